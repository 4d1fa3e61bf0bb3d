"""Measurement of a TD: what is hashed into MRTD, the run-time registers, and TDINFO.

Source: TDX Module 1.5.01, ``tdh_mem_page_add.c``, ``tdh_mr_extend.c``, ``tdg_mr_rtmr_extend.c``,
``get_tdinfo_and_teeinfohash`` in ``src/common/helpers/helpers.c``.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any, Final

from septum.arch.structures import TdInfo

if TYPE_CHECKING:
    from septum.tdx.state.td import Tdcs

CHUNK_SIZE: Final = 256
"""Bytes of a page that one TDH.MR.EXTEND measures."""
_HEADER: Final = struct.Struct("<16sQ104x")


class Sha384:
    """A SHA-384 calculation that is not finished: a value like a number, equal to others by what it has taken in."""

    __slots__ = ("_state", "size")

    def __init__(self, state: Any = None, size: int = 0) -> None:
        self._state = hashlib.sha384() if state is None else state
        self.size = size

    def update(self, data: bytes) -> Sha384:
        """The calculation with ``data`` taken in too."""
        state = self._state.copy()
        state.update(data)
        return Sha384(state, self.size + len(data))

    def digest(self) -> bytes:
        """The hash (48 bytes) of what has been taken in so far."""
        return bytes(self._state.digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sha384) and self.size == other.size and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return f"Sha384({self.size} bytes, {self.digest().hex()[:16]})"


def page_add_record(gpa: int) -> bytes:
    """What TDH.MEM.PAGE.ADD of the page at ``gpa`` adds to MRTD."""
    return _HEADER.pack(b"MEM.PAGE.ADD", gpa)


def extend_record(gpa: int, chunk: bytes) -> bytes:
    """What TDH.MR.EXTEND of the ``CHUNK_SIZE`` bytes at ``gpa`` adds to MRTD."""
    return _HEADER.pack(b"MR.EXTEND", gpa) + chunk


def extend_rtmr(rtmr: bytes, data: bytes) -> bytes:
    """A run-time measurement register after TDG.MR.RTMR.EXTEND with 48 bytes of data."""
    return hashlib.sha384(rtmr + data).digest()


def td_info(tdcs: Tdcs, ignore: int = 0) -> TdInfo:
    """TDINFO_STRUCT of a TD, for callers that hold its RTMR lock.

    The fields whose bit is set in ``ignore`` (``ignore_tdinfo_bitmap_t``: in the order of the structure, a bit for each
    RTMR) are zero.
    """
    fields: tuple[Any, ...] = (
        tdcs.attributes,
        tdcs.xfam,
        tdcs.mrtd,
        tdcs.mrconfigid,
        tdcs.mrowner,
        tdcs.mrownerconfig,
        *tdcs.rtmr,
        tdcs.servtd_hash,
    )
    kept = [_zero(value) if ignore >> bit & 1 else value for bit, value in enumerate(fields)]
    return TdInfo(*kept)


def _zero(value: Any) -> Any:
    return bytes(len(value)) if isinstance(value, bytes) else 0


def tee_info_hash(tdcs: Tdcs, ignore: int = 0) -> bytes:
    """SHA-384 of TDINFO, for callers that hold the RTMR lock.

    The hash over all fields is kept until the next TDG.MR.RTMR.EXTEND.
    """
    if tdcs.last_teeinfo_hash_valid and not ignore:
        return tdcs.last_teeinfo_hash
    digest = hashlib.sha384(td_info(tdcs, ignore).pack()).digest()
    if not ignore:
        tdcs.last_teeinfo_hash = digest
        tdcs.last_teeinfo_hash_valid = True
    return digest
