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
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from septum.core.cells import World, poke
from septum.core.locality import freeze, local_state
from septum.core.run import deadlock_message
from septum.core.steps import CALLS, Program, Step, Violation, ctx, require

#: A property of all states: reads shared cells and raises :class:`Violation` where it does not hold.
Invariant = Callable[[], None]

#: What is worth telling of an end: from the tasks' results to any hashable value. Reads shared cells.
Observer = Callable[[list[Any]], Any]


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


class _Local:
    """A local state of one task: how to get there again, and what has been learnt about the step that follows."""

    __slots__ = ("log", "number", "parent", "pending", "result", "spare", "task", "tree")

    def __init__(
        self, number: int, task: int, parent: _Local | None, log: tuple[Any, ...], pending: Step | None
    ) -> None:
        self.number = number
        self.task = task
        self.parent = parent
        self.log = log
        self.pending = pending
        self.spare: Coroutine[Step, None, Any] | None = None
        self.tree: Any = None
        self.result: Any = None


class _Effect:
    """A leaf of a decision tree: what a step does."""

    __slots__ = ("hash", "violation", "writes")

    def __init__(self, change: int, writes: tuple[tuple[int, Any], ...], violation: Violation | None) -> None:
        self.hash = change
        self.writes = writes
        self.violation = violation


#: Leaves for a task that has ended and for a wait whose guard does not hold.
_ENDED, _BLOCKED = "ended", "blocked"


class _Recording:
    """Records a step: every read in order, and the first value read and the last value written of each cell."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.first: dict[tuple[Any, Any], Any] = {}
        self.written: dict[tuple[Any, Any], Any] = {}
        self.before: dict[tuple[Any, Any], Any] = {}

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        cell = (owner, key)
        if cell not in self.written and cell not in self.first:
            self.first[cell] = value
        self.log.append(value)
        return value

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        cell = (owner, key)
        self.before.setdefault(cell, old)
        self.written[cell] = new
        return True

    def undo(self) -> None:
        for (owner, key), value in self.before.items():
            poke(owner, key, value)


class _Feeding:
    """Feeds a step again with what it read the first time; its writes are dropped."""

    def __init__(self) -> None:
        self.log: tuple[Any, ...] = ()
        self.place = 0

    def load(self, log: tuple[Any, ...]) -> None:
        self.log = log
        self.place = 0

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        require(self.place < len(self.log), "deterministic tasks", f"a replayed step read {owner} {key!r} unexpectedly")
        self.place += 1
        return self.log[self.place - 1]

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        return False


class Explorer:
    """Breadth-first exploration of all interleavings of ``programs`` over the cells of ``world``.

    :param invariants: checked in every state.
    :param observer: called at every end (nobody can go on, and all who must have finished) for ``Verdict.outcomes``.
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
        level: int = CALLS,
        exact: bool = False,
        check_merges: bool = False,
    ) -> None:
        self.world = world
        self.programs = list(programs)
        self.invariants = list(invariants)
        self.observer = observer
        self.level = level
        self.exact = exact
        self.check_merges = check_merges
        self.runs = 0
        self._keys = random.Random(0x5E9)
        self._cells: dict[tuple[Any, Any], int] = {}  # cell -> place in the vector
        self._initial: list[Any] = []  # initial value per place
        self._zobrist: list[dict[Any, int]] = []  # value -> random number, per place
        self._locals: list[_Local] = []
        self._by_key: dict[Any, _Local] = {}
        self._others: dict[int, list[tuple[_Local, tuple[Any, ...]]]] = {}
        self._trees: list[Any] = []
        self._ended: list[int] = []
        self._invariant_tree: Any = None
        self._prelude: list[_Recording] = []

    # -- the search ------------------------------------------------------------------------------------------------

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
        except KeyboardInterrupt:
            verdict.verdict = "interrupted"
        finally:
            self._to_initial()
            self.world.track(None)
            ctx.level, ctx.task, ctx.trace, ctx.cycles = before
            if collecting:
                gc.enable()
        verdict.seconds = time.perf_counter() - start
        verdict.runs = self.runs
        verdict.cells = len(self._initial) - len(self.programs)
        verdict.local_states = len(self._locals)
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
        tasks = range(len(self.programs))
        for task in tasks:
            self._start(task)
        trees, exact, initial = self._trees, self.exact, self._initial
        root: Any = tuple(initial) if exact else 0
        parents: dict[Any, tuple[Any, int] | None] = {root: None}
        level: list[tuple[Any, list[Any]]] = [(root, initial[:])]
        transitions = depth = 0
        edges: dict[tuple[str, str], tuple[Any, int]] = {}
        try:
            self._check_state(initial[:])
        except Violation as violation:
            self._violated(verdict, violation, parents, root, None)
        while level and verdict.verdict == "proved":
            if bounds.depth is not None and depth >= bounds.depth:
                verdict.verdict = "bounded"
                break
            following: list[tuple[Any, list[Any]]] = []
            for name, vector in level:
                if len(vector) < len(initial):
                    vector.extend(initial[len(vector) :])
                moves = blocked = 0
                for task in tasks:
                    node = trees[vector[task]]
                    while node.__class__ is list:
                        node = node[1].get(vector[node[0]])
                    if node.__class__ is not _Effect:
                        if node is None:
                            node = self._learn(task, vector)
                            for edge in ctx.lock_order.keys() - edges.keys():
                                edges[edge] = (name, task)
                        if node is _ENDED:
                            continue
                        if node is _BLOCKED:
                            blocked += 1
                            continue
                    moves += 1
                    transitions += 1
                    if exact:
                        after = vector[:]
                        for place, value in node.writes:
                            after[place] = value
                        successor: Any = self._trimmed(after)
                    else:
                        successor = name ^ node.hash
                    if node.violation is not None:
                        self._violated(verdict, node.violation, parents, name, task)
                        break
                    if successor in parents:
                        continue
                    parents[successor] = (name, task)
                    if not exact:
                        after = vector[:]
                        for place, value in node.writes:
                            after[place] = value
                    if self.invariants:
                        try:
                            self._check_state(after)
                        except Violation as violation:
                            self._violated(verdict, violation, parents, successor, None)
                            break
                    following.append((successor, after))
                if not moves:
                    if blocked and (deadlock := self._deadlock(vector)):
                        self._violated(verdict, deadlock, parents, name, None)
                    elif self.observer is not None:
                        outcome = self._observe(vector)
                        if outcome not in verdict.outcomes:
                            verdict.outcomes[outcome] = self._schedule(parents, name, None)
                if verdict.verdict == "violated":
                    break
            else:
                depth += 1
                level = following
                if progress:
                    progress(len(parents), transitions, depth, len(level))
                if bounds.states is not None and len(parents) >= bounds.states and level:
                    verdict.verdict = "bounded"
                if bounds.seconds is not None and time.perf_counter() - start > bounds.seconds and level:
                    verdict.verdict = "bounded"
                continue
            break
        verdict.states, verdict.transitions, verdict.depth = len(parents), transitions, depth
        if verdict.verdict in ("proved", "bounded") and ctx.cycles:
            cycle, message = ctx.cycles[0]
            *others, last = (edges[edge] for edge in cycle)
            self._violated(verdict, Violation("lock order", message), parents, *last)
            verdict.witnesses = [self._schedule(parents, *other) for other in others]

    def _violated(
        self, verdict: Verdict, violation: Violation, parents: dict[Any, Any], name: Any, task: int | None
    ) -> None:
        verdict.verdict = "violated"
        verdict.property = violation.property
        verdict.message = str(violation)
        verdict.schedule = self._schedule(parents, name, task)

    @staticmethod
    def _schedule(parents: dict[Any, Any], name: Any, task: int | None) -> list[int]:
        """The choices that lead to a state, and then ``task`` if one is given."""
        schedule = [] if task is None else [task]
        while (link := parents[name]) is not None:
            name, chosen = link
            schedule.append(chosen)
        return schedule[::-1]

    # -- states ----------------------------------------------------------------------------------------------------

    def _trimmed(self, vector: list[Any]) -> tuple[Any, ...]:
        """The vector without trailing initial values, so that it does not depend on when the vector grew."""
        end = len(vector)
        while end and vector[end - 1] == self._initial[end - 1]:
            end -= 1
        return tuple(vector[:end])

    def _random_of(self, place: int, value: Any) -> int:
        numbers = self._zobrist[place]
        number = numbers.get(value)
        if number is None:
            number = numbers[value] = self._keys.getrandbits(64)
        return number

    def _load(self, vector: Sequence[Any]) -> None:
        """Sets the world's cells to a state."""
        for (owner, key), place in self._cells.items():
            poke(owner, key, vector[place] if place < len(vector) else self._initial[place])

    def _to_initial(self) -> None:
        self._load(self._initial)
        for recording in reversed(self._prelude):
            recording.undo()

    def _place_of(self, cell: tuple[Any, Any], initial: Any) -> int:
        """The place of a written cell; a new one makes the vector grow and all trees be learnt anew."""
        place = self._cells.get(cell)
        if place is None:
            place = self._cells[cell] = len(self._initial)
            self._initial.append(initial)
            self._zobrist.append({initial: 0})
            self._invariant_tree = None
            for number, local in enumerate(self._locals):
                if self._trees[number] is not _ENDED:
                    local.tree = self._trees[number] = None
        return place

    def _file(self, tree: Any, reads: dict[tuple[Any, Any], Any], leaf: Any) -> Any:
        """Adds a leaf under the values read. Cells that nobody writes are constants and make no node."""
        path = [(self._cells[cell], value) for cell, value in reads.items() if cell in self._cells]
        if not path:
            return leaf
        root: list[Any] = tree if tree is not None else [path[0][0], {}]
        node = root
        for (place, value), following in zip(path, [*path[1:], None], strict=True):
            require(node[0] == place, "deterministic tasks", "a step read other cells after reading equal values")
            if following is None:
                node[1][value] = leaf
            else:
                node = node[1].setdefault(value, [following[0], {}])
        return root

    def _start(self, task: int) -> None:
        """Runs a task to its first step, as every scheduler does before anyone may act."""
        body = self.programs[task].body()
        recording = _Recording()
        self.world.track(recording)
        ctx.task = self.programs[task].task
        result: tuple[Any, ...] = ()
        returned: Any = None
        step: Step | None = None
        try:
            step = body.send(None)
        except StopIteration as end:
            returned = end.value
            result = ("ended", freeze(returned))
        self._prelude.append(recording)
        local = self._new_local(task, None, tuple(recording.log), step, (task, result or local_state(body)))
        local.spare = body
        local.result = returned
        if result:
            local.tree = self._trees[local.number] = _ENDED
        self._initial.append(local.number)
        self._zobrist.append({local.number: 0})

    # -- learning --------------------------------------------------------------------------------------------------

    def _learn(self, task: int, vector: list[Any]) -> Any:
        """Runs the step of ``task`` in the state ``vector`` and files what it does."""
        local = self._locals[vector[task]]
        leaf = self._run_step(local, vector)
        if self.check_merges:
            self._check_other_histories(local, vector, leaf)
        # Growing the vector emptied the trees: the leaf is filed under what is known now.
        if len(vector) < len(self._initial):
            vector += self._initial[len(vector) :]
        return leaf

    def _run_step(self, local: _Local, vector: list[Any]) -> Any:
        body = self._coroutine(local)
        recording = _Recording()
        self._load(vector)
        self.world.track(recording)
        program = self.programs[local.task]
        ctx.task = program.task
        violation: Violation | None = None
        step: Step | None = None
        result: tuple[Any, ...] = ()
        returned: Any = None
        self.runs += 1
        if local.pending is not None and local.pending.guard is not None and not local.pending.guard():
            local.spare = body
            local.tree = self._trees[local.number] = self._file(local.tree, recording.first, _BLOCKED)
            return _BLOCKED
        recording.log.clear()  # the log is what the step itself reads; nobody asks the guard in a replay
        try:
            step = body.send(None)
        except StopIteration as end:
            returned = end.value
            result = ("ended", freeze(returned))
        except Violation as found:
            violation = found
        # Places first: growing the vector empties the trees.
        places = {
            cell: self._place_of(cell, recording.before[cell])
            for cell, value in recording.written.items()
            if cell in self._cells or value != recording.before[cell]
        }
        writes: list[tuple[int, Any]] = []
        change = 0
        for cell, place in places.items():
            old, new = recording.before[cell], recording.written[cell]
            if old != new:
                change ^= self._random_of(place, old) ^ self._random_of(place, new)
                writes.append((place, new))
        if violation is None:
            after = self._following(local, body, step, tuple(recording.log), result)
            after.result = returned
            if after is not local:
                change ^= self._random_of(local.task, local.number) ^ self._random_of(local.task, after.number)
                writes.append((local.task, after.number))
        recording.undo()
        leaf = _Effect(change, tuple(writes), violation)
        # A cell that the step wrote without reading still matters: the change of the hash depends on its old value.
        reads = recording.first | {cell: recording.before[cell] for cell in places if cell not in recording.first}
        local.tree = self._trees[local.number] = self._file(local.tree, reads, leaf)
        return leaf

    def _following(
        self,
        local: _Local,
        body: Coroutine[Step, None, Any],
        step: Step | None,
        log: tuple[Any, ...],
        ended: tuple[Any, ...],
    ) -> _Local:
        """The local state that the step led to; ``ended`` tells the task's result if the step was its last."""
        key = (local.task, ended or local_state(body))
        found = self._by_key.get(key)
        if found is None:
            found = self._new_local(local.task, local, log, step, key)
            if ended:
                found.tree = self._trees[found.number] = _ENDED
        elif self.check_merges and not ended:
            self._others.setdefault(found.number, []).append((local, log))
        if not ended and found.spare is None:
            found.spare = body
        else:
            body.close()
        return found

    def _new_local(self, task: int, parent: _Local | None, log: tuple[Any, ...], step: Step | None, key: Any) -> _Local:
        local = self._by_key[key] = _Local(len(self._locals), task, parent, log, step)
        self._locals.append(local)
        self._trees.append(None)
        return local

    def _coroutine(self, local: _Local) -> Coroutine[Step, None, Any]:
        """A coroutine that stands in ``local``."""
        if local.spare is not None:
            body, local.spare = local.spare, None
            return body
        return self._replayed(local.task, self._path(local))

    @staticmethod
    def _path(local: _Local) -> list[tuple[Any, ...]]:
        path = []
        at: _Local | None = local
        while at is not None:
            path.append(at.log)
            at = at.parent
        return path[::-1]

    def _replayed(self, task: int, path: list[tuple[Any, ...]]) -> Coroutine[Step, None, Any]:
        body = self.programs[task].body()
        feeding = _Feeding()
        self.world.track(feeding)
        ctx.task = self.programs[task].task
        for log in path:
            feeding.load(log)
            body.send(None)
        return body

    def _check_other_histories(self, local: _Local, vector: list[Any], leaf: Any) -> None:
        """Merged histories must do equal things for ever: run the step from each and compare."""
        for parent, log in self._others.pop(local.number, ()):
            spare, local.spare = local.spare, self._replayed(local.task, [*self._path(parent), log])
            other = self._run_step(local, vector)
            local.spare = spare
            same = other is leaf or (
                isinstance(leaf, _Effect)
                and isinstance(other, _Effect)
                and sorted(map(repr, leaf.writes)) == sorted(map(repr, other.writes))
            )
            require(
                same,
                "deterministic tasks",
                f"two histories of task {local.task} were merged but differ at {local.pending}",
            )

    # -- checks on states ------------------------------------------------------------------------------------------

    def _check_state(self, vector: list[Any]) -> None:
        """Runs the invariants in a state; their outcome is filed by the cells that they read."""
        if not self.invariants:
            return
        node = self._invariant_tree
        while node.__class__ is list:
            node = node[1].get(vector[node[0]] if node[0] < len(vector) else self._initial[node[0]])
        if node is None:
            recording = _Recording()
            self._load(vector)
            self.world.track(recording)
            node = "holds"
            try:
                for invariant in self.invariants:
                    invariant()
            except Violation as violation:
                node = violation
            self._invariant_tree = self._file(self._invariant_tree, recording.first, node)
        if isinstance(node, Violation):
            raise node

    def _observe(self, vector: list[Any]) -> Any:
        """What the observer says of an end."""
        assert self.observer is not None
        self._load(vector)
        self.world.track(_Recording())
        return self.observer([self._locals[vector[task]].result for task in range(len(self.programs))])

    def _deadlock(self, vector: list[Any]) -> Violation | None:
        """In a state where nobody can go on: the deadlock, unless all who must finish have finished."""
        waiting = [
            (program.task.name, local.pending)
            for program, local in zip(self.programs, (self._locals[number] for number in vector), strict=False)
            if self._trees[local.number] is not _ENDED and not program.daemon
        ]
        return Violation("no deadlock", deadlock_message(waiting)) if waiting else None
