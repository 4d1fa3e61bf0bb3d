"""The races of KVM's ioctls, faults and zaps: what v6.16 does, what its changes do, and that counterexamples replay."""

from __future__ import annotations

from errno import EINVAL

import pytest

from septum.core.explore import Bounds
from septum.core.run import at_random, solo
from septum.core.trace import Event
from septum.core.verdict import Verdict
from septum.lab.recording import counterexample, explore, replay, sample
from septum.lab.scenario import find_scenario
from septum.report.sequence import folded

NO_BUG = "no KVM_BUG_ON"


def verdict_of(name: str, *params: str, **bounds: int) -> Verdict:
    scenario = find_scenario(name)
    return explore(scenario, scenario.values(params), Bounds(**bounds))


@pytest.mark.parametrize(
    ("name", "leaf", "fix"),
    [
        ("init-mem-region-race", "TDH_VP_CREATE", "state-locks"),
        ("finalize-race", "TDH_VP_CREATE", "state-locks"),
        ("punch-hole-vs-vp-init", "TDH_VP_INIT", "vp-init-excludes-zaps"),
        pytest.param("init-vcpu-race", "TDH_VP_CREATE", "state-locks", marks=pytest.mark.slow),
    ],
)
def test_a_build_race_kills_the_vm_and_its_fix_excludes_it(name: str, leaf: str, fix: str) -> None:
    scenario = find_scenario(name)
    values = scenario.values()
    verdict = explore(scenario, values, Bounds())
    assert (verdict.verdict, verdict.property) == ("violated", NO_BUG)
    assert verdict.message == f"VM0 is bugged: {leaf} failed"
    recording, outcomes = counterexample(scenario, values, verdict)
    assert outcomes[-1].violation == NO_BUG
    assert replay(recording)[-1].trace.events == outcomes[-1].trace.events
    assert any("TDX_OPERAND_BUSY" in event.text for event in outcomes[-1].trace.events)
    assert verdict_of(name, f"fix={fix}").verdict == "proved"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("two-faults", ()),
        ("two-faults", ("same=yes",)),
        ("fault-vs-punch-hole", ()),
        ("fault-vs-punch-hole", ("same=yes",)),
        ("zap-vs-accept", ()),
        pytest.param("zap-vs-accept", ("pages=2",), marks=pytest.mark.slow),
        pytest.param("two-faults", ("tables=missing", "same=yes"), marks=pytest.mark.slow),
    ],
)
def test_faults_and_zaps_of_v6_16_are_proved(name: str, params: tuple[str, ...]) -> None:
    verdict = verdict_of(name, *params)
    assert verdict.verdict == "proved", verdict.message
    assert verdict.states > 5_000


@pytest.mark.parametrize(
    ("name", "zap", "leaf"),
    [
        ("zap-vs-accept", "once", "TDH_MEM_RANGE_BLOCK"),
        ("zap-vs-accept", "kick-without-flag", "TDH_MEM_TRACK"),
        ("fault-vs-punch-hole", "once", "TDH_MEM_TRACK"),
        ("fault-vs-punch-hole", "kick-without-flag", "TDH_MEM_TRACK"),
    ],
)
def test_a_zap_needs_the_kick_and_the_flag(name: str, zap: str, leaf: str) -> None:
    verdict = verdict_of(name, f"zap={zap}")
    assert (verdict.property, verdict.message) == (NO_BUG, f"VM0 is bugged: {leaf} failed")


@pytest.mark.parametrize("name", ["two-faults", "fault-vs-punch-hole", "zap-vs-accept"])
def test_guests_come_to_their_end_in_random_runs(name: str) -> None:
    scenario = find_scenario(name)
    for seed in range(5):
        outcome = sample(scenario, scenario.values(("vcpus=3",)), at_random(seed))
        assert outcome.violation is None, outcome.message
        threads = 3 if name == "two-faults" else 4
        assert outcome.results[:threads] == [0] * threads


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("init-vcpu-race", [0, 0]),
        ("init-mem-region-race", [0, 0]),
        ("finalize-race", [0, -EINVAL]),
        ("punch-hole-vs-vp-init", [0, 0]),
    ],
)
def test_ioctls_one_after_the_other_do_what_they_should(name: str, results: list[int]) -> None:
    scenario = find_scenario(name)
    outcome = sample(scenario, scenario.values(), solo)
    assert (outcome.violation, outcome.results[:2]) == (None, results)


# -- diagrams ----------------------------------------------------------------------------------------------------------


def _event(task: str, kind: str, text: str) -> Event:
    return Event(1, 0, task, kind, text)


def test_a_call_that_met_nobody_is_one_line() -> None:
    call = [
        _event("a", "call", "X"),
        _event("a", "lock", "+L"),
        _event("a", "lock", "-L"),
        _event("a", "seamcall", "X ->"),
    ]
    assert folded(call) == call[-1:]


def test_calls_that_met_somebody_are_shown_whole() -> None:
    busy = [_event("a", "call", "X"), _event("a", "lock", "!L"), _event("a", "seamcall", "X -> BUSY")]
    assert folded(busy) == busy
    other = _event("b", "ioctl", "Y")
    met = [
        _event("a", "call", "X"),
        _event("a", "lock", "+L"),
        other,
        _event("a", "lock", "-L"),
        _event("a", "seamcall", "X"),
    ]
    assert folded(met) == met
    under_way = [_event("a", "call", "X"), _event("a", "lock", "+L")]
    assert folded(under_way) == under_way
