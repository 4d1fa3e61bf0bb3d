"""CPUID virtualisation tables of TDX Module 1.5.01, and the CPU model that its recordings were made with.

For 64 leaves and sub-leaves the module knows, bit by bit, where a TD's value comes from (`cpuid_configurations.c`):

- `fixed1`: always 1; `fixed0_or_dynamic`: 0 in the stored value (the bit is constant 0, or is filled in when the guest
  executes CPUID, such as the APIC id, OSXSAVE and OSPKE);
- `config_direct`: the host's choice in TD_PARAMS.CPUID_CONFIG; `allow_direct`: the host's choice, but at most the
  native value;
- bits that an XFAM bit must allow: `xfam_bits`;
- every other bit: the native value, as sampled by TDH.SYS.INIT.

TDH.SYS.INIT insists on `native & verify_mask == verify_value`; TDH.SYS.LP.INIT insists that all LPs agree on the bits
of `verify_same`. A leaf that is not in the table, or is marked `faulting`, gives the guest a #VE.

Twelve entries have a place in TD_PARAMS.CPUID_CONFIG and in what TDH.SYS.INFO and TDH.SYS.RD list: `configurable`.
CPUID_VALUES and CPUID_VALID (TDCS) and CPUID_CONTROL (TDVPS) are indexed by `CpuidEntry.index`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from septum.arch.data import FOLDER, read_table

SUBLEAF_NA = 0xFFFF_FFFF
"""The sub-leaf of a leaf that has none, in CPUID_CONFIG leaves and in `CpuidEntry.subleaf`."""

CPUID_FIRST_RESERVED_LEAF = 0x4000_0000
CPUID_LAST_RESERVED_LEAF = 0x4FFF_FFFF
CPUID_FIRST_EXTENDED_LEAF = 0x8000_0000
CPUID_LAST_BASE_LEAF = 0x23
"""Last base leaf for guests, whatever the CPU's own is. A guest's CPUID of a leaf above it, or above the CPU's last
extended leaf, is answered as this leaf; the reserved range is not (`td_cpuid.c`)."""
CPUID_MIN_CPU_BASE_LEAF = 0x1F
CPUID_MIN_CPU_EXTENDED_LEAF = 0x8000_0008
"""TDH.SYS.INIT wants the CPU's last leaves to be at least these. Leaves the CPU does not have count as all 0."""

XFAM_FIXED0 = 0x6DBE7
"""XFAM bits the module can give to a TD; the SYS field of this name has those that the CPU has too, by CPUID(0xd)."""
XFAM_FIXED1 = 0x3
"""XFAM bits every TD must have: x87 and SSE."""

KNOWN_FMS: tuple[int, ...] = (0xD06D0, 0xA06E0, 0xA06D0, 0xA06F0, 0xC06F2, 0x806F8)
"""Family/model/stepping values that TDs may be given, newest generation first: Clearwater Forest, Granite Rapids D and
SP, Sierra Forest, Emerald Rapids, Sapphire Rapids; bits 3:0 are the highest stepping (`cpuid_fms.c`). A platform may
present itself and what comes after it in this list. The module's list of disallowed values is empty."""


class Registers(NamedTuple):
    """EAX, EBX, ECX, EDX, or a mask over them."""

    eax: int
    ebx: int
    ecx: int
    edx: int

    @classmethod
    def from_halves(cls, low: int, high: int) -> Registers:
        """From two 64-bit elements: EBX:EAX and EDX:ECX, as TD_PARAMS and CPUID_VALUES hold them."""
        return cls(low & 0xFFFF_FFFF, low >> 32, high & 0xFFFF_FFFF, high >> 32)

    @property
    def low(self) -> int:
        """EBX:EAX, the first 64-bit element."""
        return self.ebx << 32 | self.eax

    @property
    def high(self) -> int:
        """EDX:ECX, the second 64-bit element."""
        return self.edx << 32 | self.ecx

    def __and__(self, other: Registers) -> Registers:
        return Registers(*(a & b for a, b in zip(self, other, strict=True)))

    def __or__(self, other: Registers) -> Registers:
        return Registers(*(a | b for a, b in zip(self, other, strict=True)))

    def __invert__(self) -> Registers:
        return Registers(*(a ^ 0xFFFF_FFFF for a in self))


NO_BITS = Registers(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """How one leaf or sub-leaf is virtualised; the module's docstring tells what the masks mean."""

    index: int
    leaf: int
    subleaf: int
    """`SUBLEAF_NA` where the leaf ignores ECX."""
    faulting: bool
    """CPUID of it gives the guest a #VE; its value cannot be read as metadata."""
    fixed0_or_dynamic: Registers
    fixed1: Registers
    config_index: int | None
    """Position among the CPUID_CONFIG entries of TD_PARAMS, if it has one."""
    config_direct: Registers
    allow_direct: Registers
    verify_mask: Registers
    verify_value: Registers
    verify_same: Registers

    @property
    def leaf_subleaf(self) -> int:
        """Sub-leaf in bits 63:32 and leaf in bits 31:0, as CPUID_CONFIG_LEAVES and error details give them."""
        return self.subleaf << 32 | self.leaf


def _registers(text: str) -> Registers:
    return NO_BITS if text == "." else Registers(*(int(part, 16) for part in text.split(",")))


def _subleaf(text: str) -> int:
    return SUBLEAF_NA if text == "*" else int(text, 16)


@cache
def cpuid_table() -> tuple[CpuidEntry, ...]:
    """All entries in the module's order, which is also the order of CPUID_VALUES (`cpuid_lookup`)."""
    return tuple(
        CpuidEntry(
            index=index,
            leaf=int(leaf, 16),
            subleaf=_subleaf(subleaf),
            faulting=faulting == "y",
            fixed0_or_dynamic=_registers(fixed0),
            fixed1=_registers(fixed1),
            config_index=None if config == "." else int(config),
            config_direct=_registers(direct),
            allow_direct=_registers(allow),
            verify_mask=_registers(mask),
            verify_value=_registers(value),
            verify_same=_registers(same),
        )
        for index, (leaf, subleaf, faulting, fixed0, fixed1, config, direct, allow, mask, value, same) in enumerate(
            read_table("cpuid")
        )
    )


@cache
def configurable() -> tuple[CpuidEntry, ...]:
    """The entries that TD_PARAMS.CPUID_CONFIG and CPUID_CONFIG_LEAVES list, in that order (`cpuid_configurable`)."""
    chosen = {entry.config_index: entry for entry in cpuid_table() if entry.config_index is not None}
    return tuple(chosen[index] for index in range(len(chosen)))


@cache
def _indexes() -> Mapping[tuple[int, int], int]:
    return {(entry.leaf, entry.subleaf): entry.index for entry in cpuid_table()}


def index_of(leaf: int, subleaf: int) -> int | None:
    """The entry that answers CPUID(leaf, subleaf), or None if the module knows none (`get_cpuid_lookup_entry`).

    A leaf without sub-leaves answers for every value of `subleaf`.
    """
    indexes = _indexes()
    whole = indexes.get((leaf, SUBLEAF_NA))
    return indexes.get((leaf, subleaf)) if whole is None else whole


@cache
def xfam_bits(leaf: int, subleaf: int) -> Mapping[int, Registers]:
    """For CPUID(leaf, subleaf): XFAM bit number -> the CPUID bits that are 0 for a TD without that XFAM bit.

    Empty for entries that do not depend on single XFAM bits. Leaves 0xd (sub-leaf n >= 2: XFAM bit n), 0x14 (PT),
    0x1c (LBR), 0x1d and 0x1e (AMX) depend on XFAM as a whole and are not listed here.
    """
    return {
        int(bit): _registers(masks)
        for row_leaf, row_subleaf, bit, masks in read_table("cpuid_xfam")
        if (int(row_leaf, 16), _subleaf(row_subleaf)) == (leaf, subleaf)
    }


@dataclass(frozen=True, slots=True)
class CpuModel:
    """What a modelled CPU answers to the module: native CPUID, and MSRs at power-on, the same on every LP."""

    name: str
    about: str
    fms: int
    """Family/model/stepping, CPUID(1).EAX."""
    leaves: Mapping[int, Mapping[int, Registers]]
    msrs: Mapping[int, int]

    def cpuid(self, leaf: int, subleaf: int = 0) -> Registers:
        """Native values; a leaf that has only sub-leaf 0 ignores `subleaf`, an unknown (sub-)leaf is all 0."""
        known = self.leaves.get(leaf, {})
        return known.get(0 if len(known) == 1 else subleaf, NO_BITS)

    def msr(self, address: int) -> int:
        """The MSR's value at power-on, 0 for those that are not listed."""
        return self.msrs.get(address, 0)


@cache
def recording_cpu() -> CpuModel:
    """The CPU of the recorded vectors: shaped like a Sapphire Rapids server, but a model, not a measured machine.

    CPUID(1).EBX[31:24] and EDX of leaves 0xb and 0x1f, which carry the APIC id of an LP, are those of LP 0.
    """
    raw = json.loads((FOLDER / "cpu" / "recording.json").read_text(encoding="ascii"))
    leaves: dict[int, dict[int, Registers]] = {}
    for leaf, subleaf, *values in raw["cpuid"]:
        leaves.setdefault(int(leaf, 16), {})[subleaf] = Registers(*(int(value, 16) for value in values))
    msrs = {int(address, 16): int(value, 16) for address, value in raw["msrs"]}
    return CpuModel(raw["name"], raw["about"], int(raw["fms"], 16), leaves, msrs)
