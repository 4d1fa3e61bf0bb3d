"""Dynamic partial-order reduction: every end and deadlock of brute force, in fewer runs, and honest verdicts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.core.cells import Shared, SharedMap, Tracking, World
from septum.core.dpor import Reducer, RunBounds, RunVerdict
from septum.core.run import recorded, run
from septum.core.steps import Program, Task, require, step, wait_until
from septum.lab.recording import Recording, replay
from septum.lab.scenario import find_scenario
from tests.core.programs import WAITS, Machine, Texts, brute_force, programs_of, successors


def texts_of(*operations: str, length: int = 4, tasks: int = 3) -> st.SearchStrategy[Texts]:
    instruction = st.tuples(st.sampled_from(operations), st.integers(0, 3), st.integers(0, 2))
    return st.lists(st.lists(instruction, max_size=length).map(tuple), min_size=1, max_size=tasks).map(tuple)


ALL = texts_of("load", "store", "add", "set", "skip_if", *WAITS)
MANY_WAITS = texts_of("set", "add", "load", *WAITS, length=3, tasks=4)


def reduce(texts: Texts, *, daemons: bool = False) -> RunVerdict:
    machine = Machine.fresh()
    before = machine.values()
    programs = programs_of(machine, texts)
    for program in programs:
        program.daemon = daemons
    observe = lambda results: (machine.values(), tuple(results))  # noqa: E731
    verdict = Reducer(machine.world, programs, observer=observe).explore()
    assert machine.values() == before, "exploring must leave the world as it was"
    return verdict


def ends_and_deadlocks(texts: Texts) -> set[Any]:
    """All states of brute force in which nobody can go on, with what each task that has ended returned."""
    found = set()
    for state in brute_force(texts)[0]:
        if not successors(texts, state):
            cells, tasks = state
            over = zip(texts, tasks, strict=True)
            found.add((cells, tuple(register if place == len(text) else None for text, (place, register) in over)))
    return found


@settings(max_examples=1500)
@given(ALL)
def test_finds_every_end_and_every_deadlock(texts: Texts) -> None:
    assert set(reduce(texts, daemons=True).outcomes) == ends_and_deadlocks(texts)


@settings(max_examples=1000)
@given(MANY_WAITS)
def test_finds_every_end_where_tasks_wait_for_each_other(texts: Texts) -> None:
    assert set(reduce(texts, daemons=True).outcomes) == ends_and_deadlocks(texts)


@settings(max_examples=500)
@given(ALL)
def test_agrees_with_brute_force_on_the_verdict(texts: Texts) -> None:
    _states, ends, deadlock = brute_force(texts)
    verdict = reduce(texts)
    if deadlock:
        assert (verdict.verdict, verdict.property) == ("violated", "no deadlock")
        again = run(programs_of(Machine.fresh(), texts), recorded(verdict.schedule))
        assert (again.violation, again.message) == (verdict.property, verdict.message)
        assert list(again.trace.schedule) == verdict.schedule
    else:
        assert verdict.verdict == "proved"
        assert set(verdict.outcomes) == ends


@settings(max_examples=300)
@given(ALL)
def test_each_outcome_has_a_schedule_that_leads_there(texts: Texts) -> None:
    for (cells, results), schedule in reduce(texts, daemons=True).outcomes.items():
        machine = Machine.fresh()
        outcome = run(programs_of(machine, texts), recorded(schedule), max_steps=len(schedule))
        assert (machine.values(), tuple(outcome.results)) == (cells, results)


@settings(max_examples=600)
@given(ALL, st.tuples(*[st.integers(0, 2)] * 4))
def test_an_invariant_holds_in_every_state_or_it_is_found_not_to(texts: Texts, forbidden: tuple[int, ...]) -> None:
    """The invariant looks at cells one after the other and stops early: what it reads differs from state to state."""
    states, _ends, _deadlock = brute_force(texts)
    machine = Machine.fresh()
    programs = programs_of(machine, texts)
    for program in programs:
        program.daemon = True

    def never() -> None:
        differs = any(machine.get(cell) != value for cell, value in enumerate(forbidden))
        require(differs, "never", "the forbidden state")

    verdict = Reducer(machine.world, programs, invariants=[never]).explore()
    assert (verdict.verdict == "violated") == any(cells[: len(forbidden)] == forbidden for cells, _ in states)
    assert verdict.property in (None, "never")


class Word(Shared):
    value: int = 0


def independent(tasks: int, steps: int, world: World) -> list[Program]:
    def program(index: int) -> Program:
        word = Word(f"word{index}")

        async def count() -> None:
            for _ in range(steps):
                await step("count", word)
                word.value += 1

        return Program(Task(f"t{index}", cpu=index), count)

    return [program(index) for index in range(tasks)]


def test_independent_tasks_take_one_run() -> None:
    world = Tracking.world = World()
    verdict = Reducer(world, independent(4, 10, world)).explore()
    assert (verdict.verdict, verdict.executions, verdict.steps) == ("proved", 1, 40)


@pytest.mark.parametrize("tasks", [2, 3, 4, 5])
def test_tasks_with_one_conflicting_step_each_take_as_many_runs_as_there_are_orders(tasks: int) -> None:
    world = Tracking.world = World()
    words: SharedMap[int, int] = SharedMap("words", 0)

    async def body(index: int) -> None:
        await step("own", index)
        words[index + 1] = 1
        await step("shared", index)
        words[0] = words[0] * 7 + index + 1

    programs = [Program(Task(f"t{i}", cpu=i), partial(body, i)) for i in range(tasks)]
    verdict = Reducer(world, programs, observer=lambda _: words[0]).explore()
    assert len(verdict.outcomes) == math.factorial(tasks)
    assert verdict.executions - verdict.pruned == math.factorial(tasks)


def test_objects_made_during_a_run_are_the_same_cells_in_the_next() -> None:
    """Two tasks meet in an object that one of them makes: names, not identities, tell cells apart."""
    world = Tracking.world = World()
    box: SharedMap[str, Word] = SharedMap("box")
    objects = len(world.objects)

    async def maker() -> None:
        await step("make")
        box["made"] = Word("made")
        await step("write")
        box["made"].value = 1

    async def reader() -> int:
        await wait_until(lambda: box.get("made") is not None, "see", box)
        return box["made"].value

    programs = [Program(Task("maker", cpu=0), maker), Program(Task("reader", cpu=1), reader)]
    verdict = Reducer(world, programs, observer=lambda results: results[1]).explore()
    assert set(verdict.outcomes) == {0, 1}
    assert len(world.objects) == objects + 2


def test_bounds_never_claim_more_than_was_looked_at() -> None:
    world = Tracking.world = World()
    word = Word("word")

    async def spin() -> None:
        while not word.value:
            await step("spin", word)

    async def let_go() -> None:
        await step("let go", word)
        word.value = 1

    programs = [Program(Task("spin", cpu=0), spin), Program(Task("let go", cpu=1), let_go)]
    verdict = Reducer(world, programs).explore(RunBounds(depth=20))
    assert (verdict.verdict, verdict.depth) == ("bounded", 20)
    assert Reducer(world, programs).explore(RunBounds(executions=1)).verdict == "bounded"
    assert Reducer(world, programs).explore(RunBounds(depth=20, seconds=0)).verdict == "bounded"
    assert Reducer(world, programs[1:]).explore(RunBounds(executions=5, depth=1)).verdict == "proved"


@pytest.mark.parametrize(
    ("name", "params", "prop"),
    [
        ("trylock", ["vcpus=2", "rounds=1"], None),
        ("trylock", ["vcpus=3", "rounds=1", "retry=0"], None),
        ("trylock", ["locks=1", "rounds=1"], "no lost update"),
        ("trylock", ["locks=0", "rounds=1", "vcpus=2"], "no lost update"),
        ("abba", [], "no deadlock"),
        ("abba", ["meet=no"], "lock order"),
        ("sleep-in-atomic", [], "no sleep in atomic context"),
    ],
)
def test_scenarios_have_the_verdict_of_the_state_explorer(name: str, params: list[str], prop: str | None) -> None:
    scenario = find_scenario(name)
    values = scenario.values(params)
    setting = scenario.setting(values)
    verdict = Reducer(setting.world, setting.programs, invariants=setting.invariants, level=scenario.level).explore()
    assert (verdict.verdict, verdict.property) == ("violated" if prop else "proved", prop)
    if prop:
        witnesses = tuple(map(tuple, verdict.witnesses))
        outcome = replay(Recording(name, values, tuple(verdict.schedule), witnesses, prop))[-1]
        assert (outcome.violation, outcome.message) == (prop, verdict.message)
