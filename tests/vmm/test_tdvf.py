"""Reading TDVF images: real ones, every section type, and every way an image can be wrong."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.vmm.measure import measure_image
from septum.vmm.payload import builtin_payload, make_image
from septum.vmm.sections import MR_EXTEND, PAGE_AUG, Section, SectionType
from septum.vmm.tdvf import MAX_IMAGE_SIZE, MAX_SECTIONS, SECTION, TdvfImage, load_image, parse_image

SIZE = 0x4000
BODY = bytes(range(256)) * (SIZE // 256)
BFV = Section(SectionType.BFV, 0x1000, 0x3000, 0xFFFFD000, 0x3000, MR_EXTEND)
CFV = Section(SectionType.CFV, 0, 0x1000, 0xFFFFC000, 0x1000)
HOB = Section(SectionType.TD_HOB, memory_address=0x809000, memory_data_size=0x2000)
TEMP = Section(SectionType.TempMem, memory_address=0x80B000, memory_data_size=0x2000)
PERM = Section(SectionType.PermMem, memory_address=0x1000000, memory_data_size=0x400000, attributes=PAGE_AUG)
PAYLOAD = Section(SectionType.Payload, 0x1000, 0x1800, 0x2000000, 0x4000, MR_EXTEND)
PARAM = Section(SectionType.PayloadParam, memory_address=0x3000000, memory_data_size=0x1000)
INFO = Section(SectionType.TD_INFO, 0x1100, 0x40)
PARAMS = Section(SectionType.TD_PARAMS, 0x1400, 0x400)
EVERY_TYPE = (BFV, CFV, HOB, TEMP, PERM, PAYLOAD, PARAM, INFO, PARAMS)


def complaint(data: bytes) -> str:
    """The message an image is refused with, without the name of the image."""
    with pytest.raises(UsageError) as caught:
        parse_image(data, "fw.fd")
    text = str(caught.value)
    assert text.startswith("fw.fd: ")
    assert "\n" not in text
    return text.removeprefix("fw.fd: ")


def refused(*sections: Section) -> str:
    """The message an image with these sections is refused with."""
    return complaint(make_image(sections, BODY))


@pytest.mark.parametrize("entry", [0, 1])
def test_real_images_are_read_as_recorded(shared: Path, entry: int) -> None:
    known = json.loads((shared / "firmware/known-mrtd.json").read_text())[entry]
    image = load_image(shared / "firmware" / known["file"])
    assert hashlib.sha256(image.data).hexdigest() == known["image_sha256"]
    assert [
        (s.type.name, s.type, s.data_offset, s.raw_data_size, s.memory_address, s.memory_data_size, s.attributes)
        for s in image.sections
    ] == [
        (
            s["type"],
            s["type_id"],
            *(int(s[key], 16) for key in ("data_offset", "raw_size", "address", "mem_size")),
            s["attributes"],
        )
        for s in known["sections"]
    ]
    assert sum(s.memory_data_size for s in image.sections if s.added) == known["page_adds"] * 4096
    assert sum(s.memory_data_size for s in image.sections if s.measured) == known["mr_extends"] * 256


def test_the_code_part_of_a_real_image_is_refused(shared: Path) -> None:
    whole = load_image(shared / "firmware/deb13-2025.02-OVMF.fd.xz").data
    assert complaint(whole[0x84000:]) == (
        "section 0 (BFV): DataOffset 0x84000 + RawDataSize 0x37c000 is past the end of the image of 0x37c000 bytes; "
        "it is cut, or a CODE part without VARS: give the combined image"
    )


def test_a_real_image_without_tdx_metadata_is_refused(shared: Path) -> None:
    whole = load_image(shared / "firmware/deb13-2025.02-OVMF.fd.xz").data
    entry = bytes.fromhex("35657ae44a989847865e4685a7bf8ec2")
    assert whole.count(entry) == 1
    assert complaint(whole.replace(entry, bytes(16))).startswith("no TDX metadata: no OVMF table entry e47a6535-")


@pytest.mark.parametrize("pointer", ["table", "offset"])
def test_every_section_type_is_read_back(pointer: str) -> None:
    image = parse_image(make_image(EVERY_TYPE, BODY, pointer))  # type: ignore[arg-type]
    assert image.sections == EVERY_TYPE
    assert image.data[image.descriptor_offset :][:4] == b"TDVF"
    assert {s.type.name for s in image.sections if s.added} == {
        "BFV", "CFV", "TD_HOB", "TempMem", "Payload", "PayloadParam",
    }  # fmt: skip
    assert {s.type.name for s in image.sections if s.measured} == {"BFV", "Payload"}


def test_memory_behind_the_raw_data_is_zero() -> None:
    image = parse_image(make_image((BFV, HOB, PAYLOAD), BODY))
    pages = list(image.pages(PAYLOAD))
    assert [gpa for gpa, _ in pages] == [0x2000000, 0x2001000, 0x2002000, 0x2003000]
    assert b"".join(page for _, page in pages) == BODY[:0x1800] + bytes(0x2800)
    assert list(image.pages(INFO)) == []
    assert list(image.pages(TEMP)) == [(0x80B000, bytes(4096)), (0x80C000, bytes(4096))]


UNUSABLE = {
    "unknown type": (BFV, HOB, replace(TEMP, type=9)),  # type: ignore[arg-type]
    "no sections": (),
    "no BFV": (CFV, HOB),
    "no memory": (BFV, CFV),
    "two HOBs": (BFV, HOB, replace(HOB, memory_address=0x900000)),
    "parameter without payload": (BFV, HOB, PARAM),
    "info outside": (BFV, CFV, HOB, replace(INFO, data_offset=0xFE0)),
    "params outside": (BFV, CFV, HOB, replace(PARAMS, data_offset=0x0)),
    "reserved attribute": (BFV, HOB, replace(TEMP, attributes=4)),
    "measured HOB": (BFV, replace(HOB, attributes=MR_EXTEND)),
    "augmented BFV": (replace(BFV, attributes=PAGE_AUG), HOB),
    "measured and augmented": (BFV, HOB, replace(TEMP, attributes=MR_EXTEND | PAGE_AUG)),
    "added PermMem": (BFV, replace(PERM, attributes=0)),
    "measured payload elsewhere": (BFV, HOB, replace(PAYLOAD, data_offset=0, raw_data_size=0)),
    "BFV without data": (replace(BFV, raw_data_size=0), HOB),
    "HOB with data": (BFV, replace(HOB, raw_data_size=16)),
    "offset without data": (BFV, HOB, replace(TEMP, data_offset=0x1000)),
    "data past the end": (replace(BFV, data_offset=0x1001), HOB),
    "data wraps": (replace(BFV, data_offset=0xFFFFF000, raw_data_size=0x3000), HOB),
    "info in memory": (BFV, HOB, replace(INFO, memory_address=0x1000)),
    "info with memory size": (BFV, HOB, replace(INFO, memory_data_size=0x1000)),
    "address not aligned": (BFV, HOB, replace(TEMP, memory_address=0x80B010)),
    "size not aligned": (BFV, HOB, replace(TEMP, memory_data_size=0x1001)),
    "no memory size": (BFV, HOB, replace(TEMP, memory_data_size=0)),
    "address too high": (BFV, HOB, replace(TEMP, memory_address=1 << 51)),
    "address wraps": (BFV, HOB, replace(TEMP, memory_address=(1 << 64) - 0x1000)),
    "size too large": (BFV, HOB, replace(PERM, memory_data_size=(1 << 64) - 0x1000)),
    "data larger than memory": (replace(BFV, memory_data_size=0x2000), HOB),
    "overlap": (BFV, HOB, replace(TEMP, memory_address=0x80A000)),
    "same place": (BFV, HOB, replace(TEMP, memory_address=HOB.memory_address)),
    "too much added": (BFV, HOB, replace(TEMP, memory_address=1 << 32, memory_data_size=1 << 30)),
    "too much measured": (
        BFV, HOB, replace(TEMP, memory_address=1 << 32, memory_data_size=200 << 20, attributes=MR_EXTEND),
    ),
}  # fmt: skip
MESSAGES = {
    "unknown type": "section 2: Type 9 is unknown; allowed 0 BFV, 1 CFV, 2 TD_HOB, 3 TempMem, 4 PermMem, 5 Payload, "
    "6 PayloadParam, 7 TD_INFO, 8 TD_PARAMS",
    "no sections": f"TDVF descriptor at 0x3fa0: NumberOfSectionEntry 0, allowed 1 to {MAX_SECTIONS}",
    "no BFV": "sections: no BFV; an image needs at least one",
    "no memory": "sections: neither TD_HOB nor PermMem; the firmware needs one of them to learn its memory",
    "two HOBs": "section 2 (TD_HOB): a second one, after section 1; allowed is one",
    "parameter without payload": "section 2 (PayloadParam): there is no Payload it could belong to",
    "info outside": "section 3 (TD_INFO): DataOffset 0xfe0 + RawDataSize 0x40 is not inside the data of a BFV",
    "params outside": "section 3 (TD_PARAMS): DataOffset 0x0 + RawDataSize 0x400 is not inside the data of a BFV",
    "reserved attribute": "section 2 (TempMem): Attributes 0x4; this type allows MR.EXTEND (1) or PAGE.AUG (2)",
    "measured HOB": "section 1 (TD_HOB): Attributes 0x1; this type allows none",
    "augmented BFV": "section 0 (BFV): Attributes 0x2; this type allows MR.EXTEND (1)",
    "measured and augmented": "section 2 (TempMem): Attributes 0x3; a page that comes through PAGE.AUG can't be "
    "measured, drop one of the two",
    "added PermMem": "section 1 (PermMem): Attributes 0x0; this type needs PAGE.AUG (2)",
    "measured payload elsewhere": "section 2 (Payload): Attributes MR.EXTEND with RawDataSize 0; MRTD would depend on "
    "content that is not in the image",
    "BFV without data": "section 0 (BFV): RawDataSize 0; this type needs bytes of the image",
    "HOB with data": "section 1 (TD_HOB): RawDataSize 0x10, must be 0: this type has no bytes in the image",
    "offset without data": "section 2 (TempMem): DataOffset 0x1000, must be 0 when RawDataSize is 0",
    "data past the end": "section 0 (BFV): DataOffset 0x1001 + RawDataSize 0x3000 is past the end of the image of "
    "0x4000 bytes; it is cut, or a CODE part without VARS: give the combined image",
    "data wraps": "section 0 (BFV): DataOffset 0xfffff000 + RawDataSize 0x3000 is past the end of the image of "
    "0x4000 bytes; it is cut, or a CODE part without VARS: give the combined image",
    "info in memory": "section 2 (TD_INFO): MemoryAddress 0x1000, must be 0: this type is not put into memory",
    "info with memory size": "section 2 (TD_INFO): MemoryDataSize 0x1000, must be 0: this type is not put into memory",
    "address not aligned": "section 2 (TempMem): MemoryAddress 0x80b010 is not a multiple of 0x1000",
    "size not aligned": "section 2 (TempMem): MemoryDataSize 0x1001 is not a multiple of 0x1000",
    "no memory size": "section 2 (TempMem): MemoryDataSize 0; allowed are multiples of 0x1000 above 0",
    "address too high": "section 2 (TempMem): MemoryAddress 0x8000000000000 + MemoryDataSize 0x2000 is above the end "
    "of private guest addresses, 0x8000000000000",
    "address wraps": "section 2 (TempMem): MemoryAddress 0xfffffffffffff000 + MemoryDataSize 0x2000 is above the end "
    "of private guest addresses, 0x8000000000000",
    "size too large": "section 2 (PermMem): MemoryAddress 0x1000000 + MemoryDataSize 0xfffffffffffff000 is above the "
    "end of private guest addresses, 0x8000000000000",
    "data larger than memory": "section 0 (BFV): RawDataSize 0x3000 is larger than MemoryDataSize 0x2000",
    "overlap": "section 2 (TempMem): MemoryAddress 0x80a000 is inside section 1 (TD_HOB), 0x809000 to 0x80b000; "
    "sections may not overlap",
    "same place": "section 2 (TempMem): MemoryAddress 0x809000 is inside section 1 (TD_HOB), 0x809000 to 0x80b000; "
    "sections may not overlap",
    "too much added": "sections: the MemoryDataSize to be added is 0x40005000 in all; Septum allows 0x10000000",
    "too much measured": "sections: the MemoryDataSize to be measured (MR.EXTEND) is 0xc803000 in all; "
    "Septum allows 0x8000000",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_sections_that_no_td_can_be_built_from(name: str) -> None:
    assert refused(*UNUSABLE[name]) == MESSAGES[name]


def test_a_section_may_fill_the_space_below_the_shared_bit() -> None:
    top = replace(PERM, memory_address=1 << 32, memory_data_size=(1 << 51) - (1 << 32))
    assert parse_image(make_image((BFV, top), BODY)).sections[1] == top


GOOD = make_image(EVERY_TYPE, BODY)
FOOT = SIZE - 48
DESCRIPTOR = parse_image(GOOD).descriptor_offset
NONE_FOUND = (
    "no TDX metadata: no OVMF table entry e47a6535-984a-4798-865e-4685a7bf8ec2 and no descriptor offset 32 bytes "
    "before the end; give an image built for TDX (of a pair CODE and VARS, the combined OVMF.fd)"
)
PATCHES = {
    "no footer": (FOOT, bytes(16), NONE_FOUND),
    "empty table": (FOOT - 2, struct.pack("<H", 18), NONE_FOUND),
    "short table": (FOOT - 2, struct.pack("<H", 17), f"OVMF table: length 17 at 0x3fce; allowed 18 to {FOOT + 16}"),
    "long table": (
        FOOT - 2, struct.pack("<H", 0xFFFF), f"OVMF table: length 65535 at 0x3fce; allowed 18 to {FOOT + 16}",
    ),
    "empty entry": (
        FOOT - 20, struct.pack("<H", 0),
        "OVMF table: entry e47a6535-984a-4798-865e-4685a7bf8ec2 at 0x3fbe has length 0; allowed 18 to 22",
    ),
    "long entry": (
        FOOT - 20, struct.pack("<H", 23),
        "OVMF table: entry e47a6535-984a-4798-865e-4685a7bf8ec2 at 0x3fbe has length 23; allowed 18 to 22",
    ),
    "entry without value": (
        FOOT - 20, struct.pack("<H", 18), "OVMF table: TDX metadata entry has length 18, must be 22",
    ),
    "offset before the start": (
        FOOT - 24, struct.pack("<I", SIZE + 1),
        "the TDX metadata offset 0x4001 from the end of the image is before the image of 0x4000 bytes; "
        "it is damaged or cut: give the complete image",
    ),
    "offset at the end": (
        FOOT - 24, struct.pack("<I", 15),
        "the TDX metadata offset 0xf from the end of the image is past the image of 0x4000 bytes; "
        "it is damaged or cut: give the complete image",
    ),
    "wrong GUID": (
        DESCRIPTOR - 16, bytes(16),
        f"the TDX metadata offset {SIZE - DESCRIPTOR:#x} from the end of the image: the GUID before the descriptor is "
        "00000000-0000-0000-0000-000000000000, must be e9eaf9f3-168e-44d5-a8eb-7f4d8738f6ae",
    ),
    "wrong signature": (
        DESCRIPTOR, b"TDVX", f"TDVF descriptor at {DESCRIPTOR:#x}: Signature b'TDVX', must be b'TDVF'",
    ),
    "wrong version": (
        DESCRIPTOR + 8, struct.pack("<I", 2), f"TDVF descriptor at {DESCRIPTOR:#x}: Version 2, must be 1",
    ),
    "too many sections": (
        DESCRIPTOR + 12, struct.pack("<I", 0xFFFFFFFF),
        f"TDVF descriptor at {DESCRIPTOR:#x}: NumberOfSectionEntry 4294967295, allowed 1 to 1024",
    ),
    "other length": (
        DESCRIPTOR + 4, struct.pack("<I", 0),
        f"TDVF descriptor at {DESCRIPTOR:#x}: Length 0, must be 304 for 9 section entries",
    ),
    "sections past the end": (
        DESCRIPTOR + 4, struct.pack("<III", 16 + 32 * 99, 1, 99),
        f"TDVF descriptor at {DESCRIPTOR:#x}: Length 3184 runs past the end of the image of 0x4000 bytes; it is cut",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_damaged_ways_to_the_sections(name: str) -> None:
    at, patch, message = PATCHES[name]
    assert complaint(GOOD[:at] + patch + GOOD[at + len(patch) :]) == message


def test_an_older_offset_that_leaves_no_room_for_the_guid_is_refused() -> None:
    image = bytearray(make_image(EVERY_TYPE, BODY, "offset"))
    image[8:12] = b"TDVF"
    image[SIZE - 32 : SIZE - 28] = struct.pack("<I", 8)
    assert complaint(bytes(image)).startswith("the TDX metadata offset 0x8 at 0x3fe0 is before the image")
    image[SIZE - 4 :] = b"TDVF"
    image[SIZE - 32 : SIZE - 28] = struct.pack("<I", SIZE - 4)
    assert complaint(bytes(image)).startswith("the TDX metadata offset 0x3ffc at 0x3fe0 is past the image")


def test_other_entries_of_the_table_are_passed_over() -> None:
    other = b"some data" + struct.pack("<H16s", 9 + 18, bytes(range(16)))
    entry_start = FOOT - 2 - 22
    table_length = struct.pack("<H", 22 + 18 + len(other))
    distance = struct.pack("<I", SIZE - DESCRIPTOR + len(other))
    grown = GOOD[:entry_start] + distance + GOOD[entry_start + 4 : FOOT - 2] + other + table_length + GOOD[FOOT:]
    sections = list(EVERY_TYPE)
    assert parse_image(grown).sections == tuple(sections)


@pytest.mark.parametrize("size", [1, 47, 4095])
def test_files_too_small_to_be_firmware(size: int) -> None:
    assert complaint(bytes(size)) == f"only {size} bytes; a firmware image has at least 4096"


def test_files_of_zeros_and_of_noise_hold_no_metadata() -> None:
    assert complaint(bytes(4096)) == NONE_FOUND
    assert complaint(random.Random(1).randbytes(1 << 16)) == NONE_FOUND


# --- files


def load_complaint(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_and_compressed_files_give_the_same_image(tmp_path: Path) -> None:
    plain, packed, unnamed = tmp_path / "fw.fd", tmp_path / "fw.fd.xz", tmp_path / "packed"
    plain.write_bytes(GOOD)
    packed.write_bytes(lzma.compress(GOOD) + bytes(8))
    unnamed.write_bytes(lzma.compress(GOOD))
    images = [load_image(plain), load_image(str(packed)), load_image(unnamed)]
    assert [image.name for image in images] == [str(plain), str(packed), str(unnamed)]
    assert {(image.data, image.sections) for image in images} == {(GOOD, EVERY_TYPE)}


def test_paths_that_can_not_be_read(tmp_path: Path) -> None:
    gone = tmp_path / "gone.fd"
    assert load_complaint(gone) == (
        f"{gone}: can't be read: No such file or directory; check the path and its permissions"
    )
    assert load_complaint(tmp_path) == (
        f"{tmp_path}: not a regular file; give the path of a firmware image such as OVMF.fd"
    )
    assert load_complaint("/dev/zero").startswith("/dev/zero: not a regular file; ")
    assert load_complaint("").startswith("'': not a regular file; ")
    assert load_complaint("a\0b").startswith("'a\\x00b': not a path: ")
    assert load_complaint("two\nlines").startswith("'two\\nlines': can't be read: ")
    assert load_complaint("x" * 5000).endswith(
        ": can't be read: File name too long; check the path and its permissions"
    )


def test_empty_and_oversize_files(tmp_path: Path) -> None:
    empty, large = tmp_path / "empty.fd", tmp_path / "large.fd"
    empty.touch()
    with large.open("wb") as stream:
        stream.truncate(MAX_IMAGE_SIZE + 1)
    assert load_complaint(empty) == f"{empty}: empty; give a firmware image such as OVMF.fd"
    assert load_complaint(large) == (
        f"{large}: larger than 67108864 bytes, the largest image Septum reads; give a firmware image"
    )


def test_damaged_compressed_files(tmp_path: Path) -> None:
    packed = lzma.compress(GOOD)
    broken = packed[:40] + bytes([packed[40] ^ 1]) + packed[41:]
    bomb = lzma.compress(bytes(MAX_IMAGE_SIZE + 4096), preset=0)
    for content, text in (
        (
            GOOD,
            "damaged xz data (Input format not supported by decoder); fetch the file again, or give the image itself",
        ),
        (b"", "the xz data ends too soon, after 0 bytes; fetch the file again"),
        (packed[:-8], f"the xz data ends too soon, after {len(packed) - 8} bytes; fetch the file again"),
        (broken, "damaged xz data (Corrupt input data); fetch the file again, or give the image itself"),
        (packed + packed, f"{len(packed)} bytes follow the xz stream; give a file of one xz stream"),
        (bomb, "larger than 67108864 bytes, the largest image Septum reads; give a firmware image"),
    ):
        path = tmp_path / "fw.fd.xz"
        path.write_bytes(content)
        assert load_complaint(path) == f"{path}: {text}"


# --- any damage


def survive(data: bytes) -> TdvfImage | None:
    """Parse, and measure what parses: either both succeed or there is a single-line UsageError."""
    message = ""
    try:
        image = parse_image(data, "fw.fd")
    except UsageError as error:
        message = str(error)
    if message:
        assert re.fullmatch(r"fw\.fd: [^\n]{10,400}", message), message
        return None
    assert len(measure_image(image)) == 48
    return image


def damage(image: bytes, dice: random.Random) -> bytes:
    """The image after one random accident: bits flipped (mostly where the metadata is), or cut at either end."""
    kind = dice.random()
    if kind < 0.1:
        return image[: dice.randrange(len(image))]
    if kind < 0.2:
        return image[dice.randrange(len(image)) :]
    changed = bytearray(image)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        tail = 512 if dice.random() < 0.8 else len(image)
        changed[len(image) - 1 - dice.randrange(tail)] ^= (
            1 << dice.randrange(8) if kind < 0.7 else dice.randrange(1, 256)
        )
    return bytes(changed)


def test_ten_thousand_damaged_images() -> None:
    dice = random.Random(20250601)
    parsed = 0
    for _ in range(10_000):
        start = time.perf_counter()
        parsed += survive(damage(GOOD, dice)) is not None
        assert time.perf_counter() - start < 2
    assert 500 < parsed < 9_500, "both outcomes must be exercised"


def test_damaged_real_images(shared: Path) -> None:
    dice = random.Random(7)
    for name in ("deb12-2022.11-OVMF.fd.xz", "deb13-2025.02-OVMF.fd.xz"):
        image = load_image(shared / "firmware" / name).data
        for _ in range(100):
            survive(damage(image, dice))


words = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 0x1000, 0xFFFFF000, 2**32 - 1, 2**51 - 0x1000, 2**63, 2**64 - 0x1000, 2**64 - 1]),
    st.integers(0, SIZE),
    st.integers(0, 64).map(lambda page: page << 12),
)


@st.composite
def raw_sections(draw: st.DrawFn) -> bytes:
    """A table of up to five sections with any values in the fields."""
    rows = draw(st.lists(st.tuples(words, words, words, words, st.integers(0, 9), st.integers(0, 4)), max_size=5))
    return b"".join(
        SECTION.pack(offset % 2**32, raw % 2**32, address, size, kind, attributes)
        for offset, raw, address, size, kind, attributes in rows
    )


@settings(max_examples=300)
@given(raw_sections())
def test_any_fields_behind_a_good_start(table: bytes) -> None:
    """Two good sections, then anything: what is accepted keeps the rules that the build relies on."""
    count = 2 + len(table) // SECTION.size
    data = bytearray(make_image((BFV, HOB, *[TEMP] * (count - 2)), BODY))
    at = bytes(data).index(b"TDVF") + 16 + 2 * SECTION.size
    data[at : at + len(table)] = table
    image = survive(bytes(data))
    if image is None:
        return
    taken: set[int] = set()
    for section in image.sections:
        assert section.data_offset + section.raw_data_size <= SIZE
        if section.added:
            pages = {gpa for gpa, page in image.pages(section) if len(page) == 4096}
            assert len(pages) * 4096 == section.memory_data_size
            assert not pages & taken
            taken |= pages


@settings(max_examples=200)
@given(st.binary(max_size=8192))
def test_any_bytes(data: bytes) -> None:
    assert survive(data) is None


def test_the_built_in_payload_survives_no_change_of_its_descriptor_unnoticed() -> None:
    """Each bit of descriptor and sections matters: flipping it gives an error or a different set of sections."""
    image = parse_image(builtin_payload())
    end = image.descriptor_offset + 16 + len(image.sections) * SECTION.size
    for at in range(image.descriptor_offset - 16, end):
        for bit in range(8):
            data = bytearray(image.data)
            data[at] ^= 1 << bit
            changed = survive(bytes(data))
            assert changed is None or changed.sections != image.sections
