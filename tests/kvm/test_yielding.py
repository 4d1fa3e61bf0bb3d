"""Zaps that let mmu_lock go in between, and mmu notifiers that may not."""

from __future__ import annotations

import pytest

from septum.core.run import run, solo
from septum.core.steps import CALLS, Program, Task, Violation
from septum.kvm.abi import KVM_MEMORY_ATTRIBUTE_PRIVATE
from septum.kvm.arguments import Region
from septum.kvm.mmu.mirror import tdp_mmu_set_spte
from septum.kvm.mmu.spte import SHADOW_NONPRESENT
from septum.kvm.mmu.walk import walk_to
from tests.kvm.machines import Vmm

PAGES = 8
GPA = 0x10_0000


def mapped(private: bool) -> Vmm:
    """A TD with some pages mapped, all private or all shared."""
    vmm = Vmm()
    assert vmm.solo(lambda: vmm.build(1, 2)) == 0
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    size = PAGES << 12
    assert vmm.solo(lambda: vmm.process.set_memory_attributes(vmm.vm, GPA, size, attributes)) == 0
    assert vmm.solo(lambda: vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, GPA, PAGES))) == 0
    return vmm


def locked(vmm: Vmm, kind: str) -> tuple[int, list[str]]:
    """What a zap returns, and how often it took mmu_lock, on a CPU whose scheduler wants it for another thread."""
    vmm.host.need_resched[0] = True
    address = vmm.shared_memory + GPA
    calls = {
        "hole": lambda: vmm.punch(GPA, PAGES << 12),
        "madvise": lambda: vmm.process.madvise_dontneed(address, PAGES << 12),
        "reaper": lambda: vmm.process.oom_reap(address, PAGES << 12),
    }
    programs = [Program(Task("zap", cpu=0), calls[kind]), *vmm.host.interrupt_contexts()]
    outcome = run(programs, solo, level=CALLS)
    assert outcome.violation is None, outcome.message
    return outcome.results[0], [
        e.text for e in outcome.trace.events if e.kind == "klock" and "+kvm->mmu_lock" in e.text
    ]


@pytest.mark.parametrize(("kind", "times"), [("hole", 3), ("madvise", 3), ("reaper", 2)])
def test_a_zap_yields_if_it_may(kind: str, times: int) -> None:
    """Beginning and end take mmu_lock once each; who may block takes it anew after the first leaf."""
    vmm = mapped(private=kind == "hole")
    result, took = locked(vmm, kind)
    assert (result, len(took)) == (0, times)
    assert bool(vmm.host.need_resched[0]) == (kind == "reaper")
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()


def test_the_reaper_leaves_private_memory_alone() -> None:
    vmm = mapped(private=True)
    before = dict(vmm.host.counts["TDH.MEM.PAGE.AUG"])
    assert locked(vmm, "reaper")[0] == 0
    assert "TDH.MEM.RANGE.BLOCK" not in vmm.host.counts
    assert vmm.host.counts["TDH.MEM.PAGE.AUG"] == before


def test_entries_change_only_in_rcu_read_sections() -> None:
    vmm = mapped(private=True)
    kvm = vmm.kvm
    found = walk_to(kvm, kvm.mirror_root, True, GPA >> 12, 1)

    async def careless() -> None:
        async with kvm.mmu_lock.write():
            await tdp_mmu_set_spte(kvm, found, SHADOW_NONPRESENT, True)

    with pytest.raises(Violation, match="outside of an RCU read section"):
        vmm.solo(careless)
