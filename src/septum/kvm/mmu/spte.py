"""Shadow page table entries, and where they are kept.

An entry is named by the physical address at which it stands (the kernel's ``sptep``). The *mirror* tables shadow the
Secure EPT and are read by nobody but KVM; they are a map from address to value. The *direct* tables are the EPT for
shared memory: the CPU and the module walk them, so they are in physical memory.
Source: Linux 6.16, ``arch/x86/kvm/mmu/spte.{h,c}``. The software bits of leaf entries are unverified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.pages import PAGE_MASK

if TYPE_CHECKING:
    from septum.kvm.vm import Vm

SHADOW_NONPRESENT: Final = 1 << 63
"""An empty entry: the CPU does not turn a violation into a #VE (SHADOW_NONPRESENT_VALUE)."""
FROZEN_SPTE: Final = SHADOW_NONPRESENT | 0x5A0
"""Not present, and being changed by somebody: hands off."""
MMU_PRESENT: Final = 1 << 11
LARGE: Final = 1 << 7
RWX: Final = 7
_NON_LEAF: Final = SHADOW_NONPRESENT | MMU_PRESENT | 1 << 8 | RWX
_LEAF: Final = SHADOW_NONPRESENT | 3 << 57 | MMU_PRESENT | 3 << 8 | 1 << 6 | 6 << 3 | RWX
"""Host-writable, MMU-writable, dirty, accessed, write-back."""
_MMIO_MASK: Final = SHADOW_NONPRESENT | RWX
EMPTY_TABLE: Final = SHADOW_NONPRESENT.to_bytes(8, "little") * 512

PG_LEVEL_4K: Final = 1
PG_LEVEL_2M: Final = 2
PG_LEVEL_1G: Final = 3


class Sp(NamedTuple):
    """``struct kvm_mmu_page``: a page table. ``external_spt`` is the page that the module has in its place, or 0."""

    gfn: int
    level: int
    is_mirror: bool
    external_spt: int


def is_shadow_present_pte(spte: int) -> bool:
    """``is_shadow_present_pte``."""
    return bool(spte & MMU_PRESENT)


def is_frozen_spte(spte: int) -> bool:
    """``is_frozen_spte``."""
    return spte == FROZEN_SPTE


def is_last_spte(spte: int, level: int) -> bool:
    """``is_last_spte``: whether a present entry maps memory and not a table."""
    return level == PG_LEVEL_4K or bool(spte & LARGE)


def is_mmio_spte(spte: int) -> bool:
    """``is_mmio_spte`` in a TD: the guest gets a #VE for an access."""
    return not spte & _MMIO_MASK


def spte_to_pa(spte: int) -> int:
    """``spte_to_pfn``, as an address."""
    return spte & PAGE_MASK


def is_large_pte(spte: int) -> bool:
    """``is_large_pte``: whether a present entry maps more than 4 KiB."""
    return bool(spte & LARGE)


def make_spte(pa: int, level: int = PG_LEVEL_4K) -> int:
    """``make_spte``: a leaf with all permissions."""
    return pa | _LEAF | (LARGE if level > PG_LEVEL_4K else 0)


def make_small_spte(huge_spte: int, level: int, index: int) -> int:
    """``make_small_spte``: the entry that maps the ``index``-th part of what a large entry at ``level`` maps."""
    return make_spte(spte_to_pa(huge_spte) + index * (pages_per_hpage(level - 1) << 12), level - 1)


def make_nonleaf_spte(spt: int) -> int:
    """``make_nonleaf_spte``."""
    return spt | _NON_LEAF


def make_mmio_spte(gfn: int) -> int:
    """``make_mmio_spte``: not present, and not suppressing #VE."""
    return gfn << 12


def pages_per_hpage(level: int) -> int:
    """``KVM_PAGES_PER_HPAGE``: page frames that an entry at this level covers."""
    return 1 << 9 * (level - 1)


def spte_index(gfn: int, level: int) -> int:
    """``SPTE_INDEX``."""
    return gfn >> 9 * (level - 1) & 511


def read_spte(kvm: Vm, sptep: int, mirror: bool) -> int:
    """``kvm_tdp_mmu_read_spte``."""
    if mirror:
        return kvm.mirror_sptes[sptep]
    return int.from_bytes(kvm.host.module.memory.read(sptep, 8), "little")


def write_spte(kvm: Vm, sptep: int, spte: int, mirror: bool) -> None:
    """``__kvm_tdp_mmu_write_spte``."""
    if mirror:
        kvm.mirror_sptes.store(sptep, spte)
    else:
        kvm.host.module.memory.write(sptep, spte.to_bytes(8, "little"))
