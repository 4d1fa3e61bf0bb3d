"""Partial order reduction: in most states, the steps of some tasks can wait.

Where the next steps of a few tasks have nothing to do with anything that the others may *ever* do from where they are,
it is enough to look at these few: whatever the others do first can as well be done after. Such a set is persistent
(Godefroid 1996). What "has to do with" means is known cell by cell, because steps are learnt under a recorder: of each
local state its step's cells, and all cells that the task may touch from there on, along the local states that
are known to follow.

- ``lock-free``: a single task whose step touches only cells that the others never touch, wherever they are.
- ``footprint``: a smallest set of tasks, seen from where all of them are.

Three things keep this sound. A step that writes what an invariant reads is never preferred. Nor is a step that leads
back, to a local state known at least as long: so each cycle of states has one in which all tasks are looked at, and
nobody waits for ever. And when something is learnt later that an earlier choice had not reckoned with, the search is
:attr:`~Reduction.stale` and has to begin again, with all that was learnt: at most as often as there is more to learn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from septum.core.automata import BLOCKED, Automata, Local
from septum.core.cells import Cell
from septum.core.functions import StateFunction
from septum.core.recorders import Recording
from septum.core.search import Link, Search
from septum.core.vectors import Vector

#: Reductions of the order of steps.
LOCK_FREE, FOOTPRINT = "lock-free", "footprint"

#: After so many states, footprints must have helped in one of so many, or they are given up.
TRIAL, WORTH = 1000, 20


class Footprints:
    """Which cells the step of each local state touches, and which the task may touch from there on, as bit masks."""

    SAVED = ("version", "reads", "writes", "reads_on", "writes_on", "_bits", "_before")

    def __init__(self) -> None:
        self.version = 0
        self.reads: defaultdict[int, int] = defaultdict(int)
        self.writes: defaultdict[int, int] = defaultdict(int)
        self.reads_on: defaultdict[int, int] = defaultdict(int)
        self.writes_on: defaultdict[int, int] = defaultdict(int)
        self._bits: dict[Cell, int] = {}
        self._before: defaultdict[int, set[int]] = defaultdict(set)

    def watch(self, local: Local, recording: Recording, after: Local | None) -> None:
        """A step that has been learnt."""
        number = local.number
        self.reads[number] |= self.mask(recording.first)
        self.writes[number] |= self.mask(recording.written)
        if after is not None:
            self._before[after.number].add(number)
            self._spread(number, self.reads_on[after.number], self.writes_on[after.number])
        self._spread(number, self.reads[number], self.writes[number])

    def mask(self, cells: Iterable[Cell]) -> int:
        """The bits of cells."""
        mask = 0
        for cell in cells:
            mask |= 1 << self._bits.setdefault(cell, len(self._bits))
        return mask

    def clash(self, one: int, other: int) -> bool:
        """Whether the step of local state ``one`` has to do with anything that a task in ``other`` may ever do."""
        writes = self.writes_on[other]
        return bool(self.writes[one] & (self.reads_on[other] | writes) or self.reads[one] & writes)

    def _spread(self, number: int, reads: int, writes: int) -> None:
        """Tells a local state, and those before it, of cells to come."""
        todo = [number]
        while todo:
            at = todo.pop()
            if reads & ~self.reads_on[at] or writes & ~self.writes_on[at]:
                self.reads_on[at] |= reads
                self.writes_on[at] |= writes
                self.version += 1
                todo += self._before[at]


class Reduction:
    """Chooses the tasks to look at in each state of one search after another."""

    SAVED = ("_footprint", "_clashes", "_version", "_visible", "_asked", "_helped")

    def __init__(self, automata: Automata, names: Collection[str], functions: Sequence[StateFunction]) -> None:
        self._automata = automata
        self._lock_free = LOCK_FREE in names
        self._footprint = FOOTPRINT in names
        self._functions = functions
        self.footprints = Footprints()
        automata.watchers.append(self.footprints.watch)
        self._count = len(automata.programs)
        self._tasks = range(self._count)
        self._sets: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._clashes: dict[tuple[int, int], bool] = {}
        self._asked = self._helped = 0
        self._version = 0
        self._visible = 0
        self._seen: list[int] = []

    def choose(self, search: Search, vector: Vector, link: Link) -> Iterable[int]:
        """The tasks whose steps are to be looked at in a state."""
        where = tuple(vector[: self._count])
        sets = self._sets.get(where)
        if sets is None:
            for task in self._tasks:
                search.leaf(task, vector, link)  # the more is known, the fewer choices turn out wrong
            sets = self._sets[where] = self._persistent_sets(where)
        self._asked += 1
        for chosen in sets:
            if self._may_go_first(chosen, search, vector, link):
                self._helped += 1
                return chosen
        return self._tasks

    @property
    def given_up(self) -> set[str]:
        """What is not used (any more)."""
        return {name for name, used in ((LOCK_FREE, self._lock_free), (FOOTPRINT, self._footprint)) if not used}

    def stale(self) -> bool:
        """Whether a choice has been made, since this was last asked, that what is known now forbids.

        Or whether sets of tasks have turned out not to be worth the time that they take, and are no longer looked for.
        """
        grown = False
        seen = [len(function.cells) for function in self._functions]
        if seen != self._seen:
            self._seen = seen
            visible = self._visible
            for function in self._functions:
                self._visible |= self.footprints.mask(function.cells)
            grown = visible != self._visible
        if self._version != self.footprints.version:
            self._version = self.footprints.version
            for pair, clash in self._clashes.items():
                if not clash and self.footprints.clash(*pair):
                    self._clashes[pair] = grown = True
        if self._footprint and self._asked >= TRIAL:
            self._footprint = self._helped * WORTH >= self._asked
            grown |= not self._footprint
            self._asked = self._helped = 0
        if grown:
            self._sets.clear()
        return grown

    def _clash(self, one: int, other: int) -> bool:
        pair = one, other
        found = self._clashes.get(pair)
        if found is None:
            found = self._clashes[pair] = self.footprints.clash(one, other)
        return found

    def _persistent_sets(self, where: Sequence[int]) -> list[tuple[int, ...]]:
        """The sets of tasks that need not wait for the others, where all stand as told; the smallest first."""
        alive = [task for task in self._tasks if not self._automata.locals[where[task]].ended]
        sets: set[tuple[int, ...]] = set()
        if self._lock_free:
            initial = self._automata.vectors.initial
            for task in alive:
                if not any(self._clash(where[task], initial[other]) for other in self._tasks if other != task):
                    sets.add((task,))
        if self._footprint:
            sets |= {tuple(sorted(self._closure(task, alive, where))) for task in alive}
        return sorted((chosen for chosen in sets if len(chosen) < len(alive)), key=lambda chosen: (len(chosen), chosen))

    def _closure(self, task: int, alive: Sequence[int], where: Sequence[int]) -> set[int]:
        """The smallest set with ``task`` whose next steps do not clash with what the others may do."""
        chosen = {task}
        todo = [task]
        while todo:
            at = where[todo.pop()]
            clashing = [other for other in alive if other not in chosen and self._clash(at, where[other])]
            chosen.update(clashing)
            todo += clashing
        return chosen

    def _may_go_first(self, chosen: Iterable[int], search: Search, vector: Vector, link: Link) -> bool:
        """Whether somebody in the set can go on, and nobody's step is seen by an invariant or leads back."""
        moves = False
        rank = self._automata.rank
        for task in chosen:
            leaf = search.leaf(task, vector, link)
            if leaf is not BLOCKED:
                number = vector[task]
                if leaf.after < 0 or rank(leaf.after) <= rank(number) or self.footprints.writes[number] & self._visible:
                    return False
                moves = True
        return moves
