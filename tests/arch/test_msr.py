"""The MSR table by itself, and against the MSR bitmaps and accesses of the real module's TDs."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.msr import GP_UNLESS, HIGH_MSR_START, Action, Bitmap, bitmap_bit, find_msr, msr_table


def test_table_is_whole_and_ordered() -> None:
    table = msr_table()
    assert len(table) == 134
    assert all(before.end < after.start for before, after in pairwise(table))
    for entry in table:
        assert entry.start <= entry.end
        assert bitmap_bit(entry.start, write=False) is not None
        assert bitmap_bit(entry.end, write=True) is not None
        for handling in (entry.read, entry.write):
            assert (handling.bitmap is Bitmap.FIXED_0) == (handling.action is Action.FATAL_ERROR)


def test_gp_or_ve_ranges_name_their_feature() -> None:
    conditional = [e for e in msr_table() if Action.GP_OR_VE in (e.read.action, e.write.action)]
    assert [entry.start for entry in conditional] == list(GP_UNLESS)


EDGES = [edge + step for entry in msr_table() for edge in (entry.start, entry.end) for step in (-1, 0, 1)]


@given(st.integers(0, 0xFFFF_FFFF) | st.sampled_from(EDGES))
def test_lookup_agrees_with_a_plain_search(address: int) -> None:
    assert find_msr(address) == next((e for e in msr_table() if e.start <= address <= e.end), None)


@pytest.mark.parametrize(
    ("address", "write", "place"),
    [
        (0x0, False, (0, 0)),
        (0x1FFF, False, (1023, 7)),
        (HIGH_MSR_START, False, (1024, 0)),
        (0xC0000080, True, (3072 + 16, 0)),
        (0x10, True, (2050, 0)),
        (0x2000, False, None),
        (0x40000000, True, None),
        (0xC0002000, False, None),
    ],
)
def test_bitmap_places(address: int, write: bool, place: tuple[int, int] | None) -> None:
    assert bitmap_bit(address, write=write) == place


def test_recorded_bitmaps(shared: Path) -> None:
    """Fixed bits are as listed, all bits of one dynamic kind agree, and MSRs outside the table always exit."""
    pages = []
    with gzip.open(shared / "vectors" / "guest" / "guest_cpuid.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            if event["op"] == "oracle" and event["what"] == "MSR_BITMAPS":
                pages.append(bytes.fromhex(event["value"]))
    assert len(pages) == 3
    kinds: list[dict[Bitmap, set[int]]] = []
    for page in pages:
        kinds.append({})
        for address in (*range(0x2000), *range(HIGH_MSR_START, HIGH_MSR_START + 0x2000)):
            entry = find_msr(address)
            for write in (False, True):
                place = bitmap_bit(address, write=write)
                assert place is not None
                bit = page[place[0]] >> place[1] & 1
                if entry is None:
                    assert bit == 1, hex(address)
                else:
                    kinds[-1].setdefault((entry.write if write else entry.read).bitmap, set()).add(bit)
        assert kinds[-1].pop(Bitmap.FIXED_0) == {0}
        assert kinds[-1].pop(Bitmap.FIXED_1) == {1}
        kinds[-1].pop(Bitmap.DYN_OTHER)
        assert all(len(bits) == 1 for bits in kinds[-1].values()), kinds[-1]
    assert kinds[0][Bitmap.DYN_PERFMON] == {1}
    assert kinds[2][Bitmap.DYN_PERFMON] == {0}  # ATTRIBUTES 0x8000000050000000


def test_recorded_accesses(shared: Path) -> None:
    """#VE and #GP come where the table says so."""
    vectors = {Action.VE: {"inject:20"}, Action.GP: {"inject:13"}, Action.GP_OR_VE: {"inject:20", "inject:13"}}
    seen = dict.fromkeys(vectors, 0)
    sequence = ""
    with gzip.open(shared / "vectors" / "guest" / "guest_msr.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            sequence = event["id"] if event["op"] == "seq_begin" else sequence
            if not sequence.startswith("msr/") or event.get("exit") not in ("RDMSR", "WRMSR"):
                continue
            entry = find_msr(int(event["guest_gprs_set"]["rcx"], 16) & 0xFFFF_FFFF)
            write = event["exit"] == "WRMSR"
            action = Action.VE if entry is None else (entry.write if write else entry.read).action
            if action in vectors:
                assert event["status"] in vectors[action], event
                seen[action] += 1
    assert min(seen.values()) > 10, seen
