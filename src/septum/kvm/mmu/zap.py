"""Unmapping: leaves in a range, a memslot, or everything.

Source: Linux 6.16, ``arch/x86/kvm/mmu/{mmu,tdp_mmu}.c``.
"""

from __future__ import annotations

from enum import Flag
from typing import TYPE_CHECKING, NamedTuple

from septum.core.klocks import AtomicSection
from septum.core.steps import current_task
from septum.kvm.mmu.mirror import RCU_READ_SECTION, tdp_mmu_set_spte
from septum.kvm.mmu.roots import tdp_mmu_free_sp
from septum.kvm.mmu.spte import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, SHADOW_NONPRESENT
from septum.kvm.mmu.walk import gfn_root_bits, present_sptes
from septum.kvm.requests import KVM_REQ_TLB_FLUSH, kvm_make_all_cpus_request

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.memslot import Memslot
    from septum.kvm.vm import Vm


class Roots(Flag):
    """``enum kvm_tdp_mmu_root_types``: which page tables an operation is for."""

    DIRECT = 1
    MIRROR = 2
    BOTH = 3


class GfnRange(NamedTuple):
    """``struct kvm_gfn_range``: page frames of a memslot from ``start`` up to ``end``, in some of the page tables."""

    slot: Memslot
    start: int
    end: int
    roots: Roots
    may_block: bool = True


def rcu_read_lock() -> AtomicSection:
    """``rcu_read_lock`` to ``rcu_read_unlock``."""
    return AtomicSection(RCU_READ_SECTION)


async def kvm_flush_remote_tlbs(kvm: Vm) -> None:
    """``kvm_flush_remote_tlbs``: every vCPU flushes its TLB before it enters the guest again."""
    await kvm_make_all_cpus_request(kvm, KVM_REQ_TLB_FLUSH)


def tables(kvm: Vm, roots: Roots) -> list[tuple[int, bool]]:
    """The root page tables of some kinds that there are; True: mirror."""
    wanted = [(kvm.direct_root, False)] if Roots.DIRECT in roots else []
    wanted += [(kvm.mirror_root, True)] if Roots.MIRROR in roots else []
    return [table for table in wanted if table[0]]


async def tdp_mmu_zap_leafs(
    kvm: Vm, root: int, mirror: bool, start: int, end: int, *, can_yield: bool, flush: bool
) -> bool:
    """``tdp_mmu_zap_leafs``: unmaps the leaves of one page table in a range. Returns whether TLBs must be flushed.

    Between two leaves it may yield, with ``can_yield``.
    """
    at = start
    while True:
        async with rcu_read_lock():
            at, flush = await _zap_leafs(kvm, root, mirror, at, end, can_yield, flush)
        if at == end:
            return flush
        flush = await tdp_mmu_iter_cond_resched(kvm, flush=flush)


async def _zap_leafs(
    kvm: Vm, root: int, mirror: bool, start: int, end: int, can_yield: bool, flush: bool
) -> tuple[int, bool]:
    """Unmaps leaves until the end, or until it has come further than ``start`` and should yield."""
    at, bits = start, gfn_root_bits(kvm, mirror)
    while found := next(present_sptes(kvm, root, mirror, at, end, PG_LEVEL_4K, bits), None):
        if can_yield and found.gfn > start and (need_resched(kvm.host) or kvm.mmu_lock.is_contended()):
            return found.gfn, flush
        await tdp_mmu_set_spte(kvm, found, SHADOW_NONPRESENT, mirror)
        at, flush = found.gfn + 1, True
    return end, flush


def need_resched(host: Host) -> bool:
    """``need_resched``: the scheduler wants the caller's CPU for another thread."""
    return host.need_resched[current_task().cpu]


async def tdp_mmu_iter_cond_resched(kvm: Vm, *, flush: bool) -> bool:
    """``tdp_mmu_iter_cond_resched``, once it is found that it should yield: flushes what is unmapped so far, lets
    ``mmu_lock`` go and takes it again. What the walk had read counts for nothing then. Whether TLBs must be flushed."""
    if flush:
        await kvm_flush_remote_tlbs(kvm)
    kvm.host.need_resched.store(current_task().cpu, False)
    await kvm.mmu_lock.resched()
    return False


async def kvm_unmap_gfn_range(kvm: Vm, gfns: GfnRange, *, flush: bool = False) -> bool:
    """``kvm_unmap_gfn_range`` and ``kvm_tdp_mmu_unmap_gfn_range``: with ``mmu_lock`` held for write, which it lets go
    in between if the range may block."""
    for root, mirror in tables(kvm, gfns.roots):
        flush = await tdp_mmu_zap_leafs(kvm, root, mirror, gfns.start, gfns.end, can_yield=gfns.may_block, flush=flush)
    return flush


async def kvm_mmu_zap_memslot(kvm: Vm, slot: Memslot) -> None:
    """``kvm_mmu_zap_memslot``: unmaps a memslot that is being deleted or moved, private and shared memory alike."""
    async with kvm.mmu_lock.write():
        gfns = GfnRange(slot, slot.base_gfn, slot.base_gfn + slot.npages, Roots.BOTH)
        if await kvm_unmap_gfn_range(kvm, gfns):
            await kvm_flush_remote_tlbs(kvm)


async def kvm_mmu_zap_all(kvm: Vm) -> None:
    """``kvm_mmu_zap_all``: the process is gone, and its memory with it. Private memory is not part of that."""
    async with kvm.mmu_lock.write():
        for root, mirror in tables(kvm, Roots.DIRECT):
            await tdp_mmu_zap_root(kvm, root, mirror)


async def tdp_mmu_zap_root(kvm: Vm, root: int, mirror: bool) -> None:
    """``tdp_mmu_zap_root``: everything below a root, leaves first, then tables of growing size."""
    sp = kvm.sps[root]
    async with rcu_read_lock():
        for level in sorted({PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, sp.level}):
            for found in present_sptes(kvm, root, mirror, 0, 1 << 9 * sp.level, level, 0):
                await tdp_mmu_set_spte(kvm, found, SHADOW_NONPRESENT, mirror)


async def kvm_mmu_uninit_tdp_mmu(kvm: Vm) -> None:
    """``kvm_mmu_uninit_tdp_mmu``: the page tables end with the VM."""
    async with kvm.mmu_lock.write():
        for root, mirror in tables(kvm, Roots.BOTH):
            await tdp_mmu_zap_root(kvm, root, mirror)
            tdp_mmu_free_sp(kvm, root)
        kvm.mirror_root = kvm.direct_root = 0
