"""The explorer: known state counts, agreement with brute force, counterexamples that are shortest and replay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.core.cells import Shared, Tracking, World
from septum.core.explore import Bounds, Explorer
from septum.core.run import at_random, recorded, run
from septum.core.steps import Program, Task, require, step, wait_until
from septum.lab.recording import counterexample, explore, replay
from septum.lab.scenario import find_scenario
from tests.core.programs import Machine, Texts, brute_force, programs_of, texts

TEXTS = texts()


@pytest.mark.parametrize(("rounds", "states"), [(1, 4_027), (2, 84_640)])
@pytest.mark.parametrize("exact", [False, True])
def test_trylock_has_the_states_that_spin_counts(rounds: int, states: int, exact: bool) -> None:
    scenario = find_scenario("trylock")
    verdict = explore(scenario, scenario.values([f"rounds={rounds}"]), Bounds(), exact=exact)
    assert (verdict.verdict, verdict.states) == ("proved", states)
    assert rounds != 2 or verdict.transitions == 225_801


@pytest.mark.slow
def test_trylock_with_three_rounds() -> None:
    scenario = find_scenario("trylock")
    verdict = explore(scenario, scenario.values(["rounds=3"]), Bounds())
    assert (verdict.verdict, verdict.states) == ("proved", 612_724)


@settings(max_examples=400)
@given(TEXTS, st.booleans())
def test_agrees_with_brute_force(programs: Texts, exact: bool) -> None:
    _states, ends, deadlock = brute_force(programs)
    machine = Machine.fresh()
    before = machine.values()

    def observe(results: list[Any]) -> Any:
        return machine.values(), tuple(results)

    verdict = Explorer(
        machine.world, programs_of(machine, programs), observer=observe, exact=exact, check_merges=True
    ).explore()
    if deadlock:
        assert (verdict.verdict, verdict.property) == ("violated", "no deadlock")
    else:
        assert verdict.verdict == "proved", verdict.message
        assert set(verdict.outcomes) == ends
    assert machine.values() == before, "exploring must leave the world as it was"


@settings(max_examples=150)
@given(TEXTS)
def test_never_more_states_than_brute_force(programs: Texts) -> None:
    """Equal local states are merged, never told apart: dead registers can only make fewer."""
    states, _ends, deadlock = brute_force(programs)
    machine = Machine.fresh()
    verdict = Explorer(machine.world, programs_of(machine, programs)).explore()
    assert deadlock or verdict.states <= len(states)


@settings(max_examples=150)
@given(TEXTS)
def test_each_outcome_has_a_schedule_that_leads_there(programs: Texts) -> None:
    machine = Machine.fresh()

    def observe(results: list[Any]) -> Any:
        return machine.values(), tuple(results)

    tasks = programs_of(machine, programs)
    verdict = Explorer(machine.world, tasks, observer=observe).explore()
    for (cells, results), schedule in verdict.outcomes.items():
        again = Machine.fresh()
        outcome = run(programs_of(again, programs), recorded(schedule), max_steps=len(schedule))
        assert (again.values(), tuple(outcome.results)) == (cells, results)


@settings(max_examples=100)
@given(TEXTS, st.integers(0, 1 << 32))
def test_random_runs_end_where_the_explorer_says(programs: Texts, seed: int) -> None:
    _states, ends, _deadlock = brute_force(programs)
    machine = Machine.fresh()
    outcome = run(programs_of(machine, programs), at_random(seed))
    assert outcome.violation == "no deadlock" or (machine.values(), tuple(outcome.results)) in ends


class Pair(Shared):
    x: int = 0
    y: int = 0


def pair_world() -> tuple[World, Pair]:
    world = Tracking.world = World()
    return world, Pair("pair")


def test_counterexample_is_shortest() -> None:
    world, pair = pair_world()

    async def walk(limit: int) -> None:
        for _ in range(limit):
            await step("x")
            pair.x += 1

    async def jump() -> None:
        await step("y")
        pair.y = 5

    def below() -> None:
        require(pair.x + pair.y < 6, "small", f"{pair.x} + {pair.y}")

    programs = [Program(Task("walk", cpu=0), lambda: walk(9)), Program(Task("jump", cpu=1), jump)]
    verdict = Explorer(world, programs, invariants=[below]).explore()
    assert (verdict.verdict, verdict.property) == ("violated", "small")
    assert sorted(verdict.schedule) == [0, 1]


def test_bounds_never_claim_more_than_was_looked_at() -> None:
    scenario = find_scenario("trylock")
    values = scenario.values([])
    assert explore(scenario, values, Bounds(depth=3)).verdict == "bounded"
    assert explore(scenario, values, Bounds(states=100)).verdict == "bounded"
    assert explore(scenario, values, Bounds(seconds=0)).verdict == "bounded"
    small = scenario.values(["vcpus=1", "rounds=1"])
    assert explore(scenario, small, Bounds(states=10**6, depth=10**6)).verdict == "proved"


def test_waiting_for_ever_is_a_deadlock_but_a_daemon_may_wait() -> None:
    world, pair = pair_world()

    async def wait() -> None:
        await wait_until(lambda: pair.x == 1, "see", pair)

    task = Task("waiter", cpu=0)
    assert Explorer(world, [Program(task, wait)]).explore().property == "no deadlock"
    assert Explorer(world, [Program(task, wait, daemon=True)]).explore().verdict == "proved"


@pytest.mark.parametrize(
    ("name", "params", "prop"),
    [
        ("trylock", ["locks=1", "rounds=1"], "no lost update"),
        ("trylock", ["locks=0", "rounds=1", "vcpus=2"], "no lost update"),
        ("abba", [], "no deadlock"),
        ("abba", ["meet=no"], "lock order"),
        ("sleep-in-atomic", [], "no sleep in atomic context"),
    ],
)
def test_violations_are_found_and_replay(name: str, params: list[str], prop: str) -> None:
    scenario = find_scenario(name)
    values = scenario.values(params)
    verdict = explore(scenario, values, Bounds())
    assert (verdict.verdict, verdict.property) == ("violated", prop)
    recording, outcomes = counterexample(scenario, values, verdict)
    assert outcomes[-1].violation == prop
    again = replay(recording)
    assert [o.trace.events for o in again] == [o.trace.events for o in outcomes]
