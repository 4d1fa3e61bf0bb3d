"""Page sizes, levels and address formats: host physical addresses with HKID, guest physical addresses, page_info.

Addresses are plain ints. Sources: common/helpers/helpers.{h,c}, common/x86_defs/x86_defs.h and include/tdx_api_defs.h
of TDX Module 1.5.01.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

PAGE_SHIFT: Final = 12
LEVEL_SHIFT: Final = 9
"""Address bits that one level of the page tables resolves."""
PAGE_4K: Final = 1 << 12
PAGE_2M: Final = 1 << 21
PAGE_1G: Final = 1 << 30
PAGES_4K_IN_2M: Final = 512
CACHE_LINE: Final = 64

MODULE_MAX_PA: Final = 52
"""Physical address width that module 1.5.01 is built for; it checks host addresses against this, not against CPUID."""
PA_MASK: Final = (1 << MODULE_MAX_PA) - 1
PAGE_MASK: Final = PA_MASK & -PAGE_4K
"""Bits 51:12: the page number's place in operands, entries and PAMT owners."""
NULL_PA: Final = (1 << 64) - 1
"""What stands for "no page" in optional page operands."""


class Level(IntEnum):
    """Level of a Secure-EPT entry. An entry at PT, PD or PDPT may be a leaf that maps 4 KiB, 2 MiB or 1 GiB."""

    PT = 0
    PD = 1
    PDPT = 2
    PML4 = 3
    PML5 = 4


class PageSize(IntEnum):
    """Page size as the PAMT and TDH.PHYMEM.PAGE.RDMD number it; the same numbers as the leaf levels."""

    SIZE_4K = 0
    SIZE_2M = 1
    SIZE_1G = 2


SIZE_NAMES: Final = ("4K", "2M", "1G", "512G", "256T")
"""Short names of what one entry covers, by level."""


def level_size(level: int) -> int:
    """Bytes covered by one entry at this level: 4 KiB, 2 MiB, 1 GiB, 512 GiB, 256 TiB."""
    return 1 << PAGE_SHIFT + LEVEL_SHIFT * level


def level_index(address: int, level: int) -> int:
    """Index (0 to 511) of the entry for an address in the table of this level."""
    return address >> PAGE_SHIFT + LEVEL_SHIFT * level & 0x1FF


def align_down(address: int, size: int) -> int:
    """The greatest multiple of a power of two that is not above the address."""
    return address & -size


def align_up(address: int, size: int) -> int:
    """The least multiple of a power of two that is not below the address."""
    return address + size - 1 & -size


def is_aligned(address: int, size: int) -> bool:
    """Whether an address is a multiple of a power of two."""
    return address & size - 1 == 0


def overlaps(base: int, size: int, other_base: int, other_size: int) -> bool:
    """Whether two address ranges share a byte (is_overlap; the caller has checked for wrap-around)."""
    return base < other_base + other_size and other_base < base + size


def contains(base: int, size: int, inner_base: int, inner_size: int) -> bool:
    """Whether the second range lies within the first."""
    return base <= inner_base and inner_base + inner_size <= base + size


def is_valid_range(base: int, size: int) -> bool:
    """Whether ``base + size`` stays within 64 bits (is_valid_integer_range)."""
    return base <= (1 << 64) - 1 - size


def is_below_max_pa(pa: int) -> bool:
    """Whether no bit above :data:`MODULE_MAX_PA` is set (is_pa_smaller_than_max_pa)."""
    return pa < 1 << MODULE_MAX_PA


@dataclass(frozen=True, slots=True)
class PaFormat:
    """Where the HKID sits in a host physical address: the top ``keyid_bits`` bits below the CPU's ``max_pa``."""

    max_pa: int
    keyid_bits: int

    @property
    def hkid_shift(self) -> int:
        """Lowest bit of the HKID."""
        return self.max_pa - self.keyid_bits

    @property
    def hkid_mask(self) -> int:
        """The HKID's bits in place."""
        return (1 << self.keyid_bits) - 1 << self.hkid_shift

    def hkid(self, pa: int) -> int:
        """The HKID in an address (get_hkid_from_pa)."""
        return (pa & self.hkid_mask) >> self.hkid_shift

    def address(self, pa: int) -> int:
        """The address without HKID, cut to 52 bits (get_addr_from_pa)."""
        return pa & PA_MASK & ~self.hkid_mask

    def with_hkid(self, pa: int, hkid: int) -> int:
        """The address with this HKID in place of the one it had (set_hkid_to_pa)."""
        return pa & ~self.hkid_mask | hkid << self.hkid_shift


def gpa_width(gpaw: bool) -> int:
    """Width of guest physical addresses in bits, the SHARED bit included: 52 with GPAW set, else 48."""
    return 52 if gpaw else 48


def shared_bit(gpaw: bool) -> int:
    """Bit position of SHARED in a guest physical address: 51 with GPAW set, else 47."""
    return gpa_width(gpaw) - 1


def is_shared_gpa(gpa: int, gpaw: bool) -> bool:
    """Whether the SHARED bit of a guest physical address is set (get_gpa_shared_bit)."""
    return gpa >> shared_bit(gpaw) & 1 == 1


def is_valid_gpa(gpa: int, gpaw: bool, *, private: bool = False) -> bool:
    """Whether no bit above the GPA width is set and, if asked for, SHARED is clear (check_gpa_validity)."""
    return gpa < 1 << (shared_bit(gpaw) if private else gpa_width(gpaw))


def is_canonical(address: int, width: int = 48) -> bool:
    """Whether bits 63 down to ``width - 1`` of a 64-bit linear address are equal (48: 4-level, 57: 5-level paging)."""
    high = address >> width - 1
    return high in (0, (1 << 65 - width) - 1)


@dataclass(frozen=True, slots=True)
class PageInfo:
    """The operand "GPA and level" of the memory leaves: level in bits 2:0, GPA in 51:12, all others reserved."""

    gpa: int
    level: int
    reserved_clear: bool = True

    @classmethod
    def decode(cls, raw: int) -> "PageInfo":
        """Take an operand apart. The GPA is bits 51:12, whatever the level; nothing is checked."""
        return cls(raw & PAGE_MASK, raw & 7, raw & ~(PAGE_MASK | 7) == 0)

    def encode(self) -> int:
        """The operand for this GPA and level."""
        return self.gpa & PAGE_MASK | self.level

    def is_valid(self, lowest: int, highest: int) -> bool:
        """Whether reserved bits are 0, the level is in range and the GPA aligned to it (verify_page_info_input)."""
        return self.reserved_clear and lowest <= self.level <= highest and is_aligned(self.gpa, level_size(self.level))


def page_info(gpa: int, level: int = Level.PT) -> int:
    """The "GPA and level" operand as a number, ready for RCX."""
    return gpa & PAGE_MASK | level
