"""Page tables come and go: allocation, roots, and their end with the VM.

Source: Linux 6.16, ``arch/x86/kvm/mmu/{mmu,tdp_mmu}.c``. The caches of pages that the kernel fills before it takes
``mmu_lock`` are not modelled: pages are allocated where they are used, and ``mmu_topup_memory_caches`` checks that
there are enough.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING, Final

from septum.core.steps import step
from septum.kvm.mmu.spte import EMPTY_TABLE, Sp
from septum.kvm.requests import KVM_REQ_TLB_FLUSH
from septum.kvm.tdx.sept import tdx_load_mmu_pgd

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm

PT64_ROOT_MAX_LEVEL: Final = 5
CACHED_PAGES: Final = 2 * PT64_ROOT_MAX_LEVEL + 1


def mmu_topup_memory_caches(vcpu: Vcpu) -> int:
    """``mmu_topup_memory_caches``: 0, or -ENOMEM."""
    return 0 if vcpu.kvm.host.pages.available(CACHED_PAGES) else -ENOMEM


def tdp_mmu_alloc_sp(kvm: Vm, gfn: int, level: int, *, mirror: bool, external: bool) -> int:
    """``tdp_mmu_alloc_sp`` and ``kvm_mmu_alloc_external_spt``: the address of a new, empty page table."""
    pages = kvm.host.pages
    spt = pages.alloc()
    kvm.sps[spt] = Sp(gfn, level, mirror, pages.alloc() if external else 0)
    if not mirror:
        kvm.host.module.memory.set_page(spt, EMPTY_TABLE)
    return spt


def tdp_mmu_free_sp(kvm: Vm, spt: int) -> None:
    """``tdp_mmu_free_sp``."""
    sp = kvm.sps.pop(spt)
    if sp.external_spt:
        kvm.host.pages.free(sp.external_spt)
    kvm.host.pages.free(spt)


async def kvm_mmu_reload(vcpu: Vcpu) -> int:
    """``kvm_mmu_reload`` and ``kvm_mmu_load``: the vCPU gets roots, if it has none. 0, or a negative errno."""
    if vcpu.direct_root:
        return 0
    if r := mmu_topup_memory_caches(vcpu):
        return r
    if not vcpu.mirror_root:
        vcpu.mirror_root = await kvm_tdp_mmu_alloc_root(vcpu.kvm, mirror=True)
    vcpu.direct_root = await kvm_tdp_mmu_alloc_root(vcpu.kvm, mirror=False)
    await tdx_load_mmu_pgd(vcpu, vcpu.direct_root)
    vcpu.requests &= ~KVM_REQ_TLB_FLUSH.bit
    return 0


async def kvm_tdp_mmu_alloc_root(kvm: Vm, *, mirror: bool) -> int:
    """``kvm_tdp_mmu_alloc_root``: the root that all vCPUs share; the first vCPU makes it."""
    async with kvm.mmu_lock.read():
        if root := _root(kvm, mirror):
            return root
        async with kvm.tdp_mmu_pages_lock.locked():
            if root := _root(kvm, mirror):
                return root
            level = 5 if kvm.shared_gpa_bit > 1 << 47 else 4
            root = tdp_mmu_alloc_sp(kvm, 0, level, mirror=mirror, external=False)
            await step("publish root", kvm)
            if mirror:
                kvm.mirror_root = root
            else:
                kvm.direct_root = root
            return root


def _root(kvm: Vm, mirror: bool) -> int:
    return kvm.mirror_root if mirror else kvm.direct_root


def kvm_mmu_unload(vcpu: Vcpu) -> None:
    """``kvm_mmu_unload``: the vCPU lets go of its roots; they stay with the VM."""
    vcpu.mirror_root = vcpu.direct_root = 0
