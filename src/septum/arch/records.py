"""Little-endian records: dataclasses that know their place and size in memory.

A record is a frozen dataclass whose fields are declared with :func:`u8` ... :func:`u64`, :func:`raw`, :func:`nested` or
:func:`array`; the order of the fields is their order in memory and nothing is padded.
"""

import struct
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self, TypeVar

from septum.arch.errors import UsageError


def u8(default: int = 0) -> int:
    """A field of one byte."""
    return field(default=default, metadata={"format": "<B"})


def u16(default: int = 0) -> int:
    """A field of two bytes."""
    return field(default=default, metadata={"format": "<H"})


def u32(default: int = 0) -> int:
    """A field of four bytes."""
    return field(default=default, metadata={"format": "<I"})


def u64(default: int = 0) -> int:
    """A field of eight bytes."""
    return field(default=default, metadata={"format": "<Q"})


def raw(size: int) -> bytes:
    """A field of ``size`` bytes, zero by default."""
    return field(default=bytes(size), metadata={"format": f"{size}s"})


class _Place(NamedTuple):
    """Where a field is, and how to read it: a struct format, one record (repeat 0) or an array of records."""

    offset: int
    size: int
    form: "str | type[Record]"
    repeat: int


@dataclass(frozen=True, slots=True)
class Record:
    """Base of all records."""

    def pack(self) -> bytes:
        """The record's bytes.

        Raises UsageError when a number does not fit its field or bytes have the wrong length.
        """
        return b"".join(_pack_field(self, name, place) for name, place in _layout(type(self)).items())

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        """Read a record at an offset of ``data``.

        Raises UsageError when fewer bytes are left than the record has.
        """
        if offset < 0 or len(data) - offset < cls.size():
            left = max(len(data) - offset, 0)
            raise UsageError(f"{cls.__name__} needs {cls.size()} bytes at offset {offset}, only {left} are there")
        values: dict[str, Any] = {}
        for name, place in _layout(cls).items():
            at = offset + place.offset
            if isinstance(place.form, str):
                (values[name],) = struct.unpack_from(place.form, data, at)
            elif place.repeat:
                step = place.form.size()
                values[name] = tuple(place.form.unpack(data, at + step * i) for i in range(place.repeat))
            else:
                values[name] = place.form.unpack(data, at)
        return cls(**values)

    @classmethod
    def size(cls) -> int:
        """Bytes that the record takes."""
        return sum(place.size for place in _layout(cls).values())

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Where a field begins, in bytes."""
        return _layout(cls)[name].offset

    def reserved_clear(self) -> bool:
        """Whether all fields that the specification reserves, named ``reserved...``, are zero."""
        values = (getattr(self, name) for name in _layout(type(self)) if name.startswith("reserved"))
        return not any(any(value) for value in values if isinstance(value, bytes))


R = TypeVar("R", bound=Record)


def nested(item: type[R]) -> R:
    """A field that is itself a record."""
    return field(default=item(), metadata={"format": item})


def array(item: type[R], count: int) -> tuple[R, ...]:
    """A field of ``count`` records of one type."""
    return field(default=tuple(item() for _ in range(count)), metadata={"format": item, "count": count})


_LAYOUTS: dict[type[Record], dict[str, _Place]] = {}


def _layout(record: type[Record]) -> dict[str, _Place]:
    """The place of every field, in the order of memory."""
    if record not in _LAYOUTS:
        layout: dict[str, _Place] = {}
        offset = 0
        for item in fields(record):
            form, count = item.metadata["format"], item.metadata.get("count", 0)
            size = struct.calcsize(form) if isinstance(form, str) else form.size() * max(count, 1)
            layout[item.name] = _Place(offset, size, form, count)
            offset += size
        _LAYOUTS[record] = layout
    return _LAYOUTS[record]


def _pack_field(record: Record, name: str, place: _Place) -> bytes:
    value = getattr(record, name)
    where = f"{type(record).__name__}.{name}"
    if isinstance(place.form, str):
        if isinstance(value, bytes) and len(value) != place.size:
            raise UsageError(f"{where} must have {place.size} bytes, not {len(value)}")
        try:
            return struct.pack(place.form, value)
        except struct.error:
            raise UsageError(f"{where} = {value!r} does not fit in {place.size} bytes") from None
    if not place.repeat:
        return bytes(value.pack())
    if len(value) != place.repeat:
        raise UsageError(f"{where} must have {place.repeat} entries, not {len(value)}")
    return b"".join(item.pack() for item in value)
