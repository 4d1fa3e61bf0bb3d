"""PAMT sizes, page types and BEPOCH."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import pamt
from septum.arch.pages import PAGE_1G, PageSize
from septum.arch.pamt import MigrationEpoch, PageType


def test_sizes_for_one_gib_and_for_tables_of_more_than_a_page() -> None:
    assert [pamt.pamt_area_size(PAGE_1G, size) for size in PageSize] == [0x400000, 0x2000, 0x1000]
    assert pamt.pamt_area_size(256 * PAGE_1G, PageSize.SIZE_1G) == 0x1000
    assert pamt.pamt_area_size(257 * PAGE_1G, PageSize.SIZE_1G) == 0x2000
    assert pamt.pamt_total_size(PAGE_1G) == 4104 * 1024 + 4096


def test_sizes_printed_by_real_machines(shared: Path) -> None:
    profiles = json.loads((shared / "platforms" / "profiles.json").read_text())
    checked = 0
    for profile in profiles:
        if profile.get("pamt_kb") and profile.get("computed"):
            tdmrs = [[int(bound, 16) for bound in tdmr] for tdmr in profile["computed"]["tdmrs"]]
            assert sum(pamt.pamt_total_size(end - start) for start, end in tdmrs) == profile["pamt_kb"] * 1024
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize(
    ("page_type", "number"),
    [("NDA", 0), ("RSVD", 1), ("REG", 3), ("TDR", 4), ("TDCX", 5), ("TDVPR", 6), ("EPT", 8)],
)
def test_page_types(page_type: str, number: int) -> None:
    assert PageType[page_type] == number


@given(st.integers(0, (1 << 63) - 1))
def test_bepoch_without_flag_is_a_td_epoch(epoch: int) -> None:
    assert pamt.decode_bepoch(epoch) == epoch


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 31) - 1))
def test_bepoch_with_flag_is_a_migration_epoch(epoch: int, count: int) -> None:
    encoded = MigrationEpoch(epoch, count).encode()
    assert encoded >> 63 == 1
    assert pamt.decode_bepoch(encoded) == MigrationEpoch(epoch, count)
