"""MRTD from an image: known answers, and the rules of the records by a slow second way."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from septum.arch.errors import UsageError
from septum.vmm.measure import measure_image, page_add_record, page_extend_records
from septum.vmm.payload import builtin_payload, make_image
from septum.vmm.sections import MR_EXTEND, PAGE_AUG, Section, SectionType
from septum.vmm.tdvf import TdvfImage, load_image, parse_image

SIZE = 0x3000
BODY = hashlib.shake_128(b"test").digest(SIZE)
BFV = Section(SectionType.BFV, 0x1000, 0x2000, 0xFFFFE000, 0x2000, MR_EXTEND)
CFV = Section(SectionType.CFV, 0, 0x1000, 0xFFFFD000, 0x1000)
HOB = Section(SectionType.TD_HOB, memory_address=0x809000, memory_data_size=0x2000)
TEMP = Section(SectionType.TempMem, memory_address=0x80B000, memory_data_size=0x1000)
PERM = Section(SectionType.PermMem, memory_address=0x1000000, memory_data_size=0x400000, attributes=PAGE_AUG)
PAYLOAD = Section(SectionType.Payload, 0x0800, 0x0900, 0x2000000, 0x2000, MR_EXTEND)
INFO = Section(SectionType.TD_INFO, 0x1000, 0x40)


def image_of(*sections: Section) -> TdvfImage:
    return parse_image(make_image(sections, BODY))


@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize(("order", "key"), [("page", "mrtd"), ("section", "mrtd_section_order")])
def test_known_answers(shared: Path, entry: int, order: str, key: str) -> None:
    known = json.loads((shared / "firmware/known-mrtd.json").read_text())[entry]
    image = load_image(shared / "firmware" / known["file"])
    assert measure_image(image, order).hex() == known[key]


def test_page_order_is_the_default() -> None:
    image = image_of(BFV, HOB)
    assert measure_image(image) == measure_image(image, "page") != measure_image(image, "section")


def test_records() -> None:
    record = page_add_record(0x123456789000)
    assert record == b"MEM.PAGE.ADD\0\0\0\0" + bytes.fromhex("0090785634120000") + bytes(104)
    records = page_extend_records(0xFFFFF000, BODY[:4096])
    assert len(records) == 16 * 384
    assert records[15 * 384 :] == (
        b"MR.EXTEND\0\0\0\0\0\0\0" + bytes.fromhex("00ffffff00000000") + bytes(104) + BODY[0xF00:0x1000]
    )


def spelled_out(image: TdvfImage, order: str) -> bytes:
    """MRTD written down call by call."""
    calls: list[bytes] = []
    for s in image.sections:
        content = image.data[s.data_offset :][: s.raw_data_size] + bytes(s.memory_data_size - s.raw_data_size)
        adds, extends = [], []
        for at in range(0, s.memory_data_size, 4096):
            adds.append(b"MEM.PAGE.ADD".ljust(16, b"\0") + (s.memory_address + at).to_bytes(112, "little"))
            extends.append([
                b"MR.EXTEND".ljust(16, b"\0") + (s.memory_address + c).to_bytes(112, "little") + content[c : c + 256]
                for c in range(at, at + 4096, 256)
            ])  # fmt: skip
        if s.attributes & 2:
            continue
        if not s.attributes & 1:
            calls += adds
        elif order == "page":
            calls += [piece for add, chunks in zip(adds, extends, strict=True) for piece in (add, *chunks)]
        else:
            calls += [*adds, *(chunk for chunks in extends for chunk in chunks)]
    return hashlib.sha384(b"".join(calls)).digest()


@pytest.mark.parametrize("order", ["page", "section"])
@pytest.mark.parametrize(
    "sections",
    [
        (BFV, CFV, HOB, TEMP),
        (TEMP, HOB, CFV, BFV),
        (BFV, PERM),
        (BFV, HOB, PAYLOAD),
        (replace(BFV, attributes=0), HOB),
        (BFV, HOB, replace(TEMP, attributes=MR_EXTEND)),
        (BFV, HOB, replace(TEMP, attributes=PAGE_AUG)),
    ],
    ids=lambda sections: "-".join(s.type.name for s in sections),
)
def test_every_kind_of_section(sections: tuple[Section, ...], order: str) -> None:
    image = image_of(*sections)
    assert measure_image(image, order) == spelled_out(image, order)


def test_sections_that_are_not_added_do_not_count() -> None:
    plain = image_of(BFV, PERM)
    more = TdvfImage("more", plain.data, (BFV, PERM, replace(TEMP, attributes=PAGE_AUG), INFO), plain.descriptor_offset)
    assert measure_image(more) == measure_image(plain)


def test_the_order_of_the_metadata_counts() -> None:
    image = image_of(BFV, HOB, TEMP)
    turned = replace(image, sections=(BFV, TEMP, HOB))
    assert measure_image(turned) != measure_image(image)


def test_content_counts_only_where_it_is_measured() -> None:
    image = image_of(BFV, CFV, HOB)
    in_cfv = replace(image, data=b"\xff" + image.data[1:])
    in_bfv = replace(image, data=image.data[:0x1000] + b"\xff" + image.data[0x1001:])
    assert measure_image(in_cfv) == measure_image(image) != measure_image(in_bfv)


def test_unknown_order() -> None:
    with pytest.raises(UsageError, match=r"^order 'chunk' is unknown; allowed are page and section$"):
        measure_image(image_of(BFV, HOB), "chunk")


def test_the_built_in_payload_measures_the_same_for_ever() -> None:
    image = parse_image(builtin_payload())
    assert measure_image(image).hex() == (
        "2e39bcb30c2adb4ced6c0e79c97ab5144ae8950c4e10026a6f6a3aad7b36fbb3e30326cb0599ffa87261b55ed6a3a7ca"
    )


def test_not_much_slower_than_hashlib_alone() -> None:
    """The bound is 4; best of five each, so that a busy machine does not decide."""
    size = 1 << 20
    bfv = Section(SectionType.BFV, 0, size, (1 << 32) - size, size, MR_EXTEND)
    image = parse_image(make_image((bfv, HOB), bytes(size)))
    record, chunk = bytes(128), bytes(256)

    def alone() -> None:
        digest = hashlib.sha384()
        for _ in range(size // 256):
            digest.update(record)
            digest.update(chunk)

    def best(work: object) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(lambda: measure_image(image)) < 4 * best(alone)
