"""What TDH.SYS.CONFIG wants of the TDMRs that it is given.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_sys_config.c``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from septum.arch.pages import (
    PAGE_1G,
    PAGE_4K,
    PaFormat,
    contains,
    is_aligned,
    is_below_max_pa,
    is_valid_range,
    level_size,
    overlaps,
)
from septum.arch.pamt import PAMT_ENTRY_SIZE
from septum.arch.status import Status, with_details
from septum.arch.structures import TdmrInfo
from septum.arch.tdmr import MemoryRange, Tdmr
from septum.tdx.outcome import check

U64 = (1 << 64) - 1


def check_tdmr(pa_format: PaFormat, cmrs: Sequence[MemoryRange], earlier: Sequence[Tdmr], info: TdmrInfo) -> Tdmr:
    """Checks a TDMR and its PAMT areas, given those before it in the list; all numbers in the details count from 0.

    :raises Fail: with the first thing that is wrong, in the order in which the real module looks.
    """
    index = len(earlier)
    tdmr = _tdmr(info)
    check(is_valid_range(tdmr.base, tdmr.size), with_details(Status.TDX_INVALID_TDMR, index))
    check(not earlier or tdmr.base >= earlier[-1].end, with_details(Status.TDX_NON_ORDERED_TDMR, index))
    is_gib = is_aligned(tdmr.base, PAGE_1G) and is_aligned(tdmr.size, PAGE_1G) and tdmr.size > 0
    check(is_gib and _is_addressable(pa_format, tdmr), with_details(Status.TDX_INVALID_TDMR, index))
    for j in range(len(info.reserved_areas)):
        _check_reserved(info, index, j)
    _check_pamts(pa_format, cmrs, [*earlier, tdmr])
    inside = all(is_in_cmr(cmrs, part) for part in tdmr.available)
    check(inside, with_details(Status.TDX_TDMR_OUTSIDE_CMRS, index))
    return tdmr


def is_in_cmr(cmrs: Sequence[MemoryRange], area: MemoryRange) -> bool:
    """``is_area_in_cmr``: within one CMR, or within several that follow each other without a gap."""
    before = MemoryRange(0, 0)
    for cmr in cmrs:
        merged = MemoryRange(before.base, before.size + cmr.size) if cmr.base == before.end else cmr
        if contains(*merged, *area):
            return True
        before = merged
    return False


def _tdmr(info: TdmrInfo) -> Tdmr:
    return Tdmr(
        info.base,
        info.size_bytes,
        MemoryRange(info.pamt_1g_base, info.pamt_1g_size),
        MemoryRange(info.pamt_2m_base, info.pamt_2m_size),
        MemoryRange(info.pamt_4k_base, info.pamt_4k_size),
        tuple(MemoryRange(area.offset, area.size_bytes) for area in info.reserved_areas if area.size_bytes),
    )


def _pamts(tdmr: Tdmr) -> Iterator[tuple[int, MemoryRange]]:
    """The PAMT areas from 4 KiB up, each with its level."""
    return enumerate((tdmr.pamt_4k, tdmr.pamt_2m, tdmr.pamt_1g))


def _is_addressable(pa_format: PaFormat, area: MemoryRange | Tdmr) -> bool:
    """Whether the first and the last byte are below the physical address width and have no HKID bits."""
    return all(is_below_max_pa(pa) and not pa_format.hkid(pa) for pa in (area.base, area.base + area.size - 1 & U64))


def _check_reserved(info: TdmrInfo, index: int, j: int) -> None:
    areas = info.reserved_areas
    area = areas[j]
    offset, size = area.offset, area.size_bytes
    unordered = with_details(Status.TDX_NON_ORDERED_RESERVED_IN_TDMR, index, j)
    invalid = with_details(Status.TDX_INVALID_RESERVED_IN_TDMR, index, j)
    if not size:
        check(j == len(areas) - 1 or not areas[j + 1].size_bytes, unordered)
        return
    check(is_valid_range(offset, size), invalid)
    check(j == 0 or offset >= areas[j - 1].offset + areas[j - 1].size_bytes, unordered)
    check(is_aligned(offset, PAGE_4K) and is_aligned(size, PAGE_4K), invalid)
    check(offset + size <= info.size_bytes, invalid)


def _check_pamts(pa_format: PaFormat, cmrs: Sequence[MemoryRange], tdmrs: Sequence[Tdmr]) -> None:
    *earlier, tdmr = tdmrs
    index = len(earlier)
    largest_first = list(_pamts(tdmr))[::-1]
    for level, pamt in largest_first:
        ok = (
            is_valid_range(*pamt)
            and is_aligned(pamt.base, PAGE_4K)
            and is_aligned(pamt.size, PAGE_4K)
            and _is_addressable(pa_format, pamt)
            and pamt.size >= tdmr.size // level_size(level) * PAMT_ENTRY_SIZE
        )
        check(ok, with_details(Status.TDX_INVALID_PAMT, index, level))
    for j, other in enumerate(earlier):
        for level, pamt in _pamts(tdmr):
            _check_apart(pamt, (area for _, area in _pamts(other)), index, level, j)
    _check_apart(tdmr.pamt_4k, (tdmr.pamt_2m, tdmr.pamt_1g), index, 0, index)
    _check_apart(tdmr.pamt_2m, (tdmr.pamt_1g,), index, 1, index)
    for j, other in enumerate(tdmrs):
        for level, pamt in _pamts(tdmr):
            _check_apart(pamt, other.available, index, level, j)
        for level, pamt in _pamts(other):
            _check_apart(pamt, tdmr.available, j, level, index)
    for level, pamt in largest_first:
        check(is_in_cmr(cmrs, pamt), with_details(Status.TDX_PAMT_OUTSIDE_CMRS, index, level))


def _check_apart(pamt: MemoryRange, others: Iterator[MemoryRange] | Sequence[MemoryRange], *details: int) -> None:
    apart = not any(overlaps(*pamt, *other) for other in others)
    check(apart, with_details(Status.TDX_PAMT_OVERLAP, *details))
