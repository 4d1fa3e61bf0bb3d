"""Secure-EPT entries: bits, states, what each state allows, and the form in which entries are shown to the host.

An entry is a plain 64-bit int. Its state is spread over the bits of :data:`STATE_MASK`; a :class:`SeptState` member
*is* those bits in place, so ``raw & STATE_MASK == SeptState.MAPPED`` is the whole test. States, bits and the tables of
allowed leaves are those of TDX Module 1.5.01: common/x86_defs/x86_defs.h (ia32e_sept_t), common/memory_handlers/
sept_manager.{h,c} and include/auto_gen/sept_state_lookup.{h,c}.
"""

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.pages import PAGE_MASK, Level

R: Final = 1 << 0
W: Final = 1 << 1
X: Final = 1 << 2
RWX: Final = R | W | X
MT_SHIFT: Final = 3
MT_MASK: Final = 7 << MT_SHIFT
MT_WB: Final = 6 << MT_SHIFT
"""Memory type write-back: the only type that the module gives to private pages."""
IPAT: Final = 1 << 6
PS: Final = 1 << 7
"""Leaf. In Secure EPT it is set in 4 KiB entries too."""
A: Final = 1 << 8
D: Final = 1 << 9
"""Dirty: written by the module in the exported states, never by the CPU."""
TDEL: Final = 1 << 11
"""Entry lock."""
TDHP: Final = 1 << 52
"""Host priority: a host function found the entry locked. Guest functions give way until a host function locks it."""
TDEX: Final = 1 << 53
"""Exported."""
TDBW: Final = 1 << 54
"""Blocked for writing."""
TDB: Final = 1 << 55
"""Blocked."""
TDP: Final = 1 << 56
"""Pending: added by the host, not yet accepted by the guest."""
TDAL_SHIFT: Final = 58
TDAL_MASK: Final = 7 << TDAL_SHIFT
"""Bit ``58 + n - 1``: L2 VM n has an alias of this leaf entry."""
SVE: Final = 1 << 63
"""Suppress #VE: an EPT violation here goes to the host, not to the guest."""

HPA_MASK: Final = PAGE_MASK
ACCEPT_COUNTER_SHIFT: Final = 12
ACCEPT_COUNTER_MASK: Final = 0x1FF << ACCEPT_COUNTER_SHIFT
"""In a pending 2 MiB entry: how many 4 KiB chunks an interrupted TDG.MEM.PAGE.ACCEPT has initialised."""
MIG_EPOCH_SHIFT: Final = 12
MIG_EPOCH_VALID: Final = 1 << 44
"""In a removed entry, bits 43:12 hold the migration epoch if this bit is set."""

STATE_MASK: Final = D | IPAT | PS | TDEX | TDBW | TDB | TDP
"""The bits that encode the state."""


def _bits(encoding: int) -> int:
    """Spread the module's compact encoding of a state (PS IPAT TDP TDB TDBW TDEX D, bit 6 to bit 0) over an entry."""
    return (encoding & 1) << 9 | (encoding >> 1 & 0xF) << 53 | (encoding >> 5) << 6


class SeptState(IntEnum):
    """State of a Secure-EPT entry, in the order of the module's tables. The value is the state's bits in place.

    ``NL_`` states belong to entries that point at another table. NL_MAPPED is 0: compare, do not test for truth.
    """

    FREE = _bits(0x0E)
    REMOVED = _bits(0x0C)
    NL_MAPPED = _bits(0x00)
    NL_BLOCKED = _bits(0x08)
    MAPPED = _bits(0x60)
    BLOCKED = _bits(0x68)
    BLOCKEDW = _bits(0x64)
    EXPORTED_BLOCKEDW = _bits(0x66)
    EXPORTED_DIRTY = _bits(0x63)
    EXPORTED_DIRTY_BLOCKEDW = _bits(0x67)
    PENDING = _bits(0x70)
    PENDING_BLOCKED = _bits(0x78)
    PENDING_BLOCKEDW = _bits(0x74)
    PENDING_EXPORTED_BLOCKEDW = _bits(0x76)
    PENDING_EXPORTED_DIRTY = _bits(0x73)
    PENDING_EXPORTED_DIRTY_BLOCKEDW = _bits(0x77)


_S = SeptState
_BY_BITS: Final[dict[int, SeptState]] = {state.value: state for state in SeptState}

FREE_ENTRY: Final = _S.FREE | SVE
"""A free entry, as whole Secure-EPT pages are filled with."""


def state(raw: int) -> SeptState:
    """The state of an entry. Raises ValueError for bits that no state has, which the module never writes."""
    try:
        return _BY_BITS[raw & STATE_MASK]
    except KeyError:
        raise ValueError(f"Secure-EPT entry {raw:#x} is in no state that the module knows") from None


# What the host is told -----------------------------------------------------------------------------------------------

ARCH_STATE: Final[dict[int, int]] = {
    _S.FREE: 0,
    _S.BLOCKED: 1,
    _S.PENDING: 2,
    _S.PENDING_BLOCKED: 3,
    _S.MAPPED: 4,
    _S.REMOVED: 5,
    _S.BLOCKEDW: 8,
    _S.EXPORTED_BLOCKEDW: 9,
    _S.EXPORTED_DIRTY: 11,
    _S.EXPORTED_DIRTY_BLOCKEDW: 12,
    _S.PENDING_BLOCKEDW: 16,
    _S.PENDING_EXPORTED_BLOCKEDW: 17,
    _S.PENDING_EXPORTED_DIRTY: 19,
    _S.PENDING_EXPORTED_DIRTY_BLOCKEDW: 20,
    _S.NL_BLOCKED: 0x81,
    _S.NL_MAPPED: 0x84,
}
"""State number in bits 15:8 of RDX, by state. Bit 7 of the number says non-leaf, bit 6 an entry of an L2 VM."""

_BY_ARCH_STATE: Final[dict[int, SeptState]] = {number: SeptState(bits) for bits, number in ARCH_STATE.items()}

ARCH_LEAF_MASK: Final = RWX | MT_MASK | HPA_MASK | IPAT | PS | SVE
ARCH_NON_LEAF_MASK: Final = RWX | PS
"""Bits of an entry shown to the host. For non-leaf entries the table's address is not among them."""


def arch_state_name(number: int) -> str:
    """The name of an architectural state number; ``state N`` when there is none."""
    found = _BY_ARCH_STATE.get(number)
    return found.name if found is not None else f"state {number}"


def arch_entry(raw: int) -> int:
    """The entry as the host sees it in RCX. A free entry reads as SVE alone.

    In a pending 2 MiB entry the accept counter shows through in bits 20:12: the module clears it in another copy
    (set_arch_septe_details_in_vmm_regs).
    """
    if raw & STATE_MASK == _S.FREE:
        return SVE
    return raw & (ARCH_LEAF_MASK if raw & PS else ARCH_NON_LEAF_MASK)


def arch_info(raw: int, level: int) -> int:
    """Level (2:0) and state (15:8) of an entry as the host sees them in RDX."""
    return ARCH_STATE[raw & STATE_MASK] << 8 | level


def arch_details(raw: int, level: int) -> tuple[int, int]:
    """RCX and RDX as the memory leaves return them (set_arch_septe_details_in_vmm_regs)."""
    return arch_entry(raw), arch_info(raw, level)


# What a state means ---------------------------------------------------------------------------------------------------

_ALL: Final = frozenset(SeptState)
_LEAF_STATES: Final = frozenset(s for s in SeptState if s & PS)
_EXPORTED_CLEAN: Final = frozenset({_S.EXPORTED_BLOCKEDW, _S.PENDING_EXPORTED_BLOCKEDW})
_ANY_PENDING: Final = frozenset(s for s in _LEAF_STATES if s & TDP)
_ANY_BLOCKED: Final = frozenset({_S.NL_BLOCKED, _S.BLOCKED, _S.PENDING_BLOCKED})


def _among(states: Iterable[SeptState], meaning: str) -> Callable[[int], bool]:
    """A test on raw entries for membership in a set of states."""
    bits = frozenset(int(s) for s in states)

    def test(raw: int) -> bool:
        return raw & STATE_MASK in bits

    test.__doc__ = meaning
    return test


is_any_blocked = _among(_ANY_BLOCKED, "Blocked by TDH.MEM.RANGE.BLOCK, leaf or not, pending or not.")
is_any_blockedw = _among((s for s in _LEAF_STATES if s & TDBW), "Blocked for writing by TDH.EXPORT.BLOCKW.")
is_any_pending = _among(_ANY_PENDING, "Not yet accepted by the guest.")
is_guest_acceptable = _among((_S.PENDING, _S.PENDING_EXPORTED_DIRTY), "Pending, and TDG.MEM.PAGE.ACCEPT may take it.")
is_mapped_or_pending = _among((_S.MAPPED, _S.PENDING), "MAPPED or PENDING.")
is_guest_accessible_leaf = _among(_LEAF_STATES - _ANY_PENDING - _ANY_BLOCKED, "The guest can read through the entry.")
is_any_exported = _among((s for s in _LEAF_STATES if s & TDEX), "Exported at least once.")
is_exported_dirty = _among((s for s in _LEAF_STATES if s & D), "Exported, and written since.")
is_exported_clean = _among(_EXPORTED_CLEAN, "Exported, and not written since.")
is_tlb_tracking_required = _among(
    _ALL - {_S.FREE, _S.REMOVED} - _EXPORTED_CLEAN, "Translations through the entry may be cached in TLBs."
)


def is_free(raw: int) -> bool:
    """The entry maps nothing."""
    return raw & STATE_MASK == _S.FREE


def is_mapped(raw: int) -> bool:
    """MAPPED, whatever the dirty bit."""
    return raw & (STATE_MASK & ~D) == _S.MAPPED


def is_pending(raw: int) -> bool:
    """Exactly PENDING."""
    return raw & STATE_MASK == _S.PENDING


def is_blocked(raw: int) -> bool:
    """A blocked leaf: BLOCKED or PENDING_BLOCKED."""
    return raw & (STATE_MASK & ~TDP) == _S.BLOCKED


def is_leaf(raw: int) -> bool:
    """The entry maps a page. Meaningful for entries that are neither free nor removed."""
    return raw & PS != 0


def is_present(raw: int) -> bool:
    """Some access is allowed, so that a walk goes on through the entry."""
    return raw & RWX != 0


def is_locked(raw: int) -> bool:
    """The entry lock is held."""
    return raw & TDEL != 0


def is_aliased(raw: int, vm: int) -> bool:
    """L2 VM ``vm`` (1 to 3) has an alias of this entry."""
    return raw >> TDAL_SHIFT + vm - 1 & 1 == 1


def is_any_aliased(raw: int) -> bool:
    """Some L2 VM has an alias of this entry."""
    return raw & TDAL_MASK != 0


# Which leaf functions each state allows -------------------------------------------------------------------------------

_HOST_TABLE: Final[dict[HostLeaf, str]] = {
    # One column per state in the order of SeptState: FREE REMOVED, NL_ (2), plain (6 from MAPPED), PENDING (6).
    HostLeaf.TDH_MEM_PAGE_ADD: "10 00 000000 000000",
    HostLeaf.TDH_MEM_SEPT_ADD: "10 10 000000 000000",
    HostLeaf.TDH_MEM_PAGE_RELOCATE: "00 00 111111 111111",
    HostLeaf.TDH_MEM_PAGE_AUG: "11 00 000000 000000",
    HostLeaf.TDH_MEM_RANGE_BLOCK: "00 10 101000 101000",
    HostLeaf.TDH_MEM_RD: "00 00 101111 000000",
    HostLeaf.TDH_MEM_WR: "00 00 100010 000000",
    HostLeaf.TDH_MEM_PAGE_DEMOTE: "00 00 110000 110000",
    HostLeaf.TDH_MR_EXTEND: "00 00 100000 000000",
    HostLeaf.TDH_MEM_PAGE_PROMOTE: "00 11 000000 000000",
    HostLeaf.TDH_MEM_SEPT_RD: "11 11 111111 111111",
    HostLeaf.TDH_MEM_PAGE_REMOVE: "00 00 111000 111000",
    HostLeaf.TDH_MEM_SEPT_REMOVE: "00 11 000000 000000",
    HostLeaf.TDH_MEM_RANGE_UNBLOCK: "00 01 010000 010000",
    HostLeaf.TDH_EXPORT_BLOCKW: "00 00 100010 100010",
    HostLeaf.TDH_EXPORT_RESTORE: "00 00 000111 000111",
    HostLeaf.TDH_EXPORT_MEM: "00 00 101111 101111",
    HostLeaf.TDH_EXPORT_UNBLOCKW: "00 00 001101 001101",
    HostLeaf.TDH_IMPORT_MEM: "11 00 100000 100000",
}
_GUEST_TABLE: Final[dict[GuestLeaf, str]] = {
    GuestLeaf.TDG_MEM_PAGE_ACCEPT: "00 00 000000 100010",
    GuestLeaf.TDG_MEM_PAGE_ATTR_RD: "00 00 101111 101111",
    GuestLeaf.TDG_MEM_PAGE_ATTR_WR: "00 00 100010 100010",
}


def _states_of(row: str) -> frozenset[int]:
    return frozenset(int(s) for s, allowed in zip(SeptState, row.replace(" ", ""), strict=True) if allowed == "1")


HOST_ALLOWED: Final[dict[int, frozenset[int]]] = {leaf: _states_of(row) for leaf, row in _HOST_TABLE.items()}
"""State bits in which a host leaf accepts an entry, by leaf number. Leaves without a row accept none."""
GUEST_ALLOWED: Final[dict[int, frozenset[int]]] = {leaf: _states_of(row) for leaf, row in _GUEST_TABLE.items()}
"""The same for guest leaves."""


def host_allowed(leaf: HostLeaf, raw: int) -> bool:
    """Whether the entry's state allows this host leaf (sept_state_is_seamcall_leaf_allowed)."""
    return raw & STATE_MASK in HOST_ALLOWED[leaf]


def guest_allowed(leaf: GuestLeaf, raw: int) -> bool:
    """Whether the entry's state allows this guest leaf (sept_state_is_tdcall_leaf_allowed)."""
    return raw & STATE_MASK in GUEST_ALLOWED[leaf]


# Making entries -------------------------------------------------------------------------------------------------------


def leaf_entry(pa: int, new_state: SeptState, permissions: int = 0, *, locked: bool = False) -> int:
    """A leaf entry for a page (sept_set_leaf_*). Permissions are RWX for MAPPED pages, 0 for pending ones."""
    return permissions | new_state | MT_WB | IPAT | pa & HPA_MASK | SVE | (TDEL if locked else 0)


def non_leaf_entry(pa: int, *, locked: bool = False) -> int:
    """An entry that points at the next table (sept_set_mapped_non_leaf)."""
    return RWX | _S.NL_MAPPED | pa & HPA_MASK | SVE | (TDEL if locked else 0)


def removed_entry(mig_epoch: int) -> int:
    """What a removed page leaves behind while a TD is being imported (set_remove_and_release_locks_for_import)."""
    return _S.REMOVED | SVE | MIG_EPOCH_VALID | mig_epoch << MIG_EPOCH_SHIFT


def with_state(raw: int, new_state: SeptState) -> int:
    """The entry with another state and SVE set; all other bits stay (sept_update_state)."""
    return raw & ~STATE_MASK | new_state | SVE


def without_accept_progress(raw: int, level: int) -> int:
    """The entry with the accept counter cleared, if it is an acceptable 2 MiB page (sept_cleanup_if_pending)."""
    return raw & ~ACCEPT_COUNTER_MASK if level == Level.PD and is_guest_acceptable(raw) else raw


_BLOCKED_FORM: Final[dict[int, SeptState]] = {
    _S.NL_MAPPED: _S.NL_BLOCKED,
    _S.MAPPED: _S.BLOCKED,
    _S.BLOCKEDW: _S.BLOCKED,
    _S.PENDING: _S.PENDING_BLOCKED,
    _S.PENDING_BLOCKEDW: _S.PENDING_BLOCKED,
}


def blocked(raw: int, level: int) -> int:
    """The entry after TDH.MEM.RANGE.BLOCK: no permissions, accept counter cleared (block_sept_entry).

    Raises KeyError for states that :data:`HOST_ALLOWED` does not let TDH.MEM.RANGE.BLOCK touch.
    """
    return with_state(without_accept_progress(raw, level), _BLOCKED_FORM[raw & STATE_MASK]) & ~RWX


def unblocked(raw: int) -> int:
    """The entry after TDH.MEM.RANGE.UNBLOCK; unchanged when it was not blocked (sept_unblock)."""
    match raw & STATE_MASK:
        case _S.NL_BLOCKED:
            return with_state(raw, _S.NL_MAPPED) & ~MT_MASK | RWX
        case _S.BLOCKED:
            return with_state(raw, _S.MAPPED) & ~MT_MASK | RWX | MT_WB
        case _S.PENDING_BLOCKED:
            return with_state(raw, _S.PENDING)
    return raw
