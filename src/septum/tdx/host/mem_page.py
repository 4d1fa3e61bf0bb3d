"""TDH.MEM.PAGE.*: adding, removing and moving a TD's private pages.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mem_page_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import Level
from septum.arch.pamt import PageType
from septum.arch.sept import SeptState, leaf_entry
from septum.arch.status import Status
from septum.core.steps import step
from septum.tdx.call import (
    SHARED,
    HostCall,
    check_entry_allows,
    decode_page_info,
    lock_free_page,
    lock_op_state,
    lock_sept_and_walk,
    lock_sept_entry,
    lock_tdr,
)
from septum.tdx.state.memory import PamtEntry

if TYPE_CHECKING:
    from septum.tdx.host import Handler


async def tdh_mem_page_aug(call: HostCall) -> int:
    """TDH.MEM.PAGE.AUG: maps a page dynamically, pending until the guest accepts it.

    RCX: GPA and level (4 KiB or 2 MiB). RDX: TDR. R8: the page. On a walk or state error RCX and RDX tell the entry.
    """
    module, regs = call.module, call.regs
    gpa_and_level, tdr_pa, page_pa = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0

    td = await lock_tdr(call, tdr_pa, Operand.RDX, SHARED)
    await lock_op_state(call, td)
    info = decode_page_info(gpa_and_level, Level.PT, Level.PD)
    entry = await lock_sept_and_walk(call, td, info.gpa, info.level, SHARED, Operand.RCX)
    await lock_sept_entry(call, entry)
    check_entry_allows(call, entry)
    page = await lock_free_page(call, page_pa, Operand.R8, info.level)

    # The entry is unlocked by writing it, before the PAMT says whose page it is.
    await step("write", entry.lock)
    module.sept[entry.pa] = leaf_entry(page_pa, SeptState.PENDING)
    call.locks.forget(entry.lock)
    await step("xadd", "TDR.CHLDCNT")
    td.tdr.chldcnt += 1 << 9 * info.level
    module.pamt[page.key] = PamtEntry(PageType.REG, td.pa, 0)
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {HostLeaf.TDH_MEM_PAGE_AUG: tdh_mem_page_aug}
