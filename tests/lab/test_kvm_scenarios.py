"""The races of KVM's ioctls, faults and zaps: what v6.16 does, what its changes do, and that counterexamples replay."""

from __future__ import annotations

from errno import EINVAL

import pytest

from septum.core.explore import Bounds
from septum.core.run import ENDS, at_random, run, solo
from septum.core.trace import Event
from septum.core.trylocks import ALWAYS_SHARED
from septum.core.verdict import Verdict
from septum.kvm.kernel import FIXES
from septum.lab.hosts import TdHost
from septum.lab.recording import counterexample, explore, replay, sample
from septum.lab.sampled import sample_runs
from septum.lab.scenario import find_scenario, scenarios
from septum.lab.strategies import sampler
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
    assert verdict_of(name, f"kernel=v6.16,+{fix}").verdict == "proved"


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
    assert verdict.states > 2_000


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
    verdict = verdict_of(name, f"kernel=v6.16,zap={zap}")
    assert (verdict.property, verdict.message) == (NO_BUG, f"VM0 is bugged: {leaf} failed")


FIXED = "v6.16," + ",".join(
    f"+{fix.name}" for fix in FIXES.values() if fix.since.startswith("v") and fix.name != "flush-rechecks-cpu"
)
"""A kernel with all fixes that were merged."""
OTHERS = ("hugepages", "zerostep", "module_faults")
"""Scenarios of these have tests of their own."""
KVM = [
    name
    for name, scenario in scenarios().items()
    if any(p.name == "kernel" for p in scenario.parameters) and not scenario.build.__module__.endswith(OTHERS)
]


def first_violation(name: str, kernel: str, runs: int, strategy: str) -> str | None:
    """The property that the first run that fails violates, if any does."""
    scenario = find_scenario(name)
    values = scenario.values((f"kernel={kernel}",))
    found = sample_runs(scenario, values, sampler(scenario, values, strategy), times=runs)
    return found.shown.violation if found.shown else None


@pytest.mark.parametrize("name", KVM)
def test_no_run_fails_on_a_kernel_with_all_fixes(name: str) -> None:
    for strategy in ("random", "pct"):
        assert first_violation(name, FIXED, 20, strategy) is None


KNOWN = {
    "init-vcpu-race": ("state-locks", NO_BUG),
    "init-mem-region-race": ("state-locks", NO_BUG),
    "finalize-race": ("state-locks", NO_BUG),
    "finalize-vs-init-mem-region": ("state-locks", NO_BUG),
    "create-vcpu-vs-finalize": ("state-locks", NO_BUG),
    "punch-hole-vs-vp-init": ("vp-init-excludes-zaps", NO_BUG),
    "fault-vs-memslot-delete": ("no-local-retry-on-invalid-slot", ENDS),
    "prefault-vs-memslot-delete": ("prefault-eagain-on-invalid-slot", ENDS),
    "create-vcpu-race": ("flush-on-vcpu-free", "no list corruption"),
    "vcpu-id-taken": ("flush-on-vcpu-free", "no list corruption"),
    "cpu-offline-vs-vcpu-flush": ("flush-rechecks-cpu", "no list corruption"),
}
"""Scenarios that need a fix: without it, which property they violate."""
assert {*KNOWN} <= {*KVM}


@pytest.mark.parametrize(("name", "fix", "prop"), [(name, *known) for name, known in KNOWN.items()])
def test_each_fix_is_needed(name: str, fix: str, prop: str) -> None:
    kernel = f"{FIXED},-{fix}"
    found = first_violation(name, kernel, 100, "random") or first_violation(name, kernel, 1000, "pct")
    assert found == prop


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


# -- locks that are always shared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fault-vs-punch-hole", ()),
        ("fault-vs-punch-hole", ("kernel=v6.16,zap=once",)),
        ("zap-vs-accept", ("kernel=v6.16,zap=kick-without-flag",)),
        ("punch-hole-vs-vp-init", ()),
        ("cpu-offline-vs-vcpu-flush", ("kernel=v6.16,-flush-rechecks-cpu",)),
    ],
)
def test_locks_that_nobody_finds_busy_change_no_verdict(
    name: str, params: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = verdict_of(name, *params)
    monkeypatch.setattr("septum.lab.hosts.declare_always_shared", lambda words, keys: None)
    whole = verdict_of(name, *params)
    assert (reduced.verdict, reduced.property) == (whole.verdict, whole.property)
    assert reduced.states < whole.states


def test_a_wrong_claim_that_locks_are_always_shared_is_told() -> None:
    host = TdHost("v6.16", 1, initialised=0)
    built = host.setting([host.thread("vCPU 0", "KVM_TDX_INIT_VCPU", host.init_vcpu(0))], built=False, stays=True)
    outcome = run(built.programs, solo)
    assert (outcome.violation, outcome.message) == (ALWAYS_SHARED, "PAMT_4K[0x1000000] is taken exclusively")
