"""``septum status``: completion statuses in words."""

from __future__ import annotations

import pytest

from tests.cli.calling import Septum


@pytest.mark.parametrize(
    ("code", "name", "status_class", "operand", "recoverable"),
    [
        ("0x8000020000000092", "TDX_OPERAND_BUSY", "resource busy", "SEPT_TREE", True),
        ("c000030000000001", "TDX_PAGE_METADATA_INCORRECT", "page metadata", "RCX", False),
        ("0xc0000b0800000001", "TDX_TLB_TRACKING_NOT_DONE", "guest TD memory", "RCX", False),
        ("9223374235878031360", "TDX_OPERAND_BUSY", "resource busy", "RAX", True),
        ("tdx_rnd_no_entropy", "TDX_RND_NO_ENTROPY", "resource busy", None, True),
        ("0", "TDX_SUCCESS", "general", None, True),
    ],
)
def test_known_codes(
    septum: Septum, code: str, name: str, status_class: str, operand: str | None, recoverable: bool
) -> None:
    answer = septum("status", code, "--json")
    assert answer.status == 0
    record = answer.json
    assert (record["name"], record["class"]) == (name, status_class)
    assert (record["operand"], record["recoverable"]) == (operand, recoverable)


def test_words(septum: Septum) -> None:
    assert septum("status", "0x8000020000000092").out == (
        "TDX_OPERAND_BUSY (0x8000020000000092)\n"
        "class       resource busy\n"
        "about       operand SEPT_TREE\n"
        "made again  the same call may succeed\n"
    )
    assert septum("status", "0x8000020000000092", "-q").out == "TDX_OPERAND_BUSY, operand SEPT_TREE\n"


def test_a_code_that_nobody_returns_is_a_bad_answer(septum: Septum) -> None:
    answer = septum("status", "0x8000021200000000")
    assert answer.status == 1
    assert "not a status that is known" in answer.out


@pytest.mark.parametrize("code", ["TDX_NO_SUCH_THING", "0x1ffffffffffffffff", "99999999999999999999", "", "0x", "-1"])
def test_what_is_no_code(septum: Septum, code: str) -> None:
    septum("status", code).misuse()
