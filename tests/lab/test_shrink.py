"""Shrinking keeps the property, never grows, is deterministic, and its results replay byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from septum.core.run import Chooser, Outcome, at_random, run
from septum.lab.recording import Recording, digest, load, record, replay, sample, save
from septum.lab.scenario import find_scenario
from septum.lab.shrink import following, shrink, shrink_schedule, switches
from tests.core.programs import WAITS, Machine, Texts, programs_of
from tests.core.test_dpor import texts_of

DEADLOCKING = texts_of("add", "set", "load", *WAITS, length=5, tasks=4)


def runner(texts: Texts):  # type: ignore[no-untyped-def]
    def attempt(choose: Chooser, steps: int | None) -> Outcome:
        return run(programs_of(Machine.fresh(), texts), choose, max_steps=steps)

    return attempt


@settings(max_examples=400)
@given(DEADLOCKING, st.integers(0, 1 << 32))
def test_keeps_the_property_and_never_grows(texts: Texts, seed: int) -> None:
    attempt = runner(texts)
    found = attempt(at_random(seed), None)
    assume(found.violation)
    before = list(found.trace.schedule)
    after = shrink_schedule(attempt, before, "no deadlock")
    assert (switches(after), len(after)) <= (switches(before), len(before))
    again = attempt(following(after), len(after))
    assert (again.violation, list(again.trace.schedule)) == ("no deadlock", after)
    assert shrink_schedule(attempt, before, "no deadlock") == after, "the same each time"
    assert shrink_schedule(attempt, after, "no deadlock") == after, "nothing is left to shrink"


def test_what_cannot_be_shown_again_stays_as_it_is() -> None:
    attempt = runner(((("set", 0, 1),), (("set", 1, 1),)))
    assert shrink_schedule(attempt, [1, 0], "no deadlock") == [1, 0]


def test_without_budget_a_run_stays_as_it_is() -> None:
    texts = ((("set", 0, 1), ("set", 0, 0), ("set", 1, 1)), (("wait", 0, 1),))
    attempt = runner(texts)
    assert shrink_schedule(attempt, [0, 0, 0], "no deadlock", budget=-1) == [0, 0, 0]


def violating(name: str, params: list[str], prop: str) -> Recording:
    """The longest of some random runs that violate a property."""
    scenario = find_scenario(name)
    values = scenario.values(params)
    stop = prop != "no deadlock"  # else a cycle in the lock order is found before the deadlock that it leads to
    outcomes = (sample(scenario, values, at_random(seed), stop_at_cycle=stop) for seed in range(60))
    return record(scenario, values, max((o for o in outcomes if o.violation == prop), key=lambda o: o.steps))


@pytest.mark.parametrize(
    ("name", "params", "prop", "least_switches"),
    [
        ("trylock", ["locks=1", "rounds=1"], "no lost update", 2),
        ("trylock", ["locks=0", "rounds=3", "vcpus=4"], "no lost update", 2),
        ("abba", [], "no deadlock", 1),
        ("sleep-in-atomic", [], "no sleep in atomic context", 0),
    ],
)
def test_scenarios_shrink_to_the_fewest_switches_and_replay_byte_for_byte(
    name: str, params: list[str], prop: str, least_switches: int, tmp_path: Path
) -> None:
    found = violating(name, params, prop)
    small = shrink(found)
    assert small.property == prop
    assert switches(small.schedule) == least_switches
    assert len(small.schedule) <= len(found.schedule)
    assert shrink(found) == small
    path = save(small, tmp_path)
    outcome = replay(load(path))[-1]
    assert (digest(outcome), outcome.violation, outcome.message) == (small.digest, prop, small.message)
    assert json.loads(path.read_text()) == small.to_json()


def test_each_run_behind_a_cycle_in_the_lock_order_is_shrunk() -> None:
    scenario = find_scenario("abba")
    values = scenario.values(["meet=no"])
    whole = tuple(sample(scenario, values, at_random(1), stop_at_cycle=False).trace.schedule)
    small = shrink(Recording("abba", values, whole, (whole[:2], whole[:2]), "lock order"))
    assert small.property == "lock order"
    assert small.witnesses == (), "the last run shows both orders"
    assert len(small.schedule) < len(whole)
    outcome = replay(small)[-1]
    assert (digest(outcome), outcome.violation) == (small.digest, "lock order")
