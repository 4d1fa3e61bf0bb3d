"""What an ``await`` means: tasks, steps, waiting, and the context that a scheduler sets.

Model code is plain ``async def`` Python on Septum's own schedulers. Three rules:

1. **Every ``await`` of a step is a place where the other tasks may act; between two of them nothing else happens.**
2. **What tasks share lives in cells** (:mod:`septum.core.cells`); everything else that a task holds is its own.
3. **A task is a deterministic function of the cell values it has read.** No clocks, no global variables, no randomness.

So the code between two steps is one atomic transition of the system, the places where others may come in are visible
in the source, and one source runs solo, replayed, at random, exhaustively or in virtual time.

The lock primitives of this package contain the steps; most model code only awaits those. ``step`` marks one
explicitly, ``wait_until`` is a step that others must enable.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any

from septum.core.cells import Shared, SharedMap

if TYPE_CHECKING:
    from septum.core.trace import Trace

#: Granularity of steps. ``SOLO``: none, only waits. ``CALLS``: before each lock attempt and release, blocking
#: operation and explicit step. ``PRIMITIVES``: before and after each lock primitive (the ``op`` level of the recorded
#: interleavings). ``ATOMICS``: also before each atomic instruction inside a primitive. ``FINE``: also after each.
SOLO, CALLS, PRIMITIVES, ATOMICS, FINE = range(5)


class Violation(Exception):
    """A property does not hold. ``property`` is its short name, the message says what happened and where."""

    def __init__(self, prop: str, message: str) -> None:
        super().__init__(message)
        self.property = prop


class Task(Shared):
    """A thread of the host (or an interrupt context of one of its CPUs), pinned to ``cpu``.

    ``held`` lists the kernel locks it holds, outermost first; ``atomic`` counts what forbids sleeping.
    """

    cpu: int
    held: tuple[str, ...] = ()
    atomic: tuple[str, ...] = ()


class Step:
    """What a task yields: what it is about to do, and, for a wait, when it can."""

    __slots__ = ("guard", "kind", "what")

    def __init__(self, kind: str, what: object = None, guard: Callable[[], bool] | None = None) -> None:
        self.kind = kind
        self.what = what
        self.guard = guard

    def __repr__(self) -> str:
        return f"{self.kind} {self.what}" if self.what is not None else self.kind


class Context:
    """Set by the scheduler: the task that runs now, the granularity, and the trace if one is kept.

    ``lock_order`` maps a pair of lock classes, taken one inside the other, to who did so first. A cycle in it is a
    violation at once, or, when ``cycles`` is a list, added to it (the explorer looks for worse first).
    ``progressed`` is whether :func:`progress` was called since the scheduler last cleared it.
    """

    __slots__ = ("cycles", "level", "lock_order", "progressed", "task", "trace")

    def __init__(self) -> None:
        self.level: int = SOLO
        self.task: Task | None = None
        self.trace: Trace | None = None
        self.progressed = False
        self.lock_order: dict[tuple[str, str], str] = {}
        self.cycles: list[tuple[list[tuple[str, str]], str]] | None = None

    def report_cycle(self, edges: list[tuple[str, str]], message: str) -> None:
        """A cycle in the lock order: the pairs that make it, the new one last."""
        if self.cycles is None:
            raise Violation("lock order", message)
        self.cycles.append((edges, message))


ctx = Context()


@types.coroutine
def switch(step: Step) -> Generator[Step, None, None]:
    """Yields to the scheduler, whatever the granularity."""
    yield step


async def step(kind: str, what: object = None) -> None:
    """A place where others may act, before doing ``kind`` to ``what``."""
    if ctx.level:
        await switch(Step(kind, what))


async def wait_until(guard: Callable[[], bool], kind: str, what: object = None) -> None:
    """Goes on only in a state where ``guard()`` holds. The guard may only read shared cells."""
    if ctx.level or not guard():
        await switch(Step(kind, what, guard))


def current_task() -> Task:
    """The task whose code runs now."""
    task = ctx.task
    if task is None:
        raise RuntimeError("model code runs under a scheduler")
    return task


def emit(kind: str, text: str, **data: Any) -> None:
    """Adds an event to the trace, if one is kept. Events never influence the model."""
    if ctx.trace is not None:
        ctx.trace.add(kind, text, data)


def progress(what: object) -> None:
    """The current task got on: ``what`` it was called for is done, and not merely tried again.

    A task that neither ends nor gets on, though every task gets its turn, is what the check of liveness looks for
    (:mod:`septum.core.liveness`). Like an event, progress never influences the model.
    """
    ctx.progressed = True
    emit("progress", f"gets on: {what}")


def require(condition: bool, prop: str, message: str) -> None:
    """Reports a violation of ``prop`` unless ``condition`` holds."""
    if not condition:
        raise Violation(prop, message)


TaskBody = Callable[[], Coroutine[Step, None, Any]]


class Program:
    """A task and the coroutine function that it runs. Daemons (interrupt contexts) need not come to an end.

    Tasks of one ``group`` are equal: nothing changes when two of them are exchanged together with what each ``owns``
    (objects of the same kinds, in the same order). A number that stands for a task must then be in no cell.
    """

    __slots__ = ("body", "daemon", "group", "owns", "task")

    def __init__(
        self,
        task: Task,
        body: TaskBody,
        *,
        daemon: bool = False,
        group: str | None = None,
        owns: Sequence[Shared | SharedMap[Any, Any]] = (),
    ) -> None:
        self.task = task
        self.body = body
        self.daemon = daemon
        self.group = group
        self.owns = owns
