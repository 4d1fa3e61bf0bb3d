"""Calls that take two try-locks: the contention of the TDX Module in its smallest form.

Each of ``vcpus`` virtual CPUs makes ``rounds`` calls. A call takes two locks one after the other, even CPUs in one
order and odd ones in the other, and never waits: a lock that is busy makes it drop what it holds and report BUSY, and
the caller tries again at most ``retry`` times before it gives the round up. Inside, a counter is read and written in
two steps.

With 3 CPUs and 3 retries this is, step for step, the Promela model whose state counts SPIN gives as 4,027, 84,640 and
612,724 for 1, 2 and 3 rounds. ``locks`` below 2 leaves locks out: then updates of the counter get lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from septum.core.automata import Invariant
from septum.core.cells import Shared, SharedMap
from septum.core.steps import Program, Task, emit, require, step
from septum.core.trylocks import Mode, Mutex, Taken
from septum.lab.scenario import Parameter, Scenario


class Vcpu(Shared):
    """What a caller counts: attempts in this round, rounds won, and the counter as it read it."""

    tries: int = 0
    won: int = 0
    reg: int = 0


class Counter(Shared):
    """What the locks protect."""

    value: int = 0


async def caller(vcpu: Vcpu, counter: Counter, locks: Sequence[Mutex], rounds: int, retry: int) -> None:
    """One virtual CPU."""
    for _round in range(rounds):
        while not await call(vcpu, counter, locks) and vcpu.tries < retry:
            vcpu.tries += 1
        vcpu.tries = 0


async def call(vcpu: Vcpu, counter: Counter, locks: Sequence[Mutex]) -> bool:
    """One call: takes the locks in order, adds 1 to the counter, drops them in reverse. False: a lock was busy."""
    for place, lock in enumerate(locks):
        if await lock.acquire(Mode.EXCLUSIVE) is not Taken.YES:
            for held in locks[:place][::-1]:
                await held.release(Mode.EXCLUSIVE)
            return False
    await step("read", counter)
    vcpu.reg = counter.value
    emit("read", f"reads {vcpu.reg}")
    await step("write", counter)
    require(
        counter.value == vcpu.reg, "no lost update", f"{vcpu} read {vcpu.reg}, but the counter is now {counter.value}"
    )
    counter.value = vcpu.reg + 1
    emit("write", f"writes {counter.value}")
    vcpu.won += 1
    vcpu.reg = 0
    for held in locks[::-1]:
        await held.release(Mode.EXCLUSIVE)
    return True


def build(vcpus: int, rounds: int, retry: int, locks: int) -> tuple[list[Program], list[Invariant]]:
    """The scenario's tasks."""
    words: SharedMap[int, int] = SharedMap("words", 0)
    counter = Counter("counter")
    pair = [Mutex(words, 0, "lock 0"), Mutex(words, 1, "lock 1")]

    def program(index: int) -> Program:
        vcpu = Vcpu(f"vcpu{index}")
        order = (pair if index % 2 == 0 else pair[::-1])[:locks]
        return Program(Task(f"vcpu{index} thread", cpu=index), lambda: caller(vcpu, counter, order, rounds, retry))

    return [program(index) for index in range(vcpus)], []


SCENARIOS = (
    Scenario(
        "trylock",
        "calls that take two try-locks in opposite orders and retry when one is busy",
        build,
        (
            Parameter("vcpus", 3, "virtual CPUs that call", 1, 8),
            Parameter("rounds", 2, "calls that each makes", 0, 20),
            Parameter("retry", 3, "attempts after the first", 0, 20),
            Parameter("locks", 2, "locks that each call takes (below 2, updates get lost)", 0, 2),
        ),
        reducible=False,
    ),
)
