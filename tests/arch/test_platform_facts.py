"""Platforms: the recorded one, the built-in ones, and TDMRs laid over memory maps as Linux lays them."""

import gzip
import json
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.arch.pages import PAGE_1G, PAGE_4K, is_aligned
from septum.arch.platform import Platform, profile, profile_names
from septum.arch.structures import TdmrInfo
from septum.arch.tdmr import MemoryRange, Tdmr, build_tdmrs

FOUR_GIB = 1 << 32


def facts(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files("septum.arch") / "data" / "platforms" / f"{name}.toml").read_text())


# The recorded platform


@pytest.fixture(scope="module")
def boot(shared: Path) -> list[dict[str, Any]]:
    with gzip.open(shared / "vectors" / "dev" / "boot.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def test_recorded_header(boot: list[dict[str, Any]]) -> None:
    platform = Platform.from_vector_header(boot[0])
    assert (platform.num_lps, platform.num_packages) == (4, 2)
    assert list(platform.private_hkids) == [*range(32, 64)]
    assert platform.pa_format.hkid_shift == boot[0]["hkid_shift_in_pa"]
    assert platform.cmrs[0] == MemoryRange(0x40000000, 0xC0000000)
    assert platform.seamrr.end == 0x208000000


def test_recorded_tdmrs_are_what_the_host_wrote_for_sys_config(boot: list[dict[str, Any]]) -> None:
    """The TDMR_INFO structures of the header's TDMRs are byte for byte those that the real module was given."""
    platform = Platform.from_vector_header(boot[0])
    written = {event["hex"] for event in boot if event["op"] == "write"}
    for tdmr in platform.tdmrs:
        assert tdmr.info().pack().ljust(512, b"\0").hex() in written


@pytest.mark.parametrize("header", [{}, {"op": "seq_begin"}, {"op": "header", "cmrs": 5}, {"op": "header", "cmrs": []}])
def test_a_broken_header_is_misuse(header: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="header"):
        Platform.from_vector_header(header)


# Built-in platforms


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_a_possible_machine(name: str) -> None:
    platform = profile(name)
    assert platform.num_packages == 2
    assert len(set(platform.x2apic_ids)) == platform.num_lps
    assert 1 << platform.keyid_bits == platform.private_hkids.stop
    assert platform.global_private_hkid in platform.private_hkids
    top = 1 << platform.pa_format.hkid_shift
    regions = sorted([*platform.cmrs, platform.seamrr, platform.smrr])
    assert all(low.end <= high.base for low, high in pairwise(regions))
    assert regions[-1].end <= top
    assert platform.smrr.end <= FOUR_GIB
    assert platform.description


@pytest.mark.parametrize("name", [name for name in profile_names() if "pamt_kb" in facts(name)])
def test_pamt_has_the_size_that_the_real_machine_printed(name: str) -> None:
    assert profile(name).pamt_size == facts(name)["pamt_kb"] * 1024


def test_profiles_repeat_the_published_facts(shared: Path) -> None:
    published = {item["id"]: item for item in json.loads((shared / "platforms" / "profiles.json").read_text())}
    checked = 0
    for name in profile_names():
        if name not in published:
            continue
        platform, item = profile(name), published[name]
        assert [(cmr.base, cmr.end) for cmr in platform.cmrs] == [(int(a, 16), int(b, 16)) for a, b in item["cmrs"]]
        assert [(t.base, t.end) for t in platform.tdmrs] == [
            (int(a, 16), int(b, 16)) for a, b in item["computed"]["tdmrs"]
        ]
        if item["keyid_range"]:
            assert [platform.private_hkids.start, platform.private_hkids.stop] == item["keyid_range"]
        assert f"build {item['module']['build_num']} " in platform.module_version
        checked += 1
    assert checked == 5


def test_small_and_default() -> None:
    small = profile("small")
    assert (small.num_lps, small.num_packages, len(small.tdmrs)) == (4, 2, 1)
    assert small.lp_package == (0, 0, 1, 1)
    assert small.x2apic_ids == (0, 2, 128, 130)
    default = profile()
    assert (default.name, default.num_lps) == ("default", 16)
    assert default.private_memory > 64 << 30


def test_unknown_profile_is_misuse() -> None:
    with pytest.raises(UsageError, match=r"no platform is named 'huge'; there are default, "):
        profile("huge")


# TDMRs over memory maps


def ranges(*bounds: tuple[int, int]) -> list[MemoryRange]:
    return [MemoryRange.between(base, end) for base, end in bounds]


def test_a_real_map_with_17_holes_exhausts_the_reserved_areas() -> None:
    platform = profile("emr-foxcreekpass-256g")
    memory = [*platform.usable_memory, *(cmr for cmr in platform.cmrs if cmr.base >= FOUR_GIB)]
    with pytest.raises(UsageError, match=r"TDMR \[0x0, 0x80000000\): too many reserved areas: 17 .* limit 16"):
        build_tdmrs(memory, cmrs=platform.cmrs)
    patched = build_tdmrs(memory, cmrs=platform.cmrs, holes=platform.cmrs)
    assert sum(tdmr.pamt_size for tdmr in patched) == 1050644 * 1024
    assert len(build_tdmrs(memory, cmrs=platform.cmrs, max_reserved=17)[0].reserved) == 17


def test_ranges_that_share_a_gib_share_a_tdmr() -> None:
    memory = ranges((0, 0x9F000), (0x100000, 0x30000000), (0x30001000, 0x38000000), (FOUR_GIB, FOUR_GIB + PAGE_1G))
    low, high = build_tdmrs(memory)
    assert (low.base, low.end, high.base, high.end) == (0, PAGE_1G, FOUR_GIB, FOUR_GIB + PAGE_1G)
    assert low.reserved == (
        MemoryRange.between(0, 0x100000),
        MemoryRange.between(0x30000000, 0x30001000),
        MemoryRange.between(0x38000000, PAGE_1G),
    )
    pamt_low = MemoryRange(low.pamt_4k.base, low.pamt_size)
    pamt_high = MemoryRange(high.pamt_4k.base, high.pamt_size)
    assert pamt_low.end == high.end, "the low TDMR's PAMT is put above 4 GiB"
    assert pamt_high.end == pamt_low.base
    assert [area.base + high.base for area in high.reserved] == [pamt_high.base, pamt_low.base]


def test_a_region_that_reaches_beyond_the_last_tdmr_continues_in_a_new_one() -> None:
    memory = ranges((0x100000, PAGE_1G - PAGE_4K), (PAGE_1G - 0x100 * PAGE_4K + 0x100000, 3 * PAGE_1G))
    assert [(t.base, t.end) for t in build_tdmrs(memory)] == [(0, PAGE_1G), (PAGE_1G, 3 * PAGE_1G)]


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        ([], {}, "no usable memory"),
        (ranges((0, 0x100000)), {}, "no usable memory"),
        (ranges((0x100000, 0x200000)), {}, "no usable memory has 4206592 bytes"),
        (ranges((0x100000, PAGE_1G)), {"cmrs": ranges((0x200000, PAGE_1G))}, "in no convertible memory range"),
        (ranges((PAGE_1G, 2 * PAGE_1G), (3 * PAGE_1G, 4 * PAGE_1G)), {"max_tdmrs": 1}, "TDMRs exhausted"),
    ],
)
def test_maps_that_cannot_be_laid_out_are_misuse(memory: list[MemoryRange], options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tdmrs(memory, **options)


@st.composite
def memory_maps(draw: st.DrawFn) -> list[MemoryRange]:
    """Up to 8 page-aligned ranges with gaps, the last one with room for PAMTs."""
    memory, at = [], draw(st.integers(0, 0x40000)) * PAGE_4K
    for _ in range(draw(st.integers(0, 7))):
        size = draw(st.integers(1, 0x60000)) * PAGE_4K
        memory.append(MemoryRange(at, size))
        at += size + draw(st.integers(1, 0x60000)) * PAGE_4K
    return [*memory, MemoryRange(at, 4 * PAGE_1G)]


@given(memory_maps())
def test_tdmrs_obey_the_modules_rules_and_lose_no_memory(memory: list[MemoryRange]) -> None:
    tdmrs = build_tdmrs(memory)
    assert all(low.end <= high.base for low, high in pairwise(tdmrs))
    pamts = [area for tdmr in tdmrs for area in (tdmr.pamt_4k, tdmr.pamt_2m, tdmr.pamt_1g)]
    for tdmr in tdmrs:
        assert tdmr.size
        assert is_aligned(tdmr.base, PAGE_1G)
        assert is_aligned(tdmr.size, PAGE_1G)
        assert list(tdmr.reserved) == sorted(tdmr.reserved)
        assert all(low.end <= high.base for low, high in pairwise(tdmr.reserved))
        assert all(is_aligned(area.base | area.size, PAGE_4K) and area.end <= tdmr.size for area in tdmr.reserved)
        for part in tdmr.available:
            assert not any(part.base < pamt.end and pamt.base < part.end for pamt in pamts)
            assert any(usable.base <= part.base and part.end <= usable.end for usable in memory)
    usable = sum(part.end - max(part.base, 1 << 20) for part in memory if part.end > 1 << 20)
    available = sum(part.size for tdmr in tdmrs for part in tdmr.available)
    assert available + sum(pamt.size for pamt in pamts) == usable


def test_available_parts_and_tdmr_info() -> None:
    tdmr = Tdmr(
        base=PAGE_1G,
        size=PAGE_1G,
        pamt_1g=MemoryRange(0x1000, 0x1000),
        pamt_2m=MemoryRange(0x2000, 0x2000),
        pamt_4k=MemoryRange(0x400000, 0x400000),
        reserved=(MemoryRange(0, 0x1000), MemoryRange(0x5000, PAGE_1G - 0x5000)),
    )
    assert tdmr.available == (MemoryRange(PAGE_1G + 0x1000, 0x4000),)
    info = TdmrInfo.unpack(tdmr.info().pack())
    assert (info.base, info.pamt_4k_size, info.reserved_areas[1].offset) == (PAGE_1G, 0x400000, 0x5000)
    assert len(info.reserved_areas) == 16
