"""The sections of TDVF metadata: what they are and the rules each one, and all of them together, must keep.

Sources: Intel TDX Virtual Firmware Design Guide (344991), chapter 11; td-shim doc/tdshim_spec.md and
td-shim-interface/src/metadata.rs (which alone defines TD_PARAMS); QEMU 10.1 hw/i386/tdvf.c. Where those differ, what
is allowed here is whatever a VMM could build a TD from with only the image at hand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

PAGE_SIZE = 4096

MR_EXTEND = 1 << 0
"""Attribute: the pages' content is measured with TDH.MR.EXTEND."""
PAGE_AUG = 1 << 1
"""Attribute: the pages come later through TDH.MEM.PAGE.AUG, instead of TDH.MEM.PAGE.ADD while the TD is built."""

ADDRESS_LIMIT = 1 << 51
"""The shared bit of the widest guest address (GPAW 52): no private page is at or above it."""
MAX_ADDED_SIZE = 256 << 20
MAX_MEASURED_SIZE = 128 << 20
"""Septum's own limits, in bytes, for what one image may ask for, so that no image takes unbounded time."""


class SectionType(IntEnum):
    """TDVF_SECTION.Type."""

    BFV = 0
    CFV = 1
    TD_HOB = 2
    TempMem = 3
    PermMem = 4
    Payload = 5
    PayloadParam = 6
    TD_INFO = 7
    TD_PARAMS = 8


@dataclass(frozen=True, slots=True)
class Section:
    """One TDVF_SECTION: bytes of the image (offset and size) and where they go in the TD's memory (address, size)."""

    type: SectionType
    data_offset: int = 0
    raw_data_size: int = 0
    memory_address: int = 0
    memory_data_size: int = 0
    attributes: int = 0

    @property
    def memory_end(self) -> int:
        """The first guest physical address behind the section."""
        return self.memory_address + self.memory_data_size

    @property
    def measured(self) -> bool:
        """Whether the content goes into MRTD."""
        return bool(self.attributes & MR_EXTEND)

    @property
    def added(self) -> bool:
        """Whether the VMM adds the pages while it builds the TD (TDH.MEM.PAGE.ADD)."""
        return self.memory_data_size > 0 and not self.attributes & PAGE_AUG

    def label(self, index: int) -> str:
        """How messages name the section; `index` is its place in the metadata, from 0."""
        return f"section {index} ({self.type.name})"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What the metadata may say for one type: raw data (None: optional), memory, attributes, how often."""

    raw: bool | None
    memory: bool = True
    allowed: int = 0
    required: int = 0
    single: bool = False


_RULES = {
    SectionType.BFV: _Rule(raw=True, allowed=MR_EXTEND),
    SectionType.CFV: _Rule(raw=True, allowed=MR_EXTEND),
    SectionType.TD_HOB: _Rule(raw=False, single=True),
    SectionType.TempMem: _Rule(raw=False, allowed=MR_EXTEND | PAGE_AUG),
    SectionType.PermMem: _Rule(raw=False, allowed=PAGE_AUG, required=PAGE_AUG),
    SectionType.Payload: _Rule(raw=None, allowed=MR_EXTEND, single=True),
    SectionType.PayloadParam: _Rule(raw=None, allowed=MR_EXTEND, single=True),
    SectionType.TD_INFO: _Rule(raw=True, memory=False, single=True),
    SectionType.TD_PARAMS: _Rule(raw=True, memory=False, single=True),
}
SECTION_TYPES = ", ".join(f"{t.value} {t.name}" for t in SectionType)
"""The types with their names, for messages."""
_ATTRIBUTES = {
    0: "none",
    MR_EXTEND: "MR.EXTEND (1)",
    PAGE_AUG: "PAGE.AUG (2)",
    MR_EXTEND | PAGE_AUG: "MR.EXTEND (1) or PAGE.AUG (2)",
}


def complaints(sections: Sequence[Section], image_size: int) -> Iterator[str]:
    """What is wrong with the sections of an image of `image_size` bytes: each alone, then all together.

    Each item is one line that names the section, the field, its value and what is allowed.
    """
    for index, section in enumerate(sections):
        for text in _section_complaints(section, _RULES[section.type], image_size):
            yield f"{section.label(index)}: {text}"
    yield from _count_complaints(sections)
    yield from _overlap_complaints(sections)
    for what, limit, size in (
        ("to be added", MAX_ADDED_SIZE, sum(s.memory_data_size for s in sections if s.added)),
        ("to be measured (MR.EXTEND)", MAX_MEASURED_SIZE, sum(s.memory_data_size for s in sections if s.measured)),
    ):
        if size > limit:
            yield f"sections: the MemoryDataSize {what} is {size:#x} in all; Septum allows {limit:#x}"


def _section_complaints(s: Section, rule: _Rule, image_size: int) -> Iterator[str]:
    yield from _attribute_complaints(s, rule)
    if rule.raw and not s.raw_data_size:
        yield "RawDataSize 0; this type needs bytes of the image"
    if rule.raw is False and s.raw_data_size:
        yield f"RawDataSize {s.raw_data_size:#x}, must be 0: this type has no bytes in the image"
    if not s.raw_data_size and s.data_offset:
        yield f"DataOffset {s.data_offset:#x}, must be 0 when RawDataSize is 0"
    if s.data_offset + s.raw_data_size > image_size:
        yield (
            f"DataOffset {s.data_offset:#x} + RawDataSize {s.raw_data_size:#x} is past the end of the image of "
            f"{image_size:#x} bytes; it is cut, or a CODE part without VARS: give the combined image"
        )
    if not rule.memory:
        for name, value in (("MemoryAddress", s.memory_address), ("MemoryDataSize", s.memory_data_size)):
            if value:
                yield f"{name} {value:#x}, must be 0: this type is not put into memory"
        return
    for name, value in (("MemoryAddress", s.memory_address), ("MemoryDataSize", s.memory_data_size)):
        if value % PAGE_SIZE:
            yield f"{name} {value:#x} is not a multiple of {PAGE_SIZE:#x}"
    if not s.memory_data_size:
        yield f"MemoryDataSize 0; allowed are multiples of {PAGE_SIZE:#x} above 0"
    if s.memory_end > ADDRESS_LIMIT:
        yield (
            f"MemoryAddress {s.memory_address:#x} + MemoryDataSize {s.memory_data_size:#x} is above the end of "
            f"private guest addresses, {ADDRESS_LIMIT:#x}"
        )
    if s.raw_data_size > s.memory_data_size:
        yield f"RawDataSize {s.raw_data_size:#x} is larger than MemoryDataSize {s.memory_data_size:#x}"


def _attribute_complaints(s: Section, rule: _Rule) -> Iterator[str]:
    if s.attributes & ~rule.allowed:
        yield f"Attributes {s.attributes:#x}; this type allows {_ATTRIBUTES[rule.allowed]}"
    if rule.required & ~s.attributes:
        yield f"Attributes {s.attributes:#x}; this type needs {_ATTRIBUTES[rule.required]}"
    if s.attributes == MR_EXTEND | PAGE_AUG:
        yield f"Attributes {s.attributes:#x}; a page that comes through PAGE.AUG can't be measured, drop one of the two"
    if s.measured and rule.raw is None and not s.raw_data_size:
        yield "Attributes MR.EXTEND with RawDataSize 0; MRTD would depend on content that is not in the image"


def _count_complaints(sections: Sequence[Section]) -> Iterator[str]:
    first: dict[SectionType, int] = {}
    for index, section in enumerate(sections):
        if _RULES[section.type].single and section.type in first:
            yield f"{section.label(index)}: a second one, after section {first[section.type]}; allowed is one"
        first.setdefault(section.type, index)
    if SectionType.BFV not in first:
        yield "sections: no BFV; an image needs at least one"
    if SectionType.TD_HOB not in first and SectionType.PermMem not in first:
        yield "sections: neither TD_HOB nor PermMem; the firmware needs one of them to learn its memory"
    if SectionType.PayloadParam in first and SectionType.Payload not in first:
        yield f"section {first[SectionType.PayloadParam]} (PayloadParam): there is no Payload it could belong to"
    volumes = [s for s in sections if s.type is SectionType.BFV]
    for index, section in enumerate(sections):
        if not _RULES[section.type].memory and not any(_holds(volume, section) for volume in volumes):
            yield (
                f"{section.label(index)}: DataOffset {section.data_offset:#x} + RawDataSize "
                f"{section.raw_data_size:#x} is not inside the data of a BFV"
            )


def _holds(outer: Section, inner: Section) -> bool:
    end = inner.data_offset + inner.raw_data_size
    return outer.data_offset <= inner.data_offset and end <= outer.data_offset + outer.raw_data_size


def _overlap_complaints(sections: Sequence[Section]) -> Iterator[str]:
    in_memory = [(s.memory_address, i, s) for i, s in enumerate(sections) if s.memory_data_size]
    for (_, i, a), (_, j, b) in pairwise(sorted(in_memory, key=lambda entry: entry[:2])):
        if b.memory_address < a.memory_end:
            yield (
                f"{b.label(j)}: MemoryAddress {b.memory_address:#x} is inside {a.label(i)}, "
                f"{a.memory_address:#x} to {a.memory_end:#x}; sections may not overlap"
            )
