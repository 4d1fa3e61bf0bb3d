"""What the interface functions *.RD and *.WR have in common: their registers, and walking through ids."""

from __future__ import annotations

from septum.arch.metadata import NULL_FIELD_ID, FieldId
from septum.arch.status import Status
from septum.tdx.metadata.elements import next_field, read_element, write_element
from septum.tdx.metadata.scope import Scope
from septum.tdx.registers import Regs


def clear_outputs(regs: Regs, *, iterate: bool) -> None:
    """What a function leaves in the registers when it fails: no value, and no next id if it gives one."""
    if iterate:
        regs.rdx = NULL_FIELD_ID
    regs.r8 = 0


def answer_read(scope: Scope, regs: Regs, field_id: int, *, iterate: bool) -> int:
    """The value of an element in R8; with ``iterate`` the next id in RDX, and for the null id the first one.

    :raises Fail: METADATA_FIELD_ID_INCORRECT or METADATA_FIELD_NOT_READABLE.
    """
    if iterate and FieldId(field_id).is_null:
        regs.rdx = next_field(scope, field_id)
        return Status.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    regs.r8 = read_element(scope, field_id)
    if iterate:
        regs.rdx = next_field(scope, field_id)
    return Status.TDX_SUCCESS


async def answer_write(scope: Scope, regs: Regs, field_id: int, value: int, mask: int) -> int:
    """Writes an element; its old value in R8.

    :raises Fail: what :func:`~septum.tdx.metadata.elements.write_element` raises.
    """
    regs.r8 = await write_element(scope, field_id, value, mask)
    return Status.TDX_SUCCESS
