"""Live runs whose steps are watched: what each one reads and writes, cell by cell."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from septum.core.automata import Invariant
from septum.core.cells import poke
from septum.core.steps import Program, Step, ctx

#: A cell by names: objects made during a run are others in the next one, their names are not.
CellName = tuple[str, Any]


class Accesses:
    """What one step reads and writes."""

    __slots__ = ("reads", "writes")

    def __init__(self) -> None:
        self.reads: set[CellName] = set()
        self.writes: set[CellName] = set()

    def conflicts(self, other: Accesses) -> bool:
        return not (
            self.writes.isdisjoint(other.writes)
            and self.writes.isdisjoint(other.reads)
            and self.reads.isdisjoint(other.writes)
        )


class AccessRecorder:
    """The recorder of a run: notes accesses for whoever is at work, and what writes replace."""

    def __init__(self) -> None:
        self.at = Accesses()
        self.log: list[tuple[Any, Any, Any]] = []

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        self.at.reads.add((owner.name, key))
        return value

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        self.at.writes.add((owner.name, key))
        self.log.append((owner, key, old))
        return True

    def undo(self) -> None:
        while self.log:
            poke(*self.log.pop())


class WatchedRun:
    """The tasks of one execution."""

    def __init__(self, programs: Sequence[Program], invariants: Sequence[Invariant], recording: AccessRecorder) -> None:
        self.programs = programs
        self.invariants = invariants
        self.recording = recording
        self.bodies: list[Coroutine[Step, None, Any] | None] = [program.body() for program in programs]
        self.pending: list[Step | None] = [None] * len(programs)
        self.results: list[Any] = [None] * len(programs)
        self.schedule: list[int] = []
        self._seen: set[CellName] = set()  # what the invariants have read
        self._guards: dict[int, set[CellName]] = {}  # what the guards of those that wait have read, while it holds

    def start(self) -> None:
        """Everyone goes to its first step, before anyone may act."""
        for task in range(len(self.programs)):
            self._advance(task)
        self._check()

    def step(self, task: int) -> Accesses:
        """One step, with its guard and with the invariants if it changes what they read."""
        self.schedule.append(task)
        did = self.recording.at = Accesses()
        pending = self.pending[task]
        if pending is not None and pending.guard is not None:
            pending.guard()
        self._advance(task)
        if not did.writes.isdisjoint(self._seen):
            self._check()
        self._guards = {i: cells for i, cells in self._guards.items() if cells.isdisjoint(did.writes)}
        return did

    def able(self) -> tuple[tuple[int, ...], dict[int, set[CellName]]]:
        """Who can go on, and what the guards of the others read."""
        enabled = []
        for task, body in enumerate(self.bodies):
            if body is None or task in self._guards:
                continue
            step = self.pending[task]
            if step is None or step.guard is None:
                enabled.append(task)
                continue
            looked = self.recording.at = Accesses()
            if step.guard():
                enabled.append(task)
            else:
                self._guards[task] = looked.reads
        return tuple(enabled), dict(self._guards)

    def close(self) -> None:
        for body in self.bodies:
            if body is not None:
                body.close()

    def _advance(self, task: int) -> None:
        body = self.bodies[task]
        assert body is not None
        ctx.task = self.programs[task].task
        try:
            self.pending[task] = body.send(None)
        except StopIteration as end:
            self.bodies[task] = None
            self.results[task] = end.value

    def _check(self) -> None:
        """Runs the invariants. The step reads what they read now, and what they had read: that could have changed."""
        if self.invariants:
            did = self.recording.at
            reads, did.reads = did.reads, set()
            for invariant in self.invariants:
                invariant()
            self._seen, did.reads = did.reads, reads | did.reads | self._seen
