"""Operation states: which leaf a TD accepts when. Every row of the table is written here a second time, as words."""

import pytest

from septum.arch import op_state
from septum.arch.leaves import HOST_LEAF_BY_NAME, GuestLeaf, HostLeaf
from septum.arch.op_state import Lifecycle, OpState, VcpuState

EVER = {state.name for state in OpState}
INITIALIZED = EVER - {"UNINITIALIZED"}
FINAL = {state.name for state in op_state.ANY_FINALIZED}
RUNNING = {"RUNNABLE", "LIVE_EXPORT", "LIVE_IMPORT"}
EXPORTING = {"LIVE_EXPORT", "PAUSED_EXPORT", "POST_EXPORT"}
MAPPING = {"INITIALIZED", "RUNNABLE", *EXPORTING, "POST_IMPORT", "LIVE_IMPORT"}
MEM, MNG, VP, EXPORT, IMPORT = "TDH.MEM.", "TDH.MNG.", "TDH.VP.", "TDH.EXPORT.", "TDH.IMPORT."

ROWS: list[tuple[str, set[str]]] = [
    (f"{VP}ENTER", RUNNING),
    (f"{VP}FLUSH", EVER),
    (f"{VP}CREATE {VP}ADDCX", {"INITIALIZED", "STATE_IMPORT"}),
    (f"{VP}INIT {MEM}PAGE.ADD TDH.MR.EXTEND TDH.MR.FINALIZE", {"INITIALIZED"}),
    (f"{MNG}ADDCX {MNG}INIT {IMPORT}STATE.IMMUTABLE", {"UNINITIALIZED"}),
    (f"{MNG}RD {VP}RD {MEM}RD {MEM}SEPT.RD {MEM}SEPT.REMOVE", INITIALIZED),
    (f"{MNG}WR {VP}WR {MEM}WR", INITIALIZED - {"PAUSED_EXPORT", "POST_EXPORT"}),
    (f"{MEM}SEPT.ADD", INITIALIZED - {"PAUSED_EXPORT", "POST_EXPORT", "FAILED_IMPORT"}),
    (f"{MEM}PAGE.AUG", RUNNING | {"INITIALIZED"}),
    (f"{MEM}TRACK", INITIALIZED - {"FAILED_IMPORT"}),
    (f"{MEM}PAGE.RELOCATE {MEM}RANGE.BLOCK {MEM}RANGE.UNBLOCK {MEM}PAGE.DEMOTE {MEM}PAGE.PROMOTE", MAPPING),
    (f"{MEM}PAGE.REMOVE", MAPPING | {"FAILED_IMPORT"}),
    ("TDH.SERVTD.BIND", {"UNINITIALIZED", "INITIALIZED", "POST_IMPORT"} | RUNNING),
    ("TDH.SERVTD.PREBIND", {"UNINITIALIZED", "INITIALIZED"}),
    ("TDH.MIG.STREAM.CREATE", {"UNINITIALIZED", "INITIALIZED", "RUNNABLE"}),
    (f"{EXPORT}ABORT {EXPORT}MEM", EXPORTING),
    (f"{EXPORT}BLOCKW {EXPORT}PAUSE", {"LIVE_EXPORT"}),
    (f"{EXPORT}RESTORE", {"RUNNABLE"}),
    (f"{EXPORT}TRACK", {"LIVE_EXPORT", "PAUSED_EXPORT"}),
    (f"{EXPORT}STATE.IMMUTABLE", {"RUNNABLE", "LIVE_IMPORT"}),
    (f"{EXPORT}STATE.TD {EXPORT}STATE.VP", {"PAUSED_EXPORT"}),
    (f"{EXPORT}UNBLOCKW", EXPORTING | {"RUNNABLE"}),
    (f"{IMPORT}ABORT", {"MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "FAILED_IMPORT"}),
    (f"{IMPORT}END", {"POST_IMPORT", "LIVE_IMPORT"}),
    (f"{IMPORT}COMMIT", {"POST_IMPORT"}),
    (f"{IMPORT}MEM", {"MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "LIVE_IMPORT"}),
    (f"{IMPORT}TRACK", {"MEMORY_IMPORT", "STATE_IMPORT"}),
    (f"{IMPORT}STATE.TD", {"MEMORY_IMPORT"}),
    (f"{IMPORT}STATE.VP", {"STATE_IMPORT"}),
]


@pytest.mark.parametrize(("leaves", "states"), ROWS)
def test_allowed_operation_states(leaves: str, states: set[str]) -> None:
    for name in leaves.split():
        leaf = HOST_LEAF_BY_NAME[name]
        assert {state.name for state in OpState if op_state.host_allowed(leaf, state)} == states, name


def test_every_row_of_the_table_is_checked_above() -> None:
    checked = [HOST_LEAF_BY_NAME[name] for leaves, _ in ROWS for name in leaves.split()]
    assert sorted(checked) == sorted(op_state.HOST_ALLOWED)
    assert HostLeaf.TDH_MNG_VPFLUSHDONE not in op_state.HOST_ALLOWED, "it looks at the life cycle only"


def test_service_td_rows() -> None:
    assert {s.name for s in op_state.SERVTD_ALLOWED[GuestLeaf.TDG_SERVTD_RD]} == EVER
    assert {s.name for s in op_state.SERVTD_ALLOWED[GuestLeaf.TDG_SERVTD_WR]} == EVER - {"PAUSED_EXPORT", "POST_EXPORT"}
    assert {s.name for s in op_state.SERVTD_BIND_SERVICE_ALLOWED} == MAPPING - {"INITIALIZED"}


def test_flags() -> None:
    assert {s.name for s in op_state.ANY_INITIALIZED} == INITIALIZED
    assert {"INITIALIZED", "FAILED_IMPORT"} == INITIALIZED - FINAL
    assert {s.name for s in op_state.TLB_TRACKING_REQUIRED} == RUNNING
    assert {s.name for s in op_state.EXPORT_IN_ORDER} == {"LIVE_EXPORT", "PAUSED_EXPORT"}
    assert {s.name for s in op_state.IMPORT_IN_PROGRESS} == {
        "MEMORY_IMPORT",
        "STATE_IMPORT",
        "POST_IMPORT",
        "LIVE_IMPORT",
    }


def test_numbers_are_those_of_the_abi() -> None:
    assert [state.value for state in OpState] == [*range(11)]
    assert [state.value for state in Lifecycle] == [0, 1, 2, 3]
    assert [state.value for state in VcpuState] == [0, 2, 4, 8, 16]
