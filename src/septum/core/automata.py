"""Tasks as automata: what each step does, learnt by running it once and looked up ever after.

See :mod:`septum.core.explore` for the idea. This is its memory: local states, their decision trees, and the cells that
the scenario writes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from septum.arch.errors import UsageError
from septum.core.cells import Cell, World
from septum.core.locality import freeze, local_state
from septum.core.recorders import Feeding, Recording
from septum.core.run import deadlock_message
from septum.core.steps import SOLO, Program, Step, Violation, ctx, require
from septum.core.symmetry import Numbers, Renaming
from septum.core.vectors import Vector, Vectors

#: What a task read in one step, in order.
Log = tuple[Any, ...]

#: A property of all states: reads shared cells and raises :class:`Violation` where it does not hold.
Invariant = Callable[[], None]

#: What is worth telling of an end: from the tasks' results to any hashable value. Reads shared cells.
Observer = Callable[[list[Any]], Any]


class Local:
    """A local state of one task: how to get there again (what was read on the way), and the step that is to follow.

    ``result`` is what the task returned, in a local state where it has ended.
    """

    __slots__ = ("ended", "key", "log", "number", "parent", "pending", "rank", "result", "spare", "task")

    def __init__(self, number: int, task: int, parent: Local | None, log: Log, halt: _Halt) -> None:
        self.number = self.rank = number
        self.task = task
        self.parent = parent
        self.log = log
        self.key = halt.key
        self.pending = halt.step
        self.ended = halt.ended
        self.result = halt.result
        self.spare: Coroutine[Step, None, Any] | None = None

    def path(self) -> list[Log]:
        """What was read in each step on the first path that led here."""
        path = []
        at: Local | None = self
        while at is not None:
            path.append(at.log)
            at = at.parent
        return path[::-1]


class _Halt:
    """Where a coroutine stands after it has run: before ``step``, or at its end, with its result."""

    __slots__ = ("ended", "key", "result", "step")

    def __init__(self, task: int, body: Coroutine[Step, None, Any]) -> None:
        self.step: Step | None = None
        self.result: Any = None
        self.ended = False
        try:
            self.step = body.send(None)
            self.key: Any = (task, local_state(body))
        except StopIteration as end:
            self.ended = True
            self.result = end.value
            self.key = (task, ("ended", freeze(end.value)))


class Effect:
    """A leaf of a decision tree: what a step does.

    ``after`` is the number of the local state that follows (-1: none, the step violates a property); ``progress`` is
    whether the task got on (:func:`septum.core.steps.progress`).
    """

    __slots__ = ("after", "hash", "progress", "violation", "writes")

    def __init__(
        self,
        change: int,
        writes: tuple[tuple[int, Any], ...],
        after: int,
        violation: Violation | None,
        progress: bool,
    ) -> None:
        self.after = after
        self.hash = change
        self.writes = writes
        self.violation = violation
        self.progress = progress


#: Leaves for a task that has ended and for a wait whose guard does not hold.
ENDED, BLOCKED = "ended", "blocked"

#: Told of each step that is learnt: its local state, what it read and wrote, and the local state that followed, if any.
Watcher = Callable[[Local, Recording, Local | None], None]


class Automata:
    """The automata of ``programs`` over the cells of ``world``.

    ``vectors`` has the shape of a state. ``trees`` has the decision tree of each local state: a list
    ``[place, {value: subtree}]``, or a leaf.
    """

    def __init__(
        self,
        world: World,
        programs: Sequence[Program],
        *,
        exchanges: Sequence[Renaming] = (),
        check_merges: bool = False,
    ) -> None:
        self.world = world
        self.programs = list(programs)
        self.check_merges = check_merges
        self.runs = 0
        self.vectors = Vectors(Numbers(exchanges))
        self.trees: list[Any] = []
        self.locals: list[Local] = []
        self.watchers: list[Watcher] = []
        self._by_key: dict[Any, Local] = {}
        self._others: dict[int, list[tuple[Local, Log]]] = {}
        self._prelude: list[Recording] = []

    def start(self) -> None:
        """Runs each task to its first step, as every scheduler does before anyone may act."""
        for task, program in enumerate(self.programs):
            body = program.body()
            recording = Recording()
            self.world.track(recording)
            ctx.task = program.task
            halt = _Halt(task, body)
            self._prelude.append(recording)
            local = self._new_local(task, None, tuple(recording.log), halt)
            local.spare = body
            self.vectors.add_task(local.number, local.key)
        for exchange in self.vectors.numbers.exchanges:
            for task, other in enumerate(exchange.tasks):
                if exchange.local(self.locals[task].key) != self.locals[other].key:
                    one, two = (self.programs[i].task.name for i in (task, other))
                    raise UsageError(f"tasks {one!r} and {two!r} are declared equal, but do not start alike")

    def rank(self, number: int) -> int:
        """How early a local state became known, or one of another task that can take its place."""
        return self.locals[number].rank

    def to_initial(self) -> None:
        self.vectors.load(self.vectors.initial)
        for recording in reversed(self._prelude):
            recording.undo()

    def leaf(self, task: int, vector: Vector) -> Any:
        """What the step of ``task`` does in a state: an :class:`Effect`, ``BLOCKED`` or ``ENDED``."""
        if len(vector) < len(self.vectors.initial):
            vector += self.vectors.initial[len(vector) :]
        node = self.trees[vector[task]]
        while node.__class__ is list:
            node = node[1].get(vector[node[0]])
        return self.learn(task, vector) if node is None else node

    def learn(self, task: int, vector: Vector) -> Any:
        """Runs the step of ``task`` in the state ``vector`` and files what it does."""
        local = self.locals[vector[task]]
        leaf = self._run_step(local, vector)
        if self.check_merges:
            self._check_other_histories(local, vector, leaf)
        # Growing the vector emptied the trees: the leaf is filed under what is known now.
        if len(vector) < len(self.vectors.initial):
            vector += self.vectors.initial[len(vector) :]
        return leaf

    def observe(self, vector: Vector, observer: Observer) -> Any:
        """What an observer says of an end. It may run model code to find out: the state stays as it is."""
        recording = Recording()
        self.vectors.load(vector)
        self.world.track(recording)
        level, ctx.level = ctx.level, SOLO
        try:
            return observer([self.locals[vector[task]].result for task in range(len(self.programs))])
        finally:
            ctx.level = level
            recording.undo()

    def deadlock(self, vector: Vector) -> Violation | None:
        """In a state where nobody can go on: the deadlock, unless all who must finish have finished."""
        waiting = [
            (program.task.name, local.pending)
            for program, local in zip(self.programs, (self.locals[number] for number in vector), strict=False)
            if self.trees[local.number] is not ENDED and not program.daemon
        ]
        return Violation("no deadlock", deadlock_message(waiting)) if waiting else None

    def _run_step(self, local: Local, vector: Vector) -> Any:
        body = self._coroutine(local)
        recording = Recording()
        self.vectors.load(vector)
        self.world.track(recording)
        ctx.task = self.programs[local.task].task
        ctx.progressed = False
        self.runs += 1
        after: Local | None = None
        violation: Violation | None = None
        try:
            if local.pending is not None and local.pending.guard is not None and not local.pending.guard():
                local.spare = body
                return self._file(local, recording, recording.first, BLOCKED, after)
            recording.log.clear()  # the log is what the step itself reads; nobody asks the guard in a replay
            try:
                after = self._following(local, body, _Halt(local.task, body), tuple(recording.log))
            except Violation as found:
                violation = found
        finally:
            recording.undo()
        # Places first: growing the vector empties the trees.
        places = {
            cell: self._place_of(cell, recording.before[cell])
            for cell, value in recording.written.items()
            if cell in self.vectors.cells or value != recording.before[cell]
        }
        change, writes = 0, []
        for cell, place in places.items():
            old, new = recording.before[cell], recording.written[cell]
            if old != new:
                change ^= self.vectors.number(cell, old) ^ self.vectors.number(cell, new)
                writes.append((place, new))
        if after is not None and after is not local:
            change ^= self._number(local) ^ self._number(after)
            writes.append((local.task, after.number))
        # A cell that the step wrote without reading still matters: the change of the hash depends on its old value.
        reads = recording.first | {cell: recording.before[cell] for cell in places if cell not in recording.first}
        return self._file(
            local,
            recording,
            reads,
            Effect(change, tuple(writes), -1 if after is None else after.number, violation, ctx.progressed),
            after,
        )

    def _file(self, local: Local, recording: Recording, reads: dict[Cell, Any], leaf: Any, after: Local | None) -> Any:
        self.trees[local.number] = self.vectors.file(self.trees[local.number], reads, leaf)
        for watcher in self.watchers:
            watcher(local, recording, after)
        return leaf

    def _following(self, local: Local, body: Coroutine[Step, None, Any], halt: _Halt, log: Log) -> Local:
        """The local state that the step led to."""
        found = self._by_key.get(halt.key)
        if found is None:
            found = self._new_local(local.task, local, log, halt)
        elif self.check_merges and not halt.ended:
            self._others.setdefault(found.number, []).append((local, log))
        if not halt.ended and found.spare is None:
            found.spare = body
        else:
            body.close()
        return found

    def _new_local(self, task: int, parent: Local | None, log: Log, halt: _Halt) -> Local:
        local = self._by_key[halt.key] = Local(len(self.locals), task, parent, log, halt)
        self.locals.append(local)
        images = [exchange.local(halt.key) for exchange in self.vectors.numbers.exchanges]
        local.rank = min((self._by_key[image].rank for image in images if image in self._by_key), default=local.number)
        self.trees.append(ENDED if halt.ended else None)
        return local

    def _number(self, local: Local) -> int:
        return self.vectors.local(local.task, local.number, local.key)

    def restore_local(self, task: int, parent: Local, log: Log) -> None:
        """Makes a local state known that once followed another after this was read."""
        body = self._replayed(task, parent.path())
        feeding = Feeding()
        feeding.load(log)
        self.world.track(feeding)
        self._new_local(task, parent, log, _Halt(task, body))
        body.close()

    def forget_steps(self) -> None:
        """Has all steps learnt anew: a constant has become a cell."""
        self.trees[:] = [ENDED if local.ended else None for local in self.locals]

    def _coroutine(self, local: Local) -> Coroutine[Step, None, Any]:
        """A coroutine that stands in ``local``."""
        if local.spare is not None:
            body, local.spare = local.spare, None
            return body
        return self._replayed(local.task, local.path())

    def _replayed(self, task: int, path: list[Log]) -> Coroutine[Step, None, Any]:
        body = self.programs[task].body()
        feeding = Feeding()
        self.world.track(feeding)
        ctx.task = self.programs[task].task
        for log in path:
            feeding.load(log)
            body.send(None)
        return body

    def _check_other_histories(self, local: Local, vector: Vector, leaf: Any) -> None:
        """Merged histories must do equal things for ever: run the step from each and compare."""
        for parent, log in self._others.pop(local.number, ()):
            spare, local.spare = local.spare, self._replayed(local.task, [*parent.path(), log])
            other = self._run_step(local, vector)
            local.spare = spare
            same = other is leaf or (
                isinstance(leaf, Effect)
                and isinstance(other, Effect)
                and sorted(map(repr, leaf.writes)) == sorted(map(repr, other.writes))
            )
            require(
                same,
                "deterministic tasks",
                f"two histories of task {local.task} were merged but differ at {local.pending}",
            )

    def _place_of(self, cell: Cell, initial: Any) -> int:
        """The place of a written cell; a new one makes the vector grow and all trees be learnt anew."""
        place = self.vectors.cells.get(cell)
        if place is None:
            place = self.vectors.add_cell(cell, initial)
            self.forget_steps()
        return place
