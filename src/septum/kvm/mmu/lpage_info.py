"""How large a mapping may be: ``lpage_info`` of a memslot, and the level that a fault goes for.

Only kernels that map private memory 2 MiB at a time (``tdx_huge_page``) keep ``lpage_info`` here. The reference counts
that the real one has for shadow paging, and the ends of memslots that no large page fits into, are not kept: the latter
follow from the slot.
Source: Linux 6.16, ``arch/x86/kvm/mmu/mmu.c``; for KVM_LPAGE_GUEST_INHIBIT_FLAG huge pages v3,
20260106101646.24809-1-yan.y.zhao.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.kvm.mmu.spte import (
    PG_LEVEL_1G,
    PG_LEVEL_2M,
    PG_LEVEL_4K,
    is_large_pte,
    is_shadow_present_pte,
    pages_per_hpage,
)
from septum.kvm.vm import TdState

if TYPE_CHECKING:
    from septum.kvm.memslot import Memslot
    from septum.kvm.mmu.fault import PageFault
    from septum.kvm.mmu.walk import Found
    from septum.kvm.vm import Vm

KVM_LPAGE_MIXED_FLAG: Final = 1 << 31
"""Some of the pages are private and some shared."""
KVM_LPAGE_GUEST_INHIBIT_FLAG: Final = 1 << 30
"""A guest accepted less than such a page at once. Never taken back."""
LARGE_LEVELS: Final = (PG_LEVEL_2M, PG_LEVEL_1G)


def _place(gfn: int, level: int) -> tuple[int, int]:
    return level, gfn // pages_per_hpage(level)


def _set(slot: Memslot, gfn: int, level: int, flag: int, on: bool) -> None:
    place = _place(gfn, level)
    old = slot.lpage_info[place]
    slot.lpage_info.store(place, old | flag if on else old & ~flag)


def is_whole_in_slot(slot: Memslot, gfn: int, level: int) -> bool:
    """Whether the large page around ``gfn`` lies in the memslot, and as large a page of its file behind it."""
    pages = pages_per_hpage(level)
    first = gfn & -pages
    aligned = not (slot.base_gfn - slot.gmem_pgoff) % pages
    return aligned and slot.base_gfn <= first and first + pages <= slot.base_gfn + slot.npages


def hugepage_test_mixed(slot: Memslot, gfn: int, level: int) -> bool:
    """``hugepage_test_mixed``."""
    return bool(slot.lpage_info[_place(gfn, level)] & KVM_LPAGE_MIXED_FLAG)


def hugepage_set_mixed(slot: Memslot, gfn: int, level: int, mixed: bool) -> None:
    """``hugepage_set_mixed`` and ``hugepage_clear_mixed``."""
    _set(slot, gfn, level, KVM_LPAGE_MIXED_FLAG, mixed)


def hugepage_test_guest_inhibit(slot: Memslot, gfn: int, level: int) -> bool:
    """``hugepage_test_guest_inhibit``."""
    return bool(slot.lpage_info[_place(gfn, level)] & KVM_LPAGE_GUEST_INHIBIT_FLAG)


def hugepage_set_guest_inhibit(slot: Memslot, gfn: int, level: int) -> None:
    """``hugepage_set_guest_inhibit``: with ``mmu_lock`` held for write."""
    _set(slot, gfn, level, KVM_LPAGE_GUEST_INHIBIT_FLAG, True)


def tdx_gmem_max_mapping_level(kvm: Vm) -> int:
    """``tdx_gmem_max_mapping_level``: 2 MiB for a TD that is built, if huge pages are on."""
    huge = kvm.host.state.enable_tdx_huge_page and kvm.state == TdState.RUNNABLE
    return PG_LEVEL_2M if huge else PG_LEVEL_4K


def kvm_mmu_hugepage_adjust(fault: PageFault) -> None:
    """``kvm_mmu_hugepage_adjust``: the level that the fault goes for, with ``mmu_lock`` held."""
    level = fault.max_level
    if fault.slot is None or not fault.page:
        level = PG_LEVEL_4K
    else:
        slot = fault.slot
        while level > PG_LEVEL_4K and (
            not is_whole_in_slot(slot, fault.gfn, level) or slot.lpage_info[_place(fault.gfn, level)]
        ):
            level -= 1
    fault.goal_level = level


def disallowed_hugepage_adjust(fault: PageFault, found: Found) -> bool:
    """``disallowed_hugepage_adjust``: no large page in the place of a table. (Merging what the table maps would take
    TDH.MEM.PAGE.PROMOTE, which the series leaves out.) Whether the fault goes for a level less now."""
    has_table = is_shadow_present_pte(found.spte) and not is_large_pte(found.spte)
    if found.level > PG_LEVEL_4K and found.level == fault.goal_level and has_table:
        fault.goal_level -= 1
        return True
    return False
