"""Reductions: fewer states, the same verdicts, deadlocks, ends and broken invariants as brute force."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, combinations
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.core.cells import Shared, SharedMap, Tracking, World
from septum.core.explore import REDUCTIONS, Bounds, Explorer, Verdict
from septum.core.klocks import Mutex as KernelMutex
from septum.core.steps import Program, Task, require, step, wait_until
from septum.lab.recording import counterexample, explore
from septum.lab.scenario import find_scenario
from tests.core.programs import Machine, Texts, brute_force, looping_texts, programs_of, texts

ORDER = [("lock-free",), ("footprint",), ("lock-free", "footprint")]


def explored(programs: Texts, invariant: tuple[int, int] | None = None, **options: Any) -> Verdict:
    machine = Machine.fresh()

    def observe(results: list[Any]) -> Any:
        return machine.values(), tuple(results)

    def differ() -> None:
        one, other = invariant or (0, 0)
        require(machine.get(one) + machine.get(other) != 3, "never three", "three")

    return Explorer(
        machine.world,
        programs_of(machine, programs),
        observer=observe,
        invariants=[differ] if invariant else [],
        **options,
    ).explore()


@settings(max_examples=1000)
@given(texts(cells=6), st.sampled_from(ORDER), st.booleans(), st.booleans())
def test_order_reductions_agree_with_brute_force(
    programs: Texts, reductions: tuple[str, ...], exact: bool, depth_first: bool
) -> None:
    states, ends, deadlock = brute_force(programs)
    verdict = explored(programs, exact=exact, depth_first=depth_first, reductions=reductions)
    if deadlock:
        assert (verdict.verdict, verdict.property) == ("violated", "no deadlock")
    else:
        assert verdict.verdict == "proved"
        assert set(verdict.outcomes) == ends
        assert verdict.states <= len(states)


@settings(max_examples=1000)
@given(texts(cells=6), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.sampled_from(ORDER), st.booleans())
@example(((("set", 2, 1), ("set", 2, 0)), (("set", 3, 2), ("set", 3, 0))), (2, 3), ("footprint",), False)
def test_invariants_see_all_that_they_would(
    programs: Texts, invariant: tuple[int, int], reductions: tuple[str, ...], depth_first: bool
) -> None:
    one, other = invariant
    states, _ends, deadlock = brute_force(programs)
    broken = any(cells[one] + cells[other] == 3 for cells, _tasks in states)
    verdict = explored(programs, invariant, depth_first=depth_first, reductions=reductions)
    allowed: list[str | None] = [name for name, found in (("never three", broken), ("no deadlock", deadlock)) if found]
    assert verdict.property in (allowed or [None])
    assert (verdict.verdict == "violated") == (broken or deadlock)


@settings(max_examples=1000)
@given(looping_texts(), st.tuples(st.integers(0, 5), st.integers(0, 5)), st.sampled_from(ORDER), st.booleans())
def test_loops_hide_nothing(
    programs: Texts, invariant: tuple[int, int], reductions: tuple[str, ...], depth_first: bool
) -> None:
    """Tasks that start over for ever: nobody may be made to wait for the end of a loop."""
    one, other = invariant
    states, _ends, deadlock = brute_force(programs)
    broken = any(cells[one] + cells[other] == 3 for cells, _tasks in states)
    verdict = explored(programs, invariant, depth_first=depth_first, reductions=reductions)
    assert (verdict.verdict == "violated") == (broken or deadlock)


def test_independent_tasks_have_one_order() -> None:
    own = tuple(tuple(("add", cell, 1) for _ in range(4)) for cell in (2, 3, 4))
    assert explored(own).states == 125
    assert explored(own, reductions=["lock-free"]).states == 13
    assert explored(own, reductions=["footprint"]).states == 13


def test_footprints_see_what_comes_later() -> None:
    """Cell 2 is used by both, but by the second only at first: then the first task's steps can be run alone."""
    early = (("set", 2, 1), *[("add", 3, 1)] * 6)
    late = (("wait", 2, 1), *[("add", 2, 1)] * 6)
    plain, private = explored((early, late)), explored((early, late), reductions=["lock-free"])
    both = explored((early, late), reductions=["footprint"])
    assert both.states <= private.states < plain.states


class Count(Shared):
    done: int = 0


def equal_tasks(count: int, body: Callable[[Task, Count, Mutexes, SharedMap[Any, int]], Any]) -> Any:
    world = Tracking.world = World()
    locks, table = [KernelMutex("a"), KernelMutex("b")], SharedMap[Any, int]("table", 0)
    programs = []
    for i in range(count):
        task, own = Task(f"vcpu{i} thread", cpu=i), Count(f"vcpu{i}")
        programs.append(Program(task, partial(body, task, own, locks, table), group="vcpu", owns=[own]))
    return world, programs


Mutexes = list[KernelMutex]


async def work(task: Task, own: Count, locks: Mutexes, table: SharedMap[Any, int]) -> int:
    for _ in range(2):
        async with locks[0].locked():
            await step("write", own)
            own.done += 1
            table[own] = own.done
            await step("add", own)
            table["sum"] += 1
    return own.done


@pytest.mark.parametrize(("count", "least"), [(2, 1.7), (3, 3.5)])
def test_symmetry_makes_fewer_states(count: int, least: float) -> None:
    verdicts = []
    for reductions in ([], ["symmetry"], list(REDUCTIONS)):
        world, programs = equal_tasks(count, work)
        verdicts.append(Explorer(world, programs, reductions=reductions).explore())
    plain, folded, all_of_them = verdicts
    assert {v.verdict for v in verdicts} == {"proved"}
    assert plain.states / folded.states > least
    assert all_of_them.states <= folded.states


@settings(max_examples=300)
@given(
    texts(tasks=1, length=5, cells=6),
    st.integers(2, 3),
    st.sampled_from([*chain(*(combinations(REDUCTIONS, n) for n in (1, 2, 3)))]),
)
@example(((("wait", 0, 1), ("add", 0, 1)),), 2, ("symmetry",))
def test_symmetry_keeps_verdicts(programs: Texts, count: int, reductions: tuple[str, ...]) -> None:
    """Equal programs: the states without symmetry, up to the order of tasks, are those with it."""
    alike = programs * count
    states, ends, deadlock = brute_force(alike)
    machine = Machine.fresh()
    tasks = [Program(p.task, p.body, group="equal") for p in programs_of(machine, alike)]
    verdict = Explorer(
        machine.world, tasks, observer=lambda results: (machine.values(), tuple(sorted(results))), reductions=reductions
    ).explore()
    assert (verdict.verdict == "violated") == deadlock
    if not deadlock:
        assert set(verdict.outcomes) == {(cells, tuple(sorted(registers))) for cells, registers in ends}
        orbits = {(cells, tuple(sorted(places))) for cells, places in states}
        assert "symmetry" not in reductions or verdict.states <= len(orbits)


def test_tasks_that_are_not_equal_are_refused() -> None:
    async def first(task: Task, own: Count, locks: Mutexes, table: SharedMap[Any, int]) -> None:
        await wait_until(lambda: True, "go")
        own.done = task.cpu

    world, programs = equal_tasks(2, work)
    programs[1].owns[0].done = 7
    with pytest.raises(UsageError, match="declared equal"):
        Explorer(world, programs, reductions=["symmetry"]).explore()
    world, programs = equal_tasks(2, first)
    with pytest.raises(UsageError, match="declared equal"):
        Explorer(world, programs, reductions=["symmetry"]).explore()


@pytest.mark.parametrize("name", ["trylock", "abba", "sleep-in-atomic"])
def test_scenarios_have_the_same_verdict(name: str) -> None:
    scenario = find_scenario(name)
    values = scenario.values(["rounds=1"] if name == "trylock" else [])
    plain = explore(scenario, values, Bounds())
    reduced = explore(scenario, values, Bounds(), reductions=REDUCTIONS)
    assert (plain.verdict, plain.property) == (reduced.verdict, reduced.property)
    if reduced.verdict == "violated":
        assert counterexample(scenario, values, reduced)[1][-1].violation == reduced.property
