"""Huge pages as the series on the list has them: what is proved, what a change of design breaks, and what we found."""

from __future__ import annotations

import pytest

from septum.core.explore import Bounds
from septum.core.verdict import Verdict
from septum.lab.recording import counterexample, explore, replay
from septum.lab.scenario import find_scenario

NO_BUG = "no KVM_BUG_ON"


def verdict_of(name: str, *params: str, liveness: bool = False) -> Verdict:
    scenario = find_scenario(name)
    return explore(scenario, scenario.values(params), Bounds(), liveness=liveness)


@pytest.mark.parametrize(
    ("name", "params", "states"),
    [
        ("accept-splits", (), 50),
        ("demote-interrupted", (), 100),
        ("demote-interrupted", ("module=1.5.01",), 100),
        ("conversion-without-memory", ("kernel=v6.16,+failed-conversion-ends",), 50),
        pytest.param("accept-splits", ("vcpus=2",), 20_000, marks=pytest.mark.slow),
        pytest.param("hole-splits", (), 50_000, marks=pytest.mark.slow),
        pytest.param("huge-fault-vs-hole", ("kernel=v6.16,+hole-invalidates-folios",), 50_000, marks=pytest.mark.slow),
    ],
)
def test_splits_with_mmu_lock_for_write_are_proved(name: str, params: tuple[str, ...], states: int) -> None:
    verdict = verdict_of(name, *params)
    assert verdict.verdict == "proved", verdict.message
    assert verdict.states > states


@pytest.mark.parametrize(
    ("name", "params", "prop", "message"),
    [
        ("accept-splits", ("vcpus=2", "kernel=v6.16,zap=once"), NO_BUG, "VM0 is bugged: TDH_MEM_TRACK failed"),
        ("hole-splits", ("kernel=v6.16,zap=once",), NO_BUG, "VM0 is bugged: TDH_MEM_TRACK failed"),
        ("hole-splits", ("kernel=v6.16,zap=kick-without-flag",), NO_BUG, "VM0 is bugged: TDH_MEM_TRACK failed"),
        ("huge-fault-vs-hole", (), "no page is used after it is freed", "is used, but it is free"),
    ],
)
def test_a_split_needs_the_kick_and_a_fault_must_not_see_half_a_folio(
    name: str, params: tuple[str, ...], prop: str, message: str
) -> None:
    verdict = verdict_of(name, *params)
    assert verdict.property == prop
    assert message in verdict.message
    scenario = find_scenario(name)
    recording, outcomes = counterexample(scenario, scenario.values(params), verdict)
    assert outcomes[-1].violation == prop
    assert replay(recording)[-1].trace.events == outcomes[-1].trace.events


def test_a_split_under_shared_mmu_lock_leaves_a_range_blocked() -> None:
    verdict = verdict_of("accept-splits", "vcpus=2", "kernel=v6.16,accept=split-shared")
    assert verdict.property == "mirror and Secure EPT agree"


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("accept-splits", "kernel=v6.16,accept=ignore", "kernel=v6.16"),
        ("demote-interrupted", "module=1.5.01", "module=1.5.28"),
        ("conversion-without-memory", "kernel=v6.16", "kernel=v6.16,+failed-conversion-ends"),
    ],
)
def test_designs_under_which_a_vcpu_takes_for_ever(name: str, bad: str, good: str) -> None:
    assert verdict_of(name, bad, liveness=True).property == "progress"
    assert verdict_of(name, good, liveness=True).verdict == "proved"
