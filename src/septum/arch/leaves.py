"""Leaf functions of the TDX Module: SEAMCALL (host side) and TDCALL (guest side) with their registers.

RAX holds the leaf number in bits 15:0 and the version in bits 23:16; bits 63:24 must be 0. For leaves that have only
version 0 the dispatchers refuse others with TDX_OPERAND_INVALID(RAX); leaves with two versions check for themselves.

Sources: include/tdx_api_defs.h, vmm_dispatcher/tdx_vmm_dispatcher.c and td_dispatcher/tdx_td_dispatcher.c of TDX Module
1.5.01. Registers are documentation; every leaf returns its completion status in RAX, which is not listed.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

from septum.arch.errors import UsageError

LEAF_MASK: Final = 0xFFFF
VERSION_SHIFT: Final = 16
VERSION_MASK: Final = 0xFF
RESERVED_MASK: Final = 0xFFFF_FFFF_FF00_0000
"""Bits of RAX that must be 0 in a call."""


class HostLeaf(IntEnum):
    """Host-side leaf functions, called with SEAMCALL.

    Number 42 (TDH.MEM.SEPT.WR) has a name in the module's header but no function behind it: 1.5.01 refuses it.
    """

    TDH_VP_ENTER = 0
    TDH_MNG_ADDCX = 1
    TDH_MEM_PAGE_ADD = 2
    TDH_MEM_SEPT_ADD = 3
    TDH_VP_ADDCX = 4
    TDH_MEM_PAGE_RELOCATE = 5
    TDH_MEM_PAGE_AUG = 6
    TDH_MEM_RANGE_BLOCK = 7
    TDH_MNG_KEY_CONFIG = 8
    TDH_MNG_CREATE = 9
    TDH_VP_CREATE = 10
    TDH_MNG_RD = 11
    TDH_MEM_RD = 12
    TDH_MNG_WR = 13
    TDH_MEM_WR = 14
    TDH_MEM_PAGE_DEMOTE = 15
    TDH_MR_EXTEND = 16
    TDH_MR_FINALIZE = 17
    TDH_VP_FLUSH = 18
    TDH_MNG_VPFLUSHDONE = 19
    TDH_MNG_KEY_FREEID = 20
    TDH_MNG_INIT = 21
    TDH_VP_INIT = 22
    TDH_MEM_PAGE_PROMOTE = 23
    TDH_PHYMEM_PAGE_RDMD = 24
    TDH_MEM_SEPT_RD = 25
    TDH_VP_RD = 26
    TDH_MNG_KEY_RECLAIMID = 27
    TDH_PHYMEM_PAGE_RECLAIM = 28
    TDH_MEM_PAGE_REMOVE = 29
    TDH_MEM_SEPT_REMOVE = 30
    TDH_SYS_KEY_CONFIG = 31
    TDH_SYS_INFO = 32
    TDH_SYS_INIT = 33
    TDH_SYS_RD = 34
    TDH_SYS_LP_INIT = 35
    TDH_SYS_TDMR_INIT = 36
    TDH_SYS_RDALL = 37
    TDH_MEM_TRACK = 38
    TDH_MEM_RANGE_UNBLOCK = 39
    TDH_PHYMEM_CACHE_WB = 40
    TDH_PHYMEM_PAGE_WBINVD = 41
    TDH_VP_WR = 43
    TDH_SYS_LP_SHUTDOWN = 44
    TDH_SYS_CONFIG = 45
    TDH_SERVTD_BIND = 48
    TDH_SERVTD_PREBIND = 49
    TDH_SYS_SHUTDOWN = 52
    TDH_SYS_UPDATE = 53
    TDH_EXPORT_ABORT = 64
    TDH_EXPORT_BLOCKW = 65
    TDH_EXPORT_RESTORE = 66
    TDH_EXPORT_MEM = 68
    TDH_EXPORT_PAUSE = 70
    TDH_EXPORT_TRACK = 71
    TDH_EXPORT_STATE_IMMUTABLE = 72
    TDH_EXPORT_STATE_TD = 73
    TDH_EXPORT_STATE_VP = 74
    TDH_EXPORT_UNBLOCKW = 75
    TDH_IMPORT_ABORT = 80
    TDH_IMPORT_END = 81
    TDH_IMPORT_COMMIT = 82
    TDH_IMPORT_MEM = 83
    TDH_IMPORT_TRACK = 84
    TDH_IMPORT_STATE_IMMUTABLE = 85
    TDH_IMPORT_STATE_TD = 86
    TDH_IMPORT_STATE_VP = 87
    TDH_MIG_STREAM_CREATE = 96

    @property
    def abi_name(self) -> str:
        """The name as the ABI specification writes it, for example ``TDH.MEM.PAGE.AUG``."""
        return self.name.replace("_", ".")


class GuestLeaf(IntEnum):
    """Guest-side leaf functions, called with TDCALL."""

    TDG_VP_VMCALL = 0
    TDG_VP_INFO = 1
    TDG_MR_RTMR_EXTEND = 2
    TDG_VP_VEINFO_GET = 3
    TDG_MR_REPORT = 4
    TDG_VP_CPUIDVE_SET = 5
    TDG_MEM_PAGE_ACCEPT = 6
    TDG_VM_RD = 7
    TDG_VM_WR = 8
    TDG_VP_RD = 9
    TDG_VP_WR = 10
    TDG_SYS_RD = 11
    TDG_SYS_RDALL = 12
    TDG_SERVTD_RD = 18
    TDG_SERVTD_WR = 20
    TDG_MR_VERIFYREPORT = 22
    TDG_MEM_PAGE_ATTR_RD = 23
    TDG_MEM_PAGE_ATTR_WR = 24
    TDG_VP_ENTER = 25
    TDG_VP_INVEPT = 26
    TDG_VP_INVVPID = 27

    @property
    def abi_name(self) -> str:
        """The name as the ABI specification writes it, for example ``TDG.MEM.PAGE.ACCEPT``."""
        return self.name.replace("_", ".")


Leaf = HostLeaf | GuestLeaf

HOST_LEAF_BY_NAME: Final[dict[str, HostLeaf]] = {leaf.abi_name: leaf for leaf in HostLeaf}
GUEST_LEAF_BY_NAME: Final[dict[str, GuestLeaf]] = {leaf.abi_name: leaf for leaf in GuestLeaf}

TWO_VERSIONS: Final[frozenset[HostLeaf]] = frozenset(
    {
        HostLeaf.TDH_MEM_PAGE_PROMOTE,
        HostLeaf.TDH_MEM_SEPT_ADD,
        HostLeaf.TDH_MEM_SEPT_REMOVE,
        HostLeaf.TDH_MNG_RD,
        HostLeaf.TDH_VP_RD,
    }
)
"""Host leaves with versions 0 and 1; on the guest's side only TDG.VM.RD has two."""

ALLOWED_BEFORE_READY: Final[frozenset[HostLeaf]] = frozenset(
    {
        HostLeaf.TDH_SYS_INFO,
        HostLeaf.TDH_SYS_RD,
        HostLeaf.TDH_SYS_RDALL,
        HostLeaf.TDH_SYS_INIT,
        HostLeaf.TDH_SYS_LP_INIT,
        HostLeaf.TDH_SYS_CONFIG,
        HostLeaf.TDH_SYS_KEY_CONFIG,
        HostLeaf.TDH_SYS_LP_SHUTDOWN,
        HostLeaf.TDH_SYS_UPDATE,
    }
)
"""Leaves that the dispatcher lets through while the module is not ready; others get TDX_SYS_NOT_READY."""


def max_version(leaf: Leaf) -> int:
    """The highest version of a leaf that module 1.5.01 accepts."""
    return int(leaf is GuestLeaf.TDG_VM_RD or (isinstance(leaf, HostLeaf) and leaf in TWO_VERSIONS))


def host_leaf(text: str) -> HostLeaf:
    """Find a host leaf by any spelling of its name: ``TDH.MEM.PAGE.AUG``, ``tdh_mem_page_aug``, ``MEM.PAGE.AUG``.

    Raises UsageError when there is no such leaf.
    """
    wanted = text.strip().upper().replace("_", ".")
    for candidate in (wanted, f"TDH.{wanted}"):
        if candidate in HOST_LEAF_BY_NAME:
            return HOST_LEAF_BY_NAME[candidate]
    raise UsageError(f"{text!r} is no host-side TDX function; give a name like TDH.MEM.PAGE.AUG")


def guest_leaf(text: str) -> GuestLeaf:
    """Find a guest leaf by any spelling of its name: ``TDG.MEM.PAGE.ACCEPT``, ``tdg_mem_page_accept``.

    Raises UsageError when there is no such leaf.
    """
    wanted = text.strip().upper().replace("_", ".")
    for candidate in (wanted, f"TDG.{wanted}"):
        if candidate in GUEST_LEAF_BY_NAME:
            return GUEST_LEAF_BY_NAME[candidate]
    raise UsageError(f"{text!r} is no guest-side TDX function; give a name like TDG.MEM.PAGE.ACCEPT")


def leaf_name(number: int, *, guest: bool = False) -> str:
    """The ABI name of a leaf number, or ``leaf N`` when the module has no such leaf."""
    try:
        return (GuestLeaf(number) if guest else HostLeaf(number)).abi_name
    except ValueError:
        return f"leaf {number}"


@dataclass(frozen=True, slots=True)
class Registers:
    """What a leaf reads and writes: register name to meaning, in the order of the specification."""

    inputs: dict[str, str]
    outputs: dict[str, str]


@lru_cache(maxsize=None, typed=True)  # host and guest leaves share numbers
def registers(leaf: Leaf) -> Registers:
    """The registers of a leaf, for documentation and reports."""
    from septum.arch.leaf_registers import GUEST_REGISTERS, HOST_REGISTERS  # noqa: PLC0415 - few runs need the table

    text = HOST_REGISTERS[leaf] if isinstance(leaf, HostLeaf) else GUEST_REGISTERS[leaf]
    inputs, outputs = (
        {
            register.strip(): meaning.strip()
            for register, _, meaning in (item.partition(":") for item in half.split(";") if item.strip())
        }
        for half in text.split("->")
    )
    return Registers(inputs, outputs)
