"""Secure EPT entries: walks to them, their locks, what their state allows, when a translation may go away.

Source: TDX Module 1.5.01, ``src/common/helpers/helpers.{h,c}``, ``src/common/memory_handlers/sept_manager.{h,c}``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import op_state, sept
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, PageInfo, is_valid_gpa, level_index, level_size
from septum.arch.status import Status
from septum.core.steps import ctx, emit, step
from septum.core.trylocks import Mode, SeptEntryLock
from septum.tdx.call import EXCLUSIVE, SHARED
from septum.tdx.outcome import Fail, check

if TYPE_CHECKING:
    from septum.core.cells import SharedMap
    from septum.tdx.call import Call, HostCall
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td


class EntryLock(SeptEntryLock):
    """The lock in a Secure EPT entry. Its key is the entry's physical address."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"SEPT_ENTRY[{self.key:#x}]"


class SeptEntry:
    """A Secure EPT entry that a walk for ``gpa`` arrived at: its address, level, the value read last, and its lock."""

    __slots__ = ("gpa", "level", "lock", "pa", "value")

    def __init__(self, gpa: int, pa: int, level: int, value: int, lock: EntryLock) -> None:
        self.gpa = gpa
        self.pa = pa
        self.level = level
        self.value = value
        self.lock = lock

    @property
    def page(self) -> int:
        """Physical address of the page that a leaf entry maps."""
        return self.value & PAGE_MASK & -level_size(self.level)

    @property
    def table(self) -> int:
        """Physical address of the Secure EPT page that a non-leaf entry points at."""
        return self.value & PAGE_MASK


def root_level(td: Td) -> int:
    """Level of the entries in the root page: PML4 or PML5."""
    return td.tdcs.eptp >> 3 & 7


def decode_page_info(raw: int, lowest: int, highest: int, operand: Operand = Operand.RCX) -> PageInfo:
    """``verify_page_info_input``: a GPA-and-level operand."""
    info = PageInfo.decode(raw)
    check(info.is_valid(lowest, highest), Status.TDX_OPERAND_INVALID, operand)
    return info


def walk_sept(module: Module, td: Td, gpa: int, level: int) -> SeptEntry:
    """``secure_ept_walk``: towards ``level``, as far as non-leaf entries are mapped."""
    table = td.tdcs.eptp & PAGE_MASK
    at = root_level(td)
    while True:
        pa = table + 8 * level_index(gpa, at)
        value = module.sept[pa]
        if at == level or not value & sept.RWX or value & sept.PS:
            return SeptEntry(gpa, pa, at, value, EntryLock(module.sept, pa))
        table = value & PAGE_MASK
        at -= 1


async def lock_sept_and_walk(call: HostCall, td: Td, gpa: int, level: int, mode: Mode, operand: Operand) -> SeptEntry:
    """``lock_sept_check_and_walk_private_gpa``: checks the GPA, takes the tree lock, walks to exactly ``level``.

    A walk that ends early leaves the entry it met in RCX and RDX.

    :raises Fail: OPERAND_INVALID or EPT_WALK_FAILED with ``operand``, OPERAND_BUSY with SEPT_TREE.
    """
    check(is_valid_gpa(gpa, td.tdcs.gpaw, private=True), Status.TDX_OPERAND_INVALID, operand)
    await call.locks.take(td.secure_ept_lock, mode, Operand.SEPT_TREE)
    entry = walk_sept(call.module, td, gpa, level)
    if entry.level != level:
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_WALK_FAILED, operand)
    return entry


async def lock_sept_entry(call: HostCall, entry: SeptEntry, operand: Operand = Operand.RCX) -> None:
    """``sept_lock_acquire_host``, then reads the entry again. When it is busy, RCX and RDX tell what the walk read."""
    try:
        await call.locks.take(entry.lock, EXCLUSIVE, operand)
    except Fail:
        return_entry(call, entry)
        raise
    entry.value = call.module.sept[entry.pa]


async def lock_entry(
    call: HostCall, td: Td, gpa_and_level: int, lowest: int, highest: int, tree: Mode = SHARED
) -> SeptEntry:
    """The way of the TDH.MEM leaves to the entry that RCX names: checks, the tree lock, the walk, the entry's lock.

    :raises Fail: OPERAND_INVALID, EPT_WALK_FAILED or OPERAND_BUSY with RCX, OPERAND_BUSY with SEPT_TREE.
    """
    info = decode_page_info(gpa_and_level, lowest, highest)
    entry = await lock_sept_and_walk(call, td, info.gpa, info.level, tree, Operand.RCX)
    await lock_sept_entry(call, entry)
    return entry


def check_entry_allows(call: HostCall, entry: SeptEntry, operand: Operand = Operand.RCX) -> None:
    """Whether the entry's state allows this leaf; else EPT_ENTRY_STATE_INCORRECT, with the entry in RCX and RDX."""
    if entry.value & sept.STATE_MASK not in sept.HOST_ALLOWED[call.leaf]:
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_ENTRY_STATE_INCORRECT, operand)


def is_tlb_tracked(td: Td, bepoch: int) -> bool:
    """Whether no TLB can still hold what was blocked in epoch ``bepoch``."""
    epoch = td.tdcs.td_epoch
    if bepoch == epoch - 1:
        return td.tdcs.refcount[bepoch & 1] == 0
    return bepoch < epoch - 1


def check_tlb_tracked(call: HostCall, td: Td, entry: SeptEntry, bepoch: int, operand: Operand = Operand.RCX) -> None:
    """Before a translation goes away: while VCPUs may run, it must have been blocked, and tracked since.

    :raises Fail: GPA_RANGE_NOT_BLOCKED with RCX (and the entry in RCX and RDX), TLB_TRACKING_NOT_DONE with ``operand``.
    """
    if td.tdcs.op_state not in op_state.TLB_TRACKING_REQUIRED or not sept.is_tlb_tracking_required(entry.value):
        return
    if not sept.is_any_blocked(entry.value):
        return_entry(call, entry)
        raise Fail(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    check(is_tlb_tracked(td, bepoch), Status.TDX_TLB_TRACKING_NOT_DONE, operand)


async def write_entry(call: Call, entry: SeptEntry, value: int) -> None:
    """A 64-bit write of an entry. It lets go of the entry's lock, if that is held, unless the value holds it too."""
    await step("write", entry.lock)
    call.module.sept.store(entry.pa, value)
    unlocks = entry.value & ~value & sept.TDEL
    entry.value = value
    if unlocks:
        call.locks.forget(entry.lock)
    if ctx.level:
        emit("write", f"={entry.lock}", value=value)
        await step("written", entry.lock)


def return_entry(call: HostCall, entry: SeptEntry) -> None:
    """``set_arch_septe_details_in_vmm_regs``: the entry as the VMM may see it, and its level and state."""
    call.regs.rcx, call.regs.rdx = sept.arch_details(entry.value, entry.level)


def table_entries(table: int) -> range:
    """Physical addresses of the 512 entries in a Secure EPT page."""
    return range(table, table + PAGE_4K, 8)


def clear_table(entries: SharedMap[int, int], table: int) -> None:
    """Fills a Secure EPT page with free entries, whatever it held when it was last used."""
    for pa in table_entries(table):
        if pa in entries:
            entries.pop(pa)
