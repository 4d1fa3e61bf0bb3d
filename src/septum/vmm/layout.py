"""Where a VM's memory is, as QEMU's q35 machine has it: RAM below and above 4 GiB, the firmware directly below 4 GiB.

Sources: QEMU 10.1 hw/i386/pc_q35.c (pc_q35_init), hw/i386/x86-common.c (x86_bios_rom_init), target/i386/kvm/tdx.c.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from septum.arch.errors import UsageError
from septum.vmm.sections import PAGE_SIZE, Section, SectionType
from septum.vmm.tdvf import TdvfImage

FOUR_GIB = 1 << 32
RESET_VECTOR = FOUR_GIB - 16
"""Where a vCPU fetches its first instruction."""
SPLIT_FROM = 0xB000_0000
"""RAM of this size or more, in bytes, does not fit below the PCI hole and is split ..."""
SPLIT_LOW = 0x8000_0000
"""... into this much from 0 and the rest from 4 GiB."""
MAX_RAM = 1 << 46

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(0x[0-9a-f]{1,16}|[0-9]{1,20})(?:([kmgt])(?:i?b)?)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Range:
    """Guest physical addresses from `start` up to, not including, `end`."""

    start: int
    end: int

    def holds(self, section: Section) -> bool:
        """Whether the whole section is inside."""
        return self.start <= section.memory_address and section.memory_end <= self.end

    def __str__(self) -> str:
        return f"{self.start:#x} to {self.end:#x}"


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """The private memory of a VM: its RAM in address order, and the window the firmware is mapped in."""

    ram: tuple[Range, ...]
    firmware: Range


def parse_size(text: str) -> int:
    """A memory size in bytes from text such as `2G`, `512MiB` or `0x40000000` (powers of 1024; no unit: bytes).

    Raises UsageError unless it is a multiple of 4 KiB from 4 KiB to 64 TiB.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"memory size {text!r}: not a size; write a number with K, M, G or T, such as 2G")
    number, unit = match.groups(default="")
    size = int(number, 0 if number[:2].lower() == "0x" else 10) << _UNITS[unit.lower()]
    return _checked_ram_size(size, f"memory size {text!r}")


def _checked_ram_size(size: int, place: str) -> int:
    if not PAGE_SIZE <= size <= MAX_RAM or size % PAGE_SIZE:
        raise UsageError(f"{place}: {size} bytes; allowed are multiples of 4 KiB from 4K to 64T, such as 2G")
    return size


def ram_ranges(ram_size: int) -> tuple[Range, ...]:
    """The RAM of a VM of `ram_size` bytes, in address order. Raises UsageError for a size no VM can have."""
    _checked_ram_size(ram_size, "memory size")
    if ram_size < SPLIT_FROM:
        return (Range(0, ram_size),)
    return Range(0, SPLIT_LOW), Range(FOUR_GIB, FOUR_GIB + ram_size - SPLIT_LOW)


def range_of(section: Section, ranges: Sequence[Range], place: str) -> Range:
    """The one of `ranges` that holds the whole section. Raises UsageError, beginning with `place`, when none does."""
    for candidate in ranges:
        if candidate.holds(section):
            return candidate
    raise UsageError(
        f"{place}: {section.memory_address:#x} to {section.memory_end:#x} is not inside the VM's memory, "
        f"{' and '.join(map(str, ranges))}; give the VM more memory or use another firmware"
    )


def plan_layout(image: TdvfImage, ram_size: int) -> MemoryLayout:
    """Lay out a VM of `ram_size` bytes of RAM that boots `image`, mapped so that it ends at 4 GiB.

    Raises UsageError when a section lies neither in the RAM nor in the firmware's window.
    """
    ram = ram_ranges(ram_size)
    window = -(-len(image.data) // PAGE_SIZE) * PAGE_SIZE
    layout = MemoryLayout(ram, Range(FOUR_GIB - window, FOUR_GIB))
    for index, section in enumerate(image.sections):
        if section.memory_data_size:
            range_of(section, (*ram, layout.firmware), f"{image.name}: {section.label(index)}")
    return layout


def check_reset_vector(image: TdvfImage) -> None:
    """Raise UsageError unless a BFV holds the reset vector, without which no vCPU could run its first instruction."""
    if not any(s.memory_address <= RESET_VECTOR < s.memory_end for s in image.sections if s.type is SectionType.BFV):
        raise UsageError(
            f"{image.name}: no BFV section holds the reset vector {RESET_VECTOR:#x}, where a vCPU starts; "
            "use a firmware whose BFV ends at 4 GiB"
        )
