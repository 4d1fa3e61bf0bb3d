"""CPUID tables by themselves, and against what guests of the real module were given."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from septum.arch.cpuid import (
    CPUID_FIRST_EXTENDED_LEAF,
    CPUID_FIRST_RESERVED_LEAF,
    CPUID_LAST_BASE_LEAF,
    CPUID_LAST_RESERVED_LEAF,
    KNOWN_FMS,
    NO_BITS,
    SUBLEAF_NA,
    XFAM_FIXED0,
    XFAM_FIXED1,
    Registers,
    configurable,
    cpuid_table,
    index_of,
    recording_cpu,
    xfam_bits,
)


def test_tables_are_whole() -> None:
    table = cpuid_table()
    assert len(table) == 64
    assert len({(entry.leaf, entry.subleaf) for entry in table}) == 64
    assert sum(entry.faulting for entry in table) == 8
    whole = {entry.leaf for entry in table if entry.subleaf == SUBLEAF_NA}
    assert not any(entry.leaf in whole for entry in table if entry.subleaf != SUBLEAF_NA)
    for entry in table:
        assert entry.fixed1 & entry.fixed0_or_dynamic == NO_BITS
        choice = entry.config_direct | entry.allow_direct
        assert choice & (entry.fixed1 | entry.fixed0_or_dynamic) == NO_BITS
        assert (entry.config_index is not None) or choice == NO_BITS


def test_known_entries() -> None:
    first = cpuid_table()[0]
    assert (first.leaf, first.subleaf) == (1, SUBLEAF_NA)
    assert first.config_direct == Registers(0xFFF3FFF, 0xFF0000, 0, 0)
    assert first.allow_direct.ecx == 0x31044D88
    vendor = cpuid_table()[10]
    assert b"".join(part.to_bytes(4, "little") for part in vendor.verify_value[1:]) == b"GenuntelineI"
    assert xfam_bits(7, 0)[9] == Registers(0, 0, 0x8, 0)  # PKU
    assert xfam_bits(3, 0) == {}
    assert sorted(xfam_bits(0xD, 1)) == [8, 11, 12, 14, 15]


def test_lookup() -> None:
    assert index_of(1, 0) == index_of(1, 77) == 0
    assert index_of(4, 3) == 4
    assert index_of(4, 9) is None
    assert index_of(0x99, 0) is None


def test_halves() -> None:
    registers = Registers(1, 2, 3, 4)
    assert (registers.low, registers.high) == (0x2_0000_0001, 0x4_0000_0003)
    assert Registers.from_halves(registers.low, registers.high) == registers
    assert ~NO_BITS & registers == registers


def test_cpu_model_satisfies_the_module() -> None:
    """TDH.SYS.INIT succeeds on it: every leaf up to the CPU's last one verifies."""
    cpu = recording_cpu()
    last, last_extended = cpu.cpuid(0).eax, cpu.cpuid(CPUID_FIRST_EXTENDED_LEAF).eax
    for entry in cpuid_table():
        if entry.leaf <= last or CPUID_FIRST_EXTENDED_LEAF <= entry.leaf <= last_extended:
            assert cpu.cpuid(entry.leaf, entry.subleaf) & entry.verify_mask == entry.verify_value, hex(entry.leaf)
    assert cpu.fms == cpu.cpuid(1).eax == KNOWN_FMS[-1]
    supported = cpu.cpuid(0xD, 0).eax | cpu.cpuid(0xD, 1).ecx  # XCR0 and IA32_XSS bits
    assert XFAM_FIXED0 & supported == 0x61BE7  # XFAM_FIXED0 as TDH.SYS.RD gave it
    assert XFAM_FIXED1 & ~supported == 0
    assert cpu.msr(0x10A) == 0x20FD6B
    assert cpu.msr(0x11) == 0


def test_cpu_model_is_the_recorded_one(shared: Path) -> None:
    raw = json.loads((shared / "platforms" / "recording-cpu.json").read_text())
    cpu = recording_cpu()
    for row in raw["cpuid"]:
        values = Registers(*(int(row[name], 16) for name in ("eax", "ebx", "ecx", "edx")))
        assert cpu.cpuid(int(row["leaf"], 16), row["subleaf"]) == values, row
    assert cpu.msrs == {int(row["msr"], 16): int(row["lp0"], 16) for row in raw["msrs"]}


def test_configurable_leaves_as_recorded(shared: Path) -> None:
    """CPUID_CONFIG_LEAVES (0x400...) and CPUID_CONFIG_VALUES (0x500...) as TDH.SYS.RD gave them."""
    leaves: dict[int, int] = {}
    values: dict[int, int] = {}
    with gzip.open(shared / "vectors" / "guest" / "metadata.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            if event.get("leaf") == "TDH.SYS.RD" and event["status"] == "TDX_SUCCESS":
                place, value = int(event["in"]["rdx"], 16) & ~(1 << 63), int(event["out"].get("r8", "0x0"), 16)
                if place >> 8 == 0x19000003000004:
                    leaves[place & 0xFF] = value
                elif place >> 8 == 0x19000003000005:
                    values[place & 0xFF] = value
            elif event.get("id") == "sysrd/ids/0":
                break
    assert len(configurable()) == 12
    for position, entry in enumerate(configurable()):
        assert leaves[position] == entry.leaf_subleaf
        assert (values[2 * position], values[2 * position + 1]) == (entry.config_direct.low, entry.config_direct.high)
    assert leaves[12] == (1 << 64) - 1


@pytest.mark.parametrize("td", ["A", "B", "C"])
def test_guests_saw_the_fixed_bits(shared: Path, td: str) -> None:
    """A leaf gives #VE exactly if it is not in the table or is faulting; else its fixed bits are as listed."""
    last_extended = recording_cpu().cpuid(CPUID_FIRST_EXTENDED_LEAF).eax
    seen = 0
    with gzip.open(shared / "vectors" / "guest" / "guest_cpuid.jsonl.gz", "rt") as lines:
        sequence = ""
        for line in lines:
            event = json.loads(line)
            sequence = event["id"] if event["op"] == "seq_begin" else sequence
            if not sequence.startswith(f"cpuid/{td}/") or event.get("exit") != "CPUID":
                continue
            leaf, subleaf = (int(event["guest_gprs_set"][name], 16) & 0xFFFF_FFFF for name in ("rax", "rcx"))
            known = leaf <= CPUID_LAST_BASE_LEAF or CPUID_FIRST_EXTENDED_LEAF <= leaf <= last_extended
            if not known and not CPUID_FIRST_RESERVED_LEAF <= leaf <= CPUID_LAST_RESERVED_LEAF:
                leaf = CPUID_LAST_BASE_LEAF
            index = index_of(leaf, subleaf)
            if index is None or cpuid_table()[index].faulting:
                assert event["status"] == "inject:20", event
                continue
            assert event["status"] == "resumed", event
            gprs, entry = event["out"]["guest_gprs"], cpuid_table()[index]
            answer = Registers(*(int(gprs[name], 16) for name in ("rax", "rbx", "rcx", "rdx")))
            assert answer & entry.fixed1 == entry.fixed1, event
            seen += 1
    assert seen > 50
