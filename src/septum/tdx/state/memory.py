"""Physical memory: page contents (only where somebody wrote) and PAMT entries (only where they are not at rest)."""

from __future__ import annotations

from typing import NamedTuple

from septum.core.cells import Fixed, SharedMap

PAGE = 4096
ZERO_PAGE = bytes(PAGE)


class Memory(Fixed):
    """Contents of physical memory by page, HKID bits stripped; a page that nobody wrote is all zero.

    The recordings that the model is measured against have one flat memory without encryption, and so has this.
    """

    __slots__ = ("pages",)

    def __init__(self) -> None:
        self.pages: SharedMap[int, bytes] = SharedMap("memory", ZERO_PAGE)

    def page(self, pa: int) -> bytes:
        """The 4096 bytes of the page that holds ``pa``."""
        return self.pages.get(pa >> 12, ZERO_PAGE)

    def set_page(self, pa: int, content: bytes) -> None:
        """Replaces a page; zeros take no room."""
        self.pages.store(pa >> 12, content)

    def read(self, pa: int, size: int) -> bytes:
        """``size`` bytes from ``pa``, across pages."""
        out = b""
        while size:
            offset = pa % PAGE
            part = self.page(pa)[offset : offset + size]
            out += part
            pa += len(part)
            size -= len(part)
        return out

    def write(self, pa: int, data: bytes) -> None:
        """Writes ``data`` at ``pa``, across pages."""
        while data:
            offset = pa % PAGE
            part = data[: PAGE - offset]
            old = self.page(pa)
            self.set_page(pa, part if len(part) == PAGE else old[:offset] + part + old[offset + len(part) :])
            pa += len(part)
            data = data[len(part) :]


class PamtEntry(NamedTuple):
    """Metadata of a physical page: page type, physical address of the owner TDR, epoch at which it was blocked."""

    page_type: int
    owner: int
    bepoch: int
