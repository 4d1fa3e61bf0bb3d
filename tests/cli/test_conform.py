"""``septum conform``: its answer in every form, and files that are no vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calling import Septum

FEW = "vectors/dev/poweron.jsonl.gz"


def test_the_forms_agree(septum: Septum, shared: Path) -> None:
    answer = septum("conform", shared / FEW, "--json", "--keep", "3")
    record = answer.json
    assert answer.status == (0 if record["events"] == record["passed"] else 1)
    assert sum(tally["events"] for tally in record["by_leaf"].values()) == record["events"] > 0
    assert sum(tally["passed"] for tally in record["by_leaf"].values()) == record["passed"]
    assert len(record["differences"]) <= 3
    brief = f"{record['passed']:,} of {record['events']:,} events agree\n"
    assert septum("conform", shared / FEW, "-q").out == brief
    words = septum("conform", shared / FEW).out
    assert words.endswith(brief)
    assert "TDH.SYS.INIT" in words


@pytest.mark.parametrize(
    ("args", "complaint"), [([], "missing argument"), (["none.jsonl"], "none.jsonl"), (["."], ".")]
)
def test_misuse(septum: Septum, args: list[str], complaint: str) -> None:
    assert complaint in septum("conform", *args).misuse()


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x1f\x8b broken", b"[1, 2", b"\xff\xfe"])
def test_what_is_no_file_of_vectors(septum: Septum, content: bytes) -> None:
    (septum.home / "file.jsonl").write_bytes(content)
    assert "file.jsonl" in septum("conform", "file.jsonl").misuse()
