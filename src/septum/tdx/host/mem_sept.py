"""TDH.MEM.SEPT.ADD, RD and REMOVE: the pages of a TD's Secure EPT, and those of its L2 virtual machines.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mem_sept_{add,rd,remove}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import sept, sept_l2
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_MASK, Level
from septum.arch.pamt import PageType
from septum.arch.sept import SeptState
from septum.arch.sept_l2 import L2State
from septum.arch.status import Status
from septum.tdx import sept_l2 as l2
from septum.tdx.call import (
    EXCLUSIVE,
    PAGE_NOT_USED,
    HostCall,
    LockedPage,
    add_children,
    decode_tdr_and_flag,
    lock_free_page,
    lock_owned_page,
    lock_td,
    page_of,
    set_page_type,
)
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import (
    SeptEntry,
    check_entry_allows,
    check_tlb_tracked,
    clear_table,
    lock_entry,
    return_entry,
    root_level,
    table_entries,
    write_entry,
)

if TYPE_CHECKING:
    from septum.tdx.host import Handler

L2_REGISTERS = ("r9", "r10", "r11")


async def tdh_mem_sept_add(call: HostCall) -> int:
    """TDH.MEM.SEPT.ADD: adds a page to the Secure EPT; in version 1 also to those of L2 VMs.

    RCX: GPA and level of the entry that is to point at it. RDX: TDR; bit 0: pages that exist already are no error.
    R8: the page. Version 1: R9 to R11 pages for L2 VMs, all ones for none; on return, all ones for a page that was
    used, bit 63 set for one that was not. With an interrupt pending, the call ends in between and can be made again
    with these.
    """
    regs = call.regs
    operands = regs.rcx, regs.rdx
    tables = [regs.r8, *((regs.r9, regs.r10, regs.r11) if call.version else (0, 0, 0))]
    regs.rcx = regs.rdx = 0
    check(call.version <= 1, Status.TDX_OPERAND_INVALID, Operand.RAX)
    tables = [pa if pa == NULL_PA else pa & ~PAGE_NOT_USED for pa in tables]
    try:
        return await _add(call, operands, tables)
    finally:
        if call.version:
            regs.r8, regs.r9, regs.r10, regs.r11 = tables


async def _add(call: HostCall, operands: tuple[int, int], tables: list[int]) -> int:
    """Adds the pages in ``tables`` (by VM) and marks there what became of each."""
    tdr_pa, allow_existing = decode_tdr_and_flag(operands[1])
    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, operands[0], Level.PD, root_level(td))
    check_entry_allows(call, entry)
    new: dict[int, LockedPage] = {}
    if tables[0] == NULL_PA:
        check(call.version, Status.TDX_OPERAND_INVALID, Operand.R8)
        _check_state(call, entry, SeptState.NL_MAPPED)
    elif not allow_existing or sept.is_free(entry.value):
        _check_state(call, entry, SeptState.FREE)
        new[0] = await lock_free_page(call, tables[0], Operand.R8)
        call.locks.first_out = (entry.lock,)
    else:
        tables[0] |= PAGE_NOT_USED
    l2_entries: dict[int, l2.L2Entry] = {}
    for vm in range(1, l2.MAX_VMS) if call.version else ():
        if tables[vm] == NULL_PA:
            continue
        check(vm <= td.tdcs.num_l2_vms, Status.TDX_OPERAND_INVALID, Operand.R8 + vm)
        l2_entries[vm] = l2.walk_to(call, td, vm, entry)
        if sept_l2.state(l2_entries[vm].value) == L2State.FREE:
            new[vm] = await lock_free_page(call, tables[vm], Operand.R8 + vm)
            call.locks.first_out = (entry.lock,)
        elif allow_existing:
            tables[vm] |= PAGE_NOT_USED
        else:
            raise l2.failure(call, td, Status.TDX_L2_SEPT_ENTRY_NOT_FREE, l2_entries[vm])

    for i, (vm, page) in enumerate(new.items()):
        if i and call.module.hardware.interrupt_pending(call.lp.index):
            call.regs.rcx, call.regs.rdx = operands
            raise Fail(Status.TDX_INTERRUPTED_RESUMABLE)
        clear_table(call.module.sept_l2 if vm else call.module.sept, page.pa)
        call.module.pamt[page.key] = page_of(td.pa, PageType.EPT)
        await add_children(td, 1)
        if vm:
            await write_entry(call, entry, l2.with_alias(call.module.sept[entry.pa], vm))
            await l2.write(call, l2_entries[vm], sept_l2.non_leaf_entry(page.pa))
        else:
            await write_entry(call, entry, sept.non_leaf_entry(page.pa, locked=True))
        tables[vm] = NULL_PA
    return Status.TDX_SUCCESS


def _check_state(call: HostCall, entry: SeptEntry, state: SeptState) -> None:
    if entry.value & sept.STATE_MASK != state:
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


async def tdh_mem_sept_rd(call: HostCall) -> int:
    """TDH.MEM.SEPT.RD: returns an entry in RCX and its level and state in RDX, as the host may see them.

    RCX: GPA and level. RDX: TDR; bit 0: return in R8 also the attributes of the page in L2 VMs (debuggable TDs only).
    """
    regs = call.regs
    gpa_and_level, tdr_pa, with_l2 = regs.rcx, regs.rdx & ~1, regs.rdx & 1
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    check(not with_l2 or td.tdcs.attributes & 1, Status.TDX_OPERAND_INVALID, Operand.RDX)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, root_level(td))
    if with_l2:
        regs.r8 = l2.attributes_of_aliases(call, td, entry)
    return_entry(call, entry)
    return Status.TDX_SUCCESS


async def tdh_mem_sept_remove(call: HostCall) -> int:
    """TDH.MEM.SEPT.REMOVE: takes a page whose 512 entries are free out of the Secure EPT; returns it in RCX.

    RCX: GPA and level of the entry that points at it. RDX: TDR. Pages of L2 VMs at the same place go too: version 1
    returns them in R9 to R11, all ones for none. While VCPUs may run, the page must be blocked and TLBs tracked.
    """
    module, regs = call.module, call.regs
    gpa_and_level, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    if call.version:
        regs.r9 = regs.r10 = regs.r11 = NULL_PA
    check(call.version <= 1, Status.TDX_OPERAND_INVALID, Operand.RAX)

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PD, root_level(td), EXCLUSIVE)
    check_entry_allows(call, entry)
    table, value = entry.table, entry.value
    key, owned = await lock_owned_page(call, table, Level.PT)
    check_tlb_tracked(call, td, entry, owned.bepoch)
    if not all(sept.is_free(module.sept[pa]) for pa in table_entries(table)):
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_PAGE_NOT_FREE, Operand.RCX)
    l2_tables = []
    for alias in l2.aliases(call, td, entry, value):
        l2.check_has_table(alias)
        l2_key, _ = await lock_owned_page(call, alias.value & PAGE_MASK, Level.PT)
        l2_tables.append((alias, l2_key))

    for alias, l2_key in reversed(l2_tables):
        await l2.write(call, alias, L2State.FREE)
        await add_children(td, -1)
        set_page_type(call, l2_key, PageType.NDA)
        if call.version:
            setattr(regs, L2_REGISTERS[alias.vm - 1], alias.value & PAGE_MASK)
    await write_entry(call, entry, sept.FREE_ENTRY)
    await add_children(td, -1)
    set_page_type(call, key, PageType.NDA)
    regs.rcx = table
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MEM_SEPT_ADD: tdh_mem_sept_add,
    HostLeaf.TDH_MEM_SEPT_RD: tdh_mem_sept_rd,
    HostLeaf.TDH_MEM_SEPT_REMOVE: tdh_mem_sept_remove,
}
