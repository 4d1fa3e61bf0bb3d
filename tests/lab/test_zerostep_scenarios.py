"""The module's zero-step defence under KVM: what is borne, who gets stuck, and who is told."""

from __future__ import annotations

from collections import Counter

import pytest

from septum.core.explore import Bounds
from septum.core.run import at_random, recorded
from septum.core.verdict import Verdict
from septum.lab.recording import explore, sample
from septum.lab.scenario import find_scenario


def verdict_of(name: str, *params: str, liveness: bool = False) -> Verdict:
    scenario = find_scenario(name)
    return explore(scenario, scenario.values(params), Bounds(), liveness=liveness)


@pytest.mark.parametrize("violations", [0, 4, 5])
def test_a_page_that_is_converted_in_time_is_no_matter(violations: int) -> None:
    verdict = verdict_of("zero-step-conversion", f"violations={violations}", "converts=at once", liveness=True)
    assert verdict.verdict == "proved", verdict.message


@pytest.mark.parametrize("violations", [6, 7, 12])
def test_after_six_the_vcpu_never_runs_again_and_nobody_is_told(violations: int) -> None:
    """Six violations before and the one that has the page mapped: module 1.5.01 wants it accepted."""
    params = f"violations={violations}", "converts=at once"
    verdict = verdict_of("zero-step-conversion", *params, liveness=True)
    assert (verdict.verdict, verdict.property) == ("violated", "progress")
    told = verdict_of("zero-step-conversion", *params, "kernel=v6.16,+no-progress-exits", liveness=True)
    assert told.verdict == "proved", told.message


def test_another_vcpu_can_rescue_it() -> None:
    assert verdict_of("zero-step-rescue", liveness=True).verdict == "proved"


def test_kvm_bears_the_modules_look_at_the_secure_ept() -> None:
    assert verdict_of("zero-step-conversion", "vcpus=2", "converts=no").verdict == "proved"


def test_entries_are_told_busy_and_exits_are_synthesized() -> None:
    scenario = find_scenario("zero-step-conversion")
    told: Counter[str] = Counter()
    entered = 0
    for seed in range(30):
        outcome = sample(scenario, scenario.values(("vcpus=2",)), at_random(seed), max_steps=1500)
        events = outcome.trace.events
        told.update(e.text.partition(" ")[0] for e in events if "OPERAND_BUSY(SEPT_TREE)" in e.text)
        told.update("synthesized" for e in events if "EPT_VIOLATION" in e.text and e.kind == "seamcall")
        entered += sum(e.kind == "enter" for e in events)
    assert told["TDH.VP.ENTER"] > 0
    assert told["synthesized"] > entered, "more EPT violations than entries"


@pytest.mark.slow
def test_two_vcpus_and_a_conversion_are_proved() -> None:
    assert verdict_of("zero-step-conversion", "vcpus=2").verdict == "proved"


def test_nothing_bounds_how_long_a_fault_is_in_the_way_of_a_suspected_vcpu() -> None:
    """Try-locks are not fair: a VMM that never converts can keep another vCPU from mapping its page, in theory."""
    scenario = find_scenario("zero-step-conversion")
    values = scenario.values(("vcpus=2", "converts=no"))
    verdict = explore(scenario, values, Bounds(), liveness=True)
    assert (verdict.property, verdict.message[:6]) == ("progress", "vCPU 1")
    steps = [*verdict.schedule, *verdict.loop]
    lasso = sample(scenario, values, recorded(steps), max_steps=len(steps))
    assert any("AUG" in e.text and "TDX_OPERAND_BUSY(SEPT_TREE)" in e.text for e in lasso.trace.events)
