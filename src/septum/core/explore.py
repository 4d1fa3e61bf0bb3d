"""The state explorer's kernel: every reachable state of a scenario, once.

Tasks are explored as automata. A task's coroutine is run only when something new can be learnt: from local state *L*,
in a shared state that differs from all earlier ones in some cell that the step reads. What it read, what it wrote
and the local state that followed are filed in *L*'s decision tree, whose inner nodes are cells and whose leaves are
effects. From then on a transition is a few dictionary look-ups: no coroutine runs, nothing is copied unless the
state is new.

A global state is a vector: one small integer per task (its local state) and one entry per cell that this scenario
has ever written. Cells that nobody has written yet are constants and take no room; when one is written for the first
time the vector grows and the trees are learnt anew. States are identified by an incremental 64-bit hash (xor of one
random number per cell value that differs from the initial one, as chess programs do): with ``n`` states the chance
that any two collide is below ``n * n / 2**65``. ``exact=True`` keeps whole vectors instead.

Coroutines can't be copied. To stand in local state *L* again, the explorer runs a fresh coroutine along the first path
that led to *L*, feeding it the cell values that it read on that path and dropping its writes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from septum.core.automata import BLOCKED, ENDED, Automata, Effect, Invariant, Observer, first_violation
from septum.core.cells import World
from septum.core.steps import CALLS, Program, Violation, ctx


@dataclass(slots=True)
class Bounds:
    """Where to stop. ``None`` is no bound; ``depth`` counts steps from the initial state."""

    states: int | None = None
    depth: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Verdict:
    """What an exploration found.

    ``verdict``: ``proved`` (the whole state space of the scenario was looked at), ``bounded`` (nothing found within the
    bounds), ``violated`` (``property``, ``message`` and the ``schedule`` of a shortest counterexample), or
    ``interrupted``. A cycle in the lock order comes from several runs: ``witnesses`` are those before the last.
    ``outcomes`` has what was observed at each end, with a shortest schedule that leads there.
    """

    verdict: str
    states: int = 0
    transitions: int = 0
    depth: int = 0
    seconds: float = 0.0
    runs: int = 0
    cells: int = 0
    local_states: int = 0
    property: str | None = None
    message: str = ""
    schedule: list[int] = field(default_factory=list)
    witnesses: list[list[int]] = field(default_factory=list)
    outcomes: dict[Any, list[int]] = field(default_factory=dict)
    collision_probability: float = 0.0


@dataclass(slots=True)
class _Found:
    """What the search knows: from each state's name to the state and task it was first reached from, ..."""

    parents: dict[Any, tuple[Any, int] | None]
    transitions: int = 0
    edges: dict[tuple[str, str], tuple[Any, int]] = field(default_factory=dict)
    """... and where each pair of the lock order was first seen."""


#: A state in the frontier: its name (hash, or trimmed vector in exact mode) and its vector.
_State = tuple[Any, list[Any]]
#: States between two looks at the bounds.
_CHUNK = 4096


class Explorer:
    """Breadth-first exploration of all interleavings of ``programs`` over the cells of ``world``.

    :param invariants: checked in every state.
    :param observer: called at every end (nobody can go on, and all who must have finished) for ``Verdict.outcomes``.
    :param stop: a state where it holds is an end, though tasks could go on: the module has halted, say.
    :param exact: identify states by their whole vector instead of its hash.
    :param check_merges: run each step from every history that led to a local state and compare (slow; for tests).
    """

    def __init__(
        self,
        world: World,
        programs: Sequence[Program],
        *,
        invariants: Sequence[Invariant] = (),
        observer: Observer | None = None,
        stop: Callable[[], bool] | None = None,
        level: int = CALLS,
        exact: bool = False,
        check_merges: bool = False,
    ) -> None:
        self.world = world
        self.programs = list(programs)
        self.observer = observer
        self.level = level
        self.exact = exact
        self._automata = Automata(world, programs, check_merges=check_merges)
        self._check = self._automata.function(first_violation(invariants)) if invariants else None
        self._stop = self._automata.function(stop) if stop else None

    def explore(
        self, bounds: Bounds | None = None, progress: Callable[[int, int, int, int], None] | None = None
    ) -> Verdict:
        """Looks at every state within ``bounds``.

        ``progress(states, transitions, depth, frontier)`` is called after each level.
        """
        bounds = bounds or Bounds()
        start = time.perf_counter()
        verdict = Verdict("proved")
        before = ctx.level, ctx.task, ctx.trace, ctx.cycles
        ctx.level, ctx.trace, ctx.lock_order, ctx.cycles = self.level, None, {}, []
        collecting = gc.isenabled()
        gc.disable()  # states are never garbage, and walking millions of them costs half of the time
        try:
            self._search(bounds, verdict, start, progress)
        finally:
            self._automata.to_initial()
            self.world.track(None)
            ctx.level, ctx.task, ctx.trace, ctx.cycles = before
            if collecting:
                gc.enable()
        verdict.seconds = time.perf_counter() - start
        verdict.runs = self._automata.runs
        verdict.cells = len(self._automata.initial) - len(self.programs)
        verdict.local_states = len(self._automata.locals)
        if not self.exact:
            verdict.collision_probability = verdict.states**2 / 2**65
        return verdict

    def _search(
        self,
        bounds: Bounds,
        verdict: Verdict,
        start: float,
        progress: Callable[[int, int, int, int], None] | None,
    ) -> None:
        for task in range(len(self.programs)):
            self._automata.start(task)
        root: Any = tuple(self._automata.initial) if self.exact else 0
        found = _Found({root: None})
        level = [(root, self._automata.initial[:])]
        if self._check and (violation := self._check(self._automata.initial)):
            self._violated(verdict, violation, found, root, None)
        try:
            while level and verdict.verdict == "proved":
                if bounds.depth is not None and verdict.depth >= bounds.depth:
                    verdict.verdict = "bounded"
                    break
                level = self._expand_level(level, bounds, verdict, start, found)
                verdict.depth += verdict.verdict == "proved"
                if progress:
                    progress(len(found.parents), found.transitions, verdict.depth, len(level))
        except KeyboardInterrupt:
            verdict.verdict = "interrupted"
        verdict.states, verdict.transitions = len(found.parents), found.transitions
        if verdict.verdict in ("proved", "bounded") and ctx.cycles:
            cycle, message = ctx.cycles[0]
            *others, last = (found.edges[edge] for edge in cycle)
            self._violated(verdict, Violation("lock order", message), found, *last)
            verdict.witnesses = [self._schedule(found, *other) for other in others]

    def _expand_level(
        self, level: list[_State], bounds: Bounds, verdict: Verdict, start: float, found: _Found
    ) -> list[_State]:
        """The states one step further. Ends early, with the verdict set, at a violation or a bound."""
        following: list[_State] = []
        for begin in range(0, len(level), _CHUNK):
            full = bounds.states is not None and len(found.parents) >= bounds.states
            if full or (bounds.seconds is not None and time.perf_counter() - start > bounds.seconds):
                verdict.verdict = "bounded"
                break
            self._expand(level[begin : begin + _CHUNK], following, verdict, found)
            if verdict.verdict == "violated":
                break
        return following

    def _expand(self, states: list[_State], following: list[_State], verdict: Verdict, found: _Found) -> None:
        """Adds the new successors of ``states`` to ``following``. The inner loop of everything."""
        trees, initial, exact, parents = self._automata.trees, self._automata.initial, self.exact, found.parents
        tasks, check, stop = range(len(self.programs)), self._check, self._stop
        transitions = 0
        for name, vector in states:
            if len(vector) < len(initial):
                vector.extend(initial[len(vector) :])
            moves = blocked = 0
            for task in tasks:
                node = trees[vector[task]]
                while node.__class__ is list:
                    node = node[1].get(vector[node[0]])
                if node.__class__ is not Effect:
                    if node is None:
                        node = self._automata.learn(task, vector)
                        for edge in ctx.lock_order.keys() - found.edges.keys():
                            found.edges[edge] = (name, task)
                    if node is ENDED:
                        continue
                    if node is BLOCKED:
                        blocked += 1
                        continue
                moves += 1
                transitions += 1
                if node.violation is not None:
                    found.transitions += transitions
                    self._violated(verdict, node.violation, found, name, task)
                    return
                if exact:
                    after = vector[:]
                    for place, value in node.writes:
                        after[place] = value
                    successor: Any = self._automata.trimmed(after)
                else:
                    successor = name ^ node.hash
                if successor in parents:
                    continue
                parents[successor] = (name, task)
                if not exact:
                    after = vector[:]
                    for place, value in node.writes:
                        after[place] = value
                if check and (violation := check(after)):
                    found.transitions += transitions
                    self._violated(verdict, violation, found, successor, None)
                    return
                if stop and stop(after):
                    self._end(successor, after, False, verdict, found)
                    continue
                following.append((successor, after))
            if not moves:
                self._end(name, vector, blocked > 0, verdict, found)
                if verdict.verdict == "violated":
                    break
        found.transitions += transitions

    def _end(self, name: Any, vector: list[Any], blocked: bool, verdict: Verdict, found: _Found) -> None:
        """A state in which nobody can go on: a deadlock, or an end to observe."""
        if blocked and (deadlock := self._automata.deadlock(vector)):
            self._violated(verdict, deadlock, found, name, None)
        elif self.observer is not None:
            outcome = self._automata.observe(vector, self.observer)
            if outcome not in verdict.outcomes:
                verdict.outcomes[outcome] = self._schedule(found, name, None)

    def _violated(self, verdict: Verdict, violation: Violation, found: _Found, name: Any, task: int | None) -> None:
        verdict.verdict = "violated"
        verdict.property = violation.property
        verdict.message = str(violation)
        verdict.schedule = self._schedule(found, name, task)

    @staticmethod
    def _schedule(found: _Found, name: Any, task: int | None) -> list[int]:
        """The choices that lead to a state, and then ``task`` if one is given."""
        schedule = [] if task is None else [task]
        while (link := found.parents[name]) is not None:
            name, chosen = link
            schedule.append(chosen)
        return schedule[::-1]
