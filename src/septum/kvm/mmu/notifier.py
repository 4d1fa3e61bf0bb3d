"""What KVM does when the process's own memory goes: only mappings of shared memory depend on it.

Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``kvm_mmu_notifier_*``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.kvm.mmu.invalidate import kvm_mmu_invalidate_begin, kvm_mmu_invalidate_end, kvm_mmu_invalidate_range_add
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_flush_remote_tlbs, kvm_mmu_zap_all, kvm_unmap_gfn_range
from septum.kvm.tdx.keys import tdx_mmu_release_hkid

if TYPE_CHECKING:
    from septum.kvm.vm import Vm


async def kvm_mmu_notifier_invalidate_range_start(kvm: Vm, start: int, end: int, *, may_block: bool) -> None:
    """``kvm_mmu_notifier_invalidate_range_start``: pages of addresses from ``start`` up to ``end`` are about to go.

    Takes ``mmu_lock`` and nothing else, and does not let it go in between when it may not block. Never touches
    private memory.
    """
    async with kvm.mmu_lock.write():
        kvm_mmu_invalidate_begin(kvm)
        flush = False
        for slot in kvm.memslots:
            low = max(start, slot.userspace_addr)
            high = min(end, slot.userspace_addr + (slot.npages << 12))
            if low < high:
                first = slot.base_gfn + (low - slot.userspace_addr >> 12)
                gfns = GfnRange(slot, first, first + (high - low >> 12), Roots.DIRECT, may_block)
                kvm_mmu_invalidate_range_add(kvm, gfns.start, gfns.end)
                flush = await kvm_unmap_gfn_range(kvm, gfns) or flush
        if flush:
            await kvm_flush_remote_tlbs(kvm)


async def kvm_mmu_notifier_release(kvm: Vm) -> None:
    """``kvm_mmu_notifier_release``: the process's memory goes. Before the fix "hkid-outlives-mm" the KeyID goes with it
    (``kvm_flush_shadow_all_private`` of the v11 series), whatever guest_memfd files are still open."""
    if not kvm.host.kernel.has("hkid-outlives-mm"):
        await tdx_mmu_release_hkid(kvm)
        kvm.shadow_flushed = True
    await kvm_mmu_zap_all(kvm)


async def kvm_mmu_notifier_invalidate_range_end(kvm: Vm) -> None:
    """``kvm_mmu_notifier_invalidate_range_end``: they are gone."""
    async with kvm.mmu_lock.write():
        kvm_mmu_invalidate_end(kvm)
