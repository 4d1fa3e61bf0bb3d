"""PAMT: the module's record of every page it may use.

Sources: common/memory_handlers/pamt_manager.h of TDX Module 1.5.01; the sizes of the areas are also what real hosts
print ("KB allocated for PAMT").
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from septum.arch.pages import PAGE_4K, PageSize, align_up, level_size

PAMT_ENTRY_SIZE: Final = 16
"""Bytes of an entry, for 4 KiB, 2 MiB and 1 GiB pages alike."""
CHILDREN: Final = 512
"""Entries one level down that an entry stands for."""


class PageType(IntEnum):
    """What a page is used for. NDA: not directly assigned, that is free or split."""

    NDA = 0
    RSVD = 1
    REG = 3
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8


def pamt_area_size(tdmr_size: int, page_size: int) -> int:
    """Bytes of the PAMT area of a TDMR for one :class:`~septum.arch.pages.PageSize`, rounded up to 4 KiB."""
    return align_up(tdmr_size // level_size(page_size) * PAMT_ENTRY_SIZE, PAGE_4K)


def pamt_total_size(tdmr_size: int) -> int:
    """Bytes of all three PAMT areas of a TDMR."""
    return sum(pamt_area_size(tdmr_size, size) for size in PageSize)


MIG_FLAG: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class MigrationEpoch:
    """The other use of a PAMT entry's BEPOCH: where the page stood in a migration. Marked by bit 63."""

    mig_epoch: int
    export_count: int

    def encode(self) -> int:
        """The 64-bit BEPOCH field."""
        return MIG_FLAG | self.export_count << 32 | self.mig_epoch


def decode_bepoch(raw: int) -> int | MigrationEpoch:
    """The TD epoch at which a range was blocked, or the migration epoch when bit 63 is set."""
    if raw & MIG_FLAG:
        return MigrationEpoch(raw & 0xFFFF_FFFF, raw >> 32 & 0x7FFF_FFFF)
    return raw
