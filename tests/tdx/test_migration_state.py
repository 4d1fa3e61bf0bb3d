"""State of a TD that comes from another platform: lists of metadata fields, and what their values are checked for."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch import vmcs
from septum.arch.cpuid import Registers, cpuid_table
from septum.arch.metadata import NULL_FIELD_ID, Access, Context, FieldId, all_ids, field_table, locate
from septum.arch.op_state import VcpuState
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags, TdAttributes
from septum.tdx.metadata import Scope, Written, dump_list, finish_immutable_state, write_list
from septum.tdx.servtd import Binding, BindingState
from tests.tdx.machines import MIN_TDCX, PARAMS, Machine
from tests.tdx.migration_machine import MIGRATABLE, Migration

PAGE = 4096
IMMUTABLE, MUTABLE = Access.IMPORT_IMMUTABLE, Access.IMPORT_MUTABLE
NOT_VALID = Status.TDX_METADATA_FIELD_VALUE_NOT_VALID
MISSING = Status.TDX_REQUIRED_METADATA_FIELD_MISSING
ID_INCORRECT = Status.TDX_METADATA_FIELD_ID_INCORRECT
OVERFLOW = Status.TDX_METADATA_LIST_OVERFLOW
OF_HEADER = 0xFFFF_0000
Sequence = tuple[int, list[int]]


class Target:
    """A TD to import into, and the lists of one that was exported."""

    def __init__(self, context: Context = Context.TD, *, mutable: bool = False) -> None:
        self.machine = Machine()
        module, lp = self.machine.module, self.machine.module.lps[0]
        tdr, tdvpr = self.machine.finalized_td(MIGRATABLE)
        source = module.td(tdr)
        exported = Access.EXPORT_MUTABLE if mutable else Access.EXPORT_IMMUTABLE
        scope = Scope(module, lp, context, exported, source, module.vp(tdvpr))
        self.lists: list[bytes] = []
        field_id = int(NULL_FIELD_ID)
        while not self.lists or field_id != NULL_FIELD_ID:
            dump = dump_list(scope, field_id, PAGE)
            self.lists.append(dump.data)
            field_id = dump.next_id
        self.td = module.td(self.machine.td_with_tdcs())
        self.vp = module.new_vp(self.machine.page())
        # Each part of the state builds on those that come before it.
        if mutable:
            self.td.tdcs.tsc_frequency, self.td.tdcs.num_vcpus = source.tdcs.tsc_frequency, 1
            self.td.tdcs.xfam = source.tdcs.xfam
            for code in (vmcs.CR0_MASK, vmcs.CR0_SHADOW, vmcs.CR4_MASK, vmcs.CR4_SHADOW, vmcs.ENTRY_CTLS):
                self.vp.vmcs[code] = module.vp(tdvpr).vmcs[code]
        self.scope = Scope(module, lp, context, MUTABLE if mutable else IMMUTABLE, self.td, self.vp)

    def sequences(self, number: int = 0) -> list[Sequence]:
        """A list, taken apart."""
        words = list(struct.unpack(f"<{len(self.lists[number]) // 8}Q", self.lists[number]))
        parts: list[Sequence] = []
        at = 1
        while at < len(words):
            header = FieldId(words[at])
            count = (header.last_element_in_field + 1) * (header.last_field_in_sequence + 1)
            parts.append((words[at], words[at + 1 : at + 1 + count]))
            at += 1 + count
        return parts

    def write(self, data: bytes, *, is_last: bool = True, field_id: int = NULL_FIELD_ID) -> Written:
        return write_list(self.scope, field_id, data, is_last=is_last)

    def write_parts(self, parts: list[Sequence]) -> Written:
        return self.write(pack(parts))

    def changed(self, name: str, *values: int) -> Written:
        """The list with other values in a field."""
        wanted, parts = field_table("td").named(name).id, self.sequences()
        for header, old in parts:
            first = FieldId(header)
            place = wanted.field_code - first.field_code
            if first.class_code == wanted.class_code and 0 <= place < len(old):
                old[place : place + len(values)] = values
                return self.write_parts(parts)
        raise AssertionError(f"{name} is not in the list")


def pack(parts: list[Sequence]) -> bytes:
    """A list of sequences."""
    words = [word for header, values in parts for word in (header, *values)]
    return struct.pack(f"<{1 + len(words)}Q", 8 + 8 * len(words) | len(parts) << 16, *words)


@pytest.fixture
def target() -> Target:
    return Target()


# -- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "mutable"), [(Context.SYS, False), (Context.TD, False), (Context.TD, True), (Context.VP, True)]
)
def test_what_was_exported_can_be_imported(context: Context, mutable: bool) -> None:
    target = Target(context, mutable=mutable)
    field_id = int(NULL_FIELD_ID)
    for number, data in enumerate(target.lists, 1):
        written = target.write(data, is_last=number == len(target.lists), field_id=field_id)
        assert written.status == Status.TDX_SUCCESS, f"{written.error[0]:#x}"
        field_id = written.next_id
    assert field_id == NULL_FIELD_ID


@pytest.mark.parametrize(("context", "access"), [(Context.TD, IMMUTABLE), (Context.TD, MUTABLE), (Context.VP, MUTABLE)])
def test_required_fields_are_exported(context: Context, access: Access) -> None:
    target = Target(context, mutable=access is MUTABLE)
    exported = set()
    for number in range(len(target.lists)):
        for header, values in target.sequences(number):
            stride = FieldId(header).inc_size + 1
            exported |= {
                (FieldId(header).class_code, FieldId(header).field_code + n * stride) for n in range(len(values))
            }
    for field_id in all_ids(context, access, whole_fields=True):
        element = locate(context, field_id)
        assert element is not None
        if element.field.is_required(access):
            assert (field_id.class_code, field_id.field_code) in exported, element.field.name


def test_a_required_field_is_missing(target: Target) -> None:
    parts = target.sequences()
    mrtd = field_table("td").named("MRTD").id
    place = next(i for i, (header, _) in enumerate(parts) if FieldId(header).class_code == mrtd.class_code)
    written = target.write_parts(parts[:place] + parts[place + 1 :])
    assert (written.status, written.error) == (MISSING, (mrtd, 0))
    assert target.write_parts(parts[:-1]).status == MISSING
    assert target.write(target.lists[0], is_last=False).status == MISSING


def test_optional_fields_may_be_missing(target: Target) -> None:
    parts = target.sequences()
    flags = field_table("td").named("CONFIG_FLAGS").id
    kept = [part for part in parts if FieldId(part[0]).field_code != flags.field_code]
    assert len(kept) == len(parts) - 1
    assert target.write_parts(kept).status == Status.TDX_SUCCESS
    assert target.td.tdcs.config_flags == 0


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda p: [(FieldId(p[0][0]).replace(context_code=2), p[0][1]), *p[1:]], ID_INCORRECT | OF_HEADER),
        (lambda p: [p[0], (p[1][0] | 1 << 62, p[1][1]), *p[2:]], (ID_INCORRECT | OF_HEADER) + 1),
        (lambda p: [p[0], (p[1][0] ^ 1 << 32, p[1][1]), *p[2:]], ID_INCORRECT + 1),
        (lambda p: [(FieldId(p[0][0]).replace(last_field_in_sequence=300), p[0][1]), *p[1:]], ID_INCORRECT),
        (lambda p: [p[1], p[0], *p[2:]], MISSING),
    ],
)
def test_wrong_sequences(target: Target, change: object, status: int) -> None:
    assert callable(change)
    assert target.write_parts(change(target.sequences())).status == status


def test_wrong_sizes(target: Target) -> None:
    data = target.lists[0]
    assert target.write(bytes(8)).status == Status.TDX_INVALID_METADATA_LIST_HEADER
    assert target.write(data[:4] + b"\1" + data[5:]).status == Status.TDX_INVALID_METADATA_LIST_HEADER
    assert target.write((16).to_bytes(2, "little") + data[2:]).status == OVERFLOW | OF_HEADER
    assert target.write((24).to_bytes(2, "little") + data[2:]).status == OVERFLOW | OF_HEADER


def test_a_write_mask_is_for_all_fields(target: Target) -> None:
    header, values = target.sequences()[0]
    masked = FieldId(header).replace(write_mask_valid=1)
    own = target.td.tdr.td_uuid
    target.write_parts([(masked, [0xFFFF, *values])])
    mixed = tuple(old & ~0xFFFF | new & 0xFFFF for old, new in zip(own, values, strict=True))
    assert target.td.tdr.td_uuid == mixed != own
    target.write_parts([(masked, [0, *values])])
    assert target.td.tdr.td_uuid == mixed


@cache
def a_target() -> Target:
    """One for all examples: what fails leaves it as good as before."""
    return Target()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_there_is_a_status(data: st.DataObject) -> None:
    target = a_target()
    raw = bytearray(target.lists[0])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw[:2] = min(int.from_bytes(raw[:2], "little"), PAGE).to_bytes(2, "little")
    written = target.write(bytes(raw))
    assert 0 <= written.status < 1 << 64


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("NUM_L2_VMS", (4,)),
        ("ATTRIBUTES", (0,)),
        ("ATTRIBUTES", (TdAttributes.MIGRATABLE | TdAttributes.DEBUG,)),
        ("ATTRIBUTES", (TdAttributes.MIGRATABLE | 1 << 40,)),
        ("XFAM", (2,)),
        ("XFAM", (1 << 62 | 3,)),
        ("EPTP", (0x1F,)),
        ("EPTP", (0x16,)),
        ("NUM_CPUID_VALUES", (1,)),
        ("CONFIG_FLAGS", (1 << 9,)),
        ("VIRTUAL_IA32_ARCH_CAPABILITIES", (0,)),
        ("MAX_VCPUS", (1 << 32,)),
    ],
)
def test_values_that_no_td_can_have(target: Target, name: str, values: tuple[int, ...]) -> None:
    written = target.changed(name, *values)
    assert written.status & ~0xFFFF_FFFF == NOT_VALID
    assert written.error == (field_table("td").named(name).id, 0)
    assert written.next_id == NULL_FIELD_ID


def test_l2_vms_need_their_pages(target: Target) -> None:
    assert target.changed("NUM_L2_VMS", 1).status & ~0xFFFF_FFFF == Status.TDX_TDCS_NOT_ALLOCATED
    target.td.tdr.num_tdcx = MIN_TDCX + 1
    assert target.changed("NUM_L2_VMS", 1).status == Status.TDX_SUCCESS
    assert not finish_immutable_state(target.machine.module, target.td)


def test_the_td_keeps_the_uuid_that_service_tds_know(target: Target) -> None:
    before = target.td.tdr.td_uuid
    assert target.write(target.lists[0]).status == Status.TDX_SUCCESS
    assert target.td.tdcs.pre_import_uuid == before != target.td.tdr.td_uuid


def test_what_follows_from_immutable_state(target: Target) -> None:
    assert target.changed("GPAW", 0).status == Status.TDX_SUCCESS
    tdcs = target.td.tdcs
    tdcs.config_flags |= ConfigFlags.GPAW
    tdcs.num_vcpus = 1
    assert finish_immutable_state(target.machine.module, target.td)
    assert tdcs.config_flags == 0
    assert (tdcs.td_epoch, tdcs.num_assoc_vcpus) == (1, 0)
    assert tdcs.xbuff_size >= 576
    for count in (0, tdcs.max_vcpus + 1):
        tdcs.num_vcpus = count
        assert not finish_immutable_state(target.machine.module, target.td)


def test_clock_and_timeout() -> None:
    target = Target(mutable=True)
    assert target.changed("VIRTUAL_TSC", 5_000_000).status == Status.TDX_SUCCESS
    tdcs, now = target.td.tdcs, target.machine.module.hardware.inputs.tsc
    assert (now * tdcs.tsc_multiplier >> 48) + tdcs.tsc_offset & (1 << 64) - 1 == 5_000_000
    assert target.changed("HP_LOCK_TIMEOUT", 50_000).status == Status.TDX_SUCCESS
    assert tdcs.hp_lock_timeout == 50_000 * target.machine.platform.tsc_hz // 1_000_000
    assert target.changed("HP_LOCK_TIMEOUT", 5).status & ~0xFFFF_FFFF == NOT_VALID


@pytest.mark.parametrize(
    ("binding", "fits"),
    [
        (Binding(), True),
        (Binding(BindingState.BOUND), True),
        (Binding(BindingState.PRE_BOUND), True),
        (Binding(BindingState.BOUND, attributes=1), False),
        (Binding(BindingState.BOUND, type=1), False),
        (Binding(BindingState.BOUND, attributes=1 << 63), False),
        (Binding(3), False),
    ],
)
def test_bindings(binding: Binding, fits: bool) -> None:
    target = Target(mutable=True)
    own = Binding(BindingState.BOUND, uuid=(1, 2, 3, 4))
    target.td.tdcs.servtd_bindings_table = own.pack()
    written = target.changed("SERVTD_BINDINGS_TABLE", *binding.pack())
    assert (written.status == Status.TDX_SUCCESS) == fits
    assert Binding.unpack(target.td.tdcs.servtd_bindings_table) == own


# -- CPUID -----------------------------------------------------------------------------------------------------------


def with_cpuid(target: Target, leaf: int, subleaf: int | None, change: dict[str, int]) -> Written:
    """The list with other values of a CPUID leaf."""
    entry = next(e for e in cpuid_table() if e.leaf == leaf and subleaf in (None, e.subleaf))
    parts = target.sequences()
    for header, values in parts:
        first = FieldId(header)
        if first.class_code == 20 and first.cpuid_leaf == (entry.leaf, entry.subleaf):
            old = Registers.from_halves(*values)
            new = old._replace(**change)
            values[:] = new.low, new.high
            return target.write_parts(parts)
    raise AssertionError(f"CPUID({leaf:#x}) is not in the list")


@pytest.mark.parametrize(
    ("leaf", "subleaf", "change"),
    [
        (0, None, {"eax": 0x8000_0000}),
        (1, None, {"eax": 0x123}),
        (1, None, {"ecx": 0}),
        (5, None, {"eax": 0x40}),
        (7, 0, {"ebx": 1 << 4}),
        (7, 0, {"ecx": 1 << 31}),
        (0xA, None, {"eax": 8}),
        (0xD, 0, {"ecx": 1}),
        (0x15, None, {"ebx": 3}),
        (0x19, None, {"eax": 1}),
    ],
)
def test_cpuid_that_this_platform_cannot_give(
    target: Target, leaf: int, subleaf: int | None, change: dict[str, int]
) -> None:
    written = with_cpuid(target, leaf, subleaf, change)
    assert written.status & ~0xFFFF_FFFF == NOT_VALID
    entry = next(e for e in cpuid_table() if e.leaf == leaf and subleaf in (None, e.subleaf))
    assert FieldId(written.error[0]).cpuid_leaf == (entry.leaf, entry.subleaf)


def test_an_older_stepping_is_fine(target: Target) -> None:
    fms = target.machine.module.hardware.cpu.fms
    assert with_cpuid(target, 1, None, {"eax": fms & ~0xF}).status == Status.TDX_SUCCESS


def test_cpuid_flags_come_with_the_leaves(target: Target) -> None:
    assert target.write(target.lists[0]).status == Status.TDX_SUCCESS
    source = target.machine.module.td(next(iter(tdrs(target))))
    assert target.td.tdcs.cpuid_flags == source.tdcs.cpuid_flags
    assert target.td.tdcs.cpuid_valid == source.tdcs.cpuid_valid
    assert target.td.tdcs.ia32_spec_ctrl_mask == source.tdcs.ia32_spec_ctrl_mask


def tdrs(target: Target) -> list[int]:
    """The TDs of the machine, in order of creation."""
    return sorted(key for key, entry in dict.items(target.machine.module.pamt) if entry.page_type == 4)


# -- VCPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("XCR0", 3, True), ("XCR0", 2, False), ("XCR0", 1 << 2 | 3, False),
        ("IA32_XSS", 0, True), ("IA32_XSS", 1 << 8, False),
        ("VCPU_INDEX", 0, True), ("VCPU_INDEX", 1, False),
        ("LAST_TD_EXIT", 2, True), ("LAST_TD_EXIT", 3, False),
        ("CURR_VM", 0, True), ("CURR_VM", 1, False),
        ("L2_EXIT_HOST_ROUTING", 2, True), ("L2_EXIT_HOST_ROUTING", 3, False),
    ],
)  # fmt: skip
def test_values_of_vcpus(name: str, value: int, fits: bool) -> None:
    move = Migration()
    scope = Scope(move.module, move.module.lps[0], Context.VP, MUTABLE, move.of_source, move.module.vp(move.tdvpr))
    entry = field_table("vp").named(name)
    # Beginning with the field, a list has only what follows it.
    written = write_list(scope, entry.id, pack([(entry.id, [value])]), is_last=False)
    assert (written.status == Status.TDX_SUCCESS) == fits
    if not fits:
        assert written.error[0] == entry.id


def test_the_state_of_a_vcpu_is_not_imported() -> None:
    move = Migration()
    vp = move.module.vp(move.tdvpr)
    scope = Scope(move.module, move.module.lps[0], Context.VP, MUTABLE, move.of_source, vp)
    state = field_table("vp").named("VCPU_STATE").id
    data = pack([(state, [VcpuState.DISABLED])])
    assert write_list(scope, state, data, is_last=False).status == Status.TDX_SUCCESS
    assert vp.tdvps.vcpu_state == VcpuState.READY


def test_other_params_too() -> None:
    """A TD with more features, four VCPUs and a 52-bit GPA finds itself again."""
    params = replace(
        MIGRATABLE, attributes=TdAttributes.MIGRATABLE | TdAttributes.PKS | TdAttributes.SEPT_VE_DISABLE, xfam=0xE7,
        config_flags=ConfigFlags.GPAW, eptp_controls=0x26, max_vcpus=4, mr_owner=b"o" * 48,
    )  # fmt: skip
    assert params.tsc_frequency == PARAMS.tsc_frequency
    machine = Machine()
    module, lp = machine.module, machine.module.lps[0]
    source = module.td(machine.finalized_td(params)[0])
    dump = dump_list(Scope(module, lp, Context.TD, Access.EXPORT_IMMUTABLE, source), NULL_FIELD_ID, PAGE)
    td = module.td(machine.td_with_tdcs())
    written = write_list(Scope(module, lp, Context.TD, IMMUTABLE, td), NULL_FIELD_ID, dump.data, is_last=True)
    assert written.status == Status.TDX_SUCCESS, f"{written.error[0]:#x}"
    assert finish_immutable_state(module, td)
    for part in ("attributes", "xfam", "gpaw", "config_flags", "td_ctls", "xbuff_offsets", "mrowner", "msr_bitmaps"):
        assert getattr(td.tdcs, part) == getattr(source.tdcs, part), part
    assert td.tdcs.eptp & 0xFFF == source.tdcs.eptp & 0xFFF
