"""Who holds which lock when, read off the events of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from septum.core.trace import Event

#: Kinds of events that tell of locks; their text begins with + (taken), - (let go), ^ (made exclusive) or ! (busy).
LOCK_KINDS = ("lock", "klock")


@dataclass(frozen=True, slots=True)
class Span:
    """A lock held by a task: from event number ``first`` to event number ``last`` (None: to the end of the run)."""

    lock: str
    task: str
    cpu: int
    first: int
    last: int | None


def held_spans(events: Sequence[Event]) -> Iterator[Span]:
    """Every period in which a task holds a lock, in the order in which they end."""
    held: dict[tuple[str, str], list[int]] = {}
    for number, event in enumerate(events):
        sign, lock = event.text[:1], event.text[1:]
        if event.kind not in LOCK_KINDS:
            continue
        if sign == "+":
            held.setdefault((event.task, lock), []).append(number)
        elif sign == "-" and held.get((event.task, lock)):
            yield Span(lock, event.task, event.cpu, held[event.task, lock].pop(), number)
    for (task, lock), starts in held.items():
        for start in starts:
            yield Span(lock, task, events[start].cpu, start, None)
