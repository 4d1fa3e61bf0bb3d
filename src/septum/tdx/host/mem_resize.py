"""TDH.MEM.PAGE.DEMOTE and PROMOTE: one large mapping into 512 smaller ones, and back.

Contents of pages stay where they are. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/api_calls/tdh_mem_page_{demote,promote}.c``, ``pamt_demote`` and ``pamt_promote`` in
``src/common/memory_handlers/pamt_manager.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import sept, sept_l2
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_MASK, Level, level_size
from septum.arch.pamt import PageType
from septum.arch.sept_l2 import L2State
from septum.arch.status import Status
from septum.tdx import sept_l2 as l2
from septum.tdx.call import (
    EXCLUSIVE,
    PAGE_NOT_USED,
    HostCall,
    LockedPage,
    PamtLock,
    add_children,
    check_no_interrupt,
    decode_tdr_and_flag,
    lock_free_page,
    lock_owned_page,
    lock_td,
    owned_entry,
    page_of,
    set_page_type,
)
from septum.tdx.held import HeldLocks
from septum.tdx.outcome import Fail, check, sanity
from septum.tdx.secure_ept import (
    EntryLock,
    SeptEntry,
    check_entry_allows,
    check_tlb_tracked,
    clear_table,
    lock_entry,
    return_entry,
    table_entries,
    write_entry,
)

if TYPE_CHECKING:
    from septum.core.cells import SharedMap
    from septum.tdx.host import Handler
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td


async def tdh_mem_page_demote(call: HostCall) -> int:
    """TDH.MEM.PAGE.DEMOTE: splits a 2 MiB or 1 GiB mapping, and unblocks it.

    RCX: GPA and level. RDX: TDR; bit 0: add Secure EPT pages only for L2 VMs with an alias. R8: new Secure EPT page.
    R9 to R11: those for L2 VMs. While VCPUs may run, the page must be blocked and TLBs tracked. With an interrupt
    pending, RCX and RDX come back unchanged and the call can be made again; with ENHANCED_DEMOTE_INTERRUPTIBILITY they
    count only if there are L2 VMs (huge pages v3 for Linux, 20260106101646.24809-1-yan.y.zhao).
    """
    module, regs = call.module, call.regs
    operands = regs.rcx, regs.rdx
    tables = [regs.r8, regs.r9, regs.r10, regs.r11]
    regs.rcx = regs.rdx = 0

    tdr_pa, aliased_only = decode_tdr_and_flag(operands[1])
    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, operands[0], Level.PD, Level.PDPT)
    check_entry_allows(call, entry)
    large = entry.value = sept.without_accept_progress(entry.value, entry.level)
    page_pa = entry.page
    key, owned = owned_entry(call, page_pa, entry.level)
    check_tlb_tracked(call, td, entry, owned.bepoch)
    new = await lock_free_page(call, tables[0], Operand.R8)
    new_l2 = await _lock_l2_tables(call, td, large, tables, aliased_only=aliased_only)

    small = sept.unblocked(large) & ~sept.TDEL
    _fill_split(module.sept, tables[0], small, page_pa, entry.level)
    l2_entries = {}
    for vm, page in new_l2.items():
        check_no_interrupt(call, operands)
        alias = l2_entries[vm] = l2.walk_to(call, td, vm, entry)
        if sept.is_aliased(small, vm):
            unblocked = alias.value if sept.is_any_pending(small) else sept_l2.unblock(alias.value)
            _fill_split(module.sept_l2, page.pa, unblocked, page_pa, entry.level)
        else:
            clear_table(module.sept_l2, page.pa)
    if td.tdcs.num_l2_vms or "enhanced_demote" not in module.features:
        check_no_interrupt(call, operands)
    await _demote_pamt(call, key, page_pa, entry.level)

    await write_entry(call, entry, sept.non_leaf_entry(tables[0], locked=True))
    set_page_type(call, new.key, PageType.EPT, td)
    await add_children(td, 1)
    for vm, page in new_l2.items():
        await l2.write(call, l2_entries[vm], sept_l2.non_leaf_entry(page.pa))
        await write_entry(call, entry, l2.with_alias(module.sept[entry.pa], vm))
        set_page_type(call, page.key, PageType.EPT, td)
        await add_children(td, 1)
    regs.r9, regs.r10, regs.r11 = tables[1:]
    return Status.TDX_SUCCESS


async def _lock_l2_tables(
    call: HostCall, td: Td, large: int, tables: list[int], *, aliased_only: bool
) -> dict[int, LockedPage]:
    """Locks the Secure EPT pages given for L2 VMs, by VM; marks in ``tables`` those that are not needed.

    :raises Fail: L2_SEPT_PAGE_NOT_PROVIDED, or what :func:`lock_free_page` raises, with the register.
    """
    locked = {}
    for vm in range(1, td.tdcs.num_l2_vms + 1):
        operand, aliased = Operand.R8 + vm, sept.is_aliased(large, vm)
        if tables[vm] == NULL_PA:
            check(not aliased, Status.TDX_L2_SEPT_PAGE_NOT_PROVIDED, operand)
        elif aliased or not aliased_only:
            locked[vm] = await lock_free_page(call, tables[vm] & ~PAGE_NOT_USED, operand)
        else:
            tables[vm] |= PAGE_NOT_USED
    return locked


def _fill_split(entries: SharedMap[int, int], table: int, large: int, page_pa: int, level: int) -> None:
    """``sept_split_entry``: fills a new table with entries that differ from the large one only in the address."""
    bits, step = large & ~PAGE_MASK, level_size(level - 1)
    for i, pa in enumerate(table_entries(table)):
        entries.store(pa, bits | page_pa + i * step)


def _child_keys(page_pa: int, level: int) -> list[int]:
    """Keys of the 512 PAMT entries below one of 2 MiB or 1 GiB."""
    return [page_pa + i * level_size(level - 1) | level - 1 for i in range(512)]


async def _demote_pamt(call: HostCall, key: int, page_pa: int, level: int) -> None:
    """``pamt_demote``: the page's type and owner go to the 512 entries below.

    :raises Fail: OPERAND_BUSY with RCX.
    """
    module, lock = call.module, PamtLock(call.module.locks, key)
    sanity(module.pamt_entry(key).page_type == PageType.REG, f"{lock} is not that of a private page")
    await call.locks.take(lock, EXCLUSIVE, Operand.RCX)
    large = module.pamt_entry(key)
    small = page_of(large.owner, PageType(large.page_type))
    for child in _child_keys(page_pa, level):
        module.pamt[child] = small
    module.pamt[key] = large._replace(page_type=PageType.NDA)
    await call.locks.release(lock)


async def tdh_mem_page_promote(call: HostCall) -> int:
    """TDH.MEM.PAGE.PROMOTE: joins 512 neighbouring mappings into one of 2 MiB or 1 GiB, and unblocks it.

    RCX: GPA and level of the large mapping. RDX: TDR. Returns the Secure EPT page that is free now in RCX, and in
    version 1 those of L2 VMs in R9 to R11. With an interrupt pending, RCX and RDX come back unchanged.
    """
    module, regs = call.module, call.regs
    operands = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    if call.version:
        regs.r9 = regs.r10 = regs.r11 = NULL_PA
    check(call.version <= 1, Status.TDX_OPERAND_INVALID, Operand.RAX)

    td = await lock_td(call, operands[1])
    entry = await lock_entry(call, td, operands[0], Level.PD, Level.PDPT)
    check_entry_allows(call, entry)
    table, parent = entry.table, entry.value
    key, owned = await lock_owned_page(call, table, Level.PT)
    check_tlb_tracked(call, td, entry, owned.bepoch)

    children = HeldLocks()
    try:
        await _lock_and_check_children(call, entry, children)
        l2_entries, l2_keys = [], []
        for alias in l2.aliases(call, td, entry, parent):
            check_no_interrupt(call, operands)
            l2.check_has_table(alias)
            l2_keys.append((await lock_owned_page(call, alias.value & PAGE_MASK, Level.PT))[0])
            if not _l2_children_can_merge(module, alias):
                return_entry(call, entry)
                raise Fail(Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)
            l2_entries.append(alias)
        check_no_interrupt(call, operands)
        await _promote_pamt(call, module.sept[table] & PAGE_MASK & -level_size(entry.level - 1), entry.level)
    except Fail:
        await children.drop(oldest_first=True)
        raise

    # The first child is locked, and so is the large entry that it becomes.
    await write_entry(call, entry, module.sept[table])
    clear_table(module.sept, table)
    await add_children(td, -1)
    set_page_type(call, key, PageType.NDA)
    for alias, alias_key in zip(l2_entries, l2_keys, strict=True):
        freed = alias.value & PAGE_MASK
        await l2.write(call, alias, module.sept_l2[freed])
        clear_table(module.sept_l2, freed)
        await add_children(td, -1)
        set_page_type(call, alias_key, PageType.NDA)
        if call.version:
            setattr(regs, ("r9", "r10", "r11")[alias.vm - 1], freed)
    regs.rcx = table
    return Status.TDX_SUCCESS


async def _lock_and_check_children(call: HostCall, entry: SeptEntry, children: HeldLocks) -> None:
    """``is_sept_page_valid_for_merge``: locks the 512 entries and checks that they map one aligned range in one way.

    :raises Fail: OPERAND_BUSY or EPT_INVALID_PROMOTE_CONDITIONS with RCX, and the parent entry in RCX and RDX.
    """
    entries, step = call.module.sept, level_size(entry.level - 1)
    expected = 0
    try:
        for i, pa in enumerate(table_entries(entry.table)):
            await children.take(EntryLock(entries, pa), EXCLUSIVE, Operand.RCX)
            child = sept.without_accept_progress(entries[pa], entry.level - 1)
            if not i:
                aligned = not child & PAGE_MASK & level_size(entry.level) - 1
                ok = aligned and sept.is_mapped_or_pending(child)
                expected = child
            else:
                expected += step
                ok = child == expected
            check(ok, Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)
    except Fail:
        return_entry(call, entry)
        raise


def _l2_children_can_merge(module: Module, alias: l2.L2Entry) -> bool:
    """``is_l2_sept_page_valid_for_merge``: all 512 entries are free, or leaves that differ only in the address."""
    table = alias.value & PAGE_MASK
    first = module.sept_l2[table]
    if sept_l2.state(first) != L2State.FREE:
        start = first & PAGE_MASK & -level_size(alias.level - 1)
        if start & level_size(alias.level) - 1 or not first & sept.PS:
            return False
    return all(module.sept_l2[pa] & ~PAGE_MASK == first & ~PAGE_MASK for pa in table_entries(table))


async def _promote_pamt(call: HostCall, page_pa: int, level: int) -> None:
    """``pamt_promote``: the 512 entries below must agree in type and owner, which go up. BEPOCH keeps its old value.

    :raises Fail: OPERAND_BUSY with RCX.
    """
    module, key = call.module, page_pa | level
    lock = PamtLock(module.locks, key)
    sanity(module.pamt_entry(key).page_type == PageType.NDA, f"{lock} is in use")
    await call.locks.take(lock, EXCLUSIVE, Operand.RCX)
    large = None
    for child in _child_keys(page_pa, level):
        small = module.pamt_entry(child)
        if large is None:
            large = module.pamt_entry(key)._replace(page_type=small.page_type, owner=small.owner)
        sanity(small[:2] == large[:2], f"the pages below {lock} differ in the PAMT")
        module.pamt[child] = small._replace(page_type=PageType.NDA)
    assert large is not None
    module.pamt[key] = large
    await call.locks.release(lock)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MEM_PAGE_DEMOTE: tdh_mem_page_demote,
    HostLeaf.TDH_MEM_PAGE_PROMOTE: tdh_mem_page_promote,
}
