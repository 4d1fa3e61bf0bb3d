"""A run as a Perfetto trace: a track per CPU with its events, a track per lock with its holders.

The file is Perfetto's own protobuf format (``TrackEvent``), which ui.perfetto.dev opens. Time is the number of the
event in microseconds: a run without a clock has order, not duration.

Field numbers: ``protos/perfetto/trace/{trace_packet,track_event/track_event,track_event/track_descriptor}.proto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from septum.core.trace import Event
from septum.report.holders import held_spans

_TIMESTAMP, _SEQUENCE, _TRACK_EVENT, _TRACK_DESCRIPTOR = 8, 10, 11, 60
_EVENT_TYPE, _EVENT_TRACK, _EVENT_CATEGORY, _EVENT_NAME = 9, 11, 22, 23
_TRACK_UUID, _TRACK_NAME, _TRACK_PARENT = 1, 2, 5
_BEGIN, _END, _INSTANT = 1, 2, 3
_TICK: Final = 1000  # nanoseconds between two events


def perfetto_trace(events: Sequence[Event], title: str) -> bytes:
    """The content of a ``.pftrace`` file."""
    packets = [*_tracks(events, title), *_cpu_events(events), *_lock_slices(events)]
    return b"".join(_message(1, packet) for packet in packets)


def _tracks(events: Sequence[Event], title: str) -> Iterator[bytes]:
    yield _descriptor("run", title)
    for cpu in sorted({event.cpu for event in events}):
        yield _descriptor(f"cpu{cpu}", f"CPU {cpu}", "run")
    yield _descriptor("locks", "locks", "run")
    for lock in sorted({span.lock for span in held_spans(events)}):
        yield _descriptor(f"lock {lock}", lock, "locks")


def _cpu_events(events: Sequence[Event]) -> Iterator[bytes]:
    for number, event in enumerate(events):
        yield _event(number * _TICK, _INSTANT, f"cpu{event.cpu}", event.text, event.kind)


def _lock_slices(events: Sequence[Event]) -> Iterator[bytes]:
    edges = []
    for span in held_spans(events):
        last = len(events) if span.last is None else span.last
        edges.append((span.first, 1, _event(span.first * _TICK, _BEGIN, f"lock {span.lock}", span.task, "held")))
        edges.append((last, 0, _event(last * _TICK, _END, f"lock {span.lock}", "", "held")))
    yield from (packet for _when, _order, packet in sorted(edges))


def _descriptor(track: str, name: str, parent: str | None = None) -> bytes:
    fields = _varint(_TRACK_UUID, _uuid(track)) + _text(_TRACK_NAME, name)
    if parent is not None:
        fields += _varint(_TRACK_PARENT, _uuid(parent))
    return _varint(_SEQUENCE, 1) + _message(_TRACK_DESCRIPTOR, fields)


def _event(when: int, kind: int, track: str, name: str, category: str) -> bytes:
    fields = _varint(_EVENT_TYPE, kind) + _varint(_EVENT_TRACK, _uuid(track)) + _text(_EVENT_CATEGORY, category)
    if name:
        fields += _text(_EVENT_NAME, name)
    return _varint(_TIMESTAMP, when) + _varint(_SEQUENCE, 1) + _message(_TRACK_EVENT, fields)


def _uuid(track: str) -> int:
    """A stable number for a track's key (FNV-1a, 63 bits)."""
    number = 0xCBF29CE484222325
    for byte in track.encode():
        number = (number ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return number >> 1


def _digits(value: int) -> Iterable[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _varint(field: int, value: int) -> bytes:
    return bytes((*_digits(field << 3), *_digits(value)))


def _message(field: int, content: bytes) -> bytes:
    return bytes((*_digits(field << 3 | 2), *_digits(len(content)))) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
