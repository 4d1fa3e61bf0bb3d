"""The TD HOB: digests that real machines logged, and its bytes taken apart."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.vmm.hob import build_td_hob, hob_digest, td_hob_section
from septum.vmm.sections import MR_EXTEND, PAGE_AUG, Section, SectionType
from septum.vmm.tdvf import load_image

GIB = 1 << 30
KIND = {0x809000: SectionType.TD_HOB}
BFV = Section(SectionType.BFV, 0x1000, 0x3000, 0xFFFFD000, 0x3000, MR_EXTEND)


def memory(address: int, size: int, kind: SectionType | None = None) -> Section:
    return Section(kind or KIND.get(address, SectionType.TempMem), memory_address=address, memory_data_size=size)


HOB = memory(0x809000, 0x2000)


def entries(hob: bytes, address: int) -> list[tuple[int, int, int]]:
    """The resources as (type, start, length), after checking the frame around them."""
    assert struct.unpack_from("<HHIIIQQQQQ", hob) == (1, 56, 0, 9, 0, 0, 0, 0, 0, address + len(hob))
    assert hob[-8:] == bytes.fromhex("ffff080000000000")
    found = []
    for at in range(56, len(hob) - 8, 48):
        kind, length, reserved, owner, resource, attributes, start, size = struct.unpack_from("<HHI16sIIQQ", hob, at)
        assert (kind, length, reserved, owner, attributes) == (3, 48, 0, bytes(16), 7)
        found.append((resource, start, size))
    return found


@pytest.mark.parametrize(("layout", "ram"), [("B", "1 GiB"), ("A", "2 GiB")])
def test_digests_from_real_machines(shared: Path, layout: str, ram: str) -> None:
    known = json.loads((shared / "firmware/known-td-hob.json").read_text())
    answer = next(a["sha384"] for a in known["answers"] if (a["layout"], a["ram"]) == (layout, ram))
    sections = [memory(int(address, 16), int(size, 16)) for address, size in known[f"layout_{layout}"]]
    assert hob_digest(build_td_hob(sections, int(ram.removesuffix(" GiB")) * GIB)).hex() == answer


def test_digest_logged_by_a_real_boot(shared: Path) -> None:
    """The image that booted, its sections in the metadata's own order."""
    run = json.loads((shared / "firmware/known-runs.json").read_text())[0]
    image = load_image(shared / "firmware" / run["image"])
    hob = build_td_hob(image.sections, int(run["ram"], 16))
    assert hashlib.sha384(hob[:-8]).hexdigest() == run["hob_sha384"] == hob_digest(hob).hex()


def test_each_section_is_an_entry_between_unaccepted_memory() -> None:
    hob = build_td_hob((BFV, memory(0x80B000, 0x2000), HOB, memory(0x800000, 0x6000)), GIB)
    assert entries(hob, HOB.memory_address) == [
        (7, 0, 0x800000),
        (0, 0x800000, 0x6000),
        (7, 0x806000, 0x3000),
        (0, 0x809000, 0x2000),
        (0, 0x80B000, 0x2000),
        (7, 0x80D000, GIB - 0x80D000),
    ]


@pytest.mark.parametrize("ram", [0xB0000000, 3 * GIB, 1 << 46])
def test_large_ram_goes_on_at_4_gib(ram: int) -> None:
    assert entries(build_td_hob([HOB], ram), HOB.memory_address)[2:] == [
        (7, 0x80B000, 0x80000000 - 0x80B000),
        (7, 4 * GIB, ram - 0x80000000),
    ]


def test_ram_up_to_the_split_is_one_piece() -> None:
    ram = 0xB0000000 - 4096
    assert entries(build_td_hob([HOB], ram), HOB.memory_address)[2:] == [(7, 0x80B000, ram - 0x80B000)]


def test_sections_at_both_ends_of_the_ram() -> None:
    hob = build_td_hob([HOB, memory(0, 0x1000), memory(GIB - 0x1000, 0x1000)], GIB)
    found = entries(hob, HOB.memory_address)
    assert found[0] == (0, 0, 0x1000)
    assert found[-1] == (0, GIB - 0x1000, 0x1000)


def test_pages_that_come_later_are_unaccepted() -> None:
    later = replace(memory(0x900000, 0x1000, SectionType.PermMem), attributes=PAGE_AUG)
    assert build_td_hob([HOB, later], GIB) == build_td_hob([HOB], GIB)
    payload = memory(0x900000, 0x1000, SectionType.Payload)
    assert (0, 0x900000, 0x1000) in entries(build_td_hob([HOB, payload], GIB), HOB.memory_address)


@given(st.sets(st.integers(0, 400), max_size=40), st.integers(0, 5))
def test_entries_tile_the_ram(pages: set[int], extra: int) -> None:
    """In address order, without gap or overlap, and exactly the sections' pages are system memory."""
    ram = 0xB0000000 + extra * 4096
    sections = [memory(page << 12, 0x1000) for page in sorted(pages, key=lambda page: page * 7919 % 401)]
    found = entries(build_td_hob([*sections, HOB], ram), HOB.memory_address)
    assert all(a + size == b or (a + size, b) == (0x80000000, 4 * GIB) for (_, a, size), (_, b, _) in pairwise(found))
    assert found[0][1] == 0
    assert sum(size for _, _, size in found) == ram
    assert {start for kind, start, _ in found if kind == 0} == {page << 12 for page in pages} | {0x809000}


def test_a_list_that_does_not_fit_is_refused() -> None:
    small = replace(HOB, memory_data_size=0x1000)
    scattered = [memory(page << 13, 0x1000) for page in range(41)]
    assert len(build_td_hob([small, *scattered], GIB)) == 0x1000
    with pytest.raises(UsageError) as caught:
        build_td_hob([small, *scattered, memory(0x900000, 0x1000)], GIB, "fw.fd")
    assert str(caught.value) == (
        "fw.fd: section 0 (TD_HOB): MemoryDataSize 0x1000 is too small for the 0x1060 bytes of the HOB list with 86 "
        "memory ranges; use another firmware"
    )


def test_sections_outside_the_ram_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        build_td_hob([BFV, HOB], 8 << 20, "fw.fd")
    assert str(caught.value) == (
        "fw.fd: section 1 (TD_HOB): 0x809000 to 0x80b000 is not inside the VM's memory, 0x0 to 0x800000; "
        "give the VM more memory or use another firmware"
    )
    with pytest.raises(UsageError, match=r"0x7ffff000 to 0x80001000 is not inside .* 0x100000000 to 0x140000000; "):
        build_td_hob([HOB, memory(0x7FFFF000, 0x2000)], 3 * GIB)


def test_without_a_td_hob_section_there_is_no_list() -> None:
    assert td_hob_section([BFV]) is None
    assert td_hob_section([BFV, HOB]) is HOB
    with pytest.raises(UsageError, match=r"^fw: no TD_HOB section, so no place for the HOB list; use a firmware"):
        build_td_hob([BFV], GIB, "fw")
