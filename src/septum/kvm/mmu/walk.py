"""Finding entries in a page table: ``for_each_tdp_pte`` and its relatives.

Source: Linux 6.16, ``arch/x86/kvm/mmu/tdp_iter.{h,c}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from septum.kvm.mmu.spte import (
    is_last_spte,
    is_shadow_present_pte,
    pages_per_hpage,
    read_spte,
    spte_index,
    spte_to_pa,
)

if TYPE_CHECKING:
    from septum.kvm.vm import Vm


class Found(NamedTuple):
    """An entry: the first page frame it covers, its level, address and value when it was read."""

    gfn: int
    level: int
    sptep: int
    spte: int


def gfn_root_bits(kvm: Vm, mirror: bool) -> int:
    """``kvm_gfn_root_bits``: the SHARED bit, which the CPU walks the direct tables with and KVM's page frames lack."""
    return 0 if mirror else kvm.gfn_direct_bits


def walk_to(kvm: Vm, root: int, mirror: bool, gfn: int, goal: int) -> Found:
    """Walks towards the entry for ``gfn`` at level ``goal``, as far as there are tables."""
    spt, level, walked = root, kvm.sps[root].level, gfn | gfn_root_bits(kvm, mirror)
    while True:
        sptep = spt + 8 * spte_index(walked, level)
        spte = read_spte(kvm, sptep, mirror)
        if level == goal or not is_shadow_present_pte(spte) or is_last_spte(spte, level):
            return Found(gfn & -pages_per_hpage(level), level, sptep, spte)
        spt, level = spte_to_pa(spte), level - 1


def present_sptes(
    kvm: Vm, spt: int, mirror: bool, start: int, end: int, min_level: int, root_bits: int
) -> Iterator[Found]:
    """The present entries at ``min_level``, and leaves above it, that cover page frames from ``start`` up to ``end``.

    Tables are read as the walk comes to them. ``root_bits`` is what :func:`gfn_root_bits` says, or 0 to see all
    entries of the root table.
    """
    sp = kvm.sps[spt]
    span = pages_per_hpage(sp.level)
    first, last = max((start - sp.gfn) // span, 0), min((end - 1 - sp.gfn) // span, 511)
    offset = spte_index(root_bits, sp.level)
    for index in range(first, last + 1):
        sptep = spt + 8 * (index | offset)
        spte = read_spte(kvm, sptep, mirror)
        if not is_shadow_present_pte(spte):
            continue
        if sp.level == min_level or is_last_spte(spte, sp.level):
            yield Found(sp.gfn + index * span, sp.level, sptep, spte)
        else:
            yield from present_sptes(kvm, spte_to_pa(spte), mirror, start, end, min_level, root_bits)
