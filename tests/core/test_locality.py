"""Local states: what distinguishes two suspended tasks, and what must not."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from septum.core.locality import freeze, live_variables, local_state
from septum.core.steps import Step, switch


async def pause() -> None:
    await switch(Step("pause"))


def stopped(body: Callable[[], Coroutine[Any, Any, Any]], steps: int = 1) -> tuple[Any, ...]:
    coroutine = body()
    for _ in range(steps):
        coroutine.send(None)
    key = local_state(coroutine)
    coroutine.close()
    return key


def test_a_retry_loop_closes() -> None:
    async def forget() -> None:
        total = 0
        while True:
            attempt = total
            await pause()
            attempt = total = 1 - total
            await pause()
            print(attempt)
            total = 0

    assert stopped(forget, 1) == stopped(forget, 3)
    assert stopped(forget, 2) == stopped(forget, 4)

    async def count() -> None:
        attempt = 0
        while True:
            await pause()
            attempt += 1

    assert stopped(count, 1) != stopped(count, 2)


def test_exceptions_that_others_have_handled_do_not_count() -> None:
    caught: list[bool] = []

    def look() -> None:
        if not caught:
            try:
                raise KeyError
            except KeyError:
                caught.append(True)

    async def body() -> None:
        look()
        await pause()

    assert stopped(body) == stopped(body)


def test_counters_and_iterators_count() -> None:
    async def counted() -> None:
        for _ in range(3):
            await pause()

    async def listed() -> None:
        for _item in ["same", "same", "same"]:
            await pause()

    for body in (counted, listed):
        assert len({stopped(body, n) for n in (1, 2, 3)}) == 3


def test_values_waiting_on_the_evaluation_stack_count() -> None:
    async def value(number: int) -> int:
        await pause()
        return number

    async def add(first: int) -> int:
        return (await value(first)) + (await value(7))

    one, two = add(1), add(2)
    for coroutine in (one, two):
        coroutine.send(None)
        coroutine.send(None)
    assert local_state(one) != local_state(two)
    one.close()
    two.close()


def test_callers_variables_count() -> None:
    async def outer(kept: int) -> int:
        await pause()
        return kept

    def at(kept: int) -> tuple[Any, ...]:
        return stopped(lambda: outer(kept))

    assert at(1) == at(1)
    assert at(1) != at(2)


def test_handlers_keep_variables_alive() -> None:
    async def guarded(token: int) -> int:
        try:
            await pause()
        except ValueError:
            return token
        return 0

    assert stopped(lambda: guarded(1)) != stopped(lambda: guarded(2))


def test_liveness_of_a_straight_line() -> None:
    def function(a: int, b: int) -> int:
        c = a + b
        c += 1
        return c

    live = live_variables(function.__code__)
    assert live[min(live)] == ("a", "b")
    assert live[max(live)] == ()


def test_freeze_compares_content_not_identity() -> None:
    class Box:
        def __init__(self, item: Any) -> None:
            self.item = item

    assert freeze(Box([1, {2: "x"}])) == freeze(Box([1, {2: "x"}]))
    assert freeze(Box([1])) != freeze(Box((1,)))
    assert freeze(True) != freeze(1)
    loop: list[Any] = []
    loop.append(loop)
    assert freeze(loop) == freeze(loop)


def test_freeze_looks_inside_partials_and_keyword_defaults() -> None:
    def add(a: int, *, b: int = 0) -> int:
        return a + b

    def with_default(value: int) -> Any:
        def inner(*, b: int = value) -> int:
            return b

        return inner

    assert freeze(partial(add, 1, b=2)) == freeze(partial(add, 1, b=2))
    assert len({freeze(p) for p in (partial(add, 1), partial(add, 2), partial(add, b=1), partial(max, 1))}) == 4
    assert freeze(with_default(1)) != freeze(with_default(2))
