"""Functions of the shared cells, learnt as steps are: invariants, and where a run ends early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from septum.core.automata import Automata, Invariant
from septum.core.cells import Cell
from septum.core.recorders import Recording
from septum.core.steps import Violation
from septum.core.vectors import Vector


class StateFunction:
    """A function that only reads shared cells: run once for each combination of values that it reads.

    ``cells`` are those that it has read so far.
    """

    __slots__ = ("_automata", "_body", "_size", "_tree", "cells")

    def __init__(self, automata: Automata, body: Callable[[], Any]) -> None:
        self.cells: set[Cell] = set()
        self._automata = automata
        self._body = body
        self._size = 0
        self._tree: Any = None

    def __call__(self, vector: Vector) -> Any:
        """Its value in a state (a vector of full length)."""
        if self._size != len(vector):
            self._size, self._tree = len(vector), None  # a constant has become a cell
        node = self._tree
        while node.__class__ is list:
            node = node[1].get(vector[node[0]])
        if node is None:
            recording = Recording()
            self._automata.vectors.load(vector)
            self._automata.world.track(recording)
            node = (self._body(),)
            self.cells |= recording.first.keys()
            self._tree = self._automata.vectors.file(self._tree, recording.first, node)
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
