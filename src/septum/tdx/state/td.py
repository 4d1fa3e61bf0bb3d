"""A TD: its TDR and TDCS, and the locks in them.

Fields that interface functions act upon are attributes, under the name of the metadata field in lower case: an integer,
a tuple of the field's elements, or bytes. The many others that only the metadata interface reads and writes live in
``Td.fields``, keyed by metadata field name and element.
Source: TDX Module 1.5.01, ``src/common/data_structures/td_control_structures.h``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.trylocks import Sharex, SharexHp, TryLock
from septum.tdx.state.migsc import Stream

MAX_TDCS_PAGES = 9
MAX_L2_VMS = 3
SEPT_ROOT_PAGE = 3
"""Index of the TDCX page that is the root of the Secure EPT."""
FIRST_L2_SEPT_ROOT_PAGE = 6
"""Those of L2 VMs follow from here on."""


class Tdr(Shared):
    """The root page of a TD: management and key-management fields."""

    fatal: bool = False
    num_tdcx: int = 0
    chldcnt: int = 0
    lifecycle_state: int = 0
    tdcx_pa: tuple[int, ...] = (0,) * MAX_TDCS_PAGES
    """With the TD's HKID."""
    td_uuid: tuple[int, int, int, int] = (0, 0, 0, 0)
    hkid: int = 0
    pkg_config_bitmap: int = 0
    """Packages that have the TD's key."""
    handoff_version: int = 0
    seamdb_index: int = 0


class CpuidFlags(NamedTuple):
    """Virtual CPUID bits that the module often asks for (``cpuid_flags_t``)."""

    monitor_mwait: bool = False
    dca: bool = False
    tsc_deadline: bool = False
    tsx: bool = False
    waitpkg: bool = False
    tme: bool = False
    mktme: bool = False
    xfd: bool = False
    ddpd: bool = False
    la57: bool = False


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
    """In units of 25 MHz."""
    cpuid_flags: CpuidFlags = CpuidFlags()
    cpuid_values: tuple[int, ...] = ()
    """Virtual CPUID: EBX:EAX and EDX:ECX of each entry of ``septum.arch.cpuid.cpuid_table``."""
    cpuid_valid: tuple[int, ...] = ()
    """1 for each entry of the same table that a guest's CPUID can be answered from."""
    xbuff_size: int = 0
    xbuff_offsets: tuple[int, ...] = ()
    """By XFAM bit; 0 for bits that are not set."""
    msr_bitmaps: bytes = b"\xff" * 4096
    ia32_spec_ctrl_mask: int = 0
    notify_enables: int = 0
    td_ctls: int = 0
    vm_ctls: tuple[int, int, int, int] = (0, 0, 0, 0)
    config_flags: int = 0
    hp_lock_timeout: int = 0
    """In TSC ticks."""
    mrtd: bytes = bytes(48)
    mrtd_hash: Any = None
    """The running ``septum.tdx.measurement.Sha384`` that becomes MRTD."""
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    rtmr: tuple[bytes, ...] = (bytes(48),) * 4
    last_teeinfo_hash: bytes = bytes(48)
    last_teeinfo_hash_valid: bool = False
    servtd_hash: bytes = bytes(48)
    servtd_num: int = 0
    servtd_bindings_table: tuple[int, ...] = (0,) * 16
    """The one binding slot, as ``septum.tdx.servtd.Binding`` packs it."""
    mig_dec_key_set: bool = False
    """A migration TD has written MIG_DEC_KEY since the last session began."""
    export_count: int = 0
    import_count: int = 0
    mig_epoch: int = 0
    bw_epoch: int = 0
    """TD_EPOCH when a page was last blocked for writing."""
    total_mb_count: int = 0
    mig_dec_key: tuple[int, int, int, int] = (0, 0, 0, 0)
    mig_dec_working_key: tuple[int, int, int, int] = (0, 0, 0, 0)
    mig_enc_key: tuple[int, int, int, int] = (0, 0, 0, 0)
    mig_enc_working_key: tuple[int, int, int, int] = (0, 0, 0, 0)
    mig_version: int = 0
    mig_working_version: int = 0
    dirty_count: int = 0
    """Pages that were exported and may have been written since."""
    mig_count: int = 0
    """Pages that are in an exported state."""
    num_migs: int = 0
    num_migrated_vcpus: int = 0
    pre_import_uuid: tuple[int, int, int, int] = (0, 0, 0, 0)


class Td(Fixed):
    """The TD whose TDR is the page at ``pa``.

    ``Module.td`` finds the latest one for a page; what it is now is state.
    """

    __slots__ = (
        "_locks", "_streams", "epoch_lock", "fields", "mig_lock", "op_state_lock", "pa", "rtmr_lock", "secure_ept_lock",
        "servtd_bindings_lock", "tdcs", "tdr",
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
        self.mig_lock = Sharex(locks, ("mig", pa), "MIG")
        self._locks = locks
        self._streams: dict[int, Stream] = {}

    def stream(self, index: int) -> Stream:
        """Migration stream ``index``: 0 is the backward stream, forward stream n is n + 1."""
        found = self._streams.get(index)
        if found is None:
            found = self._streams[index] = Stream(self.pa, index, self._locks)
        return found

    def clear_locks(self) -> None:
        """The page that becomes the first TDCX is filled with zeros, the lock words in it too."""
        locks: tuple[TryLock, ...] = (
            self.op_state_lock,
            self.secure_ept_lock,
            self.epoch_lock,
            self.rtmr_lock,
            self.servtd_bindings_lock,
            self.mig_lock,
        )
        for lock in locks:
            lock.words.pop(lock.key, None)

    def __repr__(self) -> str:
        return f"TD[{self.pa:#x}]"
