"""The scenario of two concurrent calls: which halt the module, which only meet, and that runs replay."""

from __future__ import annotations

import pytest

from septum.core.explore import Bounds
from septum.core.run import at_random
from septum.lab.recording import counterexample, explore, record, replay, sample
from septum.lab.scenario import find_scenario


def verdict_of(*params: str) -> tuple[str, str | None]:
    scenario = find_scenario("seamcalls")
    verdict = explore(scenario, scenario.values(params), Bounds())
    return verdict.verdict, verdict.property


def test_calls_that_only_meet_at_locks_are_proved_safe() -> None:
    assert verdict_of() == ("proved", None)
    assert verdict_of("a=guest ACCEPT/4K", "b=RANGE.BLOCK/4K", "same=yes") == ("proved", None)


@pytest.mark.parametrize("b", ["PAGE.RELOCATE", "PAGE.REMOVE/4K"])
def test_aug_against_a_call_that_takes_the_page_away_halts_the_module(b: str) -> None:
    """Measured on the real module 1.5.01: AUG writes the entry before it sets the page's type."""
    scenario = find_scenario("seamcalls")
    values = scenario.values([f"b={b}", "same=yes"])
    verdict = explore(scenario, values, Bounds())
    assert (verdict.verdict, verdict.property) == ("violated", "the module never halts")
    found, outcomes = counterexample(scenario, values, verdict)
    assert outcomes[-1].violation == "the module never halts"
    assert replay(found)[-1].trace.events == outcomes[-1].trace.events


def test_a_random_run_replays() -> None:
    scenario = find_scenario("seamcalls")
    values = scenario.values()
    outcome = sample(scenario, values, at_random(7))
    again = replay(record(scenario, values, outcome))[-1]
    assert again.trace.events == outcome.trace.events
    assert again.results == outcome.results
