"""TDVF firmware images: where their metadata is, what it says, and whether a VMM could build a TD from it.

An image ends with the reset vector. Before it, either OVMF's GUID table (its footer 48 bytes before the end) has an
entry with the distance of the TDVF descriptor from the end of the image, or, in the older form that td-shim keeps,
the four bytes 32 before the end hold the descriptor's offset from the start. The descriptor lists the sections the
VMM has to put into the TD's memory before its first instruction.

Sources: Intel TDX Virtual Firmware Design Guide (344991), chapter 11; QEMU 10.1 hw/i386/pc_sysfw_ovmf.c and
hw/i386/tdvf.c; EDK2 OvmfPkg/ResetVector/X64/IntelTdxMetadata.asm; td-shim doc/tdshim_spec.md.
"""

import lzma
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from septum.arch.errors import UsageError
from septum.vmm.sections import PAGE_SIZE, SECTION_TYPES, Section, SectionType, complaints

TABLE_FOOTER_GUID = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
"""Ends OVMF's table of GUIDed entries, 48 bytes before the end of the image."""
TDX_METADATA_OFFSET_GUID = UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")
"""The table entry whose 32-bit value is the distance of the TDVF descriptor from the end of the image."""
TDX_METADATA_GUID = UUID("e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae")
"""Stands directly before the TDVF descriptor."""

FOOTER_FROM_END = 48
OFFSET_FROM_END = 32
ENTRY_HEADER = struct.Struct("<H16s")
DESCRIPTOR = struct.Struct("<4sIII")
SECTION = struct.Struct("<IIQQII")
SIGNATURE = b"TDVF"
VERSION = 1

MAX_IMAGE_SIZE = 64 << 20
"""Septum's own limit for an image, in bytes, so that a wrong file or a decompression bomb ends in a message."""
MAX_SECTIONS = 1024
"""Septum's own limit for the number of sections; real images have under ten."""


@dataclass(frozen=True, slots=True)
class TdvfImage:
    """A checked firmware image. `sections` is in the order of the metadata, which is the order of the build."""

    name: str
    data: bytes = field(repr=False)
    sections: tuple[Section, ...]
    descriptor_offset: int

    def raw(self, section: Section) -> bytes:
        """The section's bytes in the image."""
        return self.data[section.data_offset : section.data_offset + section.raw_data_size]

    def pages(self, section: Section) -> Iterator[tuple[int, bytes]]:
        """Each 4 KiB page of the section, in address order, as (guest physical address, content).

        Memory beyond the raw data is zero, as the design guide wants it. (QEMU 10.1 goes on reading the image there;
        no known image has such a section.)
        """
        raw = self.raw(section)
        for offset in range(0, section.memory_data_size, PAGE_SIZE):
            yield section.memory_address + offset, raw[offset : offset + PAGE_SIZE].ljust(PAGE_SIZE, b"\0")


def load_image(path: str | Path) -> TdvfImage:
    """Read a firmware image; a file compressed with xz is decompressed on the way.

    Raises UsageError, naming the file, when it can't be read or is no TDVF image a TD could be built from.
    """
    name = str(path) if path and str(path).isprintable() else repr(str(path))
    try:
        file = Path(path)
        if not stat.S_ISREG(file.stat().st_mode):
            raise UsageError(f"{name}: not a regular file; give the path of a firmware image such as OVMF.fd")
        with file.open("rb") as stream:
            data = stream.read(MAX_IMAGE_SIZE + 1)
    except OSError as error:
        raise UsageError(
            f"{name}: can't be read: {error.strerror or error}; check the path and its permissions"
        ) from None
    except ValueError as error:
        raise UsageError(f"{name}: not a path: {error}; give the path of a firmware image") from None
    if len(data) <= MAX_IMAGE_SIZE and (data.startswith(b"\xfd7zXZ\0") or file.suffix == ".xz"):
        data = _decompress(data, name)
    return parse_image(data, name)


def _decompress(data: bytes, name: str) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=4 * MAX_IMAGE_SIZE)
    try:
        plain = stream.decompress(data, max_length=MAX_IMAGE_SIZE + 1)
    except lzma.LZMAError as error:
        raise UsageError(f"{name}: damaged xz data ({error}); fetch the file again, or give the image itself") from None
    if len(plain) <= MAX_IMAGE_SIZE and not stream.eof:
        raise UsageError(f"{name}: the xz data ends too soon, after {len(data)} bytes; fetch the file again")
    if stream.unused_data.strip(b"\0"):
        raise UsageError(f"{name}: {len(stream.unused_data)} bytes follow the xz stream; give a file of one xz stream")
    return plain


def parse_image(data: bytes, name: str = "image") -> TdvfImage:
    """Check an image and return it; `name` begins every message.

    Raises UsageError for the first thing that is wrong, naming section, field, value and what is allowed.
    """
    try:
        _check_size(data)
        offset = _descriptor_offset(data)
        sections = _read_sections(data, offset)
        for complaint in complaints(sections, len(data)):
            raise _BadImage(complaint)
    except _BadImage as bad:
        raise UsageError(f"{name}: {bad}") from None
    return TdvfImage(name, data, sections, offset)


class _BadImage(Exception):
    """What is wrong with the image, without its name."""


def _check_size(data: bytes) -> None:
    if not data:
        raise _BadImage("empty; give a firmware image such as OVMF.fd")
    if len(data) < PAGE_SIZE:
        raise _BadImage(f"only {len(data)} bytes; a firmware image has at least {PAGE_SIZE}")
    if len(data) > MAX_IMAGE_SIZE:
        raise _BadImage(f"larger than {MAX_IMAGE_SIZE} bytes, the largest image Septum reads; give a firmware image")


def _descriptor_offset(data: bytes) -> int:
    """The offset of the TDVF descriptor from the start of the image."""
    size = len(data)
    distance = _table_entry(data)
    if distance is not None:
        offset = size - distance
        where = f"the TDX metadata offset {distance:#x} from the end of the image"
    else:
        offset = int.from_bytes(data[size - OFFSET_FROM_END :][:4], "little")
        where = f"the TDX metadata offset {offset:#x} at {size - OFFSET_FROM_END:#x}"
        if data[offset : offset + len(SIGNATURE)] != SIGNATURE:
            raise _BadImage(
                f"no TDX metadata: no OVMF table entry {TDX_METADATA_OFFSET_GUID} and no descriptor offset 32 bytes "
                "before the end; give an image built for TDX (of a pair CODE and VARS, the combined OVMF.fd)"
            )
    if not 16 <= offset <= size - DESCRIPTOR.size:
        raise _BadImage(
            f"{where} is {'before' if offset < 16 else 'past'} the image of {size:#x} bytes; "
            "it is damaged or cut: give the complete image"
        )
    if data[offset - 16 : offset] != TDX_METADATA_GUID.bytes_le:
        found = UUID(bytes_le=data[offset - 16 : offset])
        raise _BadImage(f"{where}: the GUID before the descriptor is {found}, must be {TDX_METADATA_GUID}")
    return offset


def _table_entry(data: bytes) -> int | None:
    """The value of the TDX metadata entry of OVMF's GUID table, None when there is no table or no such entry.

    The table is read from its foot upwards; an entry is its data, its whole length in two bytes, and its GUID.
    """
    foot = len(data) - FOOTER_FROM_END
    if data[foot : foot + 16] != TABLE_FOOTER_GUID.bytes_le:
        return None
    end = foot - 2
    length = int.from_bytes(data[end:foot], "little")
    start = end - (length - ENTRY_HEADER.size)
    if not 0 <= start <= end:
        raise _BadImage(f"OVMF table: length {length} at {end:#x}; allowed {ENTRY_HEADER.size} to {foot + 16}")
    while end - start >= ENTRY_HEADER.size:
        length, guid = ENTRY_HEADER.unpack_from(data, end - ENTRY_HEADER.size)
        if not ENTRY_HEADER.size <= length <= end - start:
            raise _BadImage(
                f"OVMF table: entry {UUID(bytes_le=guid)} at {end - 16:#x} has length {length}; "
                f"allowed {ENTRY_HEADER.size} to {end - start}"
            )
        if guid == TDX_METADATA_OFFSET_GUID.bytes_le:
            if length != ENTRY_HEADER.size + 4:
                raise _BadImage(f"OVMF table: TDX metadata entry has length {length}, must be {ENTRY_HEADER.size + 4}")
            return int.from_bytes(data[end - length : end - length + 4], "little")
        end -= length
    return None


def _read_sections(data: bytes, offset: int) -> tuple[Section, ...]:
    signature, length, version, count = DESCRIPTOR.unpack_from(data, offset)
    place = f"TDVF descriptor at {offset:#x}"
    if signature != SIGNATURE:
        raise _BadImage(f"{place}: Signature {signature!r}, must be {SIGNATURE!r}")
    if version != VERSION:
        raise _BadImage(f"{place}: Version {version}, must be {VERSION}")
    if not 1 <= count <= MAX_SECTIONS:
        raise _BadImage(f"{place}: NumberOfSectionEntry {count}, allowed 1 to {MAX_SECTIONS}")
    if length != DESCRIPTOR.size + count * SECTION.size:
        raise _BadImage(
            f"{place}: Length {length}, must be {DESCRIPTOR.size + count * SECTION.size} for {count} section entries"
        )
    if offset + length > len(data):
        raise _BadImage(f"{place}: Length {length} runs past the end of the image of {len(data):#x} bytes; it is cut")
    table = data[offset + DESCRIPTOR.size : offset + length]
    sections = []
    for index, (data_offset, raw, address, size, kind, attributes) in enumerate(SECTION.iter_unpack(table)):
        if kind > max(SectionType):
            raise _BadImage(f"section {index}: Type {kind} is unknown; allowed {SECTION_TYPES}")
        sections.append(Section(SectionType(kind), data_offset, raw, address, size, attributes))
    return tuple(sections)
