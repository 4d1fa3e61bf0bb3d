"""Service TDs: the binding that a TD has for one, and the handle by which the service TD names it.

Source: TDX Module 1.5.01, ``src/common/helpers/service_td.h``, ``tdh_mr_finalize.c``.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from septum.arch.pages import PAGE_MASK

MAX_SERVTDS: Final = 1
"""Binding slots of a TD."""
MIGRATION_TD: Final = 0
"""The only type of service TD."""
INSTANCE_BINDING: Final = 1
"""Bit of SERVTD_ATTR: the binding is to one instance of the service TD, whatever it measures."""
IGNORE_TDINFO_SHIFT: Final = 32
IGNORE_TDINFO_MASK: Final = 0x7FF
ATTRIBUTES_ALLOWED: Final = IGNORE_TDINFO_MASK << IGNORE_TDINFO_SHIFT | INSTANCE_BINDING
_U64: Final = (1 << 64) - 1
_HASHED: Final = struct.Struct("<48sHQ")


class BindingState(IntEnum):
    """State of a binding slot."""

    NOT_BOUND = 0
    PRE_BOUND = 1
    BOUND = 2


@dataclass(frozen=True, slots=True)
class Binding:
    """A slot of SERVTD_BINDINGS_TABLE."""

    state: int = BindingState.NOT_BOUND
    type: int = 0
    attributes: int = 0
    uuid: tuple[int, ...] = (0,) * 4
    info_hash: bytes = bytes(48)

    def pack(self) -> tuple[int, ...]:
        """The sixteen 64-bit elements of the slot."""
        head = self.state | self.type << 16
        return (head, self.attributes, *self.uuid, *struct.unpack("<6Q", self.info_hash), 0, 0, 0, 0)

    @classmethod
    def unpack(cls, elements: Sequence[int]) -> Binding:
        """From the elements of a slot."""
        head, attributes, *rest = elements
        return cls(head & 0xFF, head >> 16 & 0xFFFF, attributes, tuple(rest[:4]), struct.pack("<6Q", *rest[4:10]))

    def servtd_hash(self) -> bytes:
        """SERVTD_HASH of a TD with this one slot."""
        if self.state == BindingState.NOT_BOUND:
            return bytes(48)
        return hashlib.sha384(_HASHED.pack(self.info_hash, self.type, self.attributes)).digest()


def binding_handle(tdr_pa: int, slot: int, uuid: Sequence[int]) -> int:
    """What TDH.SERVTD.BIND gives the service TD: place of the binding, hidden by its own UUID."""
    return (tdr_pa & PAGE_MASK | slot) + uuid[0] & _U64


def open_handle(handle: int, uuid: Sequence[int]) -> tuple[int, int]:
    """TDR address and slot in a handle; nonsense if the handle was made for another service TD."""
    place = handle - uuid[0]
    return place & PAGE_MASK, place & 0xFFF
