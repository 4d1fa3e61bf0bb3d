"""``septum measure``: the MRTD of real firmware, and one-line complaints about everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calling import Septum

IMAGES = ("deb12-2022.11-OVMF.fd.xz", "deb13-2025.02-OVMF.fd.xz")


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("order", "key"), [("page", "mrtd"), ("section", "mrtd_section_order")])
def test_known_answers(septum: Septum, shared: Path, image: str, order: str, key: str) -> None:
    known = json.loads((shared / "firmware/known-mrtd.json").read_text())
    expected = next(entry for entry in known if entry["file"] == image)
    answer = septum("measure", shared / "firmware" / image, "--order", order, "--json")
    assert answer.status == 0
    assert answer.json["mrtd"] == expected[key]
    assert answer.json["pages_added"] == expected["page_adds"]
    assert answer.json["bytes_measured"] == expected["mr_extends"] * 256


def test_the_three_forms_agree(septum: Septum, shared: Path) -> None:
    image = shared / "firmware" / IMAGES[1]
    mrtd = septum("measure", image, "--json").json["mrtd"]
    assert septum("measure", image, "--quiet").out == f"{mrtd}\n"
    words = septum("measure", image).out
    assert mrtd in words
    assert words.isascii()
    assert max(map(len, words.splitlines())) <= 100


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nothing.fd"], "nothing.fd"),
        (["."], "not a regular file"),
        (["empty.fd"], "empty.fd: empty"),
        (["zeros.fd"], "zeros.fd: "),
    ],
)
def test_bad_firmware(septum: Septum, args: list[str], complaint: str) -> None:
    (septum.home / "empty.fd").touch()
    (septum.home / "zeros.fd").write_bytes(bytes(1 << 16))
    assert complaint in septum("measure", *args).misuse()


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--order", "random", "page"),
        ("--memory", "lots", "such as 2G"),
        ("--memory", "4M", "more memory"),
    ],
)
def test_bad_options(septum: Septum, shared: Path, option: str, value: str, complaint: str) -> None:
    assert complaint in septum("measure", shared / "firmware" / IMAGES[1], option, value).misuse()
