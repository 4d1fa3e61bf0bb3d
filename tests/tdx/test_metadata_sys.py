"""Fields of the module: every value that the real module gave, lists, and what comes with a wrong id."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from septum.arch.cpuid import KNOWN_FMS, recording_cpu
from septum.arch.leaves import HostLeaf
from septum.arch.metadata import NULL_FIELD_ID, Access, Context, FieldId, all_ids, field_table
from septum.arch.platform import Platform
from septum.arch.status import Status
from septum.core.run import solo_call
from septum.tdx.metadata import dump_list, read_element
from septum.tdx.registers import Regs
from tests.tdx.metadata_objects import Objects

LIST_PA = 0x104_2000
HOST, GUEST = Access.HOST, Access.GUEST


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Objects:
    """The module on the machine of the recordings."""
    with gzip.open(shared / "vectors" / "guest" / "metadata.jsonl.gz", "rt") as lines:
        return Objects(Platform.from_vector_header(json.loads(next(lines))))


def recorded_calls(shared: Path, leaf: str) -> Iterator[dict[str, Any]]:
    with gzip.open(shared / "vectors" / "guest" / "metadata.jsonl.gz", "rt") as lines:
        for line in lines:
            if f'"leaf":"{leaf}"' in line or '"op":"mem"' in line:
                yield json.loads(line)


def call(objects: Objects, leaf: HostLeaf, **registers: int) -> Regs:
    return solo_call(objects.module.seamcall(0, Regs.of({"rax": leaf, **registers})))


def test_every_recorded_answer_of_sys_rd(shared: Path, recorded: Objects) -> None:
    events = [event for event in recorded_calls(shared, "TDH.SYS.RD") if event["op"] == "seamcall"]
    assert len(events) > 300
    for event in events:
        given = Regs.of({name: int(value, 16) for name, value in event["in"].items()})
        expected = given.values() | {name: int(value, 16) for name, value in event["out"].items()}
        assert solo_call(recorded.module.seamcall(0, given)).values() == expected, event


def test_recorded_list_of_all_fields(shared: Path, recorded: Objects) -> None:
    memory = next(event for event in recorded_calls(shared, "TDH.SYS.RDALL") if event["op"] == "mem")
    assert memory["pa"] == f"{LIST_PA:#x}"
    regs = call(recorded, HostLeaf.TDH_SYS_RDALL, rdx=LIST_PA, r8=NULL_FIELD_ID)
    assert regs.rax == Status.TDX_SUCCESS
    assert regs.r8 == NULL_FIELD_ID
    written = bytes.fromhex(memory["hex"])
    assert recorded.module.memory.read(LIST_PA, len(written)) == written


def sequences(data: bytes) -> Iterator[tuple[FieldId, list[int]]]:
    """Takes a list apart."""
    size, count = struct.unpack_from("<HH", data)
    assert size == len(data)
    place = 8
    for _ in range(count):
        header = FieldId(struct.unpack_from("<Q", data, place)[0])
        number = (header.last_element_in_field + 1) * (header.last_field_in_sequence + 1)
        yield header, list(struct.unpack_from(f"<{number}Q", data, place + 8))
        place += 8 + 8 * number
    assert place == size


@pytest.mark.parametrize("access", [HOST, GUEST])
@pytest.mark.parametrize("size", [4096, 1000, 136, 40])
def test_lists_of_any_size_hold_every_field_once(access: Access, size: int) -> None:
    scope = Objects().scope(Context.SYS, access)
    found: dict[tuple[int, int], int] = {}
    next_id: int = NULL_FIELD_ID
    for _ in range(500):
        dump = dump_list(scope, next_id, size)
        assert len(dump.data) <= size
        for header, values in sequences(dump.data):
            for number, value in enumerate(values):
                place = header.class_code, header.field_code + number
                assert place not in found
                found[place] = value
        next_id = dump.next_id
        assert (dump.status == Status.TDX_SUCCESS) == (next_id == NULL_FIELD_ID)
        if next_id == NULL_FIELD_ID:
            break
    expected = {(at.class_code, at.field_code): read_element(scope, at) for at in all_ids(Context.SYS, access)}
    assert found == expected


def test_a_list_starts_only_at_the_start_of_a_field_with_its_size() -> None:
    objects = Objects()
    values = field_table("sys").named("CPUID_CONFIG_VALUES").id
    for wrong in (values + 1, values.replace(element_size_code=2), values.replace(field_code=0x540), 0):
        regs = call(objects, HostLeaf.TDH_SYS_RDALL, rdx=LIST_PA, r8=wrong)
        assert regs.rax == Status.TDX_METADATA_FIELD_ID_INCORRECT
        assert regs.r8 == NULL_FIELD_ID
    assert call(objects, HostLeaf.TDH_SYS_RDALL, rdx=LIST_PA, r8=values + 2).rax == Status.TDX_SUCCESS


def test_a_guest_that_begins_at_a_field_it_may_not_read_gets_those_behind_it() -> None:
    hidden = field_table("sys").named("NUM_PKGS").id
    dump = dump_list(Objects().scope(Context.SYS, GUEST), hidden, 4096)
    first, _ = next(sequences(dump.data))
    assert first.replace(last_field_in_sequence=0) == field_table("sys").named("VENDOR_ID").id


def test_an_lp_that_is_not_initialised_gets_nothing() -> None:
    objects = Objects()
    objects.module.lps[0].initialised = False
    regs = call(objects, HostLeaf.TDH_SYS_RD, rdx=NULL_FIELD_ID, r8=5)
    assert (regs.rax, regs.rdx, regs.r8) == (Status.TDX_SYS_LP_INIT_NOT_DONE, NULL_FIELD_ID, 0)
    regs = call(objects, HostLeaf.TDH_SYS_RDALL, rdx=LIST_PA, r8=5)
    assert (regs.rax, regs.r8) == (Status.TDX_SYS_LP_INIT_NOT_DONE, NULL_FIELD_ID)


@pytest.mark.parametrize("fms", KNOWN_FMS)
def test_older_generations_may_be_presented_newer_ones_may_not(fms: int) -> None:
    own = fms & ~0xF | 1
    objects = Objects(cpu=replace(recording_cpu(), fms=own))
    first = field_table("sys").named("ALLOWED_FMS").id
    number = objects.read(Context.SYS, HOST, field_table("sys").named("NUM_ALLOWED_FMS").id)
    allowed = [objects.read(Context.SYS, HOST, first + place) for place in range(64)]
    assert allowed[:number] == [own, *KNOWN_FMS[KNOWN_FMS.index(fms) + 1 :]]
    assert not any(allowed[number:])
    assert objects.read(Context.SYS, HOST, field_table("sys").named("PKG_FMS").id) == own
