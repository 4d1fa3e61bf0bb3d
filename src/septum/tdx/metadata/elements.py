"""Reading and writing one element by its id, and which id comes next.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_generic.c``.
"""

from __future__ import annotations

from septum.arch.metadata import Context
from septum.arch.status import Status
from septum.tdx.metadata.scope import Located, Scope, find, following
from septum.tdx.metadata.sys import read_sys
from septum.tdx.metadata.td import read_td, write_td
from septum.tdx.metadata.vp import read_vp, write_vp
from septum.tdx.outcome import Fail, check


def _locate(scope: Scope, field_id: int) -> Located:
    located = find(scope.context, field_id, scope.l2_vms, scope.access)
    if located is None:
        raise Fail(Status.TDX_METADATA_FIELD_ID_INCORRECT)
    return located


def read_element(scope: Scope, field_id: int) -> int:
    """The readable bits of an element; the others are 0.

    :raises Fail: METADATA_FIELD_ID_INCORRECT or METADATA_FIELD_NOT_READABLE.
    """
    located = _locate(scope, field_id)
    if scope.context is Context.TD:
        value = read_td(scope, located)
    elif scope.context is Context.VP:
        value = read_vp(scope, located)
    else:
        value = read_sys(scope, located.element)
    check(located.read_mask, Status.TDX_METADATA_FIELD_NOT_READABLE)
    return value & located.read_mask


async def write_element(scope: Scope, field_id: int, value: int, mask: int) -> int:
    """Writes the bits of an element that ``mask`` names; returns the readable bits of the old value.

    :raises Fail: METADATA_FIELD_ID_INCORRECT, METADATA_FIELD_NOT_WRITABLE, METADATA_FIELD_VALUE_NOT_VALID, and what
        single fields add.
    """
    located = _locate(scope, field_id)
    if scope.context is Context.TD:
        return await write_td(scope, located, value, mask)
    return write_vp(scope, located, value, mask)


def next_field(scope: Scope, field_id: int) -> int:
    """The id of the next element that may be read, all ones after the last; from the null id, the first."""
    return following(scope.context, field_id, scope.l2_vms, scope.access)
