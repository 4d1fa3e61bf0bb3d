"""Liveness: lassos are found where brute force says that a fair scheduler can keep a task for ever, and only there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings

from septum.core.cells import Shared, Tracking, World
from septum.core.explore import Explorer, Verdict
from septum.core.run import recorded, run
from septum.core.steps import Program, Task, progress, step, wait_until
from tests.core.programs import Machine, Texts, brute_force, looping_texts, programs_of, successors


class Flags(Shared):
    busy: bool = False
    turn: int = 0


Body = Callable[[Flags], Awaitable[Any]]


def explored(*bodies: Body, daemons: int = 0, exact: bool = False) -> Verdict:
    world = Tracking.world = World()
    flags = Flags("flags")

    def program(i: int, body: Body) -> Program:
        return Program(Task(f"t{i}", cpu=i), lambda: body(flags), daemon=i >= len(bodies) - daemons)  # type: ignore[arg-type, return-value]

    programs = [program(i, body) for i, body in enumerate(bodies)]
    return Explorer(world, programs, liveness=True, exact=exact).explore()


async def retry_for_ever(flags: Flags) -> None:
    await step("try")
    while flags.busy:
        await step("try")
    flags.busy = True
    await step("drop")
    flags.busy = False


async def hold_and_wait(flags: Flags) -> None:
    await step("take")
    flags.busy = True
    await wait_until(lambda: flags.turn == 1, "see the turn")
    flags.busy = False


async def fault_again(flags: Flags) -> None:
    while True:
        await step("fault")


async def serve(flags: Flags) -> None:
    while True:
        await step("serve")
        progress("served")


async def toggle(flags: Flags) -> None:
    while True:
        await step("toggle")
        flags.busy = not flags.busy
        progress("toggled")


async def give_turn(flags: Flags) -> None:
    await step("give")
    flags.turn = 1


@pytest.mark.parametrize("exact", [False, True])
def test_retrying_ends_when_the_holder_does(exact: bool) -> None:
    verdict = explored(retry_for_ever, retry_for_ever, exact=exact)
    assert (verdict.verdict, verdict.liveness) == ("proved", True)


@pytest.mark.parametrize(
    ("bodies", "daemons", "who"),
    [
        ([fault_again], 0, "t0 goes on"),
        ([serve, fault_again], 0, "t1 goes on"),
        ([fault_again, serve], 0, "t0 goes on"),
        ([retry_for_ever, hold_and_wait, serve], 0, "t0 goes on"),
        ([retry_for_ever, toggle], 0, "t0 goes on"),
        ([hold_and_wait, serve], 0, "t0 waits"),
        ([hold_and_wait, serve], 1, "t0 waits"),
    ],
)
def test_lassos(bodies: list[Body], daemons: int, who: str) -> None:
    verdict = explored(*bodies, daemons=daemons)
    assert (verdict.verdict, verdict.property) == ("violated", "progress")
    assert verdict.message.startswith(who)
    assert verdict.loop


@pytest.mark.parametrize(
    ("bodies", "daemons"),
    [([serve], 0), ([serve, serve], 0), ([fault_again], 1), ([hold_and_wait, give_turn, serve], 0)],
)
def test_tasks_that_get_on_or_need_not(bodies: list[Body], daemons: int) -> None:
    assert explored(*bodies, daemons=daemons).verdict == "proved"


def kept_for_ever(programs: Texts) -> bool:
    """By brute force over sets of tasks: states from which a fair scheduler can stay in a loop that ends no task.

    A loop in which all tasks of ``movers`` go and no other can: the largest set of states with edges in it, each
    of which reaches, inside the set, an edge of every mover.
    """
    states, _ends, _deadlock = brute_force(programs)
    tasks = range(len(programs))
    for count in range(1, len(programs) + 1):
        for movers in combinations(tasks, count):
            left = {s for s in states if {*successors(programs, s)} <= {*movers}}
            changed = True
            while changed:
                changed = False
                for mover in movers:
                    reach = {s for s in left if successors(programs, s).get(mover) in left}
                    todo = reach
                    while todo:
                        todo = {s for s in left - reach if {*successors(programs, s).values()} & todo}
                        reach |= todo
                    changed |= reach != left
                    left = reach
            if left:
                return True
    return False


@settings(max_examples=500)
@given(looping_texts())
def test_agrees_with_brute_force(programs: Texts) -> None:
    _states, _ends, deadlock = brute_force(programs)
    machine = Machine.fresh()
    verdict = Explorer(machine.world, programs_of(machine, programs), liveness=True).explore()
    endless = kept_for_ever(programs)
    assert (verdict.verdict == "violated") == (deadlock or endless)
    if verdict.property == "progress":
        again = Machine.fresh()
        once = run(programs_of(again, programs), recorded(verdict.schedule), max_steps=len(verdict.schedule))
        before = again.values()
        again = Machine.fresh()
        whole = [*verdict.schedule, *verdict.loop * 3]
        outcome = run(programs_of(again, programs), recorded(whole), max_steps=len(whole))
        assert once.violation is outcome.violation is None
        assert again.values() == before, "the loop leads back"
