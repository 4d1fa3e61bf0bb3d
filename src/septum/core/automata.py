"""Tasks as automata: what each step does, learnt by running it once and looked up ever after.

See :mod:`septum.core.explore` for the idea. This is its memory: local states, their decision trees, and the cells that
the scenario writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from septum.core.cells import World, poke
from septum.core.locality import freeze, local_state
from septum.core.run import deadlock_message
from septum.core.steps import SOLO, Program, Step, Violation, ctx, require

#: A property of all states: reads shared cells and raises :class:`Violation` where it does not hold.
Invariant = Callable[[], None]

#: What is worth telling of an end: from the tasks' results to any hashable value. Reads shared cells.
Observer = Callable[[list[Any]], Any]


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


class Effect:
    """A leaf of a decision tree: what a step does."""

    __slots__ = ("hash", "violation", "writes")

    def __init__(self, change: int, writes: tuple[tuple[int, Any], ...], violation: Violation | None) -> None:
        self.hash = change
        self.writes = writes
        self.violation = violation


#: Leaves for a task that has ended and for a wait whose guard does not hold.
ENDED, BLOCKED = "ended", "blocked"


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


class Automata:
    """The automata of ``programs`` over the cells of ``world``.

    A state is a vector: the number of each task's local state, then the value of each written cell; ``initial`` is the
    first one. ``trees`` has the decision tree of each local state: a list ``[place, {value: subtree}]``, or a leaf.
    """

    def __init__(self, world: World, programs: Sequence[Program], *, check_merges: bool) -> None:
        self.world = world
        self.programs = list(programs)
        self.check_merges = check_merges
        self.runs = 0
        self.initial: list[Any] = []
        self.trees: list[Any] = []
        self.locals: list[_Local] = []
        self._keys = random.Random(0x5E9)
        self._cells: dict[tuple[Any, Any], int] = {}  # cell -> place in the vector
        self._zobrist: list[dict[Any, int]] = []  # value -> random number, per place
        self._by_key: dict[Any, _Local] = {}
        self._others: dict[int, list[tuple[_Local, tuple[Any, ...]]]] = {}
        self._functions: list[StateFunction] = []
        self._prelude: list[_Recording] = []

    def function(self, body: Callable[[], Any]) -> StateFunction:
        """A function of the shared cells that is learnt as steps are."""
        function = StateFunction(self, body)
        self._functions.append(function)
        return function

    def start(self, task: int) -> None:
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
            local.tree = self.trees[local.number] = ENDED
        self.initial.append(local.number)
        self._zobrist.append({local.number: 0})

    def load(self, vector: Sequence[Any]) -> None:
        """Sets the world's cells to a state."""
        for (owner, key), place in self._cells.items():
            poke(owner, key, vector[place] if place < len(vector) else self.initial[place])

    def to_initial(self) -> None:
        self.load(self.initial)
        for recording in reversed(self._prelude):
            recording.undo()

    def trimmed(self, vector: list[Any]) -> tuple[Any, ...]:
        """The vector without trailing initial values, so that it does not depend on when the vector grew."""
        end = len(vector)
        while end and vector[end - 1] == self.initial[end - 1]:
            end -= 1
        return tuple(vector[:end])

    def learn(self, task: int, vector: list[Any]) -> Any:
        """Runs the step of ``task`` in the state ``vector`` and files what it does."""
        local = self.locals[vector[task]]
        leaf = self._run_step(local, vector)
        if self.check_merges:
            self._check_other_histories(local, vector, leaf)
        # Growing the vector emptied the trees: the leaf is filed under what is known now.
        if len(vector) < len(self.initial):
            vector += self.initial[len(vector) :]
        return leaf

    def observe(self, vector: list[Any], observer: Observer) -> Any:
        """What an observer says of an end. It may run model code to find out: the state stays as it is."""
        recording = _Recording()
        self.load(vector)
        self.world.track(recording)
        level, ctx.level = ctx.level, SOLO
        try:
            return observer([self.locals[vector[task]].result for task in range(len(self.programs))])
        finally:
            ctx.level = level
            recording.undo()

    def deadlock(self, vector: list[Any]) -> Violation | None:
        """In a state where nobody can go on: the deadlock, unless all who must finish have finished."""
        waiting = [
            (program.task.name, local.pending)
            for program, local in zip(self.programs, (self.locals[number] for number in vector), strict=False)
            if self.trees[local.number] is not ENDED and not program.daemon
        ]
        return Violation("no deadlock", deadlock_message(waiting)) if waiting else None

    def _run_step(self, local: _Local, vector: list[Any]) -> Any:
        body = self._coroutine(local)
        recording = _Recording()
        self.load(vector)
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
            local.tree = self.trees[local.number] = self.file(local.tree, recording.first, BLOCKED)
            return BLOCKED
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
        leaf = Effect(change, tuple(writes), violation)
        # A cell that the step wrote without reading still matters: the change of the hash depends on its old value.
        reads = recording.first | {cell: recording.before[cell] for cell in places if cell not in recording.first}
        local.tree = self.trees[local.number] = self.file(local.tree, reads, leaf)
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
                found.tree = self.trees[found.number] = ENDED
        elif self.check_merges and not ended:
            self._others.setdefault(found.number, []).append((local, log))
        if not ended and found.spare is None:
            found.spare = body
        else:
            body.close()
        return found

    def _new_local(self, task: int, parent: _Local | None, log: tuple[Any, ...], step: Step | None, key: Any) -> _Local:
        local = self._by_key[key] = _Local(len(self.locals), task, parent, log, step)
        self.locals.append(local)
        self.trees.append(None)
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
                isinstance(leaf, Effect)
                and isinstance(other, Effect)
                and sorted(map(repr, leaf.writes)) == sorted(map(repr, other.writes))
            )
            require(
                same,
                "deterministic tasks",
                f"two histories of task {local.task} were merged but differ at {local.pending}",
            )

    def _place_of(self, cell: tuple[Any, Any], initial: Any) -> int:
        """The place of a written cell; a new one makes the vector grow and all trees be learnt anew."""
        place = self._cells.get(cell)
        if place is None:
            place = self._cells[cell] = len(self.initial)
            self.initial.append(initial)
            self._zobrist.append({initial: 0})
            for function in self._functions:
                function.tree = None
            for number, local in enumerate(self.locals):
                if self.trees[number] is not ENDED:
                    local.tree = self.trees[number] = None
        return place

    def _random_of(self, place: int, value: Any) -> int:
        numbers = self._zobrist[place]
        number = numbers.get(value)
        if number is None:
            number = numbers[value] = self._keys.getrandbits(64)
        return number

    def file(self, tree: Any, reads: dict[tuple[Any, Any], Any], leaf: Any) -> Any:
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


class StateFunction:
    """A function that only reads shared cells: run once for each combination of values that it reads."""

    __slots__ = ("_automata", "_body", "tree")

    def __init__(self, automata: Automata, body: Callable[[], Any]) -> None:
        self._automata = automata
        self._body = body
        self.tree: Any = None

    def __call__(self, vector: list[Any]) -> Any:
        """Its value in a state."""
        node, initial = self.tree, self._automata.initial
        while node.__class__ is list:
            node = node[1].get(vector[node[0]] if node[0] < len(vector) else initial[node[0]])
        if node is None:
            recording = _Recording()
            self._automata.load(vector)
            self._automata.world.track(recording)
            node = (self._body(),)
            self.tree = self._automata.file(self.tree, recording.first, node)
        return node[0]


def first_violation(invariants: Sequence[Invariant]) -> Callable[[], Violation | None]:
    """A function that runs invariants and returns the violation of the first that does not hold."""

    def check() -> Violation | None:
        try:
            for invariant in invariants:
                invariant()
        except Violation as violation:
            return violation
        return None

    return check
