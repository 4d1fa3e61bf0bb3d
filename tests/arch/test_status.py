"""Completion statuses: known codes, and what the details of a status say."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import status
from septum.arch.errors import UsageError
from septum.arch.operands import Operand, operand_name
from septum.arch.status import SeamcallFailure, Status, decode


@pytest.mark.parametrize(
    ("code", "name", "operand", "detail"),
    [
        (0x8000020000000092, "TDX_OPERAND_BUSY", "SEPT_TREE", "operand SEPT_TREE"),
        (0xC000010000000000, "TDX_OPERAND_INVALID", "RAX", "operand RAX"),
        (0xC0000B0800000001, "TDX_TLB_TRACKING_NOT_DONE", "RCX", "operand RCX"),
        (0x30, "TDX_SUCCESS", None, "exit reason 48 EPT_VIOLATION"),
        (0x0, "TDX_SUCCESS", None, None),
        (0x4D, "TDX_SUCCESS", None, "exit reason 77 TDCALL"),
        (0x6000000280000021, "TDX_NON_RECOVERABLE_TD", None, "exit reason 33 FAILED_VMENTER_GS, VM entry failed"),
        (0xC000092100000122, "TDX_INCORRECT_MSR_VALUE", None, "MSR 0x122"),
        (0xC0000B0F00010003, "TDX_L2_SEPT_WALK_FAILED", None, "VM 1, level 3"),
        (0xC0000A1200020100, "TDX_PAMT_OVERLAP", None, "TDMR 0, PAMT level 1, other TDMR 2"),
        (0xC000060800000000, "TDX_OP_STATE_INCORRECT", None, None),
        (0x9000020500000000, "TDX_HOST_PRIORITY_BUSY_TIMEOUT", None, "exit reason 0 EXCEPTION_OR_NMI"),
        (0x8000FF000000000D, "TDX_SEAMCALL_GP", None, None),
        (0x8000FF0000000006, "TDX_SEAMCALL_UD", None, None),
        (0x8000FF00FFFF0000, "TDX_SEAMCALL_VMFAILINVALID", None, None),
    ],
)
def test_known_answers(code: int, name: str, operand: str | None, detail: str | None) -> None:
    decoded = decode(code)
    assert (decoded.name, decoded.operand, decoded.detail_text) == (name, operand, detail)
    assert decoded.known


def test_flags_of_a_lost_td_do_not_include_error() -> None:
    decoded = decode(Status.TDX_NON_RECOVERABLE_TD)
    assert (decoded.error, decoded.recoverable, decoded.fatal) == (False, False, True)
    decoded = decode(Status.TDX_OPERAND_BUSY)
    assert (decoded.error, decoded.recoverable, decoded.fatal) == (True, True, False)


def test_fatal_bit_added_by_the_module_keeps_the_name() -> None:
    decoded = decode(Status.TDX_INVALID_MBMD | status.FATAL)
    assert decoded.name == "TDX_INVALID_MBMD"
    assert decoded.fatal
    assert decoded.known


def test_busy_test_is_blind_to_the_operand_but_not_to_the_kind_of_busy() -> None:
    assert status.is_busy(status.with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE))
    assert not status.is_busy(Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    assert not status.is_busy(Status.TDX_OPERAND_BUSY_HOST_PRIORITY)


def test_codes_are_unique_and_names_find_them() -> None:
    assert len({member.value for member in Status}) == len(Status.__members__) == 165
    assert all(member & status.DETAILS == 0 for member in Status)
    for member in (*Status, *SeamcallFailure):
        assert status.code_by_name(member.name) == member
        assert status.name(member) == member.name
    assert status.code_by_name("operand_busy") == Status.TDX_OPERAND_BUSY


@pytest.mark.parametrize("wrong", [-1, 1 << 64])
def test_numbers_beyond_64_bits_are_misuse(wrong: int) -> None:
    with pytest.raises(UsageError, match="at most 64 bits"):
        decode(wrong)


def test_unknown_name_is_misuse() -> None:
    with pytest.raises(UsageError, match="no TDX completion status"):
        status.code_by_name("TDX_NO_SUCH_THING")


@given(st.sampled_from([*Status]), st.integers(0, status.DETAILS))
def test_details_never_change_code_or_name(code: Status, details: int) -> None:
    whole = status.with_operand(code, details)
    assert status.base(whole) == code
    assert status.name(whole) == code.name
    assert decode(whole).details == details


@given(st.integers(0, (1 << 64) - 1))
def test_every_64_bit_number_decodes(code: int) -> None:
    decoded = decode(code)
    assert decoded.error == (code >= status.ERROR)
    assert decoded.known or decoded.name.startswith("0x")


def test_statuses_of_recorded_calls_have_the_recorded_names(shared: Path) -> None:
    recording = shared / "vectors" / "dev" / "errors.jsonl.gz"
    seen = 0
    with gzip.open(recording, "rt") as lines:
        for line in lines:
            event = json.loads(line)
            text = event.get("status", "")
            if event["op"] != "seamcall" or not text.startswith("TDX_") or "rax" not in event["out"]:
                continue
            decoded = decode(int(event["out"]["rax"], 16))
            assert text.startswith(decoded.name), text
            if text.endswith(")") and decoded.operand:
                assert text.endswith(f"({decoded.operand})")
            seen += 1
    assert seen > 1000


def test_operand_ids() -> None:
    assert operand_name(146) == "SEPT_TREE"
    assert operand_name(4) is None
    assert int(Operand.R8) == 8
