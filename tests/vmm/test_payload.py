"""The image made in code."""

from __future__ import annotations

import pytest

from septum.vmm.hob import build_td_hob
from septum.vmm.layout import check_reset_vector, plan_layout
from septum.vmm.payload import RESET_CODE, builtin_payload, make_image
from septum.vmm.sections import Section, SectionType
from septum.vmm.tdvf import parse_image

GIB = 1 << 30


def test_the_built_in_payload_is_a_complete_image() -> None:
    image = parse_image(builtin_payload())
    assert [s.type.name for s in image.sections] == ["BFV", "TD_HOB", "TempMem"]
    assert [s.measured for s in image.sections] == [True, False, False]
    plan_layout(image, GIB)
    check_reset_vector(image)
    assert len(build_td_hob(image.sections, GIB)) <= image.sections[1].memory_data_size


def test_the_reset_vector_is_the_end_of_memory_below_4_gib() -> None:
    image = parse_image(builtin_payload())
    gpa, page = list(image.pages(image.sections[0]))[-1]
    assert gpa + len(page) == 4 * GIB
    assert page[-16:] == RESET_CODE
    assert len(RESET_CODE) == 16


def test_the_built_in_payload_is_always_the_same_and_has_no_two_equal_chunks() -> None:
    data = builtin_payload()
    assert data == builtin_payload()
    assert len({data[at : at + 256] for at in range(0, len(data), 256)}) == len(data) // 256


def test_a_body_without_room_for_the_metadata_is_a_mistake_of_the_caller() -> None:
    section = Section(SectionType.TempMem)
    assert len(make_image([section] * 120, bytes(4096))) == 4096
    with pytest.raises(ValueError, match="a body of 4096 bytes is too small for the metadata of 130 sections"):
        make_image([section] * 130, bytes(4096))
