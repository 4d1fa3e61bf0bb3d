"""TDH.MEM.PAGE.ADD, AUG, REMOVE and RELOCATE: giving a TD private pages, taking and moving them.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mem_page_{add,aug,remove,relocate}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import sept, sept_l2
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import IMPORT_IN_PROGRESS
from septum.arch.operands import Operand
from septum.arch.pages import PA_MASK, PAGE_4K, PAGE_MASK, Level, is_valid_gpa
from septum.arch.pamt import PageType
from septum.arch.sept import SeptState, leaf_entry
from septum.arch.sept_l2 import L2State
from septum.arch.status import Status
from septum.tdx import sept_l2 as l2
from septum.tdx.call import (
    EXCLUSIVE,
    HostCall,
    add_children,
    check_shared_hpa,
    lock_free_page,
    lock_op_state,
    lock_owned_page,
    lock_td,
    lock_tdr,
    page_of,
    set_page_type,
)
from septum.tdx.measurement import page_add_record
from septum.tdx.outcome import Fail, check, sanity
from septum.tdx.secure_ept import (
    check_entry_allows,
    check_tlb_tracked,
    decode_page_info,
    lock_entry,
    return_entry,
    walk_sept,
    write_entry,
)

if TYPE_CHECKING:
    from septum.tdx.host import Handler


async def tdh_mem_page_add(call: HostCall) -> int:
    """TDH.MEM.PAGE.ADD: copies a page of the host into a new private page and maps it, before the TD runs.

    RCX: GPA and level (4 KiB). RDX: TDR. R8: the new page. R9: the page to copy. The exclusive TDR keeps all others
    out, so no lock of the Secure EPT is taken. On a walk or state error RCX and RDX tell the entry.
    """
    module, regs = call.module, call.regs
    gpa_and_level, tdr_pa, page_pa, source_pa = regs.rcx, regs.rdx, regs.r8, regs.r9
    regs.rcx = regs.rdx = 0

    td = await lock_tdr(call, tdr_pa, Operand.RDX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    info = decode_page_info(gpa_and_level, Level.PT, Level.PT)
    check(is_valid_gpa(info.gpa, td.tdcs.gpaw, private=True), Status.TDX_OPERAND_INVALID, Operand.RCX)
    entry = walk_sept(module, td, info.gpa, info.level)
    if entry.level != info.level:
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    check_entry_allows(call, entry)
    check_shared_hpa(call, source_pa, PAGE_4K, Operand.R9)
    page = await lock_free_page(call, page_pa, Operand.R8)

    module.memory.set_page(page_pa, module.memory.page(module.pa_format.address(source_pa)))
    sanity(not sept.is_locked(entry.value), f"{entry.lock} is locked")
    await write_entry(call, entry, leaf_entry(page_pa, SeptState.MAPPED, sept.RWX))
    td.tdcs.mrtd_hash = td.tdcs.mrtd_hash.update(page_add_record(info.gpa))
    td.tdr.chldcnt += 1
    module.pamt[page.key] = page_of(td.pa, PageType.REG)
    return Status.TDX_SUCCESS


async def tdh_mem_page_aug(call: HostCall) -> int:
    """TDH.MEM.PAGE.AUG: maps a page dynamically, pending until the guest accepts it.

    RCX: GPA and level (4 KiB or 2 MiB). RDX: TDR. R8: the page. On a walk or state error RCX and RDX tell the entry.
    """
    regs = call.regs
    gpa_and_level, tdr_pa, page_pa = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, Level.PD)
    check_entry_allows(call, entry)
    page = await lock_free_page(call, page_pa, Operand.R8, entry.level)

    # The entry is unlocked by writing it, before the PAMT says whose page it is.
    await write_entry(call, entry, leaf_entry(page_pa, SeptState.PENDING))
    await add_children(td, 1 << 9 * entry.level)
    call.module.pamt[page.key] = page_of(td.pa, PageType.REG)
    return Status.TDX_SUCCESS


async def tdh_mem_page_remove(call: HostCall) -> int:
    """TDH.MEM.PAGE.REMOVE: takes a page away from a TD; returns its address in RCX.

    RCX: GPA and level. RDX: TDR. While VCPUs may run, the page must be blocked and TLBs tracked. On an error that
    concerns the entry RCX and RDX tell it. While the TD is imported, the entry keeps the migration epoch of the
    removal, so that no older content comes back.
    """
    regs = call.regs
    gpa_and_level, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, Level.PDPT)
    check_entry_allows(call, entry)
    page_pa, mapped = entry.page, entry.value
    key, owned = await lock_owned_page(call, page_pa, entry.level)
    check_tlb_tracked(call, td, entry, owned.bepoch)

    for alias in l2.aliases(call, td, entry, mapped):
        await l2.write(call, alias, L2State.FREE)
    importing = td.tdcs.op_state in IMPORT_IN_PROGRESS
    await write_entry(call, entry, sept.removed_entry(td.tdcs.mig_epoch) if importing else sept.FREE_ENTRY)
    await add_children(td, -(1 << 9 * entry.level))
    set_page_type(call, key, PageType.NDA)
    regs.rcx = page_pa
    return Status.TDX_SUCCESS


async def tdh_mem_page_relocate(call: HostCall) -> int:
    """TDH.MEM.PAGE.RELOCATE: moves a 4 KiB page to another physical page and unblocks it; returns the old one in RCX.

    RCX: GPA and level. RDX: TDR. R8: the new page. Conditions and error outputs are those of TDH.MEM.PAGE.REMOVE.
    """
    module, regs = call.module, call.regs
    gpa_and_level, tdr_pa, target_pa = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, Level.PT)
    check_entry_allows(call, entry)
    source_pa, mapped = entry.page, entry.value
    check(source_pa != target_pa & PA_MASK, Status.TDX_OPERAND_INVALID, Operand.R8)
    source_key, source = await lock_owned_page(call, source_pa, Level.PT)
    check_tlb_tracked(call, td, entry, source.bepoch)
    target = await lock_free_page(call, target_pa, Operand.R8)

    pending = sept.is_any_pending(mapped)
    if not pending:
        module.memory.set_page(target_pa, module.memory.page(source_pa))
    set_page_type(call, source_key, PageType.NDA)
    module.pamt[target.key] = page_of(td.pa, PageType.REG)
    for alias in l2.aliases(call, td, entry, mapped):
        moved = alias.value & ~PAGE_MASK | target_pa
        await l2.write(call, alias, moved if pending else sept_l2.unblock(moved))
    await write_entry(call, entry, sept.unblocked(mapped & ~PAGE_MASK | target_pa))
    regs.rcx = source_pa
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MEM_PAGE_ADD: tdh_mem_page_add,
    HostLeaf.TDH_MEM_PAGE_AUG: tdh_mem_page_aug,
    HostLeaf.TDH_MEM_PAGE_REMOVE: tdh_mem_page_remove,
    HostLeaf.TDH_MEM_PAGE_RELOCATE: tdh_mem_page_relocate,
}
