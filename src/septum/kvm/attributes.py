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
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_unmap_gfn_range

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    The kernel stores page by page; here 512 at once, which no fault can tell: each looks at one page.
    """
    emit("attributes", f"gfn {start:#x}..{end:#x} {'private' if private else 'shared'}")
    async with kvm.slots_lock.locked():
        if kvm_range_has_memory_attributes(kvm, start, end, private):
            return 0

        was = Roots.DIRECT if private else Roots.MIRROR
        await kvm_handle_gfn_range(kvm, start, end, was, kvm_mmu_invalidate_begin, _kvm_pre_set_memory_attributes)
        for block, mask in _blocks(start, end):
            await step("xa_store", "mem_attr_array")
            before = kvm.mem_attrs[block]
            kvm.mem_attrs.store(block, before | mask if private else before & ~mask)
        await kvm_handle_gfn_range(kvm, start, end, was, kvm_mmu_invalidate_end, _post_set_memory_attributes)
        return 0


async def _kvm_pre_set_memory_attributes(kvm: Vm, gfns: GfnRange) -> bool:
    """``kvm_pre_set_memory_attributes``: the range counts as invalidated, mapped or not."""
    kvm_mmu_invalidate_range_add(kvm, gfns.start, gfns.end)
    return await kvm_unmap_gfn_range(kvm, gfns)


async def _post_set_memory_attributes(kvm: Vm, gfns: GfnRange) -> bool:
    """``kvm_arch_post_set_memory_attributes``: about huge pages, which a TD does not get."""
    return False
