"""TD memory regions: how a kernel lays them, their PAMT areas and their reserved areas over the machine's memory.

Source: arch/x86/virt/vmx/tdx/tdx.c of Linux 6.16 (fill_out_tdmrs, tdmr_set_up_pamt, tdmr_populate_rsvd_areas). One
thing is Septum's own. Linux asks its page allocator for the PAMT areas, which prefers memory above 4 GiB on a node of
the TDMR; here they get the top of the first memory above 4 GiB that reaches into or behind the TDMR and has room, or
else of the highest memory that has room.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from septum.arch.errors import UsageError
from septum.arch.pages import PAGE_1G, PAGE_4K, PageSize, align_down, align_up
from septum.arch.pamt import pamt_area_size
from septum.arch.structures import MAX_RESERVED_AREAS, MAX_TDMRS, ReservedArea, TdmrInfo

_FIRST_MIB: Final = 1 << 20
"""Memory below this is never convertible and never given to TDX."""
_FOUR_GIB: Final = 1 << 32


class MemoryRange(NamedTuple):
    """A range of physical addresses."""

    base: int
    size: int

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.base + self.size

    @classmethod
    def between(cls, base: int, end: int) -> "MemoryRange":
        """The range from ``base`` up to, but not including, ``end``."""
        return cls(base, end - base)

    def __str__(self) -> str:
        return f"[{self.base:#x}, {self.end:#x})"


@dataclass(frozen=True, slots=True)
class Tdmr:
    """A TD memory region. Base and size are multiples of 1 GiB."""

    base: int
    size: int
    pamt_1g: MemoryRange
    pamt_2m: MemoryRange
    pamt_4k: MemoryRange
    reserved: tuple[MemoryRange, ...] = ()
    """Areas without private pages, lowest first. As in TDMR_INFO, their base counts from the TDMR's base."""

    @property
    def end(self) -> int:
        """First address behind the region."""
        return self.base + self.size

    @property
    def pamt_size(self) -> int:
        """Bytes of the three PAMT areas together."""
        return self.pamt_1g.size + self.pamt_2m.size + self.pamt_4k.size

    @property
    def available(self) -> tuple[MemoryRange, ...]:
        """The parts that may hold private pages: what is not reserved, as absolute addresses."""
        parts, start = [], self.base
        for area in self.reserved:
            parts.append(MemoryRange.between(start, self.base + area.base))
            start = self.base + area.end
        parts.append(MemoryRange.between(start, self.end))
        return tuple(part for part in parts if part.size > 0)

    def info(self) -> TdmrInfo:
        """The TDMR_INFO structure for TDH.SYS.CONFIG."""
        areas = tuple(ReservedArea(area.base, area.size) for area in self.reserved)
        return TdmrInfo(
            self.base,
            self.size,
            *self.pamt_1g,
            *self.pamt_2m,
            *self.pamt_4k,
            reserved_areas=areas + (ReservedArea(),) * (MAX_RESERVED_AREAS - len(areas)),
        )


def build_tdmrs(
    memory: Sequence[MemoryRange],
    *,
    cmrs: Sequence[MemoryRange] = (),
    holes: Sequence[MemoryRange] | None = None,
    max_tdmrs: int = MAX_TDMRS,
    max_reserved: int = MAX_RESERVED_AREAS,
) -> tuple[Tdmr, ...]:
    """Cover the usable memory with TDMRs, as the kernel does when it enables TDX.

    ``memory`` is what the firmware's map calls usable, lowest first; its first MiB is left out. What lies between the
    ranges becomes reserved areas. Give ``holes`` the CMRs to find the reserved areas between those instead, as patched
    kernels do (PATCH v8 8/9 of November 2024, not in 6.16). ``cmrs``, if given, must contain all of the memory.

    Raises UsageError where the kernel fails: memory outside the CMRs, TDMRs exhausted, too many reserved areas, no room
    for a PAMT.
    """
    usable = [MemoryRange.between(max(part.base, _FIRST_MIB), part.end) for part in memory]
    usable = [part for part in usable if part.size > 0]
    if not usable:
        raise UsageError("the memory map has no usable memory above 1 MiB; give at least one range")
    for part in usable if cmrs else ():
        if not any(cmr.base <= part.base and part.end <= cmr.end for cmr in cmrs):
            raise UsageError(f"memory {part} is in no convertible memory range; take it out of the map")
    spans = _cover(usable)
    if len(spans) > max_tdmrs:
        raise UsageError(f"TDMRs exhausted: the memory map needs {len(spans)}, the module has {max_tdmrs}")
    tdmrs = _with_pamts(spans, usable)
    pamts = [MemoryRange(tdmr.pamt_4k.base, tdmr.pamt_size) for tdmr in tdmrs]
    present = usable if holes is None else holes
    return tuple(replace(tdmr, reserved=_reserved_areas(tdmr, present, pamts, max_reserved)) for tdmr in tdmrs)


def _cover(memory: Sequence[MemoryRange]) -> list[MemoryRange]:
    """One span of whole GiB for each range of memory that the span before does not cover (fill_out_tdmrs)."""
    spans: list[MemoryRange] = []
    for part in memory:
        start, end = align_down(part.base, PAGE_1G), align_up(part.end, PAGE_1G)
        if spans:
            start = max(start, spans[-1].end)
        if start < end:
            spans.append(MemoryRange.between(start, end))
    return spans


def _with_pamts(spans: Sequence[MemoryRange], memory: Sequence[MemoryRange]) -> list[Tdmr]:
    """Give each span its PAMT areas in one piece: 4 KiB, 2 MiB, 1 GiB from the lowest address (tdmr_set_up_pamt)."""
    tops = [part.end for part in memory]
    tdmrs = []
    for span in spans:
        sizes = [pamt_area_size(span.size, size) for size in PageSize]
        room = [i for i, part in enumerate(memory) if align_down(tops[i], PAGE_4K) - part.base >= sum(sizes)]
        if not room:
            raise UsageError(f"TDMR {span}: no usable memory has {sum(sizes)} bytes in one piece for the PAMT")
        near = [i for i in room if memory[i].base >= _FOUR_GIB and memory[i].end > span.base]
        chosen = near[0] if near else room[-1]
        base = tops[chosen] = align_down(tops[chosen], PAGE_4K) - sum(sizes)
        areas = []
        for size in sizes:
            areas.append(MemoryRange(base, size))
            base += size
        pamt_4k, pamt_2m, pamt_1g = areas
        tdmrs.append(Tdmr(span.base, span.size, pamt_1g, pamt_2m, pamt_4k))
    return tdmrs


def _reserved_areas(
    tdmr: Tdmr, present: Sequence[MemoryRange], pamts: Sequence[MemoryRange], limit: int
) -> tuple[MemoryRange, ...]:
    """Holes between the present memory and PAMTs that lie in a TDMR, in order of address (tdmr_populate_rsvd_areas)."""
    holes: list[tuple[int, int]] = []
    start = tdmr.base
    for part in present:
        if part.end <= tdmr.base or part.base >= tdmr.end:
            continue
        if part.base > start:
            holes.append((start, part.base))
        start = part.end
    if start < tdmr.end:
        holes.append((start, tdmr.end))
    overlapping = [
        (max(pamt.base, tdmr.base), min(pamt.end, tdmr.end))
        for pamt in pamts
        if pamt.base < tdmr.end and tdmr.base < pamt.end
    ]
    if len(holes) + len(overlapping) > limit:
        raise UsageError(
            f"TDMR [{tdmr.base:#x}, {tdmr.end:#x}): too many reserved areas: {len(holes)} for holes in memory,"
            f" {len(overlapping)} for PAMTs, limit {limit}; take the holes between the CMRs, or a map with fewer"
        )
    return tuple(MemoryRange(low - tdmr.base, high - low) for low, high in sorted(holes + overlapping))
