"""KVM_PRE_FAULT_MEMORY: mapping memory before the guest touches it.

Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/mmu/mmu.c``.
"""

from __future__ import annotations

from errno import EINTR, EINVAL, EOPNOTSUPP
from typing import TYPE_CHECKING

from septum.arch.pages import PAGE_4K
from septum.kvm.arguments import Region
from septum.kvm.attributes import kvm_mem_is_private
from septum.kvm.lifetime import vcpu_load
from septum.kvm.mmu.fault import PFERR_PRIVATE_ACCESS, kvm_tdp_map_page
from septum.kvm.mmu.roots import kvm_mmu_reload
from septum.kvm.mmu.spte import pages_per_hpage
from septum.kvm.run import kvm_vcpu_srcu_read_lock, kvm_vcpu_srcu_read_unlock
from septum.kvm.signals import signal_pending

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu


async def kvm_vcpu_pre_fault_memory(vcpu: Vcpu, region: Region) -> int:
    """``kvm_vcpu_pre_fault_memory``: 0 when at least one page was mapped, else a negative errno."""
    if region.gpa % PAGE_4K or region.nr_pages <= 0 or region.gpa + region.nr_pages * PAGE_4K >= 1 << 64:
        return -EINVAL
    done, r = 0, 0
    async with vcpu_load(vcpu):
        kvm_vcpu_srcu_read_lock(vcpu)
        while region.nr_pages:
            if signal_pending(vcpu.kvm.host):
                r = -EINTR
                break
            r = await kvm_arch_vcpu_pre_fault_memory(vcpu, region)
            if r < 0:
                break
            done += r
            region.gpa += r * PAGE_4K
            region.nr_pages -= r
        kvm_vcpu_srcu_read_unlock(vcpu)
    return 0 if done else r


async def kvm_arch_vcpu_pre_fault_memory(vcpu: Vcpu, region: Region) -> int:
    """``kvm_arch_vcpu_pre_fault_memory``: one mapping, as the attribute says. How many of the region's pages are mapped
    now, or a negative errno."""
    kvm, gpa = vcpu.kvm, region.gpa
    if not kvm.pre_fault_allowed:
        return -EOPNOTSUPP
    if gpa & kvm.shared_gpa_bit:
        return -EINVAL
    if r := await kvm_mmu_reload(vcpu):
        return r
    if kvm_mem_is_private(kvm, gpa >> 12):
        level = await kvm_tdp_map_page(vcpu, gpa, PFERR_PRIVATE_ACCESS)
    else:
        level = await kvm_tdp_map_page(vcpu, gpa | kvm.shared_gpa_bit, 0)
    if level < 0:
        return level
    pages = pages_per_hpage(level)
    return min(region.nr_pages, pages - (gpa >> 12) % pages)
