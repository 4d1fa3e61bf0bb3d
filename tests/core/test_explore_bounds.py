"""Depth-first search and bounds: same verdicts, and bounds that are exact about what was looked at."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.core.explore import Bounds, Explorer
from septum.lab.recording import counterexample, explore
from septum.lab.scenario import find_scenario
from tests.core.programs import Machine, Texts, brute_force, least_preemptions, programs_of, texts


def explorer_of(programs: Texts, **options: Any) -> Explorer:
    machine = Machine.fresh()

    def observe(results: list[Any]) -> Any:
        return machine.values(), tuple(results)

    return Explorer(machine.world, programs_of(machine, programs), observer=observe, **options)


@settings(max_examples=400)
@given(texts(), st.booleans())
def test_depth_first_agrees_with_brute_force(programs: Texts, exact: bool) -> None:
    _states, ends, deadlock = brute_force(programs)
    verdict = explorer_of(programs, exact=exact, depth_first=True).explore()
    broad = explorer_of(programs, exact=exact).explore()
    assert (verdict.verdict, verdict.property) == (broad.verdict, broad.property)
    if not deadlock:
        assert (verdict.verdict, set(verdict.outcomes)) == ("proved", ends)
        assert (verdict.states, verdict.transitions) == (broad.states, broad.transitions)


@settings(max_examples=400)
@given(texts(), st.integers(0, 4), st.booleans())
def test_preemption_bound_looks_at_just_the_runs_with_so_many(programs: Texts, limit: int, exact: bool) -> None:
    ends, deadlock = least_preemptions(programs)
    verdict = explorer_of(programs, exact=exact).explore(Bounds(preemptions=limit))
    if deadlock <= limit:
        assert (verdict.verdict, verdict.property) == ("violated", "no deadlock")
    else:
        assert set(verdict.outcomes) == {end for end, least in ends.items() if least <= limit}
        if verdict.verdict == "bounded":
            assert verdict.preemptions == limit
            assert verdict.unexpanded
        else:
            assert verdict.states == explorer_of(programs).explore().states


@settings(max_examples=200)
@given(texts())
def test_depth_is_proved_when_all_levels_were_looked_at(programs: Texts) -> None:
    whole = explorer_of(programs).explore()
    if whole.verdict == "proved":
        assert explorer_of(programs).explore(Bounds(depth=whole.depth)).states == whole.states
        if whole.depth > 1:
            less = explorer_of(programs).explore(Bounds(depth=whole.depth - 1))
            assert (less.verdict, less.depth) == ("bounded", whole.depth - 1)
            assert less.unexpanded > 0


def test_depth_first_counts_what_spin_counts() -> None:
    scenario = find_scenario("trylock")
    verdict = explore(scenario, scenario.values([]), Bounds(), depth_first=True)
    assert (verdict.verdict, verdict.states, verdict.transitions) == ("proved", 84_640, 225_801)


def test_a_lost_update_needs_one_preemption() -> None:
    scenario = find_scenario("trylock")
    values = scenario.values(["locks=0", "rounds=1", "vcpus=2"])
    assert explore(scenario, values, Bounds(preemptions=0)).verdict == "bounded"
    verdict = explore(scenario, values, Bounds(preemptions=1))
    assert (verdict.verdict, verdict.property) == ("violated", "no lost update")
    assert counterexample(scenario, values, verdict)[1][-1].violation == "no lost update"


@pytest.mark.parametrize("bounds", [Bounds(depth=3), Bounds(preemptions=3)])
def test_depth_first_refuses_bounds_that_it_cannot_keep(bounds: Bounds) -> None:
    scenario = find_scenario("trylock")
    with pytest.raises(ValueError, match="depth-first"):
        explore(scenario, scenario.values([]), bounds, depth_first=True)
