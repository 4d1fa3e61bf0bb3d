"""TDH.PHYMEM.*: pages of physical memory, and the caches.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_phymem_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState, Lifecycle
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGES_4K_IN_2M, is_aligned, level_size
from septum.arch.pamt import PageType
from septum.arch.platform_msrs import IA32_WBINVDP
from septum.arch.status import Status
from septum.tdx.call import (
    EXCLUSIVE,
    SHARED,
    HostCall,
    LockedPage,
    add_children,
    check_hpa,
    lock_page,
    set_page_type,
    walk_pamt,
)
from septum.tdx.outcome import check
from septum.tdx.secure_ept import clear_table
from septum.tdx.vcpu import lock_owner

if TYPE_CHECKING:
    from septum.core.trylocks import Mode
    from septum.tdx.host import Handler
    from septum.tdx.state.memory import PamtEntry

START, RESUME = 0, 1
LEVEL_MASK = 3


async def tdh_phymem_cache_wb(call: HostCall) -> int:
    """TDH.PHYMEM.CACHE.WB: writes back the cache of this package, for the HKIDs whose VCPUs have been flushed.

    RCX: 0 begins, 1 goes on after INTERRUPTED_RESUMABLE.
    """
    module, package, command = call.module, call.lp.package, call.regs.rcx
    progress = module.writebacks[package]
    check(command in (START, RESUME), Status.TDX_OPERAND_INVALID, Operand.RCX)
    await call.locks.take(module.writeback_locks[package], EXCLUSIVE, Operand.WBCACHE)
    await call.locks.take(module.kot_lock, SHARED, Operand.KOT)
    if command == START:
        progress.parts_done = 0
        private = module.platform.private_hkids
        flushed = tuple(hkid for hkid in private if module.kot[hkid].state == KotState.HKID_FLUSHED)
        check(flushed, Status.TDX_NO_HKID_READY_TO_WBCACHE)
        progress.hkids = flushed
    else:
        check(progress.parts_done, Status.TDX_WBCACHE_RESUME_ERROR)

    # After each part but the last, a pending interrupt gets its turn.
    is_last = progress.parts_done + 1 >= module.sys.sampled_msr(IA32_WBINVDP)
    if not is_last and module.hardware.interrupt_pending(call.lp.index):
        progress.parts_done += 1
        return Status.TDX_INTERRUPTED_RESUMABLE
    for hkid in progress.hkids:
        module.kot[hkid].wbinvd_bitmap &= ~(1 << package)
    progress.parts_done, progress.hkids = 0, ()
    return Status.TDX_SUCCESS


async def _lock_any_page(call: HostCall, mode: Mode) -> tuple[LockedPage, int, PamtEntry]:
    """The page in RCX, of whatever size and type, with its level and PAMT entry; zeroes the output registers."""
    regs = call.regs
    pa = regs.rcx
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = regs.r11 = 0
    check_hpa(call, pa, PAGE_4K, Operand.RCX)
    page = await walk_pamt(call, pa, Operand.RCX, mode)
    return page, page.key & LEVEL_MASK, call.module.pamt_entry(page.key)


def _return_metadata(call: HostCall, level: int, entry: PamtEntry) -> None:
    call.regs.rcx, call.regs.rdx, call.regs.r8 = entry.page_type, entry.owner, level


async def tdh_phymem_page_rdmd(call: HostCall) -> int:
    """TDH.PHYMEM.PAGE.RDMD: what the PAMT says of a page. RCX: the page.

    Out: RCX type, RDX owner (also the last one of a page that is free now), R8 size, R9 BEPOCH.
    """
    _, level, entry = await _lock_any_page(call, SHARED)
    _return_metadata(call, level, entry)
    if entry.page_type in (PageType.REG, PageType.EPT):
        call.regs.r9 = entry.bepoch
    return Status.TDX_SUCCESS


async def tdh_phymem_page_reclaim(call: HostCall) -> int:
    """TDH.PHYMEM.PAGE.RECLAIM: takes a page from a TD that is being torn down. RCX: the page; the TDR goes last.

    Out: RCX type, RDX owner, R8 size, of every page that is in use.
    """
    page, level, entry = await _lock_any_page(call, EXCLUSIVE)
    in_use = entry.page_type not in (PageType.NDA, PageType.RSVD)
    check(in_use, Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
    _return_metadata(call, level, entry)
    check(is_aligned(page.pa, level_size(level)), Status.TDX_OPERAND_INVALID, Operand.RCX)
    if entry.page_type == PageType.TDR:
        tdr = call.module.td(page.pa).tdr
        check(tdr.lifecycle_state == Lifecycle.TEARDOWN, Status.TDX_LIFECYCLE_STATE_INCORRECT)
        check(not tdr.chldcnt, Status.TDX_TD_ASSOCIATED_PAGES_EXIST)
    else:
        td = await lock_owner(call, page)
        check(td.tdr.lifecycle_state == Lifecycle.TEARDOWN, Status.TDX_LIFECYCLE_STATE_INCORRECT)
        await add_children(td, -(PAGES_4K_IN_2M**level))
    if entry.page_type in (PageType.EPT, PageType.TDCX):
        clear_table(call.module.sept, page.pa)
        clear_table(call.module.sept_l2, page.pa)
    set_page_type(call, page.key, PageType.NDA)
    return Status.TDX_SUCCESS


async def tdh_phymem_page_wbinvd(call: HostCall) -> int:
    """TDH.PHYMEM.PAGE.WBINVD: writes back the cache lines of a free page. RCX: the page, with an HKID."""
    pa = call.regs.rcx & ~call.module.pa_format.hkid_mask
    await lock_page(call, pa, Operand.RCX, SHARED, PageType.NDA)
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_PHYMEM_CACHE_WB: tdh_phymem_cache_wb,
    HostLeaf.TDH_PHYMEM_PAGE_RDMD: tdh_phymem_page_rdmd,
    HostLeaf.TDH_PHYMEM_PAGE_RECLAIM: tdh_phymem_page_reclaim,
    HostLeaf.TDH_PHYMEM_PAGE_WBINVD: tdh_phymem_page_wbinvd,
}
