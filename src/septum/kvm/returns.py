"""The waitqueue of the design "waitqueue": threads that wait for another CPU's SEAMCALL to return."""

from __future__ import annotations

from septum.core.cells import Shared
from septum.core.steps import current_task


class SeamcallReturns(Shared):
    """Who waits, by the names of the tasks."""

    waiting: tuple[str, ...] = ()

    def enqueue(self) -> None:
        """``prepare_to_wait``."""
        name = current_task().name
        if name not in self.waiting:
            self.waiting = (*self.waiting, name)

    def dequeue(self) -> None:
        """``finish_wait``."""
        self._keep({name for name in self.waiting if name != current_task().name})

    def has_woken(self, name: str) -> bool:
        """Whether a task need not wait any longer."""
        return name not in self.waiting

    def wake(self) -> None:
        """A SEAMCALL of the current task has returned: everybody else may try again."""
        self._keep({current_task().name})

    def _keep(self, names: set[str]) -> None:
        if self.waiting:
            self.waiting = tuple(name for name in self.waiting if name in names)
