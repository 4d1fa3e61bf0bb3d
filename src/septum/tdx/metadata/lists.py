"""Metadata lists: a header, then sequences of consecutive fields, each behind an id that says how many there are.

| bits of a list header | part |
| --- | --- |
| 15:0 | bytes of the list, this header included |
| 31:16 | number of sequences |
| 63:32 | reserved |

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_generic.c``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from septum.arch.metadata import Element, FieldId, locate, next_id
from septum.arch.status import Status
from septum.tdx.metadata.elements import read_element
from septum.tdx.metadata.scope import Scope
from septum.tdx.outcome import Fail, check

QWORD = 8
NUM_SEQUENCES_SHIFT = 16
_CPUID_VALUES = "CPUID_VALUES"


class Dump(NamedTuple):
    """A list, the id of the first field that did not fit, and METADATA_LIST_OVERFLOW if there is one."""

    status: Status
    data: bytes
    next_id: int


class _Sequence:
    """Fields that follow each other without a gap and have elements of one size and number."""

    def __init__(self, first: FieldId, element: Element) -> None:
        self.first = first
        self.last = first
        self.field = element.field
        self.values: list[int] = []

    def goes_on_with(self, field_id: FieldId, element: Element) -> bool:
        """Whether a field belongs to the sequence. Each CPUID leaf is a sequence of its own."""
        field = element.field
        return (
            field.name != _CPUID_VALUES
            and field_id.class_code == self.last.class_code
            and field_id.field_code == self.last.field_code + self.field.elements * self.field.stride
            and field.elements == self.field.elements
            and field.element_size == self.field.element_size
        )

    def pack(self) -> bytes:
        """Header and elements."""
        per_field = self.field.elements
        header = self.first.replace(
            last_element_in_field=per_field - 1, last_field_in_sequence=len(self.values) // per_field - 1
        )
        return struct.pack(f"<{1 + len(self.values)}Q", header, *self.values)


def dump_list(scope: Scope, field_id: int, size: int) -> Dump:
    """A list of at most ``size`` bytes with the whole fields from ``field_id`` on that may be read.

    :raises Fail: METADATA_FIELD_ID_INCORRECT unless the id names the start of a field, with its true element size.
    """
    current = _first_field(scope, FieldId(field_id))
    sequences: list[_Sequence] = []
    open_sequence: _Sequence | None = None
    room = size - QWORD
    while not current.is_null:
        element = locate(scope.context, current, scope.l2_vms)
        assert element is not None
        if open_sequence is not None and not open_sequence.goes_on_with(current, element):
            open_sequence = None
        need = QWORD * (element.field.elements + (open_sequence is None))
        if room < need:
            break
        values = _read_field(scope, current, element)
        if values is None:
            open_sequence = None
        else:
            room -= need
            if open_sequence is None:
                open_sequence = _Sequence(current, element)
                sequences.append(open_sequence)
            open_sequence.values += values
            open_sequence.last = current
        current = next_id(scope.context, current, scope.access, l2_vms=scope.l2_vms, whole_fields=True)
    body = b"".join(sequence.pack() for sequence in sequences)
    header = QWORD + len(body) | len(sequences) << NUM_SEQUENCES_SHIFT
    status = Status.TDX_SUCCESS if current.is_null else Status.TDX_METADATA_LIST_OVERFLOW
    return Dump(status, header.to_bytes(QWORD, "little") + body, int(current))


def _first_field(scope: Scope, field_id: FieldId) -> FieldId:
    if field_id.is_null:
        return next_id(scope.context, field_id, scope.access, l2_vms=scope.l2_vms, whole_fields=True)
    element = locate(scope.context, field_id, scope.l2_vms)
    valid = (
        element is not None
        and element.field.starts_field(field_id)
        and element.field.id.element_size_code == field_id.element_size_code
    )
    check(valid, Status.TDX_METADATA_FIELD_ID_INCORRECT)
    assert element is not None
    return element.field.id.replace(field_code=field_id.field_code)


def _read_field(scope: Scope, field_id: FieldId, element: Element) -> list[int] | None:
    """All elements of a field, or None if they cannot be read."""
    field = element.field
    try:
        return [read_element(scope, field_id + number * field.stride) for number in range(field.elements)]
    except Fail as fail:
        if fail.status != Status.TDX_METADATA_FIELD_NOT_READABLE:
            raise
        return None
