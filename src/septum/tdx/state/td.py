"""A TD: its TDR and TDCS, and the locks in them.

Only fields that interface functions act upon are attributes; the many others that the metadata interface reads and writes
live in ``Tdcs.fields``, keyed by metadata field name and element.
Source: TDX Module 1.5.01, ``src/common/data_structures/td_control_structures.h``.
"""

from __future__ import annotations

from typing import Any

from septum.core.cells import Shared, SharedMap
from septum.core.trylocks import Sharex, SharexHp


class Tdr(Shared):
    """The root page of a TD: management and key-management fields."""

    fatal: bool = False
    num_tdcx: int = 0
    chldcnt: int = 0
    lifecycle_state: int = 0
    tdcx_pa: tuple[int, ...] = ()
    td_uuid: tuple[int, int, int, int] = (0, 0, 0, 0)
    hkid: int = 0
    pkg_config_bitmap: int = 0


class Tdcs(Shared):
    """The control structure of a TD."""

    num_vcpus: int = 0
    num_assoc_vcpus: int = 0
    op_state: int = 0
    num_l2_vms: int = 0
    td_epoch: int = 0
    refcount: tuple[int, int] = (0, 0)
    attributes: int = 0
    xfam: int = 0
    max_vcpus: int = 0
    gpaw: bool = False
    eptp: int = 0
    tsc_offset: int = 0
    tsc_multiplier: int = 0
    tsc_frequency: int = 0
    notify_enables: int = 0
    td_ctls: int = 0
    vm_ctls: tuple[int, int, int, int] = (0, 0, 0, 0)
    config_flags: int = 0
    hp_lock_timeout: int = 0
    vcpu_index: int = 0
    mrtd: bytes = bytes(48)
    mrtd_hash: Any = None
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    rtmr: tuple[bytes, bytes, bytes, bytes] = (bytes(48),) * 4
    last_teeinfo_hash: bytes = bytes(48)
    last_teeinfo_hash_valid: bool = False


class Td:
    """The TD whose TDR is the page at ``pa``. There is one for every page that ever was a TDR; what it is now is state."""

    __slots__ = (
        "epoch_lock", "fields", "op_state_lock", "pa", "rtmr_lock", "secure_ept_lock", "servtd_bindings_lock", "tdcs",
        "tdr",
    )  # fmt: skip

    def __init__(self, pa: int, locks: SharedMap[Any, int]) -> None:
        self.pa = pa
        self.tdr = Tdr(f"TDR[{pa:#x}]")
        self.tdcs = Tdcs(f"TDCS[{pa:#x}]")
        self.fields: SharedMap[tuple[str, int], int] = SharedMap(f"TDCS.fields[{pa:#x}]", 0)
        self.op_state_lock = SharexHp(locks, ("op_state", pa), "OP_STATE")
        self.secure_ept_lock = Sharex(locks, ("secure_ept", pa), "SEPT_TREE")
        self.epoch_lock = Sharex(locks, ("epoch", pa), "TD_EPOCH")
        self.rtmr_lock = SharexHp(locks, ("rtmr", pa), "RTMR")
        self.servtd_bindings_lock = SharexHp(locks, ("servtd_bindings", pa), "SERVTD_BINDINGS")

    def __repr__(self) -> str:
        return f"TD[{self.pa:#x}]"
