"""Checks of single fields of TD_PARAMS, and numbers that follow from them.

Source: TDX Module 1.5.01, ``src/common/helpers/helpers.c``.
"""

from __future__ import annotations

from typing import Final

from septum.arch.cpuid import XFAM_FIXED1
from septum.arch.structures import ConfigFlags, TdAttributes
from septum.tdx.td_params.native import MAX_XFAM_BIT, XCR0_BITS, NativeCpu

# As plain integers: the complement of an IntFlag loses bits that have no name.
ATTRIBUTES_FIXED0: Final = int(
    TdAttributes.DEBUG
    | TdAttributes.SEPT_VE_DISABLE
    | TdAttributes.MIGRATABLE
    | TdAttributes.PKS
    | TdAttributes.PERFMON
)
"""Bits of ATTRIBUTES that a TD may have."""
CONFIG_FLAGS_FIXED0: Final = int(ConfigFlags.GPAW | ConfigFlags.FLEXIBLE_PENDING_VE | ConfigFlags.NO_RBP_MOD)
"""Bits of CONFIG_FLAGS that a TD may have."""
MIN_TSC_FREQUENCY: Final = 4
MAX_TSC_FREQUENCY: Final = 400
TSC_FREQUENCY_UNIT: Final = 25_000_000
"""Hz."""
TSC_FRACTION_BITS: Final = 48
"""Binary places of TSC_MULTIPLIER."""

PK, PT, CET_U, CET_S, ULI, LBR, TILECFG, TILEDATA = 9, 8, 11, 12, 14, 15, 17, 18
"""Bits of XFAM."""
_TOGETHER: Final = ((5, 6), (5, 7), (CET_U, CET_S), (TILECFG, TILEDATA))
_AVX, _AVX512 = 2, 5

_WRITE_BACK: Final = 6
_PML4, _PML5 = 3, 4
_MIN_PA_FOR_PML5: Final = 49
_XSTATE_LEAF: Final = 0xD
_XSAVE_EXTENDED_REGION: Final = 576
"""Bytes before it: the legacy area and the header."""


def attributes_allowed(attributes: int) -> bool:
    """``verify_td_attributes``: no unknown bits; a migratable TD is neither a debug TD nor has PERFMON."""
    conflict = attributes & (TdAttributes.DEBUG | TdAttributes.PERFMON)
    return not attributes & ~ATTRIBUTES_FIXED0 and not (attributes & TdAttributes.MIGRATABLE and conflict)


def xfam_allowed(xfam: int, cpu: NativeCpu) -> bool:
    """``check_xfam``: x87 and SSE, nothing that the CPU lacks, no feature without those that it builds upon."""
    if xfam & ~cpu.xfam_fixed0 or xfam & XFAM_FIXED1 != XFAM_FIXED1:
        return False
    return not (has(xfam, _AVX512) and not has(xfam, _AVX)) and all(has(xfam, a) == has(xfam, b) for a, b in _TOGETHER)


def xcr0_allowed(xcr0: int, xfam: int, cpu: NativeCpu) -> bool:
    """``check_guest_xcr0_value``: features that CPU and XFAM have, in combinations that are allowed."""
    supported = cpu.cpu.cpuid(_XSTATE_LEAF).eax & XCR0_BITS
    x87, sse, avx, opmask, zmm_high, zmm, tile_config, tile_data = (xcr0 >> n & 1 for n in (0, 1, 2, 5, 6, 7, 17, 18))
    consistent = sse >= avx >= opmask and opmask == zmm_high == zmm and tile_config == tile_data
    return not xcr0 & ~(supported & xfam) and bool(x87) and consistent


def has(bits: int, bit: int) -> bool:
    """Whether a bit is set."""
    return bool(bits >> bit & 1)


def eptp_allowed(eptp: int, gpaw: int, cpu: NativeCpu) -> bool:
    """``verify_and_set_td_eptp_controls``: write-back, four levels, or five if the CPU can; a 52-bit GPA needs five."""
    five = cpu.has_5_level_ept and cpu.max_pa >= _MIN_PA_FOR_PML5
    levels = (_PML5,) if gpaw else (_PML4, _PML5)
    return any(eptp == level << 3 | _WRITE_BACK for level in levels if level == _PML4 or five)


def tsc_parameters(tsc: int, native_hz: int, frequency: int) -> tuple[int, int]:
    """TSC_MULTIPLIER and TSC_OFFSET of a TD whose TSC starts at 0 now and runs at ``frequency`` x 25 MHz."""
    multiplier = (frequency * TSC_FREQUENCY_UNIT << TSC_FRACTION_BITS) // native_hz
    return multiplier, -(tsc * multiplier >> TSC_FRACTION_BITS) & (1 << 64) - 1


def xbuff_layout(xfam: int, cpu: NativeCpu) -> tuple[tuple[int, ...], int]:
    """Where each extended feature's state lies in a VCPU's XBUFF, by XFAM bit, and the buffer's size; in bytes."""
    offsets = [0] * (MAX_XFAM_BIT + 1)
    end = _XSAVE_EXTENDED_REGION
    for bit, component in enumerate(cpu.xsave_components):
        if bit > 1 and has(xfam, bit):
            offsets[bit] = end + 63 & -64 if component.aligned else end
            end = offsets[bit] + component.size
    return tuple(offsets), end
