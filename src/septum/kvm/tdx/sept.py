"""Hooks of the MMU: from the mirror page tables to the Secure EPT.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_sept_*`` and ``tdx_track``. All return 0 or a negative errno.
"""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO
from functools import partial
from typing import TYPE_CHECKING, Final

from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.sept import RWX
from septum.arch.status import Status, with_operand
from septum.arch.vmcs import SHARED_EPTP
from septum.core.steps import step
from septum.kvm.contention import contend
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.mmu.spte import PG_LEVEL_4K, is_last_spte, pages_per_hpage
from septum.kvm.requests import KVM_REQ_OUTSIDE_GUEST_MODE, kvm_make_all_cpus_request
from septum.kvm.tdx.keys import tdx_reclaim_page
from septum.kvm.vm import TdState, kvm_bug_on, seamcall_bug_on
from septum.tdx.state.memory import ZERO_PAGE

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs

ADD_IN_SET_SPTE: Final = "page-add-in-set-spte"
NOT_PRESENT_IN_SEPT: Final = with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


def pg_level_to_tdx_sept_level(level: int) -> int:
    """``pg_level_to_tdx_sept_level``: the kernel counts from 1, the module from 0."""
    return level - 1


def _is_level_allowed(kvm: Vm, level: int) -> bool:
    """4 KiB always; more only for a TD that is built, with huge pages on (huge pages v3)."""
    return level == PG_LEVEL_4K or (kvm.host.state.enable_tdx_huge_page and kvm.state == TdState.RUNNABLE)


def _pages(page: int, level: int) -> range:
    """The pages of 4 KiB in a larger one."""
    return range(page, page + (pages_per_hpage(level) << 12), PAGE_4K)


def _pins(kvm: Vm) -> bool:
    """Whether a page that the module has keeps a reference (until 6.18)."""
    return not kvm.host.kernel.has("no-page-pinning")


def _get_pages(kvm: Vm, page: int, level: int) -> None:
    for part in _pages(page, level) if _pins(kvm) else ():
        kvm.host.pages.get(part)


def _put_pages(kvm: Vm, page: int, level: int) -> None:
    for part in _pages(page, level) if _pins(kvm) else ():
        kvm.host.pages.put(part)


async def tdx_sept_set_private_spte(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_sept_set_private_spte``: while the TD runs, the page is mapped; while it is built, counted (until 6.18)
    or added (6.19).

    The page gets a reference: it must not be freed while the module has it.
    """
    if await kvm_bug_on(not _is_level_allowed(kvm, level), kvm, "a private huge page"):
        return -EINVAL
    for part in _pages(page, level):
        kvm.host.pages.require_allocated(part)
    _get_pages(kvm, page, level)
    await step("read", "TD state")
    if kvm.state == TdState.RUNNABLE:
        return await tdx_mem_page_aug(kvm, gfn, level, page)
    if kvm.host.kernel.has(ADD_IN_SET_SPTE):
        return await tdx_mem_page_add(kvm, gfn, page)
    return await tdx_mem_page_record_premap_cnt(kvm)


async def tdx_mem_page_aug(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_mem_page_aug``."""
    tdh, gpa, tdx_level = kvm.host.seamcalls, gfn << 12, pg_level_to_tdx_sept_level(level)
    regs = await contend("map", kvm, lambda: tdh.tdh_mem_page_aug(kvm.tdr_page, gpa, tdx_level, page))
    if tdx_operand_busy(regs.rax):
        _put_pages(kvm, page, level)
        return -EBUSY
    if await seamcall_bug_on(kvm, "TDH_MEM_PAGE_AUG", regs, "rcx", "rdx"):
        _put_pages(kvm, page, level)
        return -EIO
    return 0


async def tdx_mem_page_add(kvm: Vm, gfn: int, page: int) -> int:
    """``tdx_mem_page_add`` (6.19): the page gets the content of ``page_add_src``."""
    if await kvm_bug_on(not kvm.page_add_src, kvm, "a page is added without a source"):
        return -EIO
    tdh = kvm.host.seamcalls
    regs = await contend("build", kvm, lambda: tdh.tdh_mem_page_add(kvm.tdr_page, gfn << 12, page, kvm.page_add_src))
    if tdx_operand_busy(regs.rax):
        _put_pages(kvm, page, PG_LEVEL_4K)
        return -EBUSY
    if await seamcall_bug_on(kvm, "TDH_MEM_PAGE_ADD", regs, "rcx", "rdx"):
        _put_pages(kvm, page, PG_LEVEL_4K)
        return -EIO
    return 0


async def tdx_mem_page_record_premap_cnt(kvm: Vm) -> int:
    """``tdx_mem_page_record_premap_cnt``: TDH.MEM.PAGE.ADD is to follow, by KVM_TDX_INIT_MEM_REGION."""
    if await kvm_bug_on(kvm.pre_fault_allowed, kvm, "a page is premapped after the build"):
        return -EINVAL
    kvm.nr_premapped += 1
    return 0


async def tdx_sept_link_private_spt(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_sept_link_private_spt``: a new table of the Secure EPT."""
    tdh, gpa, tdx_level = kvm.host.seamcalls, gfn << 12, pg_level_to_tdx_sept_level(level)
    regs = await contend("map", kvm, lambda: tdh.tdh_mem_sept_add(kvm.tdr_page, gpa, tdx_level, page))
    if tdx_operand_busy(regs.rax):
        return -EBUSY
    if await seamcall_bug_on(kvm, "TDH_MEM_SEPT_ADD", regs, "rcx", "rdx"):
        return -EIO
    return 0


async def tdx_sept_remove_private_spte(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_sept_remove_private_spte``: block, track, remove; with ``mmu_lock`` held for write.

    Before the fix "hkid-outlives-mm" pages may be left when the KeyID is gone: they are reclaimed (v13,
    ``tdx_sept_drop_private_spte``).
    """
    if not kvm.host.kernel.has("hkid-outlives-mm"):
        await step("read", "hkid")
        if not kvm.is_hkid_assigned:
            return await _reclaim_private_pages(kvm, level, page)
    if await kvm_bug_on(not kvm.is_hkid_assigned, kvm, "a private page is removed after the KeyID is gone"):
        return -EINVAL
    ret = await tdx_sept_zap_private_spte(kvm, gfn, level, page)
    if ret <= 0:
        return ret
    await tdx_track(kvm)
    return await tdx_sept_drop_private_spte(kvm, gfn, level, page)


async def _reclaim_private_pages(kvm: Vm, level: int, page: int) -> int:
    """A page that the module does not give back keeps its reference, after a warning."""
    for part in _pages(page, level):
        if await tdx_reclaim_page(kvm, part):
            return 0
    _put_pages(kvm, page, level)
    return 0


async def tdx_sept_zap_private_spte(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_sept_zap_private_spte``: blocks the page. 1 when it was blocked, 0 when it was never added."""
    tdh, gpa, tdx_level = kvm.host.seamcalls, gfn << 12, pg_level_to_tdx_sept_level(level)
    regs = await contend("block", kvm, lambda: tdh.tdh_mem_range_block(kvm.tdr_page, gpa, tdx_level))
    premapped = tdx_is_sept_zap_err_due_to_premap(kvm, regs, level)
    if premapped and not await kvm_bug_on(not kvm.nr_premapped, kvm, "no page is premapped"):
        kvm.nr_premapped -= 1
        kvm.host.pages.put(page)
        return 0
    if await seamcall_bug_on(kvm, "TDH_MEM_RANGE_BLOCK", regs, "rcx", "rdx"):
        return -EIO
    return 1


def tdx_is_sept_zap_err_due_to_premap(kvm: Vm, regs: Regs, level: int) -> bool:
    """``tdx_is_sept_zap_err_due_to_premap``: the mirror has the page, but TDH.MEM.PAGE.ADD has not happened."""
    if kvm.state == TdState.RUNNABLE or regs.rax != NOT_PRESENT_IN_SEPT or kvm.host.kernel.has(ADD_IN_SET_SPTE):
        return False
    return not (is_last_spte(regs.rcx, level) and regs.rcx & RWX)


async def tdx_track(kvm: Vm) -> None:
    """``tdx_track``: begins a new TLB epoch, and sees to it that no vCPU stays in the one before.

    Kicking always, also when TDH.MEM.TRACK succeeded at once, keeps TDX_PREVIOUS_TLB_EPOCH_BUSY from the next one.
    """
    if kvm.state != TdState.RUNNABLE:
        return
    tdh = kvm.host.seamcalls
    regs = await contend("track", kvm, lambda: tdh.tdh_mem_track(kvm.tdr_page))
    await seamcall_bug_on(kvm, "TDH_MEM_TRACK", regs)
    await kvm_make_all_cpus_request(kvm, KVM_REQ_OUTSIDE_GUEST_MODE)


async def tdx_sept_drop_private_spte(kvm: Vm, gfn: int, level: int, page: int) -> int:
    """``tdx_sept_drop_private_spte``: takes the blocked page from the TD and writes its cache lines back.

    When that fails, the page keeps its reference: it is never freed.
    """
    tdh, gpa, tdx_level = kvm.host.seamcalls, gfn << 12, pg_level_to_tdx_sept_level(level)
    if await kvm_bug_on(not _is_level_allowed(kvm, level), kvm, "a private huge page"):
        return -EINVAL
    if await kvm_bug_on(not kvm.is_hkid_assigned, kvm, "a private page is dropped after the KeyID is gone"):
        return -EINVAL
    regs = await contend("remove", kvm, lambda: tdh.tdh_mem_page_remove(kvm.tdr_page, gpa, tdx_level))
    if await seamcall_bug_on(kvm, "TDH_MEM_PAGE_REMOVE", regs, "rcx", "rdx"):
        return -EIO
    for part in _pages(page, level):
        regs = await contend("wbinvd", kvm, partial(tdh.tdh_phymem_page_wbinvd_hkid, kvm.hkid, part))
        if await seamcall_bug_on(kvm, "TDH_PHYMEM_PAGE_WBINVD", regs):
            return -EIO
    for part in _pages(page, level):
        kvm.host.module.memory.set_page(part, ZERO_PAGE)
    _put_pages(kvm, page, level)
    return 0


async def tdx_sept_free_private_spt(kvm: Vm, page: int) -> int:
    """``tdx_sept_free_private_spt``: a table of the Secure EPT is taken back, after the KeyID is gone."""
    if await kvm_bug_on(kvm.is_hkid_assigned, kvm, "a Secure EPT page is freed while the KeyID is assigned"):
        return -EINVAL
    return await tdx_reclaim_page(kvm, page)


# -- vCPU fields -------------------------------------------------------------------------------------------------------


async def td_vmcs_write(vcpu: Vcpu, encoding: int, value: int, mask: int) -> None:
    """``td_vmcs_write16`` ... ``td_vmcs_setbit32``: a field of the vCPU's VMCS (class 0 of field ids), by TDH.VP.WR.

    Failure bugs the VM.
    """
    regs = await vcpu.kvm.host.seamcalls.tdh_vp_wr(vcpu.tdvpr_page, encoding, value, mask)
    if await kvm_bug_on(regs.rax, vcpu.kvm, f"TDH_VP_WR of VMCS field {encoding:#x} failed"):
        vcpu.kvm.host.log.pr(f"TDH_VP_WR[VMCS.{encoding:#x}]={value:#x} failed: {regs.rax:#x}")


async def tdx_load_mmu_pgd(vcpu: Vcpu, root: int) -> None:
    """``tdx_load_mmu_pgd``: tells the module where the EPT for shared memory begins."""
    await td_vmcs_write(vcpu, SHARED_EPTP, root, (1 << 64) - 1)
