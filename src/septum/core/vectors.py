"""The shape of a global state: which cells it has, what they were at first, and the numbers that its hash is made of.

A state is a list: the number of each task's local state, then the value of each cell that the scenario has ever
written. Cells that nobody has written yet are constants and take no room; when one is written for the first time, all
vectors grow by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from septum.arch.errors import UsageError
from septum.core.cells import Cell, peek, poke
from septum.core.steps import require
from septum.core.symmetry import Numbers

#: A state: local states first, then cells.
Vector = list[Any]


class Vectors:
    """Places of cells in vectors. The xor of the numbers of all values in a vector is the state's hash."""

    def __init__(self, numbers: Numbers) -> None:
        self.initial: Vector = []
        self.cells: dict[Cell, int] = {}
        self.numbers = numbers
        self._places: list[dict[Any, int]] = []

    def add_task(self, number: int, key: Any) -> None:
        """The place of a task's local states: the number of the initial one, and its key."""
        self.numbers.zero(None, key)
        self._add(number)

    def add_cell(self, cell: Cell, initial: Any) -> int:
        """A new place for a cell (and those of the cells that can take its place in a symmetrical state).

        :raises UsageError: when such a cell does not start with the value that it should.
        """
        self.numbers.zero(cell, initial)
        self.cells[cell] = place = self._add(initial)
        for exchange in self.numbers.exchanges:
            image = exchange.cell(cell)
            wanted = exchange.value(initial)
            if self.initial[self.cells[image]] != wanted if image in self.cells else peek(*image) != wanted:
                raise UsageError(
                    f"tasks are declared equal, but {image[0]} {image[1]!r} does not start like {cell[0]} {cell[1]!r}"
                )
            if image not in self.cells:
                self.cells[image] = self._add(wanted)
        return place

    def local(self, task: int, number: int, key: Any) -> int:
        """The number, in the hash, of a task's local state."""
        return self._number(task, number, None, key)

    def number(self, cell: Cell, value: Any) -> int:
        """The number, in the hash, of a cell's value."""
        return self._number(self.cells[cell], value, cell, value)

    def tables(self) -> list[dict[Any, int]]:
        """For each place, the numbers of all values that it has had."""
        return self._places

    def restore(
        self, cells: Sequence[Cell], initial: Vector, tables: list[dict[Any, int]], keys: Sequence[Any]
    ) -> None:
        """Puts back what :meth:`tables` gave; ``keys`` has the key of each local state."""
        tasks = len(initial) - len(cells)
        self.initial[:], self._places = initial, tables
        self.cells = {cell: place for place, cell in enumerate(cells, tasks)}
        for place, numbers in enumerate(tables):
            for value, pieces in numbers.items():
                if place < tasks:
                    self.numbers.put(None, keys[value], pieces)
                else:
                    self.numbers.put(cells[place - tasks], value, pieces)

    def _add(self, initial: Any) -> int:
        self.initial.append(initial)
        self._places.append({initial: 0})
        return len(self.initial) - 1

    def _number(self, place: int, value: Any, subject: Cell | None, meaning: Any) -> int:
        numbers = self._places[place]
        number = numbers.get(value)
        if number is None:
            number = numbers[value] = self.numbers.pieces(subject, meaning)
        return number

    def load(self, vector: Sequence[Any]) -> None:
        """Sets the world's cells to a state."""
        for (owner, key), place in self.cells.items():
            poke(owner, key, vector[place] if place < len(vector) else self.initial[place])

    def trimmed(self, vector: Vector) -> tuple[Any, ...]:
        """The vector without trailing initial values, so that it does not depend on when the vector grew."""
        end = len(vector)
        while end and vector[end - 1] == self.initial[end - 1]:
            end -= 1
        return tuple(vector[:end])

    def file(self, tree: Any, reads: dict[Cell, Any], leaf: Any) -> Any:
        """Adds a leaf to a decision tree, under the values read. Constants make no node."""
        path = [(self.cells[cell], value) for cell, value in reads.items() if cell in self.cells]
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
