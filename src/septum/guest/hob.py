"""The TD HOB as the guest reads it: the list that tells firmware which memory it has and must accept itself.

Sources: UEFI PI 1.8, volume 3, chapter 5; EDK2 OvmfPkg/IntelTdx/TdxHelperLib (what is accepted, what is measured).
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from septum.guest.vcpu import Vcpu

_HEADER: Final = struct.Struct("<HHI")
_RESOURCE: Final = struct.Struct("<HHI16sIIQQ")
_HANDOFF_SIZE: Final = 56
_END_ADDRESS: Final = slice(48, 56)
"""In the first entry: the address behind the list."""
_RESOURCE_DESCRIPTOR: Final = 3
_END_OF_LIST: Final = 0xFFFF
_UNACCEPTED: Final = 7
_LARGEST: Final = 64 << 10
"""Bytes that a list may have here; real ones have under a thousand."""


class Memory(NamedTuple):
    """Guest physical addresses from ``start`` up to, not including, ``end``."""

    start: int
    end: int


async def read_hob(vcpu: Vcpu) -> bytes:
    """The list that the VCPU was given, its END entry included; nothing if there is none."""
    if not vcpu.hob:
        return b""
    head = await vcpu.read(vcpu.hob, _HANDOFF_SIZE)
    size = int.from_bytes(head[_END_ADDRESS], "little") - vcpu.hob
    return await vcpu.read(vcpu.hob, size) if _HANDOFF_SIZE < size <= _LARGEST else b""


def unaccepted_memory(hob: bytes) -> tuple[Memory, ...]:
    """The memory that the guest must accept before it uses it, in the order of the list."""
    found = []
    at = 0
    while at + _HEADER.size <= len(hob):
        kind, size, _ = _HEADER.unpack_from(hob, at)
        if kind == _END_OF_LIST or size < _HEADER.size:
            break
        if kind == _RESOURCE_DESCRIPTOR and at + _RESOURCE.size <= len(hob):
            *_, resource, _, start, length = _RESOURCE.unpack_from(hob, at)
            if resource == _UNACCEPTED:
                found.append(Memory(start, start + length))
        at += size
    return tuple(found)


def hob_digest(hob: bytes) -> bytes:
    """What firmware extends RTMR0 with first: the SHA-384 of the list without its END entry."""
    return hashlib.sha384(hob[: -_HEADER.size]).digest()
