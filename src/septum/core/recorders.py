"""What stands behind the tracked cells while a step is learnt, and while one is fed again with what it read."""

from __future__ import annotations

from typing import Any

from septum.core.cells import poke
from septum.core.steps import require


class Recording:
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


class Feeding:
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
