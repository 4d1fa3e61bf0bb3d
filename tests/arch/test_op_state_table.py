"""Operation states: which leaf a TD accepts when."""

from septum.arch import op_state
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.op_state import Lifecycle, OpState, VcpuState


def allowed(leaf: HostLeaf) -> set[str]:
    return {state.name for state in OpState if op_state.host_allowed(leaf, state)}


def test_build_leaves_need_a_td_that_is_not_final() -> None:
    for leaf in (HostLeaf.TDH_MEM_PAGE_ADD, HostLeaf.TDH_MR_EXTEND, HostLeaf.TDH_MR_FINALIZE, HostLeaf.TDH_VP_INIT):
        assert allowed(leaf) == {"INITIALIZED"}
    assert allowed(HostLeaf.TDH_MNG_INIT) == {"UNINITIALIZED"}


def test_running_and_growing() -> None:
    assert allowed(HostLeaf.TDH_VP_ENTER) == {"RUNNABLE", "LIVE_EXPORT", "LIVE_IMPORT"}
    assert allowed(HostLeaf.TDH_MEM_PAGE_AUG) == {"INITIALIZED", "RUNNABLE", "LIVE_EXPORT", "LIVE_IMPORT"}
    assert len(allowed(HostLeaf.TDH_VP_FLUSH)) == len(OpState)
    assert "FAILED_IMPORT" not in allowed(HostLeaf.TDH_MEM_TRACK)


def test_service_td_rows() -> None:
    assert OpState.PAUSED_EXPORT not in op_state.SERVTD_ALLOWED[GuestLeaf.TDG_SERVTD_WR]
    assert OpState.RUNNABLE in op_state.SERVTD_BIND_SERVICE_ALLOWED
    assert OpState.INITIALIZED not in op_state.SERVTD_BIND_SERVICE_ALLOWED


def test_flags() -> None:
    assert OpState.UNINITIALIZED not in op_state.ANY_INITIALIZED
    assert {OpState.INITIALIZED, OpState.FAILED_IMPORT} == op_state.ANY_INITIALIZED - op_state.ANY_FINALIZED
    assert {OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT} == op_state.TLB_TRACKING_REQUIRED
    assert not op_state.IMPORT_IN_PROGRESS & op_state.EXPORT_IN_ORDER


def test_every_row_belongs_to_a_leaf_and_numbers_are_those_of_the_abi() -> None:
    assert all(HostLeaf(leaf) for leaf in op_state.HOST_ALLOWED if leaf)
    assert HostLeaf.TDH_MNG_VPFLUSHDONE not in op_state.HOST_ALLOWED
    assert [state.value for state in Lifecycle] == [0, 1, 2, 3]
    assert [state.value for state in VcpuState] == [0, 2, 4, 8, 16]
