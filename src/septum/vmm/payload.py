"""A TDVF image made in code: the payload Septum boots when it is given no firmware, and a builder for any other.

The end of an image is laid out as EDK2 OvmfPkg/ResetVector does (Ia16/ResetVectorVtf0.asm, X64/IntelTdxMetadata.asm).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

from septum.vmm.layout import FOUR_GIB
from septum.vmm.sections import MR_EXTEND, PAGE_SIZE, Section, SectionType
from septum.vmm.tdvf import (
    DESCRIPTOR,
    ENTRY_HEADER,
    FOOTER_FROM_END,
    OFFSET_FROM_END,
    SECTION,
    SIGNATURE,
    TABLE_FOOTER_GUID,
    TDX_METADATA_GUID,
    TDX_METADATA_OFFSET_GUID,
    VERSION,
)

RESET_CODE = bytes.fromhex("fa f3 90 eb fc").ljust(16, b"\x90")
"""At the reset vector: cli; then pause for ever."""


def make_image(sections: Sequence[Section], body: bytes, pointer: Literal["table", "offset"] = "table") -> bytes:
    """An image with the bytes of `body`, its end overwritten with metadata for `sections` and the reset vector.

    `pointer` says how the descriptor is found: through OVMF's GUID table, or in the older form by its offset 32 bytes
    before the end. Nothing is checked, so that wrong images can be made too; ValueError when `body` is too small.
    """
    descriptor = DESCRIPTOR.pack(SIGNATURE, DESCRIPTOR.size + SECTION.size * len(sections), VERSION, len(sections))
    entries = b"".join(
        SECTION.pack(s.data_offset, s.raw_data_size, s.memory_address, s.memory_data_size, s.type, s.attributes)
        for s in sections
    )
    entry = ENTRY_HEADER.size + 4
    table_start = len(body) - FOOTER_FROM_END - 2 - entry
    metadata = TDX_METADATA_GUID.bytes_le + descriptor + entries
    start = (table_start - len(metadata)) // 16 * 16
    if start < 0:
        raise ValueError(f"a body of {len(body)} bytes is too small for the metadata of {len(sections)} sections")
    offset = start + len(TDX_METADATA_GUID.bytes_le)
    table = bytes(entry + ENTRY_HEADER.size)
    if pointer == "table":
        distance = (len(body) - offset).to_bytes(4, "little")
        table = (
            distance
            + ENTRY_HEADER.pack(entry, TDX_METADATA_OFFSET_GUID.bytes_le)
            + ENTRY_HEADER.pack(entry + ENTRY_HEADER.size, TABLE_FOOTER_GUID.bytes_le)
        )
    last = (offset if pointer == "offset" else 0).to_bytes(4, "little").ljust(OFFSET_FROM_END - len(RESET_CODE), b"\0")
    tail = metadata.ljust(table_start - start, b"\0") + table + last + RESET_CODE
    return body[: len(body) - len(tail)] + tail


def builtin_payload() -> bytes:
    """The built-in image, always the same: a measured BFV of four pages with the reset vector, a TD_HOB, a TempMem.

    The BFV is filled from SHAKE-128, so that no two of its chunks are equal and every slip in order or address shows.
    """
    size = 4 * PAGE_SIZE
    sections = (
        Section(SectionType.BFV, 0, size, FOUR_GIB - size, size, MR_EXTEND),
        Section(SectionType.TD_HOB, memory_address=0x80_9000, memory_data_size=2 * PAGE_SIZE),
        Section(SectionType.TempMem, memory_address=0x80_B000, memory_data_size=2 * PAGE_SIZE),
    )
    return make_image(sections, hashlib.shake_128(b"septum built-in payload").digest(size))
