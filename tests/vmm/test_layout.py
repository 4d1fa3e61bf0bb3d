"""Sizes of memory, and where a VM has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.vmm.layout import MAX_RAM, Range, check_reset_vector, parse_size, plan_layout, ram_ranges
from septum.vmm.payload import builtin_payload, make_image
from septum.vmm.sections import MR_EXTEND, Section, SectionType
from septum.vmm.tdvf import load_image, parse_image

GIB = 1 << 30
PAYLOAD = parse_image(builtin_payload(), "payload")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * GIB), ("512M", 512 << 20), ("512MiB", 512 << 20), ("1t", 1 << 40), ("64T", 1 << 46), ("4K", 4096),
        (" 1gb ", GIB), ("4096", 4096), ("0x40000000", GIB), ("0X1000", 4096), ("0008K", 8192), ("0x10M", 16 << 20),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "lots", "-2G", "1.5G", "2GG", "2 G", "0x", "1e9", "2G\n3G", "9" * 5000, "٢G"]
)
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value).endswith(": not a size; write a number with K, M, G or T, such as 2G")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "2048", "4097", "65T", "0xffffffffffffffff"])
def test_sizes_no_vm_can_have(text: str) -> None:
    with pytest.raises(UsageError, match=r" bytes; allowed are multiples of 4 KiB from 4K to 64T, such as 2G$"):
        parse_size(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_misuse(text: str) -> None:
    message, size = "", 4096
    try:
        size = parse_size(text)
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
    assert 0 < size <= MAX_RAM


def test_ram_below_and_above_4_gib() -> None:
    assert ram_ranges(4096) == (Range(0, 4096),)
    assert ram_ranges(0xAFFFF000) == (Range(0, 0xAFFFF000),)
    assert ram_ranges(0xB0000000) == (Range(0, 0x80000000), Range(4 * GIB, 4 * GIB + 0x30000000))
    with pytest.raises(UsageError, match=r"^memory size: 1000 bytes"):
        ram_ranges(1000)


@given(st.integers(1, MAX_RAM >> 12))
def test_ranges_hold_all_the_ram_outside_the_hole(pages: int) -> None:
    ranges = ram_ranges(pages << 12)
    assert sum(r.end - r.start for r in ranges) == pages << 12
    assert all(r.end <= 0xB0000000 or r.start >= 4 * GIB for r in ranges)


def test_the_firmware_ends_at_4_gib(shared: Path) -> None:
    image = load_image(shared / "firmware/deb13-2025.02-OVMF.fd.xz")
    layout = plan_layout(image, 2 * GIB)
    assert layout.firmware == Range(0xFFC00000, 4 * GIB)
    assert layout.ram == (Range(0, 2 * GIB),)
    check_reset_vector(image)


def test_sections_must_lie_where_there_is_memory() -> None:
    assert plan_layout(PAYLOAD, 16 << 20).firmware == Range(0xFFFFC000, 4 * GIB)
    with pytest.raises(UsageError) as caught:
        plan_layout(PAYLOAD, 8 << 20)
    assert str(caught.value) == (
        "payload: section 1 (TD_HOB): 0x809000 to 0x80b000 is not inside the VM's memory, 0x0 to 0x800000 and "
        "0xffffc000 to 0x100000000; give the VM more memory or use another firmware"
    )


def test_memory_of_the_firmware_may_be_in_its_own_window() -> None:
    """As td-shim has it: stack and heap below the code."""
    bfv = Section(SectionType.BFV, 0x1000, 0x1000, 0xFFFFF000, 0x1000, MR_EXTEND)
    stack = Section(SectionType.TempMem, memory_address=0xFFFFE000, memory_data_size=0x1000)
    hob = Section(SectionType.TD_HOB, memory_address=0x1000, memory_data_size=0x1000)
    image = parse_image(make_image((bfv, stack, hob), bytes(0x2000)))
    assert plan_layout(image, 1 << 20).firmware == Range(0xFFFFE000, 4 * GIB)


def test_a_vcpu_needs_code_at_the_reset_vector() -> None:
    low = Section(SectionType.BFV, 0, 0x1000, 0xFFFFE000, 0x1000, MR_EXTEND)
    hob = Section(SectionType.TD_HOB, memory_address=0x1000, memory_data_size=0x1000)
    with pytest.raises(UsageError) as caught:
        check_reset_vector(parse_image(make_image((low, hob), bytes(0x2000)), "fw.fd"))
    assert str(caught.value) == (
        "fw.fd: no BFV section holds the reset vector 0xfffffff0, where a vCPU starts; use a firmware whose BFV "
        "ends at 4 GiB"
    )
