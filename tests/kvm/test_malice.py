"""Any system calls from several threads: never a Python exception, no page with two owners, nothing left at the end."""

from __future__ import annotations

import pytest

from septum.core.run import at_random, run
from septum.core.steps import CALLS
from septum.guest.scripted import ScriptedGuest
from septum.kvm.kernel import FIXES, Kernel
from tests.kvm.machines import Vmm
from tests.kvm.malice import THREADS, Malice, restless

MERGED = Kernel().with_(*(fix.name for fix in FIXES.values() if fix.since.startswith("v")))
HUGE = MERGED.with_("huge-pages", "hole-invalidates-folios", "failed-conversion-ends")
CALLS_OF_A_THREAD = 30
STARTS = ("nothing", "initialised", "built")
KNOWN_OF_V6_16 = "no list corruption"
"""Linux 1e3a825c9ec9: a vCPU whose creation failed is freed on a list."""
USERSPACES_FAULT = {"TDH_MR_FINALIZE failed"}
"""KVM_BUG_ONs that a VMM can have at will, by itself: KVM_TDX_FINALIZE_VM of a TD without vCPUs."""


def suffers(kernel: Kernel, seed: int, start: str) -> Vmm | None:
    """A host on which threads have done their worst, and whose process has ended; None if the kernel broke down."""
    vmm = Vmm(kernel)

    async def begin() -> int:
        if start == "initialised":
            return await vmm.init() or await vmm.add_memory()
        return await vmm.build(2) if start == "built" else 0

    assert vmm.solo(begin) == 0
    for fd in vmm.vcpus:
        vmm.process.attach_guest(fd, ScriptedGuest(restless, f"guest of {fd}"))
    malice = Malice(vmm, seed, CALLS_OF_A_THREAD)
    outcome = run(malice.programs(), at_random(seed), level=CALLS, max_steps=200_000, keep_events=False)
    assert outcome.violation in (None, KNOWN_OF_V6_16 if kernel == Kernel() else None), outcome.message
    if outcome.violation:
        return None
    assert malice.results.total() == THREADS * CALLS_OF_A_THREAD, "every call returns"
    vmm.solo(vmm.process.exit)
    return vmm


def assert_nothing_lost(vmm: Vmm | None) -> None:
    """All pages and KeyIDs are back, and the kernel met no bug of its own."""
    assert vmm is not None
    assert vmm.host.pages.in_use == 0
    assert not vmm.host.keyids_in_use()
    assert set(vmm.host.log.bugs) <= USERSPACES_FAULT
    assert not vmm.host.log.warnings


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", range(6))
def test_a_kernel_with_all_that_was_merged_loses_nothing(seed: int, start: str) -> None:
    assert_nothing_lost(suffers(MERGED, seed, start))


@pytest.mark.parametrize("seed", range(6))
def test_huge_pages_too(seed: int) -> None:
    assert_nothing_lost(suffers(HUGE, seed, "built"))


@pytest.mark.parametrize("start", STARTS[1:])
@pytest.mark.parametrize("seed", range(4))
def test_v6_16_accounts_for_what_it_loses(seed: int, start: str) -> None:
    """Its races may bug a VM, and then pages are lost; never without a word."""
    vmm = suffers(Kernel(), seed, start)
    if vmm is None:
        return
    assert vmm.host.pages.in_use == len(vmm.host.pages.leaks)
    assert not vmm.host.pages.leaks or vmm.host.log.bugs
