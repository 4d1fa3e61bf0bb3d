"""MBMD, the header of a migration bundle: 48 bytes in the host's memory, their last 16 a MAC over the first 32.

Source: TDX Module 1.5.01, ``mbmd_t`` in ``src/common/helpers/migration.h``.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.tdx.call import check_shared_hpa
from septum.tdx.outcome import check

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.module import Module

_LAYOUT: Final = struct.Struct("<HHHBBIIQQ16s")
SIZE: Final = _LAYOUT.size
_AUTHENTICATED: Final = 32
_ALIGNMENT: Final = 128
_SIZE_SHIFT: Final = 52
OUT_OF_ORDER_EPOCH: Final = 0xFFFF_FFFF
"""MIG_EPOCH once pages may be imported in any order."""

_SYS_PAGES_SHIFT: Final = 32


class BundleType(IntEnum):
    """MB_TYPE."""

    IMMUTABLE_TD_STATE = 0
    MUTABLE_TD_STATE = 1
    MUTABLE_VCPU_STATE = 2
    MEM = 16
    EPOCH_TOKEN = 32
    ABORT_TOKEN = 33


class Mbmd(NamedTuple):
    """A bundle's header. ``body`` is what its type adds: counts in the low bits, the rest reserved."""

    mb_type: int
    mig_version: int = 0
    migs_index: int = 0
    mb_counter: int = 0
    mig_epoch: int = 0
    iv_counter: int = 0
    body: int = 0
    mac: bytes = bytes(16)
    size: int = SIZE
    reserved: int = 0

    def pack(self) -> bytes:
        """The 48 bytes."""
        return _LAYOUT.pack(
            self.size, self.mig_version, self.migs_index, self.mb_type, self.reserved, self.mb_counter, self.mig_epoch,
            self.iv_counter, self.body, self.mac,
        )  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> Mbmd:
        """From 48 bytes."""
        size, version, index, mb_type, reserved, counter, epoch, iv_counter, body, mac = _LAYOUT.unpack(raw)
        return cls(mb_type, version, index, counter, epoch, iv_counter, body, mac, size, reserved)

    def authenticated(self) -> bytes:
        """What the MAC covers: all but stream index and IV counter, which are in the IV."""
        return self._replace(migs_index=0, iv_counter=0).pack()[:_AUTHENTICATED]

    def fits(self, mb_type: BundleType, mig_version: int, migs_index: int) -> bool:
        """What every importing function checks first."""
        expected = (mb_type, mig_version, migs_index, SIZE, 0)
        return (self.mb_type, self.mig_version, self.migs_index, self.size, self.reserved) == expected


def immutable_body(forward_streams: int, sys_pages: int) -> int:
    """The body of a bundle of immutable state."""
    return forward_streams | sys_pages << _SYS_PAGES_SHIFT


def open_immutable_body(body: int) -> tuple[int, int] | None:
    """Forward streams and pages of module metadata, or None if a reserved bit is set."""
    forward_streams, sys_pages = body & 0xFFFF, body >> _SYS_PAGES_SHIFT & 0xFF
    return (forward_streams, sys_pages) if body == immutable_body(forward_streams, sys_pages) else None


def check_buffer(call: HostCall, raw: int) -> int:
    """Checks ``hpa_and_size_t``, the operand R8 that names the host's buffer for an MBMD; returns its address.

    :raises Fail: OPERAND_INVALID with R8 when it is too small or not the host's.
    """
    check(raw >> _SIZE_SHIFT >= SIZE, Status.TDX_OPERAND_INVALID, Operand.R8)
    pa = raw & (1 << _SIZE_SHIFT) - 1
    check_shared_hpa(call, pa, _ALIGNMENT, Operand.R8)
    return pa


def read(module: Module, pa: int) -> Mbmd:
    """The MBMD in the host's memory."""
    return Mbmd.unpack(module.memory.read(module.pa_format.address(pa), SIZE))


def write(module: Module, pa: int, mbmd: Mbmd) -> None:
    """Writes an MBMD to the host's memory."""
    module.memory.write(module.pa_format.address(pa), mbmd.pack())
