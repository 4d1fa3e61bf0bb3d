"""The pages of a guest_memfd file.

Folios have one page, or, with the fix "huge-pages", 2 MiB where that fits: the series (huge pages v3,
20260106101646.24809-1-yan.y.zhao) leaves to guest_memfd how it comes by large folios, and works on any. Those here are
taken apart when a part of them is freed, and never put together again.
Source: Linux 6.16, ``virt/kvm/guest_memfd.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.pages import PAGE_4K, PAGES_4K_IN_2M
from septum.core.cells import Shared, SharedMap
from septum.core.klocks import RwSem
from septum.core.steps import emit

if TYPE_CHECKING:
    from septum.kvm.memslot import Memslot
    from septum.kvm.vm import Vm

UPTODATE: Final = 1
"""Bit 0 of a folio's entry: the page is prepared for the guest."""
_BLOCK: Final = PAGES_4K_IN_2M
_ALL: Final = (1 << _BLOCK) - 1


class HugeFolio(NamedTuple):
    """2 MiB of contiguous memory: its address, and a bit for each page that is still the file's, and that is prepared.

    Once a page is gone, those that are left are folios of one page.
    """

    page: int
    pages: int
    uptodate: int


class Gmem(Shared):
    """``struct kvm_gmem`` and the inode behind it.

    ``bindings``: ranges of page indices with the memslots that use them. ``folios``: page by index, with
    :data:`UPTODATE`; ``huge``: large folios by number of their 512 indices; ``present``: for 512 indices each, a bit
    for every page that is there.
    """

    kvm: Vm
    size: int
    invalidate_lock: RwSem
    folios: SharedMap[int, int]
    huge: SharedMap[int, HugeFolio | None]
    present: SharedMap[int, int]
    bindings: tuple[tuple[int, int, Memslot], ...] = ()


def kvm_gmem_get_folio(gmem: Gmem, index: int) -> int:
    """``kvm_gmem_get_folio``: the page at an index, with :data:`UPTODATE`, allocated if it was not there; 0: none."""
    page = _look_up(gmem, index)
    if page:
        return page
    block, bit = index // _BLOCK, 1 << (index % _BLOCK)
    pages = gmem.kvm.host.pages
    is_whole = (block + 1) * _BLOCK <= gmem.size // PAGE_4K and not gmem.present[block]
    if is_whole and gmem.kvm.host.state.enable_tdx_huge_page and (page := pages.alloc_huge()):
        gmem.huge[block] = HugeFolio(page, _ALL, 0)
        gmem.present[block] = _ALL
        return page + (index % _BLOCK) * PAGE_4K
    page = pages.alloc()
    if page:
        gmem.folios[index] = page
        gmem.present[block] = gmem.present[block] | bit
    return page


def _look_up(gmem: Gmem, index: int) -> int:
    huge, place = gmem.huge[index // _BLOCK], index % _BLOCK
    if huge is not None and huge.pages >> place & 1:
        return huge.page + place * PAGE_4K | (UPTODATE if huge.uptodate >> place & 1 else 0)
    return gmem.folios[index]


def mark_uptodate(gmem: Gmem, index: int) -> None:
    """``foliomark_uptodate``, page by page."""
    block, bit = index // _BLOCK, 1 << (index % _BLOCK)
    huge = gmem.huge[block]
    if huge is not None and huge.pages & bit:
        gmem.huge[block] = huge._replace(uptodate=huge.uptodate | bit)
    else:
        gmem.folios[index] = gmem.folios[index] | UPTODATE


def is_in_huge_folio(gmem: Gmem, index: int) -> bool:
    """Whether the page at an index is one of a folio of 2 MiB that is still whole."""
    huge = gmem.huge[index // _BLOCK]
    return huge is not None and huge.pages == _ALL


def truncate_inode_pages_range(gmem: Gmem, start: int, end: int) -> None:
    """``truncate_inode_pages_range``: drops pages, splitting a large folio that loses a part. A page that still has
    references, because the module would not give it back, is lost."""
    pages = gmem.kvm.host.pages
    for block in range(start // _BLOCK, (end - 1) // _BLOCK + 1):
        present, first = gmem.present[block], block * _BLOCK
        low, high = max(start - first, 0), min(end - first, _BLOCK)
        going = present & (1 << high) - (1 << low)
        gmem.present.store(block, present & ~going)
        huge = gmem.huge[block]
        if huge is not None:
            left = huge.pages & ~going
            gmem.huge.store(block, HugeFolio(huge.page, left, huge.uptodate & left) if left else None)
        while going:
            bit = going & -going
            going ^= bit
            place = bit.bit_length() - 1
            of_huge = huge is not None and huge.pages & bit
            pa = huge.page + place * PAGE_4K if huge and of_huge else gmem.folios.pop(first + place) & ~UPTODATE
            emit("gmem", f"{gmem} frees page {first + place:#x}")
            pages.put(pa)
            if pages.is_allocated(pa):
                pages.leak(pa, "private page still referenced after its file was truncated")
