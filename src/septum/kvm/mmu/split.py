"""Splitting large mappings.

Private memory must be unmapped precisely: what is mapped again the guest would have to accept again. So before a range
is unmapped, the large mappings that it cuts are split.
Source: huge pages v3 (20260106101646.24809-1-yan.y.zhao), ``arch/x86/kvm/mmu/{mmu,tdp_mmu}.c``. The kernel walks the
whole range to find mappings that cross its ends; here only the ends are looked up.
"""

from __future__ import annotations

from errno import ENOMEM
from typing import TYPE_CHECKING

from septum.core.steps import step
from septum.kvm.mmu.mirror import tdp_mmu_set_spte, tdp_mmu_set_spte_atomic
from septum.kvm.mmu.roots import tdp_mmu_alloc_sp, tdp_mmu_free_sp
from septum.kvm.mmu.spte import (
    PG_LEVEL_4K,
    is_large_pte,
    is_shadow_present_pte,
    make_nonleaf_spte,
    make_small_spte,
    pages_per_hpage,
    write_spte,
)
from septum.kvm.mmu.walk import Found, walk_to
from septum.kvm.mmu.zap import GfnRange, rcu_read_lock, tables

if TYPE_CHECKING:
    from septum.kvm.vm import Vm


async def kvm_split_cross_boundary_leafs(kvm: Vm, gfns: GfnRange, *, shared: bool) -> int:
    """``kvm_split_cross_boundary_leafs``: with ``mmu_lock`` held, ``shared`` or for write; lets it go to allocate.

    0, -ENOMEM, or, with ``shared``, what a split came to that did not succeed.
    """
    for root, mirror in tables(kvm, gfns.roots):
        if r := await tdp_mmu_split_huge_pages_root(kvm, root, mirror, gfns.start, gfns.end, shared=shared):
            return r
    return 0


async def tdp_mmu_split_huge_pages_root(kvm: Vm, root: int, mirror: bool, start: int, end: int, *, shared: bool) -> int:
    """``tdp_mmu_split_huge_pages_root`` with ``only_cross_boundary``, down to 4 KiB. 0 or a negative errno."""
    spt, r = 0, 0
    while not r:
        async with rcu_read_lock():
            found = _crossing(kvm, root, mirror, start, end)
            if found is None:
                break
            if spt:
                r = await tdp_mmu_split_huge_page(kvm, found, spt, mirror, shared=shared)
                if not r:
                    spt = 0
                    continue
        if not spt:
            spt = await tdp_mmu_alloc_sp_for_split(kvm, found, mirror, shared=shared)
            r = 0 if spt else -ENOMEM
    if spt:
        tdp_mmu_free_sp(kvm, spt)
    return r


def _crossing(kvm: Vm, root: int, mirror: bool, start: int, end: int) -> Found | None:
    """A large leaf that lies partly in a range and partly outside (``iter_cross_boundary``)."""
    for gfn in (start, end - 1):
        found = walk_to(kvm, root, mirror, gfn, PG_LEVEL_4K)
        crosses = found.gfn < start or found.gfn + pages_per_hpage(found.level) > end
        if crosses and is_shadow_present_pte(found.spte) and is_large_pte(found.spte):
            return found
    return None


async def tdp_mmu_alloc_sp_for_split(kvm: Vm, found: Found, mirror: bool, *, shared: bool) -> int:
    """``tdp_mmu_alloc_sp_for_split``: a page table, allocated without ``mmu_lock``; 0 for -ENOMEM."""
    kvm.mmu_lock.let_go(shared=shared)
    await step("allocate", "page table")
    enough = kvm.host.pages.available(2)
    spt = tdp_mmu_alloc_sp(kvm, found.gfn, found.level - 1, mirror=mirror, external=mirror) if enough else 0
    await kvm.mmu_lock.take(shared=shared)
    return spt


async def tdp_mmu_split_huge_page(kvm: Vm, found: Found, spt: int, mirror: bool, *, shared: bool) -> int:
    """``tdp_mmu_split_huge_page``: fills a page table with what the large leaf maps, and links it in its place."""
    kvm.sps[spt] = kvm.sps[spt]._replace(gfn=found.gfn, level=found.level - 1)
    for index in range(512):
        write_spte(kvm, spt + 8 * index, make_small_spte(found.spte, found.level, index), mirror)
    if shared:
        return await tdp_mmu_set_spte_atomic(kvm, found, make_nonleaf_spte(spt), mirror)
    await tdp_mmu_set_spte(kvm, found, make_nonleaf_spte(spt), mirror)
    return 0
