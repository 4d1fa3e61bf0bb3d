"""Memory attributes: which guest page frames are private.

Source: Linux 6.16, ``virt/kvm/kvm_main.c`` (``kvm_vm_set_mem_attributes``), ``arch/x86/kvm/mmu/mmu.c``.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K
from septum.core.steps import emit, step
from septum.kvm.abi import KVM_MEMORY_ATTRIBUTE_PRIVATE, MemoryAttributes
from septum.kvm.mmu.invalidate import (
    kvm_handle_gfn_range,
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    kvm_mmu_invalidate_range_add,
)
from septum.kvm.mmu.lpage_info import LARGE_LEVELS, hugepage_set_mixed, hugepage_test_mixed, is_whole_in_slot
from septum.kvm.mmu.split import kvm_split_cross_boundary_leafs
from septum.kvm.mmu.spte import PG_LEVEL_2M, pages_per_hpage
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_unmap_gfn_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septum.kvm.memslot import Memslot
    from septum.kvm.vm import Vm

BLOCK_SHIFT: Final = 9
"""The attributes of 512 pages are one integer."""
_BLOCK: Final = 1 << BLOCK_SHIFT


def kvm_mem_is_private(kvm: Vm, gfn: int) -> bool:
    """``kvm_mem_is_private``."""
    return bool(kvm.mem_attrs[gfn >> BLOCK_SHIFT] >> (gfn & _BLOCK - 1) & 1)


def kvm_range_has_memory_attributes(kvm: Vm, start: int, end: int, private: bool) -> bool:
    """``kvm_range_has_memory_attributes``: whether all pages of a range are private, or all shared."""
    return all(kvm.mem_attrs[block] & mask == (mask if private else 0) for block, mask in _blocks(start, end))


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Blocks that a range touches, each with a mask of its pages in the range."""
    for block in range(start >> BLOCK_SHIFT, (end - 1 >> BLOCK_SHIFT) + 1):
        low = max(start - (block << BLOCK_SHIFT), 0)
        high = min(end - (block << BLOCK_SHIFT), _BLOCK)
        yield block, (1 << high) - (1 << low)


async def kvm_vm_ioctl_set_mem_attributes(kvm: Vm, attrs: MemoryAttributes) -> int:
    """``kvm_vm_ioctl_set_mem_attributes``."""
    if attrs.flags or attrs.attributes & ~KVM_MEMORY_ATTRIBUTE_PRIVATE:
        return -EINVAL
    if not attrs.size_bytes or attrs.address + attrs.size_bytes >= 1 << 64:
        return -EINVAL
    if attrs.address % PAGE_4K or attrs.size_bytes % PAGE_4K:
        return -EINVAL
    start = attrs.address // PAGE_4K
    return await kvm_vm_set_mem_attributes(kvm, start, start + attrs.size_bytes // PAGE_4K, bool(attrs.attributes))


async def kvm_vm_set_mem_attributes(kvm: Vm, start: int, end: int, private: bool) -> int:
    """``kvm_vm_set_mem_attributes``: unmaps what the pages were before, then makes them private or shared.

    0, or -ENOMEM when a mapping of 2 MiB that the range cuts could not be split (huge pages v3, where faults on the
    range are then held off for ever, unless the kernel has "failed-conversion-ends").

    The kernel stores page by page; here 512 at once, which no fault can tell: each looks at one page.
    """
    emit("attributes", f"gfn {start:#x}..{end:#x} {'private' if private else 'shared'}")
    async with kvm.slots_lock.locked():
        if kvm_range_has_memory_attributes(kvm, start, end, private):
            return 0

        async def post(kvm: Vm, gfns: GfnRange) -> int:
            kvm_arch_post_set_memory_attributes(kvm, gfns, private)
            return 0

        was = Roots.DIRECT if private else Roots.MIRROR
        r = await kvm_handle_gfn_range(kvm, start, end, was, kvm_mmu_invalidate_begin, _kvm_pre_set_memory_attributes)
        if r:
            if kvm.host.kernel.has("failed-conversion-ends"):
                await kvm_handle_gfn_range(kvm, start, end, was, kvm_mmu_invalidate_end, _nothing)
            return r
        for block, mask in _blocks(start, end):
            await step("xa_store", "mem_attr_array")
            before = kvm.mem_attrs[block]
            kvm.mem_attrs.store(block, before | mask if private else before & ~mask)
        await kvm_handle_gfn_range(kvm, start, end, was, kvm_mmu_invalidate_end, post)
        return 0


async def _nothing(kvm: Vm, gfns: GfnRange) -> int:
    return 0


async def _kvm_pre_set_memory_attributes(kvm: Vm, gfns: GfnRange) -> int:
    """``kvm_pre_set_memory_attributes``: the range counts as invalidated, mapped or not."""
    kvm_mmu_invalidate_range_add(kvm, gfns.start, gfns.end)
    return await kvm_arch_pre_set_memory_attributes(kvm, gfns)


async def kvm_arch_pre_set_memory_attributes(kvm: Vm, gfns: GfnRange) -> int:
    """``kvm_arch_pre_set_memory_attributes``: unmaps what the pages were. Private mappings that the range cuts are
    split first (huge pages v3).

    A large page that the range cuts, and that may be mapped as one now, counts as invalidated as a whole.
    """
    for level in LARGE_LEVELS if kvm.host.state.enable_tdx_huge_page else ():
        pages = pages_per_hpage(level)
        for gfn in {gfns.start & -pages, gfns.end & -pages}:
            cut = gfn < gfns.start < gfn + pages or gfn < gfns.end < gfn + pages
            if cut and is_whole_in_slot(gfns.slot, gfn, level) and not hugepage_test_mixed(gfns.slot, gfn, level):
                kvm_mmu_invalidate_range_add(kvm, gfn, gfn + pages)
    if gfns.roots is Roots.MIRROR and (r := await kvm_split_cross_boundary_leafs(kvm, gfns, shared=False)):
        return r
    return await kvm_unmap_gfn_range(kvm, gfns)


def kvm_arch_post_set_memory_attributes(kvm: Vm, gfns: GfnRange, private: bool) -> None:
    """``kvm_arch_post_set_memory_attributes``: notes which large pages are mixed now."""
    if kvm.host.state.enable_tdx_huge_page:
        _update_mixed(kvm, gfns.slot, gfns.start, gfns.end, private)


def kvm_mmu_init_memslot_memory_attributes(kvm: Vm, slot: Memslot) -> None:
    """``kvm_mmu_init_memslot_memory_attributes``: a new memslot, over pages some of which may be private already."""
    if kvm.host.state.enable_tdx_huge_page:
        _update_mixed(kvm, slot, slot.base_gfn, slot.base_gfn + slot.npages, None)


def _update_mixed(kvm: Vm, slot: Memslot, start: int, end: int, private: bool | None) -> None:
    """Level by level, upper levels from lower. ``private``: what all pages of the range are; None: not known."""
    for level in LARGE_LEVELS:
        pages = pages_per_hpage(level)
        for gfn in range(start & -pages, end, pages):
            if is_whole_in_slot(slot, gfn, level):
                attribute = kvm_mem_is_private(kvm, gfn) if private is None else private
                hugepage_set_mixed(slot, gfn, level, not hugepage_has_attrs(kvm, slot, gfn, level, attribute))


def hugepage_has_attrs(kvm: Vm, slot: Memslot, gfn: int, level: int, private: bool) -> bool:
    """``hugepage_has_attrs``: whether all of a large page is private, or all of it shared."""
    end = gfn + pages_per_hpage(level)
    if level == PG_LEVEL_2M:
        return kvm_range_has_memory_attributes(kvm, gfn, end, private)
    return all(
        not hugepage_test_mixed(slot, part, level - 1) and kvm_mem_is_private(kvm, part) == private
        for part in range(gfn, end, pages_per_hpage(level - 1))
    )
