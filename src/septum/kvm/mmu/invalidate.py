"""Invalidations: how faults notice that what they are about to map is being taken away.

Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``include/linux/kvm_host.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from septum.core.steps import Step
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_flush_remote_tlbs

if TYPE_CHECKING:
    from septum.kvm.vm import Vm

NOWHERE = (0, 0)


def kvm_mmu_invalidate_begin(kvm: Vm) -> None:
    """``kvm_mmu_invalidate_begin``: with ``mmu_lock`` held for write."""
    kvm.mmu_invalidate_in_progress += 1
    if kvm.mmu_invalidate_in_progress == 1:
        kvm.mmu_invalidate_range = NOWHERE


def kvm_mmu_invalidate_range_add(kvm: Vm, start: int, end: int) -> None:
    """``kvm_mmu_invalidate_range_add``: one range that covers all that is being invalidated."""
    low, high = kvm.mmu_invalidate_range
    first = (low, high) == NOWHERE
    kvm.mmu_invalidate_range = (start, end) if first else (min(low, start), max(high, end))


def kvm_mmu_invalidate_end(kvm: Vm) -> None:
    """``kvm_mmu_invalidate_end``: faults that began before it must begin again."""
    kvm.mmu_invalidate_seq += 1
    kvm.mmu_invalidate_in_progress -= 1


def mmu_invalidate_retry_gfn(kvm: Vm, mmu_seq: int, gfn: int) -> bool:
    """``mmu_invalidate_retry_gfn`` (and ``_unsafe``, without ``mmu_lock``): whether a fault that took its snapshot
    at ``mmu_seq`` is out of date."""
    low, high = kvm.mmu_invalidate_range
    if kvm.mmu_invalidate_in_progress and low <= gfn < high:
        return True
    return kvm.mmu_invalidate_seq != mmu_seq


async def kvm_handle_gfn_range(
    kvm: Vm,
    start: int,
    end: int,
    roots: Roots,
    on_lock: Callable[[Vm], None],
    handler: Callable[[Vm, GfnRange], Coroutine[Step, None, int]],
) -> int:
    """``kvm_handle_gfn_range``: runs ``handler`` on the part of each memslot in a range, ``mmu_lock`` held for write.

    ``on_lock`` runs once, and only if there is such a part. A handler returns whether TLBs must be flushed, or a
    negative errno, which ends the walk (huge pages v3) and is returned.
    """
    parts = [
        GfnRange(slot, max(start, slot.base_gfn), min(end, slot.base_gfn + slot.npages), roots)
        for slot in kvm.memslots
        if max(start, slot.base_gfn) < min(end, slot.base_gfn + slot.npages)
    ]
    if not parts:
        return 0
    async with kvm.mmu_lock.write():
        on_lock(kvm)
        flush, ret = False, 0
        for part in parts:
            ret = await handler(kvm, part)
            if ret < 0:
                break
            flush |= bool(ret)
        if flush:
            await kvm_flush_remote_tlbs(kvm)
    return min(ret, 0)
