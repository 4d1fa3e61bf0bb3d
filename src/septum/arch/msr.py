"""MSR virtualisation table of TDX Module 1.5.01 (`msr_config_lookup.c`): what a guest's RDMSR or WRMSR does.

Each range has, for reads and for writes, two facts. `bitmap` tells how TDH.MNG.INIT sets the bit of TDCS.MSR_BITMAPS:
1 means that the access exits to the module, 0 that it goes straight to the CPU. `action` tells what the module does
with an access that exits. An access that exits although its bit should be 0 halts the module.

MSRs outside every range exit and give the guest a #VE, and so do those that the bitmaps cannot cover, i.e. outside
0..0x1fff and 0xc0000000..0xc0001fff. Ranges are in ascending order and do not overlap.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from septum.arch.data import read_table

MSRS_PER_BITMAP = 0x2000
HIGH_MSR_START = 0xC000_0000
WRITE_BITMAPS_OFFSET = 2048
"""Bytes: MSR_BITMAPS holds 1 KiB each for reads of low MSRs, reads of high MSRs, writes of low, writes of high."""


class Bitmap(StrEnum):
    """When the MSR_BITMAPS bit is 0, so that the access does not exit (`is_msr_dynamic_bit_cleared`)."""

    FIXED_0 = "FIXED_0"
    """Always."""
    FIXED_1 = "FIXED_1"
    """Never."""
    DYN_PERFMON = "DYN_PERFMON"
    """ATTRIBUTES.PERFMON."""
    DYN_XFAM_CET = "DYN_XFAM_CET"
    """XFAM bit 11 or 12."""
    DYN_XFAM_PT = "DYN_XFAM_PT"
    """XFAM bit 8."""
    DYN_XFAM_ULI = "DYN_XFAM_ULI"
    """XFAM bit 14."""
    DYN_XFAM_LBR = "DYN_XFAM_LBR"
    """XFAM bit 15."""
    DYN_UMWAIT = "DYN_UMWAIT"
    """Virtual CPUID(7,0).ECX.WAITPKG."""
    DYN_XFD = "DYN_XFD"
    """Virtual CPUID(0xd,1).EAX.XFD."""
    DYN_PKS = "DYN_PKS"
    """ATTRIBUTES.PKS."""
    DYN_TSX = "DYN_TSX"
    """Virtual CPUID(7,0).EBX.HLE (and RTM)."""
    DYN_OTHER = "DYN_OTHER"
    """IA32_PERF_CAPABILITIES: PERFMON and XFAM bit 8; IA32_PERF_METRICS: PERFMON and the native
    IA32_PERF_CAPABILITIES.PERF_METRICS_AVAILABLE (bit 15)."""


class Action(StrEnum):
    """What the module does with an access that exits."""

    VE = "VE"
    """Inject #VE."""
    GP = "GP"
    """Inject #GP(0)."""
    GP_OR_VE = "GP_OR_VE"
    """#VE if the TD has the feature `GP_UNLESS[msr]`, else #GP(0)."""
    FATAL_ERROR = "FATAL_ERROR"
    """Cannot happen: the access does not exit. If it does, the module halts."""
    OTHER = "OTHER"
    """Handled one by one (`td_msr_access.c`): virtual values and checked writes."""


class CpuidFeature(StrEnum):
    """Virtual CPUID feature on which a GP_OR_VE access depends."""

    DCA = "DCA"
    TME = "TME"
    MKTME = "MKTME"
    TSC_DEADLINE = "TSC_DEADLINE"


GP_UNLESS: dict[int, CpuidFeature] = {
    0x87: CpuidFeature.MKTME,
    0x1F8: CpuidFeature.DCA,
    0x1F9: CpuidFeature.DCA,
    0x1FA: CpuidFeature.DCA,
    0x6E0: CpuidFeature.TSC_DEADLINE,
    0x981: CpuidFeature.TME,
    0x982: CpuidFeature.TME,
    0x983: CpuidFeature.TME,
    0x984: CpuidFeature.TME,
}
"""MSRs whose action is GP_OR_VE -> the feature that makes it a #VE."""


@dataclass(frozen=True, slots=True)
class Handling:
    """One direction of access."""

    bitmap: Bitmap
    action: Action


@dataclass(frozen=True, slots=True)
class MsrRange:
    """MSRs `start` to `end`, both included, that are handled alike."""

    name: str
    start: int
    end: int
    read: Handling
    write: Handling


@cache
def msr_table() -> tuple[MsrRange, ...]:
    """All ranges in ascending order."""
    return tuple(
        MsrRange(
            name,
            int(start, 16),
            int(end, 16),
            Handling(Bitmap(rd_bitmap), Action(rd_action)),
            Handling(Bitmap(wr_bitmap), Action(wr_action)),
        )
        for name, start, end, rd_bitmap, rd_action, wr_bitmap, wr_action in read_table("msr")
    )


@cache
def _starts() -> tuple[int, ...]:
    return tuple(entry.start for entry in msr_table())


def find_msr(address: int) -> MsrRange | None:
    """The range that holds the MSR `address`, or None: then every access to it gives a #VE."""
    position = bisect_right(_starts(), address) - 1
    if position < 0:
        return None
    entry = msr_table()[position]
    return entry if address <= entry.end else None


def bitmap_bit(address: int, *, write: bool) -> tuple[int, int] | None:
    """Byte offset and bit number in the 4 KiB MSR_BITMAPS page, or None if the bitmaps do not cover the MSR."""
    low = address & (MSRS_PER_BITMAP - 1)
    if address == low:
        offset = 0
    elif address == HIGH_MSR_START | low:
        offset = MSRS_PER_BITMAP // 8
    else:
        return None
    return offset + low // 8 + (WRITE_BITMAPS_OFFSET if write else 0), low % 8
