"""The kernel's blocking locks, with the rules that the kernel checks of them.

Taking one waits until it can be had. All of them keep account of what the task holds (``Task.held``) and of what
forbids it to sleep (``Task.atomic``), and check, in every way of running:

- *no sleep in atomic context* (``might_sleep``): with a spinning lock held, in an RCU read section, with interrupts
  off;
- *lock order*: an acquisition that closes a cycle in the order seen so far is reported, though no deadlock happened
  (lockdep); two locks of one class must be taken in ascending rank;
- *no recursion*, and *no unlock of what is not held*.

Letting go is no step of its own: nobody can tell at which moment a lock that only has waiters was released.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import FrameType
from typing import ClassVar, TypeVar

from septum.core.cells import Shared
from septum.core.steps import Task, Violation, ctx, current_task, emit, require, wait_until

T = TypeVar("T")


def might_sleep(what: object) -> None:
    """Reports a violation when the current task may not sleep."""
    task = current_task()
    if task.atomic:
        require(
            False,
            "no sleep in atomic context",
            f"{task.name} may sleep in {what}, but holds {', '.join(task.atomic)}"
            f" (all locks: {', '.join(task.held) or 'none'}; called through {call_path()})",
        )


def call_path() -> str:
    """The functions of the model that the current task is in, outermost first, without those that run the task."""
    names: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if not module.startswith("septum.core."):
            names.append(name)
        elif module != __name__:
            break
        frame = frame.f_back
    return " > ".join(name for name in reversed(names) if not name.startswith("<"))


def forbid_sleep(reason: str) -> None:
    """From here on the current task may not sleep, because of ``reason``."""
    task = current_task()
    task.atomic = (*task.atomic, reason)


def allow_sleep(reason: str) -> None:
    """Takes back the last :func:`forbid_sleep` with this reason."""
    task = current_task()
    if reason not in task.atomic:
        require(False, "balanced locking", f"{task.name} leaves {reason}, where it is not")
    task.atomic = _without_last(task.atomic, reason)


class Section(ABC):
    """An ``async with`` block between an action and its opposite.

    The opposite is left out when the block does not end but is abandoned: because a property failed in it, or
    because a scheduler drops the task.
    """

    @abstractmethod
    async def enter(self) -> None:
        """What happens first. May wait."""

    @abstractmethod
    def leave(self) -> None:
        """What happens last."""

    async def __aenter__(self) -> None:
        await self.enter()

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or not issubclass(kind, (GeneratorExit, Violation)):
            self.leave()


class AtomicSection(Section):
    """A section in which the current task may not sleep: RCU read side, preemption off."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def enter(self) -> None:
        """Forbids sleeping."""
        forbid_sleep(self.reason)

    def leave(self) -> None:
        """Allows it again."""
        allow_sleep(self.reason)


class KernelLock(Shared):
    """What all blocking locks share. The name is ``class`` or ``class[number]``; the number orders locks of a class.

    ``writer`` is the name of the task that holds it exclusively, ``readers`` those that hold it shared.
    """

    sleeps: ClassVar[bool] = True
    writer: str | None = None
    readers: tuple[str, ...] = ()
    waiters: int = 0

    @property
    def lock_class(self) -> str:
        """The name without the part in brackets: all ``vcpu->mutex[...]`` are one class."""
        return self.name.partition("[")[0]

    def is_contended(self) -> bool:
        """Whether somebody waits (``rwlock_needbreak``, ``spin_needbreak``)."""
        return self.waiters > 0

    async def take(self, *, shared: bool) -> None:
        """Waits for the lock and takes it; for what ``async with`` cannot express."""
        task = current_task()
        if self.sleeps:
            might_sleep(self.name)
        note_order(task, self)
        self.waiters += 1
        await wait_until((lambda: self.writer is None) if shared else self._is_free, "lock", self)
        self.waiters -= 1
        self._granted(task, shared)

    def _is_free(self) -> bool:
        return self.writer is None and not self.readers

    def _granted(self, task: Task, shared: bool) -> None:
        if shared:
            self.readers = (*self.readers, task.name)
        else:
            self.writer = task.name
        task.held = (*task.held, self.name)
        if not self.sleeps:
            task.atomic = (*task.atomic, self.name)
        if ctx.trace is not None:
            emit("klock", f"+{self.name}", shared=shared)

    def let_go(self, *, shared: bool) -> None:
        """The opposite of :meth:`take`."""
        task = current_task()
        holds = task.name in self.readers if shared else self.writer == task.name
        if not holds:
            require(False, "balanced locking", f"{task.name} unlocks {self.name}, which it does not hold")
        if shared:
            self.readers = _without_last(self.readers, task.name)
        else:
            self.writer = None
        task.held = _without_last(task.held, self.name)
        if not self.sleeps:
            task.atomic = _without_last(task.atomic, self.name)
        if ctx.trace is not None:
            emit("klock", f"-{self.name}", shared=shared)


class Hold(Section):
    """A lock held in one mode, as ``async with``."""

    def __init__(self, lock: KernelLock, *, shared: bool) -> None:
        self.lock = lock
        self.shared = shared

    async def enter(self) -> None:
        """Waits for the lock and takes it."""
        await self.lock.take(shared=self.shared)

    def leave(self) -> None:
        """Lets it go."""
        self.lock.let_go(shared=self.shared)


class Mutex(KernelLock):
    """``struct mutex``: one owner, waiters sleep. Use as ``async with mutex.locked():``."""

    def locked(self) -> Hold:
        """``mutex_lock`` to ``mutex_unlock``."""
        return Hold(self, shared=False)

    def trylock(self) -> bool:
        """``mutex_trylock``: takes the mutex if it is free. Never waits, and so adds nothing to the lock order."""
        if self.writer is not None:
            return False
        self._granted(current_task(), False)
        return True


class SpinLock(Mutex):
    """``spinlock_t``: as a mutex, but waiters spin and the owner may not sleep."""

    sleeps: ClassVar[bool] = False


class RwLock(KernelLock):
    """``rwlock_t``: many readers or one writer; waiters spin and holders may not sleep."""

    sleeps: ClassVar[bool] = False

    def read(self) -> Hold:
        """``read_lock`` to ``read_unlock``."""
        return Hold(self, shared=True)

    def write(self) -> Hold:
        """``write_lock`` to ``write_unlock``."""
        return Hold(self, shared=False)

    async def resched(self) -> None:
        """``cond_resched_rwlock_read`` or ``_write``: lets the lock go, and takes it again in the same mode."""
        shared = current_task().name in self.readers
        self.let_go(shared=shared)
        await self.take(shared=shared)


class RwSem(RwLock):
    """``struct rw_semaphore``: as a rwlock, but waiters and holders may sleep."""

    sleeps: ClassVar[bool] = True


class Srcu(Shared):
    """``struct srcu_struct``: readers may sleep; :meth:`synchronize` waits for those that were in before it began."""

    generation: int = 0
    readers: tuple[tuple[str, int], ...] = ()

    def read_lock(self) -> int:
        """Enters a read section and returns the index to leave it with."""
        task = current_task()
        self.readers = tuple(sorted((*self.readers, (task.name, self.generation))))
        task.held = (*task.held, self.name)
        return self.generation

    def read_unlock(self, index: int) -> None:
        """Leaves the read section entered with ``index``."""
        task = current_task()
        if (task.name, index) not in self.readers:
            require(False, "balanced locking", f"{task.name} leaves {self.name} twice")
        self.readers = _without_last(self.readers, (task.name, index))
        task.held = _without_last(task.held, self.name)

    async def synchronize(self) -> None:
        """``synchronize_srcu``. A reader that waits for the caller makes this a deadlock."""
        might_sleep(f"synchronize_srcu({self.name})")
        self.generation += 1
        mine = self.generation
        await wait_until(lambda: all(index >= mine for _, index in self.readers), "synchronize_srcu", self)


def note_order(task: Task, lock: KernelLock) -> None:
    """Adds what ``task`` is about to do to the lock order, and reports a cycle that it closes."""
    order = ctx.lock_order
    new = lock.lock_class
    for held in task.held:
        old = held.partition("[")[0]
        if held == lock.name:
            require(False, "no recursive locking", f"{task.name} takes {lock.name} twice")
        if old == new:
            require(
                _rank(held) < _rank(lock.name),
                "lock order",
                f"{task.name} took {lock.name} while holding {held}; locks of one class go in ascending order",
            )
        if old == new or (old, new) in order:
            continue
        order[old, new] = f"{task.name} took {lock.name} while holding {held}"
        if back := _path(new, old):
            earlier = "; ".join(order[edge] for edge in back)
            ctx.report_cycle([*back, (old, new)], f"{order[old, new]}, but {earlier}")


def _rank(name: str) -> tuple[int, str]:
    """Order within a class: the number in brackets."""
    index = name.partition("[")[2].rstrip("]")
    return (int(index), "") if index.isdecimal() else (0, index)


def _path(start: str, goal: str) -> list[tuple[str, str]]:
    """A chain of recorded orders from one class to another; empty if there is none."""
    chains: list[list[tuple[str, str]]] = [[edge] for edge in ctx.lock_order if edge[0] == start]
    seen = {start}
    while chains:
        chain = chains.pop(0)
        at = chain[-1][1]
        if at == goal:
            return chain
        if at not in seen:
            seen.add(at)
            chains += [[*chain, edge] for edge in ctx.lock_order if edge[0] == at]
    return []


def _without_last(items: tuple[T, ...], item: T) -> tuple[T, ...]:
    if items[-1] == item:
        return items[:-1]
    place = len(items) - 1 - items[::-1].index(item)
    return items[:place] + items[place + 1 :]
