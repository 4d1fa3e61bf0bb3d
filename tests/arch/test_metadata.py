"""Field tables and field ids by themselves, and against what the real module answered to every id."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.cpuid import SUBLEAF_NA, cpuid_table
from septum.arch.metadata import (
    NULL_FIELD_ID,
    Access,
    Attribute,
    Context,
    FieldId,
    Structure,
    all_ids,
    field_table,
    locate,
    next_id,
    sys_constants,
    td_vmcs_init,
)

TABLES = {"sys": 65, "td": 83, "vp": 119, "td_vmcs": 144, "l2_vmcs": 144}
CONTEXTS = {"SYS": Context.SYS, "MNG": Context.TD, "VM": Context.TD, "VP": Context.VP}
# RCX of TDH.MNG.RD and TDH.VP.RD on the TDs of `prefix/meta` -> the host's rights, number of L2 VMs.
TARGETS = {
    "0x41000000": (Access.HOST, 0),
    "0x41007000": (Access.HOST, 0),
    "0x41025000": (Access.HOST_DEBUG, 0),
    "0x4102c000": (Access.HOST_DEBUG, 0),
    "0x4104a000": (Access.HOST_DEBUG, 1),
    "0x41052000": (Access.HOST_DEBUG, 1),
}
ID_INCORRECT = "TDX_METADATA_FIELD_ID_INCORRECT"
ENCLV_EXITING = 0x2036
FIRST_ID = "TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT"


def events(shared: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(shared / "vectors" / "guest" / f"{name}.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            if event["op"] == "seq_begin":
                sequence = event["id"]
            elif event["op"] != "header":
                yield {"sequence": sequence, **event}


def number(event: dict[str, Any], register: str) -> int:
    """A GPR after the call."""
    given_, out = event["in"], event["out"]
    return int(out.get(register, given_.get(register, "0x0")), 16)


# --- ids ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, (1 << 64) - 1))
def test_parts_and_reserved_bits_make_up_the_id(raw: int) -> None:
    field_id = FieldId(raw)
    low = ("field_code", "element_size_code", "last_element_in_field", "last_field_in_sequence")
    parts = (*low, "inc_size", "write_mask_valid", "context_code", "class_code", "non_arch")
    assert FieldId.of(**{part: getattr(field_id, part) for part in parts}) | field_id.reserved == raw
    assert field_id.replace() == raw


@given(st.sampled_from(cpuid_table()), st.integers(0, 1))
def test_cpuid_leaf_round_trip(entry: Any, element: int) -> None:
    base = field_table("td").named("CPUID_VALUES").id
    field_id = base.with_cpuid_leaf(entry.leaf, entry.subleaf, element)
    assert field_id.cpuid_leaf == (entry.leaf, entry.subleaf)
    found = locate(Context.TD, field_id)
    assert found is not None
    assert (found.number, found.element_number) == (2 * entry.index + element, element)


def test_one_id_by_hand() -> None:
    field_id = FieldId(0x9100000100000008)  # MAX_TDMRS
    assert (field_id.class_code, field_id.field_code, field_id.element_size_code, field_id.non_arch) == (17, 8, 1, 1)
    assert FieldId.of(class_code=17, field_code=8, element_size_code=1, non_arch=1) == 0x9100000100000008
    assert FieldId(0x9410000300000DFE).cpuid_leaf == (6, SUBLEAF_NA)


@pytest.mark.parametrize(
    ("raw", "single"),
    [
        (0x9100000100000008, True),
        (1 << 24, False),
        (1 << 34, False),
        (1 << 38, False),
        (1 << 62, False),
        (1 << 51, True),
    ],
)
def test_single_element_ids(raw: int, single: bool) -> None:
    assert FieldId(raw).is_single_element is single


def test_sequence_headers() -> None:
    masked = FieldId.of(context_code=1, write_mask_valid=1)
    assert masked.is_sequence_header(Context.TD, write=True)
    assert not masked.is_sequence_header(Context.TD, write=False)
    assert not masked.is_sequence_header(Context.VP, write=True)


def test_null_id_ignores_the_context() -> None:
    assert all(NULL_FIELD_ID.replace(context_code=context).is_null for context in range(8))
    assert not NULL_FIELD_ID.replace(class_code=0).is_null


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entries"), TABLES.items())
def test_tables_are_whole_and_ordered(name: str, entries: int) -> None:
    table = field_table(name)
    assert len(table.entries) == entries
    assert len({entry.name for entry in table.entries}) == entries
    by_class: dict[int, int] = {}
    for entry in table.entries:
        assert entry.id.is_single_element
        assert entry.codes.start >= by_class.get(entry.id.class_code, 0), f"{entry.name} overlaps its predecessor"
        by_class[entry.id.class_code] = entry.codes.stop
        for access in (Access.HOST, Access.HOST_DEBUG, Access.GUEST, Access.SERVICE_TD):
            assert entry.write_mask(access) & ~entry.element_mask == 0
            blind = 0x2000 if (name, entry.name) == ("l2_vmcs", "IA32_DEBUGCTL") else 0
            assert entry.write_mask(access) & ~(entry.read_mask(access) | blind) == 0


def test_known_fields() -> None:
    attributes = field_table("td").named("ATTRIBUTES")
    assert attributes.id == 0x1110000300000000
    assert attributes.guest_read == (1 << 64) - 1
    assert attributes.guest_write == attributes.host_write == 0
    assert attributes.mig_import == "MB"
    assert attributes.is_required(Access.IMPORT_IMMUTABLE)
    descriptor = field_table("td_vmcs").named("Posted-interrupt descriptor address")
    assert descriptor.attributes == Attribute.HPA | Attribute.SHARED
    assert (descriptor.host_write, descriptor.special_write) == (0xFFFF_FFFF_FFFF_FFC0, True)
    assert sys_constants()["MAX_TDMRS"] == 64


def test_places_of_elements() -> None:
    uuid = locate(Context.TD, 0x8010000300000022)
    assert uuid is not None
    assert (uuid.structure, uuid.offset, uuid.field_number, uuid.element_number) == (Structure.TDR, 0x70, 0, 2)
    rip = locate(Context.VP, 0x002400030000681E)
    assert rip is not None
    assert (rip.structure, rip.offset, rip.vm) == (Structure.VMCS, 0x681E, 0)
    assert locate(Context.VP, 0x242400030000681E, l2_vms=0) is None
    l2_rip = locate(Context.VP, 0x242400030000681E, l2_vms=1)
    assert l2_rip is not None
    assert (l2_rip.table, l2_rip.vm) == ("l2_vmcs", 1)


def test_high_half_of_a_vmcs_field_has_no_element() -> None:
    assert locate(Context.VP, 0x0024000300002017) is None
    assert locate(Context.VP, 0x0024000300002016) is not None


@given(st.integers(0, (1 << 64) - 1), st.sampled_from(Context), st.integers(0, 3))
def test_any_integer_is_located_or_not(raw: int, context: Context, l2_vms: int) -> None:
    found = locate(context, raw, l2_vms)
    assert found is None or FieldId(raw).field_code in found.field.codes or found.field.name == "CPUID_VALUES"


@pytest.mark.parametrize("context", Context)
def test_every_id_is_reached_once_and_located(context: Context) -> None:
    ids = list(all_ids(context, Access.HOST_DEBUG if context else Access.HOST, l2_vms=3))
    assert len(ids) == len(set(ids))
    assert all(locate(context, field_id, 3) for field_id in ids)


def test_more_l2_vms_only_add_fields() -> None:
    counts = [len(list(all_ids(Context.VP, Access.HOST_DEBUG, l2_vms=count))) for count in range(4)]
    steps = {after - before for before, after in pairwise(counts)}
    assert len(steps) == 1
    assert steps.pop() > 0


def test_next_id_of_an_unknown_field() -> None:
    with pytest.raises(KeyError, match="no field"):
        next_id(Context.SYS, 0x3F00000000000000, Access.HOST)


# --- against the real module -------------------------------------------------------------------------------------


def test_facts_of_global_fields(shared: Path) -> None:
    known = json.loads((shared / "platforms" / "facts.json").read_text())["global_metadata_field_ids"]
    ours = {"VERSION_MINOR": "MINOR_VERSION", "VERSION_MAJOR": "MAJOR_VERSION", "VERSION_UPDATE": "UPDATE_VERSION"}
    ours["FEATURES0"] = "TDX_FEATURES0"
    for name, raw in known.items():
        assert field_table("sys").named(ours.get(name, name)).id == int(raw, 16)


def test_every_recorded_host_read(shared: Path) -> None:
    """Found or not, readable or not, no bits beyond the mask, and the next id."""
    checked = {"found": 0, "absent": 0, "next": 0}
    for event in events(shared, "metadata"):
        if event["op"] != "seamcall" or not event["leaf"].endswith(".RD"):
            continue
        context = CONTEXTS[event["leaf"].split(".")[1]]
        target = (Access.HOST, 0) if context is Context.SYS else TARGETS.get(event["in"]["rcx"])
        status, field_id = event["status"], FieldId(int(event["in"]["rdx"], 16))
        if target is None:
            continue
        access, l2_vms = target
        found = locate(context, field_id, l2_vms) if field_id.is_single_element else None
        if status == ID_INCORRECT:
            assert found is None, event
            checked["absent"] += 1
        elif status == "TDX_METADATA_FIELD_NOT_READABLE":
            assert found is not None, event
            faulting = found.field.name == "CPUID_VALUES" and cpuid_table()[found.field_number].faulting
            assert faulting or not found.field.read_mask(access), event
        elif status == "TDX_SUCCESS":
            assert found is not None, event
            mask = found.field.read_mask(access)
            assert mask != 0, event
            assert number(event, "r8") & ~mask == 0, event
            if found.table == "sys" and found.field.name in sys_constants():
                assert number(event, "r8") == sys_constants()[found.field.name]
            checked["found"] += 1
        if status in ("TDX_SUCCESS", FIRST_ID) and (event["version"] or context is Context.SYS):
            assert next_id(context, field_id, access, l2_vms=l2_vms) == number(event, "rdx"), event
            checked["next"] += 1
    assert checked["found"] > 8000
    assert checked["absent"] > 400
    assert checked["next"] > 6000


def test_every_recorded_host_write(shared: Path) -> None:
    """A field of ours without writable bits is not writable, and a successful write is to writable bits."""
    written = 0
    for event in events(shared, "metadata"):
        if event["op"] != "seamcall" or event["leaf"] not in ("TDH.MNG.WR", "TDH.VP.WR"):
            continue
        context, target = CONTEXTS[event["leaf"].split(".")[1]], TARGETS.get(event["in"]["rcx"])
        if target is None or event["status"].startswith(("TDX_OPERAND", "TDX_VCPU")):
            continue
        access, l2_vms = target
        found = locate(context, int(event["in"]["rdx"], 16), l2_vms)
        assert (found is None) == (event["status"] == ID_INCORRECT), event
        if found is not None:
            writable = found.field.write_mask(access) & int(event["in"].get("r9", "0x0"), 16)
            if event["status"] == "TDX_SUCCESS":
                assert writable, event
                written += 1
            elif not writable:
                assert event["status"] == "TDX_METADATA_FIELD_NOT_WRITABLE", event
    assert written > 1000


def test_every_recorded_guest_read(shared: Path) -> None:
    """TDG.SYS.RD, TDG.VM.RD and TDG.VP.RD: found or not, readable or not, and the next id."""
    statuses = dict.fromkeys(("TDX_SUCCESS", FIRST_ID, "TDX_METADATA_FIELD_NOT_READABLE", ID_INCORRECT), 0)
    for event in events(shared, "guest_tdcall"):
        status, gprs = str(event.get("status")).removeprefix("TDCALL:"), event.get("guest_gprs_set", {})
        if event.get("exit") not in ("TDG.SYS.RD", "TDG.VM.RD", "TDG.VP.RD") or status not in statuses:
            continue
        if "rdx" not in gprs:
            continue  # the guest's last value, which only a replay knows
        context, field_id = CONTEXTS[event["exit"].split(".")[1]], FieldId(int(gprs["rdx"], 16))
        l2_vms = 1 if "/l2_" in event["sequence"] else 0
        statuses[status] += 1
        found = locate(context, field_id, l2_vms) if field_id.is_single_element else None
        if status == ID_INCORRECT:
            assert found is None, event
        elif status == "TDX_METADATA_FIELD_NOT_READABLE":
            assert found is not None, event
            assert found.field.name == "CPUID_VALUES" or not found.field.read_mask(Access.GUEST), event
        elif status == "TDX_SUCCESS":
            assert found is not None, event
            assert found.field.read_mask(Access.GUEST), event
        iterates = context is not Context.TD or int(gprs["rax"], 16) >> 16  # TDG.VM.RD: from version 1 on
        if iterates and status in ("TDX_SUCCESS", FIRST_ID):
            following = next_id(context, field_id, Access.GUEST, l2_vms=l2_vms)
            assert following == int(event["out"]["guest_gprs"]["rdx"], 16), event
    assert sum(statuses.values()) > 4000
    assert min(statuses.values()) > 5, statuses


def test_fields_of_a_recorded_list_are_whole_and_in_order(shared: Path) -> None:
    """TDH.SYS.RDALL from the start: its sequences hold the fields that `whole_fields` steps through."""
    lists = [bytes.fromhex(event["hex"]) for event in events(shared, "metadata") if event["op"] == "mem"]
    listed: list[int] = []
    size, sequences = int.from_bytes(lists[0][0:2], "little"), int.from_bytes(lists[0][2:4], "little")
    at = 8
    for _ in range(sequences):
        header = FieldId.from_bytes(lists[0][at : at + 8], "little")
        assert header.is_sequence_header(Context.SYS, write=False)
        elements, fields = header.last_element_in_field + 1, header.last_field_in_sequence + 1
        first = header.replace(last_element_in_field=0, last_field_in_sequence=0)
        listed += [first.replace(field_code=first.field_code + n * elements) for n in range(fields)]
        at += 8 * (1 + elements * fields)
    assert at == size
    classes = [FieldId(field_id).class_code for field_id in listed]
    ours = [fid for fid in all_ids(Context.SYS, Access.HOST, whole_fields=True) if fid.class_code <= classes[-1]]
    assert [FieldId(fid).replace(non_arch=0, element_size_code=0) for fid in listed] == [
        fid.replace(non_arch=0, element_size_code=0) for fid in ours[: len(listed)]
    ]


def test_initial_vmcs_values(shared: Path) -> None:
    """Controls and pointers still have their initial value when a TD has run; guest state has moved on."""
    values = next(e["values"] for e in events(shared, "guest_cpuid") if e["op"] == "oracle" and "values" in e)
    controls = [init for init in td_vmcs_init() if init.encoding < 0x2800 or init.encoding == 0x4004]
    checked = [init for init in controls if hex(init.encoding) in values and init.encoding != ENCLV_EXITING]
    assert len(checked) == 15
    for init in checked:
        assert int(values[hex(init.encoding)], 16) == init.value, hex(init.encoding)
