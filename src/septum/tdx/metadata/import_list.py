"""Writing the fields of a metadata list that an import function has got.

Lists must have all fields that the import requires, in order; optional ones may be left out, and fields that are not
imported are passed over. Source: TDX Module 1.5.01, ``md_write_list`` and ``md_write_sequence`` in
``src/common/metadata_handlers/metadata_generic.c``.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from septum.arch.metadata import NULL_FIELD_ID, Access, Context, Element, FieldId, locate, next_id
from septum.arch.status import Status, with_operand
from septum.tdx.metadata.import_td import write_td_field
from septum.tdx.metadata.lists import NUM_SEQUENCES_SHIFT, QWORD
from septum.tdx.metadata.scope import Located, Scope
from septum.tdx.metadata.vp import write_vp
from septum.tdx.outcome import Fail, check

_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, (1 << 64) - 1
_MIN_SEQUENCE: Final = 2 * QWORD
_NOT_A_FIELD: Final = 0xFFFF_0000
"""In the details of a status: the error concerns a header."""
_LISTED: Final = {
    Access.IMPORT_IMMUTABLE: frozenset({"MB", "CB", "MBO", "CBO"}),
    Access.IMPORT_MUTABLE: frozenset({"ME", "CE", "IESME", "MEO", "CEO"}),
}
"""Kinds of fields that are written when they are in a list."""


class Written(NamedTuple):
    """What became of a list: a status, the id of the field that the next list begins with, and error information."""

    status: int
    next_id: int = NULL_FIELD_ID
    error: tuple[int, int] = (0, 0)


class _ListError(Exception):
    """Ends a list with a status, and the id of the field or the header that is wrong."""

    def __init__(self, status: int, where: int = 0) -> None:
        super().__init__(status, where)
        self.status = status
        self.where = where


def write_list(scope: Scope, field_id: int, data: bytes, *, is_last: bool) -> Written:
    """Writes the fields of a list, from ``field_id`` on, which is the null id for the first list of a context.

    ``is_last`` says that no list of the context follows. Fields before the one that is wrong stay written.
    """
    try:
        return Written(Status.TDX_SUCCESS, _Writer(scope, field_id, data).write(is_last=is_last))
    except _ListError as error:
        return Written(error.status, error=(int(error.where), 0))


class _Writer:
    """A list that is being written: where in the list we are, and at which field of the context."""

    def __init__(self, scope: Scope, field_id: int, data: bytes) -> None:
        self.scope = scope
        self.data = data
        self.offset = QWORD
        self._go_to(FieldId(field_id))

    def write(self, *, is_last: bool) -> int:
        """Writes all sequences; returns the id of the next field that is required, or the null id."""
        header = self._word(0)
        sequences = header >> NUM_SEQUENCES_SHIFT & _U16
        if not sequences or header >> 32:
            raise _ListError(Status.TDX_INVALID_METADATA_LIST_HEADER)
        if self.field_id.is_null:
            self._advance(write=True)
        if self.field_id.is_null:
            raise _ListError(Status.TDX_METADATA_FIELD_ID_INCORRECT)
        room = (header & _U16) - QWORD & _U16
        for number in range(sequences):
            begin = self.offset
            self._find(number)
            try:
                self._write_sequence(room)
            except _ListError as error:
                raise _ListError(with_operand(error.status, number), error.where) from None
            room = room - (self.offset - begin) & _U16
        self._skip_to_required()
        if is_last != self.field_id.is_null:
            raise _ListError(Status.TDX_REQUIRED_METADATA_FIELD_MISSING, self.field_id)
        return int(self.field_id)

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + QWORD], "little")

    def _go_to(self, field_id: FieldId) -> None:
        self.field_id = field_id
        self.element = None if field_id.is_null else locate(self.scope.context, field_id, self.scope.l2_vms)

    @property
    def _first_element(self) -> Element:
        assert self.element is not None
        return self.element

    def _advance(self, *, write: bool = False) -> None:
        """To the next field of the context, or the next one that is imported."""
        scope = self.scope
        self._go_to(
            next_id(scope.context, self.field_id, scope.access, l2_vms=scope.l2_vms, write=write, whole_fields=True)
        )

    def _is_required(self) -> bool:
        return self.element is None or self.element.field.is_required(self.scope.access)

    def _skip_to_required(self) -> None:
        while not self._is_required():
            self._advance()

    def _names(self, header: FieldId) -> bool:
        """Whether a sequence begins with the field where we are."""
        here = self.field_id
        same_code = (header.field_code, header.class_code) == (here.field_code, here.class_code)
        return same_code and header.context_code == here.context_code

    def _find(self, number: int) -> None:
        """Goes to the first field of the next sequence, past optional ones that the list has not.

        :raises _ListError: METADATA_FIELD_ID_INCORRECT, REQUIRED_METADATA_FIELD_MISSING.
        """
        header = FieldId(self._word(self.offset))
        if header.context_code != self.field_id.context_code or self.field_id.is_null:
            raise _ListError(Status.TDX_METADATA_FIELD_ID_INCORRECT | _NOT_A_FIELD | number, header)
        while not (self._names(header) or self._is_required()):
            self._advance()
        if not self._names(header):
            raise _ListError(Status.TDX_REQUIRED_METADATA_FIELD_MISSING, self.field_id)

    def _write_sequence(self, room: int) -> None:
        """Writes the fields of a sequence; ``room`` is what is left of the list, its header included.

        A write mask is the first element for all fields of a sequence, each of which has room for one of its own.
        """
        header = FieldId(self._word(self.offset))
        if room < _MIN_SEQUENCE:
            raise _ListError(Status.TDX_METADATA_LIST_OVERFLOW | _NOT_A_FIELD, self.field_id)
        if header.reserved:
            raise _ListError(Status.TDX_METADATA_FIELD_ID_INCORRECT | _NOT_A_FIELD, header)
        if header.element_size_code != self.field_id.element_size_code:
            raise _ListError(Status.TDX_METADATA_FIELD_ID_INCORRECT, header)
        self.offset += QWORD
        room -= QWORD
        first, mask = self.offset, _U64
        for left in reversed(range(header.last_field_in_sequence + 1)):
            element = self._first_element
            field = element.field
            if header.write_mask_valid:
                mask = self._word(first)
                self.offset += QWORD
                room = room - QWORD & _U32
            if room < QWORD * field.elements:
                raise _ListError(Status.TDX_METADATA_LIST_OVERFLOW | _NOT_A_FIELD, self.field_id)
            if field.mig_import in _LISTED[self.scope.access]:
                self._write_field(element, mask)
            self.offset += QWORD * field.elements
            room -= QWORD * field.elements
            self._advance()
            if left and self.field_id.class_code != field.id.class_code:
                raise _ListError(Status.TDX_METADATA_FIELD_ID_INCORRECT, header)

    def _write_field(self, element: Element, mask: int) -> None:
        values = [self._word(self.offset + QWORD * number) for number in range(element.field.elements)]
        try:
            _write(self.scope, element, values, mask)
        except Fail as fail:
            if fail.status != Status.TDX_METADATA_FIELD_NOT_WRITABLE:
                raise _ListError(fail.status, self.field_id) from None


def _write(scope: Scope, element: Element, values: list[int], mask: int) -> None:
    """Writes a whole field.

    :raises Fail: METADATA_FIELD_NOT_WRITABLE, METADATA_FIELD_VALUE_NOT_VALID, and what single fields add.
    """
    check(scope.context is not Context.SYS, Status.TDX_METADATA_FIELD_NOT_WRITABLE)
    located = Located(element, scope.access)
    if scope.context is Context.TD:
        write_td_field(scope, located, values, mask)
    else:
        write_vp(scope, located, values[0], mask)
