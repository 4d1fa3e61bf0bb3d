"""The host's page allocator, and the account of what was lost and why.

Pages come from the TDMRs' available memory, lowest free page first, so that equal histories give equal addresses.
What is kept for a page is two bits, in integers for 2 MiB each: memory of many GiB costs next to nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_1G, PAGE_2M, PAGE_4K, PAGES_4K_IN_2M, Level, align_down, align_up
from septum.arch.pamt import PageType
from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.steps import emit, require
from septum.tdx.state.memory import ZERO_PAGE

if TYPE_CHECKING:
    from septum.tdx.module import Module

_FULL: Final = (1 << PAGES_4K_IN_2M) - 1
LOW_MEMORY: Final = 16 << 20
"""Linux itself lives below; nothing is allocated there."""
OWNED_BY_NOBODY: Final = (PageType.NDA, PageType.RSVD)


class PageCounters(Shared):
    """Pages that are free, and the first 2 MiB block that may have one. No block above ``top`` is free as a whole."""

    free: int
    hint: int = 0
    top: int = 0


class HostPages(Fixed):
    """``alloc_page``, ``get_page``, ``put_page`` and ``__free_page`` of the host.

    A page has one reference when it is allocated. Of the others, the first is a bit and the rest a number: nearly all
    pages of a TD have exactly two (guest_memfd and the Secure EPT).
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._starts: list[int] = []
        self._first_blocks: list[int] = []
        blocks = 0
        for tdmr in module.platform.tdmrs:
            for part in tdmr.available:
                start, end = align_up(max(part.base, LOW_MEMORY), PAGE_2M), align_down(part.end, PAGE_2M)
                if start < end:
                    self._starts.append(start)
                    self._first_blocks.append(blocks)
                    blocks += (end - start) // PAGE_2M
        self.total = blocks * PAGES_4K_IN_2M
        self._counters = PageCounters("host pages", free=self.total, top=blocks - 1)
        self._used: SharedMap[int, int] = SharedMap("pages in use", 0)
        self._second: SharedMap[int, int] = SharedMap("pages with a second reference", 0)
        self._more: SharedMap[int, int] = SharedMap("pages with more references", 0)
        self.leaks: dict[int, str] = {}
        """Pages that the kernel gave up because the module may still have them, and why (for reports only)."""
        self.peak = 0
        """Most pages that were in use at one time."""

    @property
    def in_use(self) -> int:
        """Pages allocated and not freed, leaked ones among them."""
        return self.total - self._counters.free

    def available(self, count: int) -> bool:
        """Whether that many pages are free."""
        return self._counters.free >= count

    def is_allocated(self, pa: int) -> bool:
        """Whether the page at ``pa`` is in use."""
        block, bit = self._place(pa)
        return bool(self._used[block] & bit)

    def alloc(self) -> int:
        """``alloc_page``: the address of a page; 0 when memory is exhausted."""
        counters = self._counters
        if not counters.free:
            return 0
        block = counters.hint
        while (used := self._used[block]) == _FULL:
            block += 1
        lowest = ~used & (used + 1)
        self._used[block] = used | lowest
        counters.hint = block
        counters.free -= 1
        self.peak = max(self.peak, self.in_use)
        return self._address(block) + PAGE_4K * (lowest.bit_length() - 1)

    def alloc_huge(self) -> int:
        """``alloc_pages`` of 2 MiB: the address of the highest free block; 0 when there is none.

        Its 512 pages have a reference each, and are freed one by one.
        """
        counters = self._counters
        block = counters.top
        while block >= 0 and self._used[block]:
            block -= 1
        if block < 0:
            return 0
        counters.top = block - 1
        self._used[block] = _FULL
        counters.free -= PAGES_4K_IN_2M
        self.peak = max(self.peak, self.in_use)
        return self._address(block)

    def require_allocated(self, pa: int) -> None:
        """:raises Violation: when the page is free."""
        require(self.is_allocated(pa), "no page is used after it is freed", f"page {pa:#x} is used, but it is free")

    def get(self, pa: int) -> None:
        """``get_page``: one more reference.

        :raises Violation: when the page is free.
        """
        self.require_allocated(pa)
        block, bit = self._place(pa)
        second = self._second[block]
        if second & bit:
            self._more[pa] = self._more[pa] + 1
        else:
            self._second[block] = second | bit

    def put(self, pa: int) -> None:
        """``put_page``: drops a reference; the page is freed with the last one."""
        block, bit = self._place(pa)
        second = self._second[block]
        if not second & bit:
            self.free(pa)
        elif more := self._more[pa]:
            self._more.store(pa, more - 1)
        else:
            self._second.store(block, second & ~bit)

    def free(self, pa: int) -> None:
        """``__free_page``.

        :raises Violation: when the page is not allocated, has more references, or still belongs to the module.
        """
        block, bit = self._place(pa)
        used = self._used[block]
        require(bool(used & bit), "no page is freed twice", f"page {pa:#x} is freed, but it is free")
        require(not self._second[block] & bit, "balanced references", f"page {pa:#x} is freed, but has references")
        for key in (pa, pa & -PAGE_2M | Level.PD, pa & -PAGE_1G | Level.PDPT):
            kind = self._module.pamt_entry(key).page_type
            require(
                kind in OWNED_BY_NOBODY,
                "no page is freed that the module owns",
                f"page {pa:#x} is freed, but the module uses it as {PageType(kind).name}",
            )
        self._used.store(block, used & ~bit)
        self._counters.free += 1
        self._counters.hint = min(self._counters.hint, block)
        self._counters.top = max(self._counters.top, block)
        self._module.memory.set_page(pa, ZERO_PAGE)
        self.leaks.pop(pa, None)

    def leak(self, pa: int, reason: str) -> None:
        """The kernel forgets a page without freeing it."""
        self.leaks[pa] = reason
        emit("leak", f"page {pa:#x} leaked: {reason}")

    def leaks_by_reason(self) -> Counter[str]:
        """How many pages were leaked, and why."""
        return Counter(self.leaks.values())

    def _address(self, block: int) -> int:
        """Where a block of 2 MiB begins."""
        part = bisect_right(self._first_blocks, block) - 1
        return self._starts[part] + PAGE_2M * (block - self._first_blocks[part])

    def _place(self, pa: int) -> tuple[int, int]:
        """The block of 2 MiB that holds a page, and the page's bit in it."""
        part = bisect_right(self._starts, pa) - 1
        block = self._first_blocks[part] + (pa - self._starts[part]) // PAGE_2M
        return block, 1 << (pa >> 12 & PAGES_4K_IN_2M - 1)
