"""Addresses: HKID bits, SHARED bit, levels and the "GPA and level" operand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import pages
from septum.arch.pages import Level, PaFormat, PageInfo

FORMAT = PaFormat(max_pa=52, keyid_bits=6)


def test_hkid_bits_of_the_recorded_platform() -> None:
    assert FORMAT.hkid_shift == 46
    assert FORMAT.with_hkid(0x40001000, 33) == 33 << 46 | 0x40001000
    assert FORMAT.hkid(33 << 46 | 0x40001000) == 33
    assert FORMAT.address(1 << 52 | 33 << 46 | 0x40001000) == 0x40001000


@given(st.integers(0, (1 << 46) - 1), st.integers(0, 63), st.integers(0, 63))
def test_hkid_replaces_hkid_and_leaves_the_address(address: int, hkid: int, other: int) -> None:
    pa = FORMAT.with_hkid(FORMAT.with_hkid(address, other), hkid)
    assert (FORMAT.hkid(pa), FORMAT.address(pa)) == (hkid, address)


def test_level_sizes_and_indices() -> None:
    assert [pages.level_size(level) for level in Level] == [1 << 12, 1 << 21, 1 << 30, 1 << 39, 1 << 48]
    gpa = 5 << 48 | 4 << 39 | 3 << 30 | 2 << 21 | 1 << 12
    assert [pages.level_index(gpa, level) for level in Level] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("gpaw", "bit"), [(False, 47), (True, 51)])
def test_shared_bit(gpaw: bool, bit: int) -> None:
    assert pages.shared_bit(gpaw) == bit
    shared = 1 << bit | 0x1000
    assert pages.is_shared_gpa(shared, gpaw)
    assert pages.is_valid_gpa(shared, gpaw)
    assert not pages.is_valid_gpa(shared, gpaw, private=True)
    assert pages.is_valid_gpa((1 << bit) - 1, gpaw, private=True)
    assert not pages.is_valid_gpa(1 << bit + 1, gpaw)


@pytest.mark.parametrize(
    ("raw", "valid"),
    [
        (0x200001, True),
        (0x201001, False),  # not aligned to 2 MiB
        (0x200003, False),  # level out of range
        (0x200009, False),  # reserved bit 3
        (1 << 52 | 0x200001, False),  # reserved bit 52
    ],
)
def test_page_info_checks(raw: int, valid: bool) -> None:
    assert PageInfo.decode(raw).is_valid(Level.PT, Level.PDPT) is valid


@given(st.integers(0, (1 << 64) - 1))
def test_page_info_round_trip_up_to_reserved_bits(raw: int) -> None:
    info = PageInfo.decode(raw)
    assert info.encode() == raw & ~0xFFF0000000000FF8
    assert info.reserved_clear == (info.encode() == raw)


@given(st.integers(0, (1 << 52) - 1), st.sampled_from([pages.PAGE_4K, pages.PAGE_2M, pages.PAGE_1G]))
def test_alignment(address: int, size: int) -> None:
    low, high = pages.align_down(address, size), pages.align_up(address, size)
    assert low <= address <= high
    assert high - low in (0, size)
    assert pages.is_aligned(address, size) == (low == high)


@pytest.mark.parametrize(
    ("address", "width", "canonical"),
    [
        (0x7FFF_FFFF_FFFF, 48, True),
        (0x8000_0000_0000, 48, False),
        (0xFFFF_8000_0000_0000, 48, True),
        (0x8000_0000_0000, 57, True),
        (0xFF00_0000_0000_0000, 57, True),
        (0xFE00_0000_0000_0000, 57, False),
    ],
)
def test_canonical(address: int, width: int, canonical: bool) -> None:
    assert pages.is_canonical(address, width) is canonical


def test_ranges() -> None:
    assert pages.overlaps(0, 0x1000, 0xFFF, 1)
    assert not pages.overlaps(0, 0x1000, 0x1000, 0x1000)
    assert pages.contains(0x1000, 0x1000, 0x1000, 0x1000)
    assert not pages.contains(0x1000, 0x1000, 0x1800, 0x1000)
    assert pages.is_valid_range(1, (1 << 64) - 2)
    assert not pages.is_valid_range(2, (1 << 64) - 2)
