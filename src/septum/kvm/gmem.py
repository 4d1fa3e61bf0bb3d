"""guest_memfd: files whose pages only a guest can use.

Source: Linux 6.16, ``virt/kvm/guest_memfd.c``. Looking up a folio and locking it are one action here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING

from septum.arch.pages import PAGE_4K, PAGES_4K_IN_2M, align_down, align_up
from septum.core.cells import SharedMap
from septum.core.klocks import RwSem
from septum.core.steps import Step, step
from septum.kvm.abi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, CreateGuestMemfd
from septum.kvm.attributes import kvm_mem_is_private
from septum.kvm.files import File, fput, get_file_active
from septum.kvm.gmem_folios import (
    UPTODATE,
    Gmem,
    is_in_huge_folio,
    kvm_gmem_get_folio,
    mark_uptodate,
    truncate_inode_pages_range,
)
from septum.kvm.memslot import KVM_MEM_GUEST_MEMFD, Memslot, gfn_to_memslot
from septum.kvm.mmu.invalidate import kvm_mmu_invalidate_begin, kvm_mmu_invalidate_end, kvm_mmu_invalidate_range_add
from septum.kvm.mmu.split import kvm_split_cross_boundary_leafs
from septum.kvm.mmu.spte import PG_LEVEL_2M, PG_LEVEL_4K
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_flush_remote_tlbs, kvm_unmap_gfn_range
from septum.kvm.signals import signal_pending
from septum.tdx.state.memory import ZERO_PAGE

if TYPE_CHECKING:
    from septum.kvm.vm import Vm

#: ``kvm_gmem_populate_cb``: gfn, page, the page that holds its content; 0 or a negative errno.
PostPopulate = Callable[[int, int, int], Coroutine[Step, None, int]]


def kvm_gmem_create(kvm: Vm, args: CreateGuestMemfd) -> File | int:
    """``kvm_gmem_create``: a file that holds a reference to the VM, or a negative errno."""
    if args.flags:
        return -EINVAL
    if not 0 < args.size_bytes < 1 << 63 or args.size_bytes % PAGE_4K:
        return -EINVAL
    number = kvm.gmem_allocations
    kvm.gmem_allocations += 1
    key = ("gmem", kvm.number, number, args.size_bytes)
    file = kvm.host.once(key, lambda: _gmem_file(kvm, number, args.size_bytes))
    kvm.users_count += 1
    return file


def _gmem_file(kvm: Vm, number: int, size: int) -> File:
    name = f"gmem[{kvm.number}.{number}]"
    gmem = Gmem(
        name,
        kvm=kvm,
        size=size,
        invalidate_lock=RwSem(f"filemap_invalidate_lock[{kvm.number * 10_000 + number}]"),
        folios=SharedMap(f"{name}.folios", 0),
        huge=SharedMap(f"{name}.huge folios"),
        present=SharedMap(f"{name}.present", 0),
    )
    return File(f"{name}.file", kind="gmem", private_data=gmem, release=kvm_gmem_release)


# -- pages -------------------------------------------------------------------------------------------------------------


def kvm_gmem_get_index(slot: Memslot, gfn: int) -> int:
    """``kvm_gmem_get_index``: the page's index in the file."""
    return gfn - slot.base_gfn + slot.gmem_pgoff


async def kvm_gmem_get_pfn(kvm: Vm, slot: Memslot, gfn: int) -> tuple[int, int]:
    """``kvm_gmem_get_pfn``: the page behind a private gfn, with a reference, or a negative errno; and the largest level
    that its folio can be mapped at (``max_order``)."""
    await step("read gmem file of", slot)
    file = get_file_active(slot.gmem_file)
    if file is None:
        return -EFAULT, PG_LEVEL_4K
    await step("grab folio", gfn)
    gmem, index = file.private_data, kvm_gmem_get_index(slot, gfn)
    folio = kvm_gmem_get_folio(gmem, index)
    if not folio:
        fput(kvm.host, file)
        return -ENOMEM, PG_LEVEL_4K
    if not folio & UPTODATE:
        kvm.host.module.memory.set_page(folio, ZERO_PAGE)
        mark_uptodate(gmem, index)
    kvm.host.pages.get(folio & ~UPTODATE)
    level = PG_LEVEL_2M if is_in_huge_folio(gmem, index) else PG_LEVEL_4K
    fput(kvm.host, file)
    return folio & ~UPTODATE, level


async def kvm_gmem_populate(kvm: Vm, gfn: int, source: int, post_populate: PostPopulate) -> int:
    """``kvm_gmem_populate`` for one page, with ``slots_lock`` held: how many pages were populated, or a negative errno.

    The page of userspace at ``source`` is pinned with the file's invalidate lock held, which is wrong where ``source``
    is a mapping of a guest_memfd file itself: ``mmap_lock`` comes before that lock. The fix "gup-before-gmem-lock" pins
    it before (7.0).

    A page that is prepared already is refused with -EEXIST. That goes also for one that ``post_populate`` mapped before
    it failed, because mapping it prepared it: only after a hole is punched there can it be tried again.
    """
    slot = gfn_to_memslot(kvm.memslots, gfn)
    if slot is None or not slot.flags & KVM_MEM_GUEST_MEMFD:
        return -EINVAL
    file = get_file_active(slot.gmem_file)
    if file is None:
        return -EFAULT
    gmem: Gmem = file.private_data
    pinned = await kvm.mm.get_user_pages_fast(source) if kvm.host.kernel.has("gup-before-gmem-lock") else 0
    if pinned < 0:
        ret = pinned
    else:
        async with gmem.invalidate_lock.write():
            ret = await _populate(kvm, gmem, slot, gfn, source, pinned, post_populate)
        if pinned:
            kvm.host.pages.put(pinned)
    fput(kvm.host, file)
    return ret or 1


async def _populate(
    kvm: Vm, gmem: Gmem, slot: Memslot, gfn: int, source: int, pinned: int, post_populate: PostPopulate
) -> int:
    if signal_pending(kvm.host):
        return -EINTR
    index = kvm_gmem_get_index(slot, gfn)
    folio = kvm_gmem_get_folio(gmem, index)
    if not folio:
        return -ENOMEM
    if folio & UPTODATE:
        return -EEXIST
    if not kvm_mem_is_private(kvm, gfn):
        return -EINVAL
    kvm.host.pages.get(folio)
    source_page = pinned or await kvm.mm.get_user_pages_fast(source)
    ret = source_page if source_page < 0 else await post_populate(gfn, folio, source_page)
    if source_page > 0 and not pinned:
        kvm.host.pages.put(source_page)
    if not ret:
        mark_uptodate(gmem, index)
    kvm.host.pages.put(folio)
    return ret


# -- taking memory away ------------------------------------------------------------------------------------------------


async def kvm_gmem_fallocate(gmem: Gmem, mode: int, offset: int, length: int) -> int:
    """``kvm_gmem_fallocate``: punches a hole, or allocates pages."""
    if not mode & FALLOC_FL_KEEP_SIZE or mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE):
        return -EOPNOTSUPP
    if offset < 0 or length <= 0 or offset % PAGE_4K or length % PAGE_4K:
        return -EINVAL
    start, end = offset // PAGE_4K, (offset + length) // PAGE_4K
    if mode & FALLOC_FL_PUNCH_HOLE:
        return await kvm_gmem_punch_hole(gmem, start, end)
    return await kvm_gmem_allocate(gmem, start, end)


async def kvm_gmem_punch_hole(gmem: Gmem, start: int, end: int) -> int:
    """``kvm_gmem_punch_hole``: unmaps page indices from ``start`` up to ``end``, then frees them. 0, or -ENOMEM when a
    mapping of 2 MiB that the hole cuts could not be split.

    Faults on the hole are held off meanwhile; with the fix "hole-invalidates-folios" those on the rest of a folio that
    it cuts are too.
    """
    ret, low, high = 0, start, end
    host = gmem.kvm.host
    if host.kernel.has("hole-invalidates-folios"):
        low, high = align_down(start, PAGES_4K_IN_2M), align_up(end, PAGES_4K_IN_2M)
    async with gmem.invalidate_lock.write():
        if host.state.enable_tdx_huge_page:
            await kvm_gmem_invalidate_begin(gmem, low, high, zap=False)
            ret = await kvm_gmem_split_private(gmem, start, end)
            if not ret:
                await kvm_gmem_zap(gmem, start, end)
        else:
            await kvm_gmem_invalidate_begin(gmem, low, high)
        if not ret:
            await step("truncate", gmem)
            truncate_inode_pages_range(gmem, start, min(end, gmem.size // PAGE_4K))
        await kvm_gmem_invalidate_end(gmem, low, high)
    return ret


async def kvm_gmem_allocate(gmem: Gmem, start: int, end: int) -> int:
    """``kvm_gmem_allocate``: pages before anybody needs them."""
    if end * PAGE_4K > gmem.size:
        return -EINVAL
    async with gmem.invalidate_lock.read():
        for index in range(start, end):
            if signal_pending(gmem.kvm.host):
                return -EINTR
            await step("grab folio", index)
            if not kvm_gmem_get_folio(gmem, index):
                return -ENOMEM
    return 0


def _bound(gmem: Gmem, start: int, end: int) -> list[GfnRange]:
    """The parts of a range that memslots use, as private page frames."""
    return [
        GfnRange(slot, first, first + min(end, high) - max(start, low), Roots.MIRROR)
        for low, high, slot in gmem.bindings
        if max(start, low) < min(end, high)
        for first in (slot.base_gfn + max(start, low) - slot.gmem_pgoff,)
    ]


async def kvm_gmem_invalidate_begin(gmem: Gmem, start: int, end: int, *, zap: bool = True) -> None:
    """``kvm_gmem_invalidate_begin``: keeps faults away until the end, and unmaps. (The base of huge pages v3 unmaps
    later, without ``zap`` here.)"""
    kvm, parts = gmem.kvm, _bound(gmem, start, end)
    if not parts:
        return
    async with kvm.mmu_lock.write():
        kvm_mmu_invalidate_begin(kvm)
        for gfns in parts:
            kvm_mmu_invalidate_range_add(kvm, gfns.start, gfns.end)
        if zap:
            await _unmap(kvm, parts)


async def kvm_gmem_split_private(gmem: Gmem, start: int, end: int) -> int:
    """``kvm_gmem_split_private`` (huge pages v3): mappings that a range cuts become smaller. 0 or -ENOMEM."""
    kvm, ret = gmem.kvm, 0
    async with kvm.mmu_lock.write():
        for gfns in _bound(gmem, start, end):
            ret = ret or await kvm_split_cross_boundary_leafs(kvm, gfns, shared=False)
    return ret


async def kvm_gmem_zap(gmem: Gmem, start: int, end: int) -> None:
    """``kvm_gmem_zap`` (base of huge pages v3)."""
    async with gmem.kvm.mmu_lock.write():
        await _unmap(gmem.kvm, _bound(gmem, start, end))


async def _unmap(kvm: Vm, parts: list[GfnRange]) -> None:
    flush = False
    for gfns in parts:
        flush = await kvm_unmap_gfn_range(kvm, gfns) or flush
    if flush:
        await kvm_flush_remote_tlbs(kvm)


async def kvm_gmem_invalidate_end(gmem: Gmem, start: int, end: int) -> None:
    """``kvm_gmem_invalidate_end``."""
    if _bound(gmem, start, end):
        async with gmem.kvm.mmu_lock.write():
            kvm_mmu_invalidate_end(gmem.kvm)


async def kvm_gmem_release(gmem: Gmem) -> None:
    """``kvm_gmem_release``: the last reference to the file is gone. All its pages are unmapped, the VM is let go, and
    with the inode the pages go too."""
    from septum.kvm.lifetime import kvm_put_kvm  # noqa: PLC0415 -- the end of a VM is above what it is made of

    kvm, end = gmem.kvm, gmem.size // PAGE_4K
    async with kvm.slots_lock.locked(), gmem.invalidate_lock.write():
        for _, _, slot in gmem.bindings:
            slot.gmem_file = None
        await kvm_gmem_invalidate_begin(gmem, 0, end)
        await kvm_gmem_invalidate_end(gmem, 0, end)
    gmem.bindings = ()
    await kvm_put_kvm(kvm)
    truncate_inode_pages_range(gmem, 0, end)


# -- memslots ----------------------------------------------------------------------------------------------------------


async def kvm_gmem_bind(kvm: Vm, slot: Memslot, file: File | None, offset: int) -> int:
    """``kvm_gmem_bind``: a new memslot takes a part of the file. 0, -EBADF or -EINVAL."""
    if file is None:
        return -EBADF
    r = await _bind(kvm, slot, file, offset)
    fput(kvm.host, file)
    return r


async def _bind(kvm: Vm, slot: Memslot, file: File, offset: int) -> int:
    if file.kind != "gmem" or file.private_data.kvm is not kvm:
        return -EINVAL
    gmem: Gmem = file.private_data
    if offset % PAGE_4K or offset + slot.npages * PAGE_4K > gmem.size:
        return -EINVAL
    start = offset // PAGE_4K
    async with gmem.invalidate_lock.write():
        if _bound(gmem, start, start + slot.npages):
            return -EINVAL
        slot.gmem_file = file
        slot.gmem_pgoff = start
        gmem.bindings = (*gmem.bindings, (start, start + slot.npages, slot))
    return 0


async def kvm_gmem_unbind(kvm: Vm, slot: Memslot) -> None:
    """``kvm_gmem_unbind``: nothing to do if the file is (being) closed; its release drops all bindings."""
    file = get_file_active(slot.gmem_file)
    if file is None:
        return
    gmem: Gmem = file.private_data
    async with gmem.invalidate_lock.write():
        gmem.bindings = tuple(binding for binding in gmem.bindings if binding[2] is not slot)
        slot.gmem_file = None
    fput(kvm.host, file)
