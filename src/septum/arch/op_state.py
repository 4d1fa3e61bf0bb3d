"""States of a TD and of a vCPU, and which leaf functions each operation state allows.

Sources: include/auto_gen/op_state_lookup.{h,c}, common/data_structures/td_control_structures.h and tdx_tdvps.h of TDX
Module 1.5.01.
"""

from enum import IntEnum
from typing import Final

from septum.arch.leaves import GuestLeaf, HostLeaf


class OpState(IntEnum):
    """TDCS.OP_STATE: what a TD that has its keys is doing."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10


class Lifecycle(IntEnum):
    """TDR.LIFECYCLE_STATE: how far a TD is between TDH.MNG.CREATE and reclaiming its TDR."""

    HKID_ASSIGNED = 0
    KEYS_CONFIGURED = 1
    BLOCKED = 2
    TEARDOWN = 3


class VcpuState(IntEnum):
    """TDVPS.STATE."""

    UNINITIALIZED = 0x0
    READY = 0x2
    ACTIVE = 0x4
    DISABLED = 0x8
    IMPORT = 0x10


class LastExit(IntEnum):
    """TDVPS.LAST_TD_EXIT: how TDH.VP.ENTER has to resume the vCPU."""

    ASYNC_FAULT = 0
    ASYNC_TRAP = 1
    TDVMCALL = 2


class SysState(IntEnum):
    """State of the TDX Module as a whole (common/data_structures/tdx_global_data.h)."""

    SYSINIT_PENDING = 0
    SYSINIT_DONE = 1
    SYSCONFIG_DONE = 2
    READY = 3
    SHUTDOWN = 4


class KotState(IntEnum):
    """State of an HKID in the key ownership table (common/data_structures/tdx_global_data.h)."""

    HKID_FREE = 0
    HKID_ASSIGNED = 1
    HKID_FLUSHED = 2
    HKID_RESERVED = 3


_H = HostLeaf
_HOST_TABLE: Final[dict[HostLeaf, str]] = {
    # Columns: UNINITIALIZED INITIALIZED RUNNABLE, export (LIVE PAUSED POST), import (MEMORY STATE POST LIVE FAILED).
    _H.TDH_VP_ENTER: "001 100 00010",
    _H.TDH_MNG_ADDCX: "100 000 00000",
    _H.TDH_MEM_PAGE_ADD: "010 000 00000",
    _H.TDH_MEM_SEPT_ADD: "011 100 11110",
    _H.TDH_VP_ADDCX: "010 000 01000",
    _H.TDH_MEM_PAGE_RELOCATE: "011 111 00110",
    _H.TDH_MEM_PAGE_AUG: "011 100 00010",
    _H.TDH_MEM_RANGE_BLOCK: "011 111 00110",
    _H.TDH_VP_CREATE: "010 000 01000",
    _H.TDH_MNG_RD: "011 111 11111",
    _H.TDH_MEM_RD: "011 111 11111",
    _H.TDH_MNG_WR: "011 100 11111",
    _H.TDH_MEM_WR: "011 100 11111",
    _H.TDH_MEM_PAGE_DEMOTE: "011 111 00110",
    _H.TDH_MR_EXTEND: "010 000 00000",
    _H.TDH_MR_FINALIZE: "010 000 00000",
    _H.TDH_VP_FLUSH: "111 111 11111",
    _H.TDH_MNG_INIT: "100 000 00000",
    _H.TDH_VP_INIT: "010 000 00000",
    _H.TDH_MEM_PAGE_PROMOTE: "011 111 00110",
    _H.TDH_MEM_SEPT_RD: "011 111 11111",
    _H.TDH_VP_RD: "011 111 11111",
    _H.TDH_MEM_PAGE_REMOVE: "011 111 00111",
    _H.TDH_MEM_SEPT_REMOVE: "011 111 11111",
    _H.TDH_MEM_TRACK: "011 111 11110",
    _H.TDH_MEM_RANGE_UNBLOCK: "011 111 00110",
    _H.TDH_VP_WR: "011 100 11111",
    _H.TDH_SERVTD_BIND: "111 100 00110",
    _H.TDH_SERVTD_PREBIND: "110 000 00000",
    _H.TDH_EXPORT_ABORT: "000 111 00000",
    _H.TDH_EXPORT_BLOCKW: "000 100 00000",
    _H.TDH_EXPORT_RESTORE: "001 000 00000",
    _H.TDH_EXPORT_MEM: "000 111 00000",
    _H.TDH_EXPORT_PAUSE: "000 100 00000",
    _H.TDH_EXPORT_TRACK: "000 110 00000",
    _H.TDH_EXPORT_STATE_IMMUTABLE: "001 000 00010",
    _H.TDH_EXPORT_STATE_TD: "000 010 00000",
    _H.TDH_EXPORT_STATE_VP: "000 010 00000",
    _H.TDH_EXPORT_UNBLOCKW: "001 111 00000",
    _H.TDH_IMPORT_ABORT: "000 000 11101",
    _H.TDH_IMPORT_END: "000 000 00110",
    _H.TDH_IMPORT_COMMIT: "000 000 00100",
    _H.TDH_IMPORT_MEM: "000 000 11110",
    _H.TDH_IMPORT_TRACK: "000 000 11000",
    _H.TDH_IMPORT_STATE_IMMUTABLE: "100 000 00000",
    _H.TDH_IMPORT_STATE_TD: "000 000 10000",
    _H.TDH_IMPORT_STATE_VP: "000 000 01000",
    _H.TDH_MIG_STREAM_CREATE: "111 000 00000",
}
_SERVTD_TABLE: Final[dict[GuestLeaf, str]] = {
    GuestLeaf.TDG_SERVTD_RD: "111 111 11111",
    GuestLeaf.TDG_SERVTD_WR: "111 100 11111",
}


def _states_of(row: str) -> frozenset[OpState]:
    return frozenset(s for s, allowed in zip(OpState, row.replace(" ", ""), strict=True) if allowed == "1")


HOST_ALLOWED: Final[dict[int, frozenset[OpState]]] = {leaf: _states_of(row) for leaf, row in _HOST_TABLE.items()}
"""Operation states in which a host leaf accepts a TD, by leaf number. Leaves without a row do not look at OP_STATE."""
SERVTD_ALLOWED: Final[dict[int, frozenset[OpState]]] = {leaf: _states_of(row) for leaf, row in _SERVTD_TABLE.items()}
"""Operation states of the *target* TD in which a service TD's call is accepted, by guest leaf number."""
SERVTD_BIND_SERVICE_ALLOWED: Final = _states_of("001 111 00110")
"""Operation states in which the *service* TD of TDH.SERVTD.BIND may be."""


def host_allowed(leaf: HostLeaf, op_state: int) -> bool:
    """Whether a TD in this operation state accepts a host leaf (op_state_is_seamcall_allowed)."""
    return op_state in HOST_ALLOWED[leaf]


TLB_TRACKING_REQUIRED: Final = frozenset({OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT})
"""vCPUs may run, so blocking is followed by TDH.MEM.TRACK before pages are taken away."""
ANY_INITIALIZED: Final = frozenset(OpState) - {OpState.UNINITIALIZED}
ANY_FINALIZED: Final = ANY_INITIALIZED - {OpState.INITIALIZED, OpState.FAILED_IMPORT}
"""MRTD is final."""
EXPORT_IN_ORDER: Final = frozenset({OpState.LIVE_EXPORT, OpState.PAUSED_EXPORT})
IMPORT_IN_ORDER: Final = frozenset({OpState.MEMORY_IMPORT, OpState.STATE_IMPORT})
IMPORT_OUT_OF_ORDER: Final = frozenset({OpState.POST_IMPORT, OpState.LIVE_IMPORT})
IMPORT_IN_PROGRESS: Final = IMPORT_IN_ORDER | IMPORT_OUT_OF_ORDER
