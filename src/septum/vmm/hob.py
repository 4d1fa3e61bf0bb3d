"""The TD HOB: the list that tells the firmware which memory it has and how much of that it must accept itself.

OVMF extends RTMR0 with the list's digest, without its END entry, before anything else.

Sources: QEMU 10.1 hw/i386/tdvf-hob.c and target/i386/kvm/tdx.c (tdx_accept_ram_range); UEFI PI 1.8, volume 3,
chapter 5; EDK2 OvmfPkg/IntelTdx/TdxHelperLib (the digest).
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence

from septum.arch.errors import UsageError
from septum.vmm.layout import Range, ram_ranges, range_of
from septum.vmm.sections import Section, SectionType

HANDOFF = struct.Struct("<HHIIIQQQQQ")
RESOURCE = struct.Struct("<IIQQ")
END = struct.Struct("<HHI")

HOB_TYPE_HANDOFF = 0x0001
HOB_TYPE_RESOURCE_DESCRIPTOR = 0x0003
HOB_TYPE_END_OF_HOB_LIST = 0xFFFF
RESOURCE_SIZE = 48
HANDOFF_VERSION = 9
RESOURCE_SYSTEM_MEMORY = 0
RESOURCE_MEMORY_UNACCEPTED = 7
RESOURCE_ATTRIBUTES = 0x7
"""Present, initialised, tested."""

_RESOURCE_HEADER = struct.pack("<HHI16s", HOB_TYPE_RESOURCE_DESCRIPTOR, RESOURCE_SIZE, 0, bytes(16))
_ADDED_TO_RAM = (SectionType.TD_HOB, SectionType.TempMem, SectionType.Payload, SectionType.PayloadParam)


def build_td_hob(sections: Sequence[Section], ram_size: int, name: str = "firmware") -> bytes:
    """The HOB list for a VM of `ram_size` bytes of RAM, as QEMU writes it to the start of the TD_HOB section.

    RAM that the VMM adds for the firmware (TD_HOB, TempMem; also Payload and PayloadParam, which QEMU refuses) is
    system memory, one entry a section; all other RAM is unaccepted memory.

    Raises UsageError, beginning with `name`, when there is no TD_HOB section, when the list does not fit into it, or
    when one of those sections is not inside the RAM.
    """
    place = td_hob_section(sections)
    if place is None:
        raise UsageError(f"{name}: no TD_HOB section, so no place for the HOB list; use a firmware that has one")
    resources = [
        _RESOURCE_HEADER + RESOURCE.pack(kind, RESOURCE_ATTRIBUTES, r.start, r.end - r.start)
        for kind, r in _resources(sections, ram_size, name)
    ]
    size = HANDOFF.size + RESOURCE_SIZE * len(resources) + END.size
    if size > place.memory_data_size:
        raise UsageError(
            f"{name}: {place.label(sections.index(place))}: MemoryDataSize {place.memory_data_size:#x} is too small "
            f"for the {size:#x} bytes of the HOB list with {len(resources)} memory ranges; use another firmware"
        )
    handoff = HANDOFF.pack(
        HOB_TYPE_HANDOFF, HANDOFF.size, 0, HANDOFF_VERSION, 0, 0, 0, 0, 0, place.memory_address + size
    )
    return b"".join((handoff, *resources, END.pack(HOB_TYPE_END_OF_HOB_LIST, END.size, 0)))


def td_hob_section(sections: Sequence[Section]) -> Section | None:
    """The TD_HOB section, if there is one; its address is what a vCPU starts with in RCX and R8."""
    return next((s for s in sections if s.type is SectionType.TD_HOB), None)


def hob_digest(hob: bytes) -> bytes:
    """The SHA-384 of a HOB list without its END entry: what OVMF extends RTMR0 with first."""
    return hashlib.sha384(hob[: -END.size]).digest()


def _resources(sections: Sequence[Section], ram_size: int, name: str) -> Iterator[tuple[int, Range]]:
    """Each memory range with its resource type, in address order."""
    ram = ram_ranges(ram_size)
    added: dict[Range, list[Section]] = {r: [] for r in ram}
    for index, section in enumerate(sections):
        if section.type in _ADDED_TO_RAM and section.added:
            added[range_of(section, ram, f"{name}: {section.label(index)}")].append(section)
    for whole in ram:
        start = whole.start
        for section in sorted(added[whole], key=lambda s: s.memory_address):
            if start < section.memory_address:
                yield RESOURCE_MEMORY_UNACCEPTED, Range(start, section.memory_address)
            yield RESOURCE_SYSTEM_MEMORY, Range(section.memory_address, section.memory_end)
            start = section.memory_end
        if start < whole.end:
            yield RESOURCE_MEMORY_UNACCEPTED, Range(start, whole.end)
