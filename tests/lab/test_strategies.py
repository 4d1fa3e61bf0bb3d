"""The strategies on scenarios: a stage leaves no traces between runs, samplers are reproducible, verdicts agree."""

from __future__ import annotations

import pytest

from septum.arch.errors import UsageError
from septum.core.explore import Bounds
from septum.core.run import at_random
from septum.lab.recording import digest, explore, sample
from septum.lab.scenario import find_scenario
from septum.lab.stage import Stage
from septum.lab.strategies import reduce, sampler

SMALL = [
    ("trylock", ["vcpus=2", "rounds=1", "retry=1"]),
    ("trylock", ["vcpus=2", "rounds=1", "locks=1"]),
    ("abba", ["meet=yes"]),
    ("abba", ["meet=no"]),
    ("sleep-in-atomic", []),
]


@pytest.mark.parametrize(("name", "params"), SMALL)
def test_each_run_on_a_stage_is_the_run_in_a_fresh_world(name: str, params: list[str]) -> None:
    scenario = find_scenario(name)
    values = scenario.values(params)
    stage = Stage(scenario, values)
    for seed in range(20):
        assert digest(stage.run(at_random(seed))) == digest(sample(scenario, values, at_random(seed)))


@pytest.mark.parametrize(("name", "params"), SMALL)
def test_all_strategies_agree(name: str, params: list[str]) -> None:
    scenario = find_scenario(name)
    values = scenario.values(params)
    states, orders = explore(scenario, values, Bounds()), reduce(scenario, values)
    assert (orders.verdict, orders.property) == (states.verdict, states.property)
    stage = Stage(scenario, values)
    for strategy in ("pct", "random"):
        choosers = sampler(scenario, values, strategy)
        found = {stage.run(choosers(seed), stop_at_cycle=False).violation for seed in range(200)} - {None}
        # A cycle in the lock order shows over several runs; each of these has a lock order of its own.
        assert found == ({states.property} - {"lock order"} if states.verdict == "violated" else set())


def test_an_unknown_strategy_is_told() -> None:
    scenario = find_scenario("abba")
    with pytest.raises(UsageError, match="pct, random, round-robin, solo"):
        sampler(scenario, scenario.values(), "luck")
