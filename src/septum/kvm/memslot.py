"""A memslot, and finding the one that a page frame is in.

Source: Linux 6.16, ``include/linux/kvm_host.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.core.cells import Shared, SharedMap
from septum.kvm.abi import KVM_MEM_GUEST_MEMFD

if TYPE_CHECKING:
    from septum.kvm.files import File

KVM_MEMSLOT_INVALID: Final = 1 << 16
"""Flag of a slot that is being deleted or moved."""


class Memslot(Shared):
    """``struct kvm_memory_slot``: page frames from ``base_gfn``, shared at ``userspace_addr``, private in ``gmem_file``
    from page ``gmem_pgoff``. ``lpage_info``: what forbids a large page, by level and number
    (:mod:`septum.kvm.mmu.lpage_info`)."""

    id: int
    base_gfn: int
    npages: int
    flags: int
    userspace_addr: int
    lpage_info: SharedMap[tuple[int, int], int]
    gmem_file: File | None = None
    gmem_pgoff: int = 0

    def hva(self, gfn: int) -> int:
        """``__gfn_to_hva_memslot``: where the page is in the process."""
        return self.userspace_addr + (gfn - self.base_gfn << 12)


def gfn_to_memslot(slots: tuple[Memslot, ...], gfn: int) -> Memslot | None:
    """``gfn_to_memslot``."""
    for slot in slots:
        if slot.base_gfn <= gfn < slot.base_gfn + slot.npages:
            return slot
    return None


__all__ = ["KVM_MEMSLOT_INVALID", "KVM_MEM_GUEST_MEMFD", "Memslot", "gfn_to_memslot"]
