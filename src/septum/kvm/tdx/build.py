"""KVM_TDX_INIT_MEM_REGION: initial memory, page by page.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_vcpu_init_mem_region`` and ``tdx_gmem_post_populate``; for the fix
"page-add-in-set-spte" Linux 6.19.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, EINTR, EINVAL, EIO
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K
from septum.core.steps import step
from septum.kvm.abi import KVM_TDX_MEASURE_MEMORY_REGION, TdxInitMemRegion
from septum.kvm.contention import contend
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.gmem import kvm_gmem_populate
from septum.kvm.mmu.fault import PFERR_PRIVATE_ACCESS, kvm_tdp_map_page, kvm_tdp_mmu_map_private_pfn
from septum.kvm.mmu.roots import kvm_mmu_reload
from septum.kvm.signals import signal_pending
from septum.kvm.tdx.sept import ADD_IN_SET_SPTE
from septum.kvm.vcpu import VcpuTdState
from septum.kvm.vm import TdState, kvm_bug_on, seamcall_bug_on, slots_lock

if TYPE_CHECKING:
    from septum.kvm.tdx.cmd import Cmd
    from septum.kvm.vcpu import Vcpu

TDX_EXTENDMR_CHUNKSIZE: Final = 256


async def tdx_vcpu_init_mem_region(vcpu: Vcpu, cmd: Cmd) -> int:
    """``tdx_vcpu_init_mem_region``: the region's structure tells userspace what is left to do, also after a failure."""
    kvm, mm = vcpu.kvm, vcpu.kvm.mm
    if vcpu.state != VcpuTdState.INITIALIZED:
        return -EINVAL
    async with slots_lock(kvm):
        if kvm.state == TdState.RUNNABLE or cmd.flags & ~KVM_TDX_MEASURE_MEMORY_REGION:
            return -EINVAL
        packed = mm.copy_from_user(cmd.data, TdxInitMemRegion.size())
        if packed is None:
            return -EFAULT
        region = TdxInitMemRegion.unpack(packed)
        source, gpa, nr_pages = region.source_addr, region.gpa, region.nr_pages
        end = gpa + nr_pages * PAGE_4K
        if source % PAGE_4K or gpa % PAGE_4K or not nr_pages or end >= 1 << 64:
            return -EINVAL
        if not kvm.is_private_gpa(gpa) or not kvm.is_private_gpa(end - 1):
            return -EINVAL
        await kvm_mmu_reload(vcpu)
        populate = _PostPopulate(vcpu, cmd.flags)
        ret = 0
        while nr_pages:
            if signal_pending(kvm.host):
                ret = -EINTR
                break
            ret = await kvm_gmem_populate(kvm, gpa >> 12, source, populate.page)
            if ret < 0:
                break
            ret = 0
            source, gpa, nr_pages = source + PAGE_4K, gpa + PAGE_4K, nr_pages - 1
        if not mm.copy_to_user(cmd.data, TdxInitMemRegion(source, gpa, nr_pages).pack()):
            return -EFAULT
        return ret


class _PostPopulate:
    """``struct tdx_gmem_post_populate_arg`` with its function."""

    __slots__ = ("flags", "vcpu")

    def __init__(self, vcpu: Vcpu, flags: int) -> None:
        self.vcpu = vcpu
        self.flags = flags

    async def page(self, gfn: int, page: int, source_page: int) -> int:
        """``tdx_gmem_post_populate``: maps a page in the mirror, adds it to the TD, and measures it."""
        add = self._map_and_add if self.vcpu.kvm.host.kernel.has(ADD_IN_SET_SPTE) else self._premap_and_add
        if ret := await add(gfn, page, source_page):
            return ret
        return await self._measure(gfn << 12) if self.flags & KVM_TDX_MEASURE_MEMORY_REGION else 0

    async def _premap_and_add(self, gfn: int, page: int, source_page: int) -> int:
        """Until 6.18: first the mirror, then the TD; a page in between is counted in ``nr_premapped``."""
        vcpu, kvm = self.vcpu, self.vcpu.kvm
        ret = await kvm_tdp_map_page(vcpu, gfn << 12, PFERR_PRIVATE_ACCESS)
        if ret < 0:
            return ret
        tdh = kvm.host.seamcalls
        regs = await contend("build", kvm, lambda: tdh.tdh_mem_page_add(kvm.tdr_page, gfn << 12, page, source_page))
        if regs.rax:
            return -EBUSY if tdx_operand_busy(regs.rax) else -EIO
        await step("write", "nr_premapped")
        if not await kvm_bug_on(not kvm.nr_premapped, kvm, "no page is premapped"):
            kvm.nr_premapped -= 1
        return 0

    async def _map_and_add(self, gfn: int, page: int, source_page: int) -> int:
        """6.19: the source waits in ``page_add_src`` for ``tdx_mem_page_add``."""
        kvm = self.vcpu.kvm
        if await kvm_bug_on(kvm.page_add_src, kvm, "two pages are added at the same time"):
            return -EIO
        kvm.page_add_src = source_page
        ret = await kvm_tdp_mmu_map_private_pfn(self.vcpu, gfn, page)
        kvm.page_add_src = 0
        return ret

    async def _measure(self, gpa: int) -> int:
        kvm = self.vcpu.kvm
        for chunk in range(gpa, gpa + PAGE_4K, TDX_EXTENDMR_CHUNKSIZE):
            regs = await kvm.host.seamcalls.tdh_mr_extend(kvm.tdr_page, chunk)
            if regs.rax:
                if kvm.host.kernel.has("mr-extend-bugs-vm"):
                    await seamcall_bug_on(kvm, "TDH_MR_EXTEND", regs, "rcx", "rdx")
                return -EIO
        return 0
