"""A run as a text sequence diagram: one lane per CPU, plain ASCII, at most 100 columns, ready to paste into mail."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from septum.core.trace import Event

WIDTH = 100
_MARGIN = 7  # step number and two blanks
_NARROWEST = 14
_BEFORE_LOCKS = ("call", "enter", "tdcall", "exit")
_END_OF_LOCKS = ("seamcall", "enter", "exit")
"""Kinds of events between which a call into the module takes locks."""


def sequence_diagram(events: Sequence[Event], *, width: int = WIDTH) -> str:
    """The events of a run, top to bottom in time, each in the lane of its CPU, with the step number on the left.

    Lanes are as wide as fit; with more CPUs than fit side by side, each line names its CPU instead.
    """
    events = folded(events)
    cpus = sorted({event.cpu for event in events})
    if not cpus:
        return "(nothing happened)\n"
    lane = (width - _MARGIN) // len(cpus)
    if lane < _NARROWEST:
        return _list(events, width)
    names = {cpu: ", ".join(dict.fromkeys(e.task for e in events if e.cpu == cpu)) for cpu in cpus}
    lines = [_row({cpu: f"CPU {cpu}" for cpu in cpus}, cpus, lane), *_wrapped(names, cpus, lane)]
    lines.append(_row(dict.fromkeys(cpus, "-" * (lane - 2)), cpus, lane))
    last = None
    for event in events:
        number = f"{event.step:>5}" if event.step != last else ""
        last = event.step
        for line in _wrapped({event.cpu: event.text}, cpus, lane):
            lines.append(f"{number:<5}{line[5:]}")
            number = ""
    return _ascii("\n".join(line.rstrip() for line in lines) + "\n")


def folded(events: Sequence[Event]) -> list[Event]:
    """The events without the locks that a call into the module took where nobody else did anything meanwhile.

    A call that went through at one go is one line, its answer; one that found a lock busy, was interrupted by another
    CPU, or is still under way keeps all of its lines.
    """
    kept: list[Event] = []
    for event in events:
        if event.kind in _END_OF_LOCKS:
            start = len(kept)
            while start and kept[start - 1].task == event.task and _is_plain(kept[start - 1]):
                start -= 1
            if start and kept[start - 1].task == event.task and kept[start - 1].kind in _BEFORE_LOCKS:
                whole = kept[start - 1].kind == "call" and event.kind == "seamcall"
                del kept[start - whole :]
        kept.append(event)
    return kept


def _is_plain(event: Event) -> bool:
    """A lock that was taken or dropped, or an entry that was written."""
    return event.kind in ("lock", "write") and not event.text.startswith("!")


def _row(cells: dict[int, str], cpus: Sequence[int], lane: int) -> str:
    return " " * _MARGIN + "".join(f"{cells.get(cpu, ''):<{lane}}" for cpu in cpus)


def _wrapped(cells: dict[int, str], cpus: Sequence[int], lane: int) -> list[str]:
    """Rows for cells whose text is broken to fit the lane; continuation lines are indented."""
    parts = {cpu: textwrap.wrap(text, lane - 2, subsequent_indent="    ") or [""] for cpu, text in cells.items()}
    height = max(map(len, parts.values()))
    return [_row({c: p[i] for c, p in parts.items() if i < len(p)}, cpus, lane) for i in range(height)]


def _list(events: Sequence[Event], width: int) -> str:
    lines: list[str] = []
    for event in events:
        head = f"{event.step:>5}  CPU {event.cpu:<3} "
        lines += textwrap.wrap(event.text, width, initial_indent=head, subsequent_indent=" " * (len(head) + 2))
    return _ascii("\n".join(lines) + "\n")


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")
