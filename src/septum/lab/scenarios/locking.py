"""The kernel's locking rules broken in the smallest way: what the checks of every run report.

``abba`` takes two mutexes in opposite orders (a deadlock; with ``meet=no`` the two tasks never meet and only the lock
order tells). ``sleep`` waits for a mutex with a spinning lock held, as a contention design does that sleeps until
another SEAMCALL returns while ``mmu_lock`` is held.
"""

from __future__ import annotations

from septum.core.automata import Invariant
from septum.core.cells import Shared
from septum.core.klocks import Mutex, RwLock
from septum.core.steps import Program, Task, wait_until
from septum.lab.scenario import Parameter, Scenario


class Turn(Shared):
    """Lets the second task start only when the first has finished."""

    over: bool = False


def abba(meet: str) -> tuple[list[Program], list[Invariant]]:
    """Two tasks, two mutexes, two orders."""
    a, b, turn = Mutex("kvm->lock"), Mutex("kvm->slots_lock"), Turn("turn")

    async def take(first: Mutex, second: Mutex) -> None:
        if first is b and meet == "no":
            await wait_until(lambda: turn.over, "start after", a)
        async with first.locked(), second.locked():
            pass
        turn.over = True

    return [
        Program(Task("ioctl A", cpu=0), lambda: take(a, b)),
        Program(Task("ioctl B", cpu=1), lambda: take(b, a)),
    ], []


def sleep() -> tuple[list[Program], list[Invariant]]:
    """A task that sleeps under ``mmu_lock``."""
    mmu_lock, queue = RwLock("mmu_lock"), Mutex("seamcall waitqueue")

    async def zap() -> None:
        async with mmu_lock.write(), queue.locked():
            pass

    return [Program(Task("mmu notifier", cpu=0), zap)], []


SCENARIOS = (
    Scenario(
        "abba",
        "two kernel locks in opposite orders: deadlock and lock order",
        abba,
        (Parameter("meet", "yes", "whether the two tasks can meet", choices=("yes", "no")),),
    ),
    Scenario("sleep-in-atomic", "waiting on a waitqueue with mmu_lock held", sleep),
)
