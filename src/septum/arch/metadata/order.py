"""From a field id to its element, and from one field id to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from septum.arch.cpuid import cpuid_table, index_of
from septum.arch.metadata.field_id import CPUID_VALUES_CLASS, NULL_FIELD_ID, Context, FieldId
from septum.arch.metadata.tables import Access, Field, FieldTable, field_table


class Structure(StrEnum):
    """Where an element lives."""

    SYS = "SYS"
    """Computed by the module; there is no offset."""
    TDR = "TDR"
    TDCS = "TDCS"
    TDVPS = "TDVPS"
    VMCS = "VMCS"
    """The VMCS of VM `Element.vm`; the offset is the VMCS encoding."""


@dataclass(frozen=True, slots=True)
class Element:
    """One element, located."""

    field: Field
    table: str
    structure: Structure
    number: int
    """Position among all elements of the entry; of CPUID_VALUES, `CpuidEntry.index` * 2 + half."""
    offset: int
    """Bytes from the start of the structure; the encoding for VMCS; 0 for SYS."""
    vm: int
    """The L2 VM (1 to 3) it belongs to, 0 for the TD itself and its L1 VM."""

    @property
    def field_number(self) -> int:
        """Which of the entry's fields."""
        return self.number // self.field.elements

    @property
    def element_number(self) -> int:
        """Which element of that field."""
        return self.number % self.field.elements


@dataclass(frozen=True, slots=True)
class _Position:
    """A place in the iteration order of a context."""

    table: FieldTable
    index: int
    id: FieldId

    @property
    def entry(self) -> Field:
        return self.table.entries[self.index]


def _table(context: Context, field_id: FieldId) -> FieldTable:
    """The table that holds a field of the context, or would (`md_get_lookup_table`)."""
    if context is not Context.VP:
        return field_table("sys" if context is Context.SYS else "td")
    if field_id.is_null or field_id.class_code == 0:
        return field_table("td_vmcs")
    return field_table("l2_vmcs" if field_id.class_code in _L2_VMCS_CLASSES else "vp")


_L2_VMCS_CLASSES = (36, 44, 52)
_FIRST_TDCS_CLASS = 16
_FIRST_L2_VP_CLASS = 36
_FIRST_L2_TD_CLASS = 37


def _vm(context: Context, class_code: int) -> int:
    """The L2 VM that a class belongs to, or 0."""
    if context is Context.VP and class_code >= _FIRST_L2_VP_CLASS:
        return (class_code - _FIRST_L2_VP_CLASS) // 8 + 1
    if context is Context.TD and class_code >= _FIRST_L2_TD_CLASS:
        return (class_code - _FIRST_L2_TD_CLASS) // 4 + 1
    return 0


def _position(context: Context, field_id: FieldId, l2_vms: int) -> _Position | None:
    table = _table(context, field_id)
    class_code, field_code = field_id.class_code, field_id.field_code
    if table.name == "l2_vmcs":
        class_code = 0
    elif context is Context.TD and class_code == CPUID_VALUES_CLASS:
        field_code &= 1
    index = table.find(class_code, field_code, l2_vms)
    return None if index is None else _Position(table, index, field_id)


def locate(context: Context, field_id: int, l2_vms: int = 0) -> Element | None:
    """The element that an id names in a TD with `l2_vms` L2 VMs, or None if there is none (FIELD_ID_INCORRECT).

    The id's own context code is not looked at, and reserved bits are not checked: see `FieldId.is_single_element`.
    """
    fid = FieldId(field_id)
    position = _position(context, fid, l2_vms)
    vm = _vm(context, fid.class_code)
    if position is None or vm > l2_vms:
        return None
    entry, table = position.entry, position.table.name
    number = fid.field_code - entry.id.field_code
    if table in ("td_vmcs", "l2_vmcs"):
        # An odd encoding means the high half of a 64-bit VMCS field, which cannot be accessed alone.
        high = fid.field_code & 1
        return None if high else Element(entry, table, Structure.VMCS, number // entry.stride, fid.field_code, vm)
    if context is Context.SYS:
        return Element(entry, table, Structure.SYS, number, 0, 0)
    if context is Context.TD and fid.class_code == CPUID_VALUES_CLASS:
        index = index_of(*fid.cpuid_leaf)
        if index is None or fid.field_code >> 17:
            return None
        number = 2 * index + (fid.field_code & 1)
    structure = Structure.TDVPS
    if context is Context.TD:
        structure = Structure.TDR if fid.class_code < _FIRST_TDCS_CLASS else Structure.TDCS
    return Element(entry, table, structure, number, entry.offset + number * entry.element_size, vm)


def _next_cpuid(field_id: FieldId, *, whole_fields: bool) -> FieldId | None:
    code = field_id.field_code
    if not whole_fields and not code & 1:
        return field_id.replace(field_code=code + 1)
    index = index_of(*field_id.cpuid_leaf)
    if index is None:
        raise KeyError(f"field id {field_id:#x} names a CPUID leaf that is not in the table")
    following = cpuid_table()[index + 1 : index + 2]
    return field_id.with_cpuid_leaf(following[0].leaf, following[0].subleaf) if following else None


def _enter(table: FieldTable, index: int, class_code: int, l2_vms: int) -> _Position | None:
    """The first element at `index`, which may be just behind the table's end; `class_code` is that of the way here."""
    if index == table.length(l2_vms):
        if table.name == "td_vmcs":
            table, index = field_table("vp"), 0
        elif table.name == "l2_vmcs":
            # TDVPS goes on behind the entry that stood for this VMCS.
            table = field_table("vp")
            index = table.entries.index(table.named(f"L2_VMCS_{_vm(Context.VP, class_code)}")) + 1
        else:
            return None
    field_id = table.entries[index].id
    if table.name == "vp" and field_id.class_code in _L2_VMCS_CLASSES:
        table, index, class_code = field_table("l2_vmcs"), 0, field_id.class_code
        field_id = table.entries[0].id
    if table.name == "l2_vmcs":
        field_id = field_id.replace(class_code=class_code)
    elif table.name == "td" and field_id.class_code == CPUID_VALUES_CLASS:
        field_id = field_id.with_cpuid_leaf(cpuid_table()[0].leaf, cpuid_table()[0].subleaf)
    return _Position(table, index, field_id)


def _advance(position: _Position, l2_vms: int, *, whole_fields: bool) -> _Position | None:
    entry, field_id = position.entry, position.id
    if position.table.name == "td" and entry.id.class_code == CPUID_VALUES_CLASS:
        following = _next_cpuid(field_id, whole_fields=whole_fields)
        if following is not None:
            return _Position(position.table, position.index, following)
    else:
        step = entry.stride * (entry.elements if whole_fields else 1)
        count = entry.fields * (1 if whole_fields else entry.elements)
        if (field_id.field_code - entry.id.field_code) // step < count - 1:
            following = field_id.replace(field_code=field_id.field_code + step)
            return _Position(position.table, position.index, following)
    return _enter(position.table, position.index + 1, field_id.class_code, l2_vms)


def next_id(
    context: Context,
    field_id: int,
    access: Access,
    *,
    l2_vms: int = 0,
    write: bool = False,
    whole_fields: bool = False,
) -> FieldId:
    """The id that follows in the context and may be read (or, with `write`, written): what *.RD return in RDX.

    `NULL_FIELD_ID` as input gives the first id, as output it means that there are no more. Steps from element to
    element, or with `whole_fields` from field to field as metadata lists do. The result's context code is `context`;
    within one table entry it keeps the size, inc_size and other bits of `field_id`, whatever they are. Raises KeyError
    if `field_id` cannot be found; check it with `locate` first (`md_get_next_item_in_context`).
    """
    fid = FieldId(field_id).replace(context_code=context)
    position: _Position | None
    if fid.is_null:
        position = _enter(_table(context, fid), 0, 0, l2_vms)
    else:
        start = _position(context, fid, l2_vms)
        if start is None:
            raise KeyError(f"no field {fid:#x} in the {context.name} context")
        position = _advance(start, l2_vms, whole_fields=whole_fields)
    while position is not None:
        entry = position.entry
        if entry.write_mask(access) if write else entry.read_mask(access):
            return position.id
        position = _advance(position, l2_vms, whole_fields=whole_fields)
    return NULL_FIELD_ID


def all_ids(
    context: Context, access: Access, *, l2_vms: int = 0, write: bool = False, whole_fields: bool = False
) -> Iterator[FieldId]:
    """Every id of the context in order, as `next_id` gives them from the first on."""
    field_id = NULL_FIELD_ID
    while True:
        field_id = next_id(context, field_id, access, l2_vms=l2_vms, write=write, whole_fields=whole_fields)
        if field_id == NULL_FIELD_ID:
            return
        yield field_id
