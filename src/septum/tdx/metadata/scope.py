"""Whose fields are accessed, by whom, and what an id names there."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from septum.arch.metadata import Access, Context, Element, FieldId, locate, next_id
from septum.arch.structures import TdAttributes

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

#: Ids and whole tables fit; whoever makes up other ids pushes out the oldest.
_REMEMBERED = 1 << 15


class Scope:
    """The fields of one context: of the module, of a TD, or of a VCPU; and with whose rights they are accessed.

    ``lp`` is the logical processor that the access is made on. ``td`` and ``vp`` are None where the context has none.
    """

    __slots__ = ("access", "context", "l2_vms", "lp", "module", "td", "vp")

    def __init__(
        self, module: Module, lp: Lp, context: Context, access: Access, td: Td | None = None, vp: Vp | None = None
    ) -> None:
        self.module = module
        self.lp = lp
        self.context = context
        self.access = access
        self.td = td
        self.vp = vp
        self.l2_vms = td.tdcs.num_l2_vms if td is not None else 0

    @property
    def of_td(self) -> Td:
        """The TD of a TD or VCPU context."""
        assert self.td is not None
        return self.td

    @property
    def of_vp(self) -> Vp:
        """The VCPU of a VCPU context."""
        assert self.vp is not None
        return self.vp

    @property
    def by_host(self) -> bool:
        """Whether the host asks, so that a debugger sees what the CPU uses and not what a guest is shown."""
        return self.access in _HOST


_HOST = (Access.HOST, Access.HOST_DEBUG)


def host_access(td: Td) -> Access:
    """The host's rights to a TD's fields: more of them if the TD's owner allowed debugging."""
    return Access.HOST_DEBUG if td.tdcs.attributes & TdAttributes.DEBUG else Access.HOST


class Located:
    """What an id names for a certain access: the element, and which of its bits may be read and written."""

    __slots__ = ("element", "read_mask", "write_mask")

    def __init__(self, element: Element, access: Access) -> None:
        self.element = element
        self.read_mask = element.field.read_mask(access)
        self.write_mask = element.field.write_mask(access)


@lru_cache(maxsize=_REMEMBERED)
def find(context: Context, field_id: int, l2_vms: int, access: Access) -> Located | None:
    """The element that an id names, or None. Takes ids as guests and hosts give them."""
    if not FieldId(field_id).is_single_element:
        return None
    element = locate(context, field_id, l2_vms)
    return None if element is None else Located(element, access)


@lru_cache(maxsize=_REMEMBERED)
def following(context: Context, field_id: int, l2_vms: int, access: Access) -> int:
    """The id that a reader is told to go on with."""
    return int(next_id(context, field_id, access, l2_vms=l2_vms))
