"""The trace of a run: the schedule, and, when asked for, the events along it.

The schedule is the list of tasks in the order in which they took steps. With the scenario and its parameters it is the
whole run: everything else is recomputed from it. Events are what people read: SEAMCALLs, locks, exits.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from septum.arch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth showing: at which step, on which CPU, by which task; ``data`` is for machines."""

    step: int
    cpu: int
    task: str
    kind: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)


class Trace:
    """Schedule and events of one run. Two bytes a step; events only while ``keep_events``."""

    def __init__(self, *, keep_events: bool = True) -> None:
        self.schedule: array[int] = array("H")
        self.events: list[Event] = []
        self.keep_events = keep_events

    def add(self, kind: str, text: str, data: dict[str, Any]) -> None:
        """Appends an event of the task that runs now."""
        if self.keep_events:
            from septum.core.steps import current_task  # noqa: PLC0415 -- steps imports this module

            task = current_task()
            self.events.append(Event(len(self.schedule), task.cpu, task.name, kind, text, data))


def pack_schedule(schedule: array[int] | list[int]) -> str:
    """A schedule as short text: ``0*3 1 0*2`` means task 0 three times, task 1 once, task 0 twice."""
    runs = ((task, len(list(group))) for task, group in groupby(schedule))
    return " ".join(f"{task}*{n}" if n > 1 else str(task) for task, n in runs)


def unpack_schedule(text: str, *, tasks: int, limit: int = 10_000_000) -> list[int]:
    """The inverse of :func:`pack_schedule`.

    :raises UsageError: for text that is no schedule, names a task that does not exist, or exceeds ``limit`` steps.
    """
    schedule: list[int] = []
    for place, word in enumerate(text.split(), 1):
        task, star, count = word.partition("*")
        if not (task.isdecimal() and (not star or count.isdecimal())) or len(word) > 20:
            raise UsageError(f"schedule: entry {place} is {word!r}; write TASK or TASK*TIMES, as in 0*3 1 0")
        if int(task) >= tasks:
            raise UsageError(f"schedule: entry {place} names task {task}, but the scenario has tasks 0 to {tasks - 1}")
        if len(schedule) + int(count or 1) > limit:
            raise UsageError(f"schedule: more than {limit} steps at entry {place}; cut it into shorter runs")
        schedule += [int(task)] * int(count or 1)
    return schedule
