"""The decorator in this very test run: what it lets pass, what it finds, and that what it finds can be run again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import septum
from septum.arch.errors import UsageError
from septum.core.cells import Shared
from septum.core.klocks import Mutex
from septum.core.steps import require, step, wait_until
from septum.testing import Counterexample, Host
from septum.testing.exploration import replaying

STRATEGIES = ["states", "dpor", "pct", "random"]


class Counter(Shared):
    value: int = 0


def counting(host: Host, *, locked: bool) -> None:
    """Two tasks count, with a lock or without."""
    lock, counter = Mutex("lock"), Counter("counter")

    async def add() -> None:
        if locked:
            await lock.take(shared=False)
        await step("read", counter)
        seen = counter.value
        await step("write", counter)
        counter.value = seen + 1
        if locked:
            lock.let_go(shared=False)

    host.spawn(add)
    host.spawn(add)
    host.at_end(lambda: counter.value == 2, "both are counted")


@septum.explore()
def test_a_lock_is_enough(host: Host) -> None:
    counting(host, locked=True)


@pytest.mark.parametrize("locked", [True])
@septum.explore(strategy="dpor")
def test_parameters_and_fixtures_work_as_usual(host: Host, locked: bool, tmp_path: object) -> None:
    assert tmp_path
    counting(host, locked=locked)


@septum.explore(strategy="states")
def test_a_scenario_of_the_library(host: Host) -> None:
    host.scenario("trylock", vcpus=2, rounds=1)
    host.always(lambda: len(host.programs) == 2)


@pytest.fixture
def replay() -> Iterator[Any]:
    """Runs a decorated test along a schedule."""

    def along(test: Any, schedule: str) -> Counterexample:
        replaying.schedule = schedule
        with pytest.raises(Counterexample) as info:
            test()
        return info.value

    yield along
    replaying.schedule = None


def failing(test: Any, strategy: str, **options: Any) -> tuple[Any, Counterexample]:
    decorated = septum.explore(strategy=strategy, **options)(test)  # type: ignore[arg-type]
    with pytest.raises(Counterexample) as info:
        decorated()
    return decorated, info.value


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_update_is_found_shrunk_and_run_again(strategy: str, replay: Any) -> None:
    decorated, found = failing(lambda host: counting(host, locked=False), strategy)
    assert (found.property, str(found)) == ("both are counted", "both are counted: both are counted does not hold")
    assert len(found.schedule.split()) == 3, "two context switches"
    again = replay(decorated, found.schedule)
    assert (str(again), again.diagram) == (str(found), found.diagram)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_asserts_and_exceptions_of_tasks_are_found(strategy: str, replay: Any) -> None:
    def test(host: Host) -> None:
        counter = Counter("counter")

        async def divide() -> None:
            await step("divide", counter)
            assert 1 // (1 - counter.value) == 1

        async def spoil() -> None:
            await step("spoil", counter)
            counter.value = 1

        host.spawn(divide)
        host.spawn(spoil)

    decorated, found = failing(test, strategy)
    assert found.property == "ZeroDivisionError"
    assert "test_explore.py:" in str(found)
    assert str(replay(decorated, found.schedule)) == str(found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_invariants_are_checked_in_every_state(strategy: str) -> None:
    def test(host: Host) -> None:
        first, second = Counter("first"), Counter("second")

        async def set_(counter: Counter, value: int) -> None:
            await step("set", counter)
            counter.value = value

        def together() -> None:
            assert first.value >= second.value, "second came first"

        host.spawn(set_, first, 1)
        host.spawn(set_, second, 1)
        host.always(together)

    found = failing(test, strategy)[1]
    assert (found.property, found.schedule) == ("together", "1")


def abba(host: Host, *, meet: bool) -> None:
    a, b, turn = Mutex("a"), Mutex("b"), Counter("turn")

    async def take(first: Mutex, second: Mutex) -> None:
        if not meet and first is b:
            await wait_until(lambda: turn.value == 1, "wait for", turn)
        async with first.locked(), second.locked():
            pass
        turn.value = 1

    host.spawn(take, a, b)
    host.spawn(take, b, a)


@pytest.mark.parametrize("strategy", ["states", "dpor"])
@pytest.mark.parametrize(("meet", "prop"), [(True, "no deadlock"), (False, "lock order")])
def test_deadlocks_and_the_lock_order(strategy: str, meet: bool, prop: str, replay: Any) -> None:
    decorated, found = failing(lambda host: abba(host, meet=meet), strategy)
    assert found.property == prop
    again = replay(decorated, found.schedule)
    assert (again.property, again.diagram) == (prop, found.diagram)


def test_a_schedule_that_fails_no_more_passes() -> None:
    replaying.schedule = "0*4 1*4"
    try:
        septum.explore()(lambda host: counting(host, locked=True))()
    finally:
        replaying.schedule = None


@pytest.mark.parametrize(("strategy", "bound"), [("states", "states"), ("dpor", "executions"), ("dpor", "depth")])
def test_a_bound_that_is_reached_is_a_failure_unless_allowed(strategy: Any, bound: str) -> None:
    def test(host: Host) -> None:
        host.scenario("trylock", vcpus=2, rounds=1)

    limit: Any = {bound: 3}
    with pytest.raises(UsageError, match="a bound was reached"):
        septum.explore(strategy=strategy, **limit)(test)()
    septum.explore(strategy=strategy, complete=False, **limit)(test)()


def test_misuse() -> None:
    with pytest.raises(UsageError, match="no strategy 'luck'"):
        septum.explore(strategy="luck")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no tasks"):
        septum.explore()(lambda host: None)()
    with pytest.raises(AttributeError):
        _ = septum.nothing


def test_a_violation_that_model_code_reports_keeps_its_name() -> None:
    def test(host: Host) -> None:
        async def fail() -> None:
            await step("fail")
            require(False, "never fails", "it did")

        host.spawn(fail)

    assert failing(test, "states")[1].property == "never fails"


def test_each_step_is_told_once() -> None:
    """By what the model says of it (locks), or else by what the step itself says."""
    drawn = failing(lambda host: abba(host, meet=False), "states")[1].diagram
    assert "+b" in drawn
    assert "lock b" not in drawn
    drawn = failing(lambda host: counting(host, locked=False), "dpor")[1].diagram
    assert [line.split() for line in drawn.splitlines()[3:]] == [
        [str(number), what, "counter"] for number, what in enumerate(("read", "read", "write", "write"), 1)
    ]
