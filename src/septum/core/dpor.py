"""Dynamic partial-order reduction: every interleaving that matters, by live runs and without storing states.

For scenarios whose tasks' local states cannot be hashed. The search runs the tasks again and again from the initial
state, each time along another schedule. Two neighbouring steps that touch no cell in common, or only read it, have the
same result in either order, so it is enough to run one schedule of each set that differs by such swaps alone. What a
step reads and writes is not declared but recorded from the tracked cells while it runs.

- A *race* is a pair of conflicting steps of two tasks with nothing ordered between them. For each race in a run, the
  other order is scheduled where the first of the two was chosen (Flanagan and Godefroid, POPL 2005).
- A *wait* reads what its guard reads. While it cannot go on, it races with whoever wrote that last; a wait that a step
  ended needs no other order when nobody else could have ended it.
- *Sleep sets* (Godefroid 1996) keep a choice from being run again until a step has conflicted with it.
- Invariants run as part of each step that changes what they have read, so conflicts see them too.

A run that is longer than the bound on depth is cut, and the verdict is then at most ``bounded``: tasks that may retry
for ever need the state explorer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from septum.core.automata import Invariant, Observer
from septum.core.cells import World
from septum.core.run import deadlock_message
from septum.core.steps import CALLS, SOLO, Program, Violation, ctx
from septum.core.watched import Accesses, AccessRecorder, CellName, WatchedRun


@dataclass(slots=True)
class RunBounds:
    """Where to stop. ``depth`` is the most steps of one run; ``None`` is no bound."""

    executions: int | None = None
    depth: int = 10_000
    seconds: float | None = None


@dataclass(slots=True)
class RunVerdict:
    """What the search found.

    ``verdict``: ``proved`` (every interleaving, up to the order of independent steps), ``bounded``, ``violated``
    (``property``, ``message``, ``schedule`` and, for the lock order, the ``witnesses`` to look at before) or
    ``interrupted``. ``pruned`` of the ``executions`` were given up because nothing new could follow. ``outcomes`` has
    what was observed at each end, with a schedule that leads there.
    """

    verdict: str = "proved"
    executions: int = 0
    pruned: int = 0
    steps: int = 0
    depth: int = 0
    seconds: float = 0.0
    property: str | None = None
    message: str = ""
    schedule: list[int] = field(default_factory=list)
    witnesses: list[list[int]] = field(default_factory=list)
    outcomes: dict[Any, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    """A place in the present schedule: who could go on, who is to be tried, whose turn it was and what that did.

    ``blocked`` has what the guard of each waiting task read, ``sleep`` the steps that need not be tried.
    """

    enabled: tuple[int, ...]
    blocked: dict[int, set[CellName]]
    sleep: dict[int, Accesses]
    chosen: int
    todo: set[int]
    did: Accesses = field(default_factory=Accesses)
    before: int = 0
    """The steps that happen before this one, and itself, as a bit mask."""


class Reducer:
    """Depth-first search over the schedules of ``programs``.

    :param invariants: checked after each step that changes what they read.
    :param observer: called at every end (nobody can go on, and all who must have finished) for ``outcomes``.
    """

    def __init__(
        self,
        world: World,
        programs: Sequence[Program],
        *,
        invariants: Sequence[Invariant] = (),
        observer: Observer | None = None,
        level: int = CALLS,
    ) -> None:
        self.world = world
        self.programs = list(programs)
        self.invariants = list(invariants)
        self.observer = observer
        self.level = level
        self._nodes: list[_Node] = []
        self._edges: dict[tuple[str, str], list[int]] = {}

    def explore(
        self, bounds: RunBounds | None = None, progress: Callable[[int, int, int], None] | None = None
    ) -> RunVerdict:
        """Searches within ``bounds``. ``progress(executions, steps, depth of the last change)`` is called each run."""
        bounds, verdict, start = bounds or RunBounds(), RunVerdict(), time.perf_counter()
        before = ctx.level, ctx.task, ctx.trace, ctx.lock_order, ctx.cycles
        ctx.level, ctx.trace, ctx.lock_order, ctx.cycles = self.level, None, {}, []
        cut = False
        try:
            while True:
                cut |= self._execute(bounds.depth, verdict)
                verdict.executions += 1
                if verdict.verdict == "violated" or not self._next_schedule():
                    break
                if progress:
                    progress(verdict.executions, verdict.steps, len(self._nodes))
                late = bounds.seconds is not None and time.perf_counter() - start > bounds.seconds
                if late or verdict.executions == bounds.executions:
                    cut = True
                    break
        except KeyboardInterrupt:
            verdict.verdict = "interrupted"
        finally:
            self.world.track(None)
            cycles = ctx.cycles
            ctx.level, ctx.task, ctx.trace, ctx.lock_order, ctx.cycles = before
        if verdict.verdict == "proved" and cut:
            verdict.verdict = "bounded"
        if verdict.verdict in ("proved", "bounded") and cycles:
            edges, message = cycles[0]
            *verdict.witnesses, last = (self._edges[edge] for edge in edges)
            self._violated(verdict, Violation("lock order", message), last)
        verdict.seconds = time.perf_counter() - start
        return verdict

    def _execute(self, depth: int, verdict: RunVerdict) -> bool:
        """One run along the present schedule and on to an end. Returns whether it was cut at ``depth``."""
        recording, mark = AccessRecorder(), self.world.mark()
        self.world.track(recording)
        run = WatchedRun(self.programs, self.invariants, recording)
        try:
            return self._drive(run, depth, verdict)
        except Violation as violation:
            self._violated(verdict, violation, run.schedule)
            return False
        finally:
            run.close()
            recording.undo()
            self.world.forget(mark)

    def _drive(self, run: WatchedRun, depth: int, verdict: RunVerdict) -> bool:
        nodes, fresh = self._nodes, len(self._nodes) - 1
        history = _History(len(self.programs))
        run.start()
        while True:
            for edge in ctx.lock_order.keys() - self._edges.keys():
                self._edges[edge] = run.schedule[:]
            place = len(run.schedule)
            enabled, blocked = run.able()
            if place > fresh:
                for task, cells in blocked.items():
                    if place and (nodes[-1].chosen == task or not cells.isdisjoint(nodes[-1].did.writes)):
                        waits = Accesses()
                        waits.reads = cells
                        self._race(task, waits, history)
            if not enabled:
                self._ended(run, blocked, verdict)
                return False
            if place == depth:
                return True
            if place == len(nodes):
                sleep = self._asleep()
                awake = [task for task in enabled if task not in sleep]
                if not awake:
                    verdict.pruned += 1
                    return False
                last = run.schedule[-1] if run.schedule else -1
                chosen = last if last in awake else awake[0]
                nodes.append(_Node(enabled, blocked, sleep, chosen, {chosen}))
            node = nodes[place]
            if node.enabled != enabled:
                raise Violation(
                    "deterministic tasks", f"step {place} of a schedule run again finds others able to go on"
                )
            verdict.steps += 1
            verdict.depth = max(verdict.depth, place + 1)
            node.did = run.step(node.chosen)
            if place >= fresh:
                node.before = self._race(node.chosen, node.did, history) | 1 << place
            history.add(place, node)

    def _asleep(self) -> dict[int, Accesses]:
        """Who sleeps after the last step: those who did before it and have not been woken by a conflict."""
        if not self._nodes:
            return {}
        last = self._nodes[-1]
        return {task: did for task, did in last.sleep.items() if task != last.chosen and not did.conflicts(last.did)}

    def _race(self, task: int, did: Accesses, history: _History) -> int:
        """Schedules the other order of each race with a step; returns the mask of what happens before the step."""
        nodes = self._nodes
        before = nodes[history.last[task]].before if history.last[task] >= 0 else 0
        for place in sorted(history.conflicting(did), reverse=True):
            if before >> place & 1:
                continue
            self._other_order(place, task, did, before, len(history.tasks))
            before |= nodes[place].before
        return before

    def _other_order(self, place: int, task: int, did: Accesses, before: int, now: int) -> None:
        """Has ``task``, or somebody who brings it there, go on where the step at ``place`` was chosen."""
        node = self._nodes[place]
        waited = node.blocked.get(task)
        if (
            waited is not None
            and waited <= node.did.writes
            and not any(self._nodes[later].chosen == task for later in range(place + 1, now))
        ):
            return  # that step ended the wait, and whoever else could have ended it is in a race with the step too
        useful = {self._nodes[later].chosen for later in range(place + 1, now) if before >> later & 1} | {task}
        enabled = set(node.enabled)
        node.todo |= useful & enabled or enabled

    def _next_schedule(self) -> bool:
        """Goes back to the last place where something is left to be tried."""
        nodes = self._nodes
        while nodes:
            node = nodes[-1]
            node.sleep[node.chosen] = node.did
            left = node.todo - node.sleep.keys()
            if left:
                node.chosen = min(left)
                return True
            nodes.pop()
        return False

    def _ended(self, run: WatchedRun, blocked: Iterable[int], verdict: RunVerdict) -> None:
        stuck = [(self.programs[i].task.name, run.pending[i]) for i in sorted(blocked) if not self.programs[i].daemon]
        if stuck:
            raise Violation("no deadlock", deadlock_message(stuck))
        if self.observer is not None:
            level, ctx.level = ctx.level, SOLO
            try:
                verdict.outcomes.setdefault(self.observer(run.results), run.schedule[:])
            finally:
                ctx.level = level

    @staticmethod
    def _violated(verdict: RunVerdict, violation: Violation, schedule: list[int]) -> None:
        verdict.verdict, verdict.property, verdict.message = "violated", violation.property, str(violation)
        verdict.schedule = schedule[:]


class _History:
    """Which steps of a run touched each cell last."""

    def __init__(self, tasks: int) -> None:
        self.tasks: list[int] = []
        self.last = [-1] * tasks
        self._writer: dict[CellName, int] = {}
        self._readers: dict[CellName, list[int]] = {}

    def add(self, place: int, node: _Node) -> None:
        self.tasks.append(node.chosen)
        self.last[node.chosen] = place
        for cell in node.did.reads:
            self._readers.setdefault(cell, []).append(place)
        for cell in node.did.writes:
            self._writer[cell] = place
            self._readers.pop(cell, None)

    def conflicting(self, did: Accesses) -> set[int]:
        """The latest steps in conflict with an access: the last writer of each cell, and who read what it writes."""
        found = {self._writer[cell] for cell in did.reads | did.writes if cell in self._writer}
        return found.union(*(self._readers[cell] for cell in did.writes if cell in self._readers))
