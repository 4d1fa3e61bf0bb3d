"""guest_memfd: files whose pages only a guest can use.

Source: Linux 6.16, ``virt/kvm/guest_memfd.c``. Folios have one page. Looking up a folio and locking it are one action
here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from errno import EBADF, EEXIST, EFAULT, EINTR, EINVAL, ENOMEM, EOPNOTSUPP
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K
from septum.core.cells import Shared, SharedMap
from septum.core.klocks import RwSem
from septum.core.steps import Step, step
from septum.kvm.abi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, CreateGuestMemfd
from septum.kvm.attributes import kvm_mem_is_private
from septum.kvm.files import File, fput, get_file_active
from septum.kvm.memslot import KVM_MEM_GUEST_MEMFD, Memslot, gfn_to_memslot
from septum.kvm.mmu.invalidate import kvm_mmu_invalidate_begin, kvm_mmu_invalidate_end, kvm_mmu_invalidate_range_add
from septum.kvm.mmu.zap import GfnRange, Roots, kvm_flush_remote_tlbs, kvm_unmap_gfn_range
from septum.kvm.signals import signal_pending
from septum.tdx.state.memory import ZERO_PAGE

if TYPE_CHECKING:
    from septum.kvm.user_memory import UserPtr
    from septum.kvm.vm import Vm

UPTODATE: Final = 1
"""Bit 0 of a folio's entry: the page is prepared for the guest."""
_BLOCK_SHIFT: Final = 9

#: ``kvm_gmem_populate_cb``: gfn, page, where its content is; 0 or a negative errno.
PostPopulate = Callable[[int, int, "UserPtr"], Coroutine[Step, None, int]]


class Gmem(Shared):
    """``struct kvm_gmem`` and the inode behind it.

    ``bindings``: ranges of page indices with the memslots that use them. ``folios``: page by index, with
    :data:`UPTODATE`; ``present``: for 512 indices each, a bit for every folio.
    """

    kvm: Vm
    size: int
    invalidate_lock: RwSem
    folios: SharedMap[int, int]
    present: SharedMap[int, int]
    bindings: tuple[tuple[int, int, Memslot], ...] = ()


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
        present=SharedMap(f"{name}.present", 0),
    )
    return File(f"{name}.file", kind="gmem", private_data=gmem, release=kvm_gmem_release)


# -- folios ------------------------------------------------------------------------------------------------------------


def kvm_gmem_get_folio(gmem: Gmem, index: int) -> int:
    """``kvm_gmem_get_folio``: the folio's entry, the page allocated if it was not there; 0 for -ENOMEM."""
    folio = gmem.folios[index]
    if not folio:
        folio = gmem.kvm.host.pages.alloc()
        if folio:
            gmem.folios[index] = folio
            block = index >> _BLOCK_SHIFT
            gmem.present[block] = gmem.present[block] | 1 << (index & 511)
    return folio


def truncate_inode_pages_range(gmem: Gmem, start: int, end: int) -> None:
    """``truncate_inode_pages_range``: drops folios. A page that still has references, because the module would not
    give it back, is lost."""
    pages = gmem.kvm.host.pages
    for block in range(start >> _BLOCK_SHIFT, (end - 1 >> _BLOCK_SHIFT) + 1):
        present = gmem.present[block]
        low, high = max(start - (block << _BLOCK_SHIFT), 0), min(end - (block << _BLOCK_SHIFT), 512)
        going = present & (1 << high) - (1 << low)
        gmem.present.store(block, present & ~going)
        while going:
            bit = going & -going
            going ^= bit
            pa = gmem.folios.pop((block << _BLOCK_SHIFT) + bit.bit_length() - 1) & ~UPTODATE
            pages.put(pa)
            if pages.is_allocated(pa):
                pages.leak(pa, "private page still referenced after its file was truncated")


def kvm_gmem_get_index(slot: Memslot, gfn: int) -> int:
    """``kvm_gmem_get_index``: the page's index in the file."""
    return gfn - slot.base_gfn + slot.gmem_pgoff


async def kvm_gmem_get_pfn(kvm: Vm, slot: Memslot, gfn: int) -> int:
    """``kvm_gmem_get_pfn``: the page behind a private gfn, with a reference; or a negative errno."""
    await step("read gmem file of", slot)
    file = get_file_active(slot.gmem_file)
    if file is None:
        return -EFAULT
    await step("grab folio", gfn)
    gmem, index = file.private_data, kvm_gmem_get_index(slot, gfn)
    folio = kvm_gmem_get_folio(gmem, index)
    if not folio:
        fput(kvm.host, file)
        return -ENOMEM
    if not folio & UPTODATE:
        kvm.host.module.memory.set_page(folio, ZERO_PAGE)
        folio |= UPTODATE
        gmem.folios[index] = folio
    kvm.host.pages.get(folio & ~UPTODATE)
    fput(kvm.host, file)
    return folio & ~UPTODATE


async def kvm_gmem_populate(kvm: Vm, gfn: int, source: UserPtr, post_populate: PostPopulate) -> int:
    """``kvm_gmem_populate`` for one page, with ``slots_lock`` held: how many pages were populated, or a negative errno.

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
    async with gmem.invalidate_lock.write():
        ret = await _populate(kvm, gmem, slot, gfn, source, post_populate)
    fput(kvm.host, file)
    return ret or 1


async def _populate(kvm: Vm, gmem: Gmem, slot: Memslot, gfn: int, source: UserPtr, post_populate: PostPopulate) -> int:
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
    ret = await post_populate(gfn, folio, source)
    if not ret:
        gmem.folios[index] = folio | UPTODATE
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
    """``kvm_gmem_punch_hole``: unmaps page indices from ``start`` up to ``end``, then frees them."""
    async with gmem.invalidate_lock.write():
        await kvm_gmem_invalidate_begin(gmem, start, end)
        truncate_inode_pages_range(gmem, start, min(end, gmem.size // PAGE_4K))
        await kvm_gmem_invalidate_end(gmem, start, end)
    return 0


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


def _bound(gmem: Gmem, start: int, end: int) -> list[tuple[int, int, Memslot]]:
    """The parts of a range that memslots use."""
    return [
        (max(start, low), min(end, high), slot) for low, high, slot in gmem.bindings if max(start, low) < min(end, high)
    ]


async def kvm_gmem_invalidate_begin(gmem: Gmem, start: int, end: int) -> None:
    """``kvm_gmem_invalidate_begin``: unmaps, and keeps faults away until the end."""
    kvm, parts = gmem.kvm, _bound(gmem, start, end)
    if not parts:
        return
    async with kvm.mmu_lock.write():
        kvm_mmu_invalidate_begin(kvm)
        flush = False
        for low, high, slot in parts:
            first = slot.base_gfn + low - slot.gmem_pgoff
            gfns = GfnRange(first, first + high - low, Roots.MIRROR)
            kvm_mmu_invalidate_range_add(kvm, gfns.start, gfns.end)
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
