"""The kernel's locks: they exclude, and their rules are checked in every way of running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from septum.core.cells import Shared, Tracking, World
from septum.core.explore import Explorer
from septum.core.interrupts import Cpu, IrqsOff, interrupt_context, smp_call
from septum.core.klocks import AtomicSection, Mutex, RwLock, RwSem, SpinLock, Srcu, might_sleep
from septum.core.run import at_random, round_robin, run, run_solo
from septum.core.steps import Program, Task, Violation, require, step, wait_until


class Count(Shared):
    inside: int = 0
    total: int = 0


@pytest.fixture
def world() -> World:
    Tracking.world = World()
    return Tracking.world


def tasks(*bodies: Callable[[], Any]) -> list[Program]:
    return [Program(Task(f"task{i}", cpu=i), body) for i, body in enumerate(bodies)]


@pytest.mark.parametrize("make", [Mutex, SpinLock])
def test_a_mutex_excludes_in_every_interleaving(world: World, make: type[Mutex]) -> None:
    lock, count = make("lock"), Count("count")

    async def enter() -> None:
        async with lock.locked():
            count.inside += 1
            require(count.inside == 1, "mutual exclusion", "two inside")
            await step("work")
            count.inside -= 1

    verdict = Explorer(world, tasks(enter, enter, enter)).explore()
    assert verdict.verdict == "proved", verdict.message
    assert verdict.states > 10


@pytest.mark.parametrize("make", [RwLock, RwSem])
def test_readers_share_and_writers_exclude(world: World, make: type[RwLock]) -> None:
    lock, count = make("lock"), Count("count")
    together = False

    async def read() -> None:
        nonlocal together
        async with lock.read():
            count.inside += 1
            await step("read")
            together = together or count.inside == 2
            count.inside -= 1

    async def write() -> None:
        async with lock.write():
            require(count.inside == 0, "mutual exclusion", "a writer among readers")
            await step("write")

    verdict = Explorer(world, tasks(read, read, write)).explore()
    assert verdict.verdict == "proved", verdict.message
    assert together


@pytest.mark.parametrize("choose", [round_robin, at_random(1), at_random(2)])
def test_order_checks_work_in_live_runs(world: World, choose: Any) -> None:
    first, second = Mutex("first"), Mutex("second")

    async def both(outer: Mutex, inner: Mutex) -> None:
        async with outer.locked(), inner.locked():
            pass

    outcome = run(tasks(lambda: both(first, second), lambda: both(second, first)), choose)
    assert outcome.violation == "lock order"
    assert "first" in outcome.message
    assert "second" in outcome.message


def test_locks_of_one_class_go_in_ascending_order(world: World) -> None:
    vcpus = [Mutex(f"vcpu->mutex[{i}]") for i in range(3)]

    async def take(*order: int) -> None:
        for i in order:
            await vcpus[i].take(shared=False)

    assert run(tasks(lambda: take(0, 1, 2))).violation is None
    Tracking.world = World()
    vcpus = [Mutex(f"vcpu->mutex[{i}]") for i in range(3)]
    assert run(tasks(lambda: take(1, 0))).violation == "lock order"


def test_a_trylock_never_waits_and_adds_no_order(world: World) -> None:
    a, b = Mutex("a"), Mutex("b")

    async def one() -> bool:
        async with a.locked():
            await step("x")
            return b.trylock()

    async def two() -> None:
        async with b.locked(), a.locked():
            pass

    assert run(tasks(one)).results == [True]
    Tracking.world = World()
    a, b = Mutex("a"), Mutex("b")
    outcome = run(tasks(two))
    assert outcome.violation is None


@pytest.mark.parametrize("context", ["spinlock", "rcu", "irqs"])
def test_sleeping_in_atomic_context_is_reported(world: World, context: str) -> None:
    cpu, spin, mutex = Cpu("cpu", index=0), SpinLock("spin"), Mutex("mutex")

    async def sleep() -> None:
        section = {"spinlock": spin.locked(), "rcu": AtomicSection("rcu"), "irqs": IrqsOff(cpu)}[context]
        async with section, mutex.locked():
            pass

    outcome = run(tasks(sleep))
    assert outcome.violation == "no sleep in atomic context"
    assert "mutex" in outcome.message


def test_spinning_in_atomic_context_is_fine_and_ends(world: World) -> None:
    spin, other, task_state = SpinLock("spin"), SpinLock("other"), Mutex("mutex")

    async def nest() -> None:
        async with spin.locked(), other.locked():
            pass
        async with task_state.locked():
            might_sleep("nothing")

    assert run(tasks(nest)).violation is None


def test_unlocking_what_is_not_held(world: World) -> None:
    lock = Mutex("lock")

    async def wrong() -> None:
        lock.let_go(shared=False)

    assert run(tasks(wrong)).violation == "balanced locking"


def test_recursion_is_reported(world: World) -> None:
    lock = Mutex("lock")

    async def twice() -> None:
        async with lock.locked(), lock.locked():
            pass

    assert run(tasks(twice)).violation == "no recursive locking"


def test_a_failure_inside_leaves_the_lock_as_it_was(world: World) -> None:
    lock = Mutex("lock")

    async def fail() -> None:
        async with lock.locked():
            raise Violation("made up", "inside")

    assert run(tasks(fail)).violation == "made up"
    assert lock.writer == "task0"


def test_srcu_waits_for_readers_that_were_there(world: World) -> None:
    srcu, count = Srcu("srcu"), Count("count")

    async def read() -> None:
        index = srcu.read_lock()
        seen = count.total
        await step("read")
        require(seen == 1 or count.inside == 0, "grace period", "freed under a reader")
        srcu.read_unlock(index)

    async def replace() -> None:
        count.total = 1
        await srcu.synchronize()
        count.inside = 1

    verdict = Explorer(world, tasks(read, read, replace)).explore()
    assert verdict.verdict == "proved", verdict.message


def test_a_reader_that_waits_for_the_synchronizer_is_a_deadlock(world: World) -> None:
    srcu, count = Srcu("srcu"), Count("count")

    async def read() -> None:
        index = srcu.read_lock()
        await wait_until(lambda: count.total == 1, "retry until", count)
        srcu.read_unlock(index)

    async def replace() -> None:
        await srcu.synchronize()
        count.total = 1

    verdict = Explorer(world, tasks(read, replace)).explore()
    assert verdict.property == "no deadlock"
    assert "synchronize_srcu" in verdict.message


def test_ipis_run_on_the_other_cpu_and_wait_for_interrupts_on(world: World) -> None:
    cpus = [Cpu(f"cpu{i}", index=i) for i in range(2)]
    count = Count("count")

    async def serve(cpu: Cpu, amount: int) -> None:
        require(not cpus[1].irqs_off, "no interrupt with interrupts off", "served while off")
        count.total += amount

    async def ask() -> int:
        await smp_call(cpus[1], "add", 5)
        return count.total

    async def busy() -> None:
        async with IrqsOff(cpus[1]):
            await step("work")

    programs = [*tasks(ask, busy), interrupt_context(cpus[1], {"add": serve})]
    verdict = Explorer(world, programs).explore()
    assert verdict.verdict == "proved", verdict.message
    assert run_solo(programs)[0] == 5


def test_waiting_for_an_ipi_with_interrupts_off_is_reported(world: World) -> None:
    cpus = [Cpu(f"cpu{i}", index=i) for i in range(2)]

    async def serve(cpu: Cpu, argument: Any) -> None:
        pass

    async def ask() -> None:
        async with IrqsOff(cpus[0]):
            await smp_call(cpus[1], "x")

    outcome = run([*tasks(ask), interrupt_context(cpus[1], {"x": serve})])
    assert outcome.violation == "no IPI with interrupts off"
