"""Secure-EPT entries of L2 virtual machines inside a TD (TD partitioning).

They have fewer states than those of the TD itself, no lock of their own, and keep the permissions of a blocked page in
other bits until it is unblocked. Source: common/x86_defs/x86_defs.h (ia32e_sept_t.l2_encoding),
common/memory_handlers/sept_manager.{h,c} and api_calls/tdh_mem_range_block.c of TDX Module 1.5.01.
"""

from enum import IntEnum
from typing import Final

from septum.arch.sept import HPA_MASK, IPAT, MT_MASK, MT_WB, PS, SVE, TDB, R, W, X

XU: Final = 1 << 10
"""Execute in user mode; bit 2 is execute in supervisor mode here."""
VGP: Final = 1 << 57
PWA: Final = 1 << 58
TDWR: Final = 1 << 59
"""Saved W of a blocked page. Saved R, X and XU lie where the memory type is otherwise: bits 3, 4 and 5."""
SSS: Final = 1 << 60
PERMISSIONS: Final = R | W | X | XU

_SAVED: Final = ((R, 1 << 3), (W, TDWR), (X, 1 << 4), (XU, 1 << 5))

STATE_MASK: Final = R | IPAT | PS | TDB
_LEAF_STATE_MASK: Final = STATE_MASK & ~R
"""In leaf states R is a permission, no part of the state."""


class L2State(IntEnum):
    """State of an L2 entry; the value is the state's bits in place. FREE is 0: compare, do not test for truth."""

    FREE = 0
    NL_MAPPED = R
    NL_BLOCKED = TDB
    MAPPED = IPAT | PS
    BLOCKED = IPAT | PS | TDB


ARCH_STATE: Final[dict[int, int]] = {
    L2State.FREE: 0x40,
    L2State.BLOCKED: 0x41,
    L2State.MAPPED: 0x44,
    L2State.NL_BLOCKED: 0xC1,
    L2State.NL_MAPPED: 0xC4,
}
"""State number in bits 15:8 of RDX, by state."""

ARCH_LEAF_MASK: Final = MT_MASK | HPA_MASK | IPAT | PS | SVE
ARCH_LEAF_DEBUG_MASK: Final = ARCH_LEAF_MASK | PERMISSIONS | VGP | PWA | SSS
ARCH_NON_LEAF_MASK: Final = PERMISSIONS | PS


def state(raw: int) -> L2State:
    """The state of an entry. Raises ValueError for bits that no state has, which the module never writes."""
    mask = _LEAF_STATE_MASK if raw & PS else STATE_MASK
    return L2State(raw & mask)


def arch_details(raw: int, level: int, vm: int, *, debug: bool) -> tuple[int, int]:
    """RCX and RDX as the memory leaves return them for an L2 entry (set_arch_l2_septe_details_in_vmm_regs).

    Only of a debuggable TD does the host see the real permissions; else a mapped page looks fully accessible. A mapped
    page that L2 may read shows state 0: the module looks its number up with R still among the bits, and finds none.
    """
    current = state(raw)
    info = vm << 16 | ARCH_STATE.get(raw & STATE_MASK, 0) << 8 | level
    match current:
        case L2State.FREE:
            return SVE, info
        case L2State.NL_MAPPED | L2State.NL_BLOCKED:
            return raw & ARCH_NON_LEAF_MASK, info
    if debug:
        return raw & ARCH_LEAF_DEBUG_MASK, info
    return raw & ARCH_LEAF_MASK | (PERMISSIONS if current == L2State.MAPPED else 0), info


def non_leaf_entry(pa: int) -> int:
    """An entry that points at the next table (sept_l2_set_mapped_non_leaf)."""
    return PERMISSIONS | pa & HPA_MASK


def leaf_entry(pa: int, attributes: int, *, blocked: bool = False) -> int:
    """A leaf entry with attributes among the permissions, VGP, PWA, SSS and SVE (sept_l2_set_leaf)."""
    entry = attributes | pa & HPA_MASK | MT_WB | L2State.MAPPED
    return block(entry) if blocked else entry


def block(raw: int, *, blocked_for_writing: bool = False) -> int:
    """The entry after blocking: permissions saved if it is a leaf, then cleared.

    ``blocked_for_writing`` says that the TD's own entry was blocked for writing before; then W is saved already.
    """
    if not raw & PS:
        return raw & ~(STATE_MASK | PERMISSIONS) | L2State.NL_BLOCKED
    for permission, saved in _SAVED:
        if permission == W and blocked_for_writing:
            continue
        raw = raw | saved if raw & permission else raw & ~saved
    return raw & ~PERMISSIONS | TDB


def unblock(raw: int) -> int:
    """The entry after unblocking, permissions restored; unchanged when it was not blocked (sept_l2_unblock)."""
    match state(raw):
        case L2State.NL_BLOCKED:
            return raw & ~(TDB | MT_MASK | TDWR) | PERMISSIONS
        case L2State.BLOCKED:
            restored = sum(permission for permission, saved in _SAVED if raw & saved)
            return raw & ~(TDB | MT_MASK | TDWR | PERMISSIONS) | MT_WB | restored
    return raw
