"""The shape of a global state: which cells it has, what they were at first, and the numbers that its hash is made of.

A state is a list: the number of each task's local state, then the value of each cell that the scenario has ever
written. Cells that nobody has written yet are constants and take no room; when one is written for the first time, all
vectors grow by it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from septum.core.cells import poke
from septum.core.steps import require

#: A cell: the shared object and the field or key in it.
Cell = tuple[Any, Any]
#: A state: local states first, then cells.
Vector = list[Any]


class Vectors:
    """Places of cells in vectors, and the random number of each value there (xor of all of them is a state's hash)."""

    def __init__(self) -> None:
        self.initial: Vector = []
        self.cells: dict[Cell, int] = {}
        self.numbers: list[dict[Any, int]] = []
        self.keys = random.Random(0x5E9)

    def add(self, initial: Any) -> int:
        """A new place, with its value in the initial state, which counts 0 in the hash."""
        self.initial.append(initial)
        self.numbers.append({initial: 0})
        return len(self.initial) - 1

    def add_cell(self, cell: Cell, initial: Any) -> int:
        """A new place for a cell."""
        self.cells[cell] = place = self.add(initial)
        return place

    def number(self, place: int, value: Any) -> int:
        """The random number that stands for a value at a place."""
        numbers = self.numbers[place]
        number = numbers.get(value)
        if number is None:
            number = numbers[value] = self.keys.getrandbits(64)
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
