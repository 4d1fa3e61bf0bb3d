"""Symmetry: states that differ only by an exchange of equal tasks count as one.

A scenario declares which tasks are equal (``Program.group``) and what each of them owns (``Program.owns``). An exchange
renames the tasks, what they own, and every mention of these in cells and local states. The hash of a renamed state is
kept up beside that of the state itself, as further 64-bit pieces of one large integer: so the name that all
exchanges of a state have in common, the least piece, costs a few operations and no state is ever renamed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

from septum.arch.errors import UsageError
from septum.core.cells import Cell, Fixed, Shared, SharedMap, World
from septum.core.steps import Program

if TYPE_CHECKING:
    from septum.core.automata import Local
    from septum.core.recorders import Recording
    from septum.core.vectors import Vectors

SYMMETRY = "symmetry"
_BITS = 64
_PIECE = (1 << _BITS) - 1


class Renaming:
    """One exchange of tasks: ``tasks[i]`` takes the place of task ``i``."""

    def __init__(self, world: World, programs: Sequence[Program], tasks: Sequence[int]) -> None:
        self.tasks = tasks
        self._names: dict[str, str] = {}
        objects = {obj.name: obj for obj in world.objects}
        for program, other in zip(programs, (programs[task] for task in tasks), strict=True):
            for mine, theirs in zip(_belongings(program), _belongings(other), strict=True):
                self._names[mine.name] = theirs.name
        self._objects = {name: objects[other] for name, other in self._names.items()}

    def value(self, value: Any) -> Any:
        """A value of a cell, or of a local state, under the exchange."""
        if isinstance(value, str):
            return self._names.get(value, value)
        if isinstance(value, (Shared, SharedMap)):
            return self._objects.get(value.name, value)
        if type(value) is tuple:
            return tuple(map(self.value, value))
        if isinstance(value, frozenset):
            return frozenset(map(self.value, value))
        if is_dataclass(value) and not isinstance(value, (type, Fixed)):
            return replace(value, **{f.name: self.value(getattr(value, f.name)) for f in fields(value) if f.init})
        return value

    def cell(self, cell: Cell) -> Cell:
        """The cell that takes the place of another."""
        return self.value(cell[0]), self.value(cell[1])

    def local(self, key: Any) -> Any:
        """The local state (its task and key) that takes the place of another."""
        task, state = key
        return self.tasks[task], self.value(state)


def renamings(world: World, programs: Sequence[Program]) -> list[Renaming]:
    """All exchanges of equal tasks but the one that changes nothing.

    :raises UsageError: when tasks that are declared equal do not own equally many things.
    """
    groups: dict[str, list[int]] = {}
    for task, program in enumerate(programs):
        if program.group is not None:
            groups.setdefault(program.group, []).append(task)
    for name, members in groups.items():
        if len({len(programs[task].owns) for task in members}) > 1:
            raise UsageError(f"tasks of group {name!r} own different numbers of things; give each as many")
    found = []
    for orders in product(*(permutations(members) for members in groups.values())):
        tasks = [*range(len(programs))]
        for members, order in zip(groups.values(), orders, strict=True):
            for member, other in zip(members, order, strict=True):
                tasks[member] = other
        if tasks != [*range(len(programs))]:
            found.append(Renaming(world, programs, tasks))
    return found


class Numbers:
    """The random numbers that hashes are made of: for a value at a place, one piece for each exchange.

    A subject is a cell, or ``None`` for the local states of all tasks.
    """

    def __init__(self, exchanges: Sequence[Renaming] = ()) -> None:
        self.exchanges = exchanges
        self.generator = random.Random(0x5E9)
        self._known: dict[tuple[Cell | None, Any], int] = {}

    def zero(self, subject: Cell | None, value: Any) -> None:
        """From now on this counts 0 in all pieces: it is so in the initial state."""
        for image in self._images(subject, value):
            self._known[image] = 0

    def put(self, subject: Cell | None, value: Any, pieces: int) -> None:
        """Makes these the pieces of a value."""
        for place, image in enumerate(self._images(subject, value)):
            self._known[image] = pieces >> _BITS * place & _PIECE

    def pieces(self, subject: Cell | None, value: Any) -> int:
        """The pieces of a value, the first in the lowest bits."""
        number = 0
        for place, image in enumerate(self._images(subject, value)):
            known = self._known.get(image)
            if known is None:
                known = self._known[image] = self.generator.getrandbits(_BITS)
            number |= known << _BITS * place
        return number

    def _images(self, subject: Cell | None, value: Any) -> Iterator[tuple[Cell | None, Any]]:
        yield subject, value
        for exchange in self.exchanges:
            if subject is None:
                yield None, exchange.local(value)
            else:
                yield exchange.cell(subject), exchange.value(value)

    def fold(self) -> Callable[[int], int] | None:
        """From the hash of a state to the name that it shares with all its exchanges (``None``: the hash itself)."""
        count = len(self.exchanges)
        if not count:
            return None
        if count == 1:
            return lambda pieces: min(pieces & _PIECE, pieces >> _BITS)
        shifts = [_BITS * place for place in range(count + 1)]
        return lambda pieces: min([pieces >> shift & _PIECE for shift in shifts])


class Check:
    """Holds each step that is learnt against those of equal tasks that have been.

    :raises UsageError: when they differ: what was declared equal is not.
    """

    def __init__(self, exchanges: Sequence[Renaming], vectors: Vectors) -> None:
        self._exchanges = exchanges
        self._vectors = vectors
        self._seen: dict[Any, Any] = {}

    def watch(self, local: Local, recording: Recording, after: Local | None) -> None:
        """A step that has been learnt. (Cells that nobody writes may tell tasks apart, as long as nothing shows it.)"""
        reads = [(cell, value) for cell, value in recording.first.items() if cell in self._vectors.cells]
        key = local.key, frozenset(reads)
        writes = dict(recording.written), after.key if after else None
        if self._seen.setdefault(key, writes) != writes:
            raise UsageError(f"tasks are declared equal, but do not do the same at: {local.pending}")
        for exchange in self._exchanges:
            image = exchange.local(local.key), frozenset((exchange.cell(c), exchange.value(v)) for c, v in reads)
            written = {exchange.cell(c): exchange.value(v) for c, v in recording.written.items()}
            self._seen[image] = written, exchange.local(after.key) if after else None


def _belongings(program: Program) -> list[Any]:
    return [program.task, *program.owns]
