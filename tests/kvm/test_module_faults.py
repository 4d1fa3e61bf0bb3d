"""Broken modules: what comes of a TD's whole life on each, and that KVM, not Python, says so."""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EIO
from typing import NamedTuple

import pytest

from septum.core.explore import Bounds
from septum.core.run import run, solo
from septum.core.steps import CALLS, Program, Task
from septum.kvm import abi
from septum.kvm.module_faults import MODULE_FAULTS
from septum.lab.recording import explore
from septum.lab.scenario import find_scenario
from tests.kvm.machines import Vmm
from tests.kvm.test_injection import life


class Fate(NamedTuple):
    """What userspace sees first: an errno, minus an exit, or None when a call never returns; whether the VM is bugged;
    how many pages are lost."""

    told: int | None = 0
    bugged: bool = False
    lost: int = 0


FOR_EVER = Fate(None)
MEMORY_LOST = Fate(bugged=True, lost=5)
"""No private page comes back, nor any of the Secure EPT: the kernel calls it a bug, and tells no one."""
KEYID_LOST = Fate(bugged=True, lost=17)

FATES = {
    "aug-busy": FOR_EVER,
    "aug-busy-on-cpu-0": FOR_EVER,
    "aug-busy-but-done": FOR_EVER,
    "aug-not-done": FOR_EVER,
    "aug-wrong-state": Fate(EIO, bugged=True),
    "aug-unknown-status": Fate(EIO, bugged=True),
    "sept-add-busy": FOR_EVER,
    "sept-add-wrong-state": Fate(EIO, bugged=True),
    "page-add-busy": Fate(EBUSY),
    "enter-busy": FOR_EVER,
    "enter-busy-on-cpu-0": FOR_EVER,
    "enter-unknown-status": Fate(-abi.KVM_EXIT_INTERNAL_ERROR),
    "enter-not-done": Fate(-abi.KVM_EXIT_EXCEPTION),
    "enter-faults": Fate(-abi.KVM_EXIT_INTERNAL_ERROR, bugged=True),
    "block-busy": MEMORY_LOST,
    "block-not-done": MEMORY_LOST,
    "track-busy": MEMORY_LOST,
    "track-previous-epoch-busy": MEMORY_LOST,
    "track-not-done": MEMORY_LOST,
    "remove-busy": MEMORY_LOST,
    "remove-not-done": MEMORY_LOST,
    "wbinvd-busy": MEMORY_LOST,
    "demote-interrupted": Fate(),
    "finalize-busy": Fate(EBUSY),
    "vp-flush-busy": KEYID_LOST,
    "vpflushdone-not-done": KEYID_LOST,
    "cache-wb-interrupted": KEYID_LOST,
    "freeid-busy": KEYID_LOST,
    "reclaim-busy": Fate(lost=17),
    "no-entropy": Fate(EAGAIN),
}


@pytest.mark.parametrize("name", MODULE_FAULTS)
def test_a_life_on_a_broken_module(name: str) -> None:
    vmm = Vmm()
    vmm.host.seamcalls.broken = (MODULE_FAULTS[name],)
    thread = Program(Task("vmm", cpu=0), lambda: life(vmm))
    programs = [thread, *vmm.host.interrupt_contexts()]
    outcome = run(programs, solo, level=CALLS, max_steps=40_000, keep_events=False)
    assert outcome.violation is None, outcome.message
    found = Fate(outcome.results[0], bool(vmm.host.log.bugs), len(vmm.host.pages.leaks))
    assert found == FATES[name]
    assert outcome.ended == (found.told is not None)
    if outcome.ended:
        assert vmm.host.pages.in_use == len(vmm.host.pages.leaks)


@pytest.mark.parametrize(
    ("name", "prop"),
    [
        ("aug-busy", "progress"),
        ("enter-busy", "progress"),
        ("aug-not-done", "mirror and Secure EPT agree"),
        ("block-busy", "no KVM_BUG_ON"),
        ("track-previous-epoch-busy", "no KVM_BUG_ON"),
        ("enter-unknown-status", "the guest goes on"),
    ],
)
def test_the_explorer_says_who_suffers(name: str, prop: str) -> None:
    scenario = find_scenario("broken-module")
    verdict = explore(scenario, scenario.values((f"module={name}",)), Bounds(), liveness=True)
    assert (verdict.verdict, verdict.property) == ("violated", prop)


def test_a_module_that_is_busy_for_one_vcpu_only_harms_that_one() -> None:
    scenario = find_scenario("broken-module")
    verdict = explore(scenario, scenario.values(("module=enter-busy-on-cpu-0", "vcpus=1")), Bounds(), liveness=True)
    assert verdict.message.startswith("vCPU 0 goes on for ever")
