"""The host: bringing the module up, pages, KeyIDs, SEAMCALLs as they are counted and shown."""

from __future__ import annotations

from errno import EIO, ENOMEM, ENOSPC

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_2M, PAGE_4K
from septum.arch.platform import profile, profile_names
from septum.arch.status import Status, with_operand
from septum.core.cells import Tracking, World
from septum.core.run import Outcome, run, run_solo
from septum.core.steps import Program, Task, Violation
from septum.kvm.host import Host
from septum.kvm.pages import HostPages
from septum.kvm.seamcall import RDRAND_RETRY_LOOPS, Injection
from septum.tdx.registers import Regs
from tests.kvm.machines import SMALL, Vmm

BUSY = with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE)
NO_ENTROPY = int(Status.TDX_RND_NO_ENTROPY)


def host() -> Host:
    Tracking.world = World()
    return Host(SMALL)


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_come_from_tdmrs_and_are_reused() -> None:
    pages = host().pages
    first = [pages.alloc() for _ in range(600)]
    assert first == sorted(set(first))
    assert all(any(part.base <= pa < part.end for tdmr in SMALL.tdmrs for part in tdmr.available) for pa in first)
    assert (pages.in_use, pages.peak) == (600, 600)
    pages.free(first[3])
    assert not pages.is_allocated(first[3])
    assert pages.alloc() == first[3]
    assert pages.is_allocated(first[3])
    assert pages.in_use == 600


def test_pages_are_in_no_pamt_and_not_reserved() -> None:
    tested = host()
    for tdmr in SMALL.tdmrs:
        for pamt in (tdmr.pamt_1g, tdmr.pamt_2m, tdmr.pamt_4k):
            taken = {tested.pages.alloc() for _ in range(64)}
            assert not any(pamt.base <= pa < pamt.end for pa in taken)


def test_memory_is_exhausted_and_comes_back() -> None:
    pages = host().pages
    total = pages.total
    taken = [pages.alloc() for _ in range(total)]
    assert 0 not in taken
    assert not pages.available(1)
    assert pages.alloc() == 0
    for pa in taken:
        pages.free(pa)
    assert pages.in_use == 0
    assert pages.available(total)


def test_references() -> None:
    pages = host().pages
    pa = pages.alloc()
    for _ in range(4):
        pages.get(pa)
    for _ in range(4):
        pages.put(pa)
        assert pages.is_allocated(pa)
    pages.put(pa)
    assert not pages.is_allocated(pa)


def test_a_page_is_not_freed_twice_nor_while_it_has_references() -> None:
    pages = host().pages
    pa = pages.alloc()
    pages.get(pa)
    with pytest.raises(Violation, match="has references"):
        pages.free(pa)
    pages.put(pa)
    pages.free(pa)
    with pytest.raises(Violation, match="is free"):
        pages.free(pa)


def test_a_page_of_the_module_is_not_freed() -> None:
    vmm = Vmm()
    assert vmm.solo(vmm.init) == 0
    assert vmm.kvm.tdr_page
    with pytest.raises(Violation, match="the module uses it as TDR"):
        vmm.host.pages.free(vmm.kvm.tdr_page)


def test_freed_pages_are_clean() -> None:
    tested = host()
    pa = tested.pages.alloc()
    tested.module.memory.write(pa, b"secret")
    tested.pages.free(pa)
    assert tested.module.memory.read(pa, 6) == bytes(6)


def test_leaks_are_counted_by_reason() -> None:
    pages = host().pages
    kept = [pages.alloc() for _ in range(3)]
    pages.leak(kept[0], "lost")
    pages.leak(kept[1], "lost")
    pages.leak(kept[2], "stolen")
    assert pages.leaks_by_reason() == {"lost": 2, "stolen": 1}
    assert pages.in_use == 3


# -- boot, KeyIDs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile_names())
def test_every_platform_boots(name: str) -> None:
    Tracking.world = World()
    tested = Host(profile(name))
    tested.boot()
    platform = tested.platform
    assert tested.sysinfo is not None
    assert tested.counts["TDH.SYS.LP.INIT"] == {"TDX_SUCCESS": platform.num_lps}
    assert tested.counts["TDH.SYS.KEY.CONFIG"] == {"TDX_SUCCESS": len(set(platform.lp_package))}
    assert isinstance(tested.pages, HostPages)
    assert tested.pages.total > 0
    assert tested.pages.total * PAGE_4K % PAGE_2M == 0
    assert not tested.log.warnings


@pytest.mark.parametrize(
    "leaf",
    [
        HostLeaf.TDH_SYS_INIT,
        HostLeaf.TDH_SYS_LP_INIT,
        HostLeaf.TDH_SYS_CONFIG,
        HostLeaf.TDH_SYS_KEY_CONFIG,
        HostLeaf.TDH_SYS_TDMR_INIT,
    ],
)
def test_a_module_that_refuses_ends_the_boot(leaf: HostLeaf) -> None:
    """Nothing else can be modelled on such a machine."""
    Tracking.world = World()
    tested = Host(SMALL, injections=[Injection(leaf, 1, Status.TDX_SYS_BUSY)])
    with pytest.raises(Violation, match="failed with 0x8000020200000000"):
        tested.boot()
    assert tested.sysinfo is None


def test_keyids_run_out() -> None:
    vmm = Vmm()
    tested = vmm.host
    free = [tested.tdx_guest_keyid_alloc() for _ in SMALL.private_hkids][:-1]
    assert SMALL.global_private_hkid not in free
    assert tested.tdx_guest_keyid_alloc() == -ENOSPC
    assert vmm.solo(vmm.init) == -ENOSPC
    tested.tdx_guest_keyid_free(free[0])
    assert tested.keyids_in_use() == free[1:]
    assert vmm.solo(lambda: _init_again(vmm)) == 0
    assert vmm.kvm.hkid == free[0]


async def _init_again(vmm: Vmm) -> int:
    await vmm.process.close(vmm.vm)
    return await vmm.init()


@pytest.mark.parametrize("left", [0, 1, 4, 8, 12, 16, 18, 20, 23])
def test_memory_runs_out_in_a_life(left: int) -> None:
    """With few pages left a TD's creation fails somewhere with -ENOMEM, and everything is given back."""
    vmm = Vmm()
    pages = vmm.host.pages
    hoard = [pages.alloc() for _ in range(pages.total - left)]

    async def main() -> int:
        r = await vmm.build(1, 1)
        await vmm.process.exit()
        return r

    assert vmm.solo(main) in ((-ENOMEM, -EIO) if left < 19 else (0, -ENOMEM))
    assert pages.in_use == len(hoard)
    assert not pages.leaks
    assert not vmm.host.keyids_in_use()


# -- SEAMCALLs ---------------------------------------------------------------------------------------------------------


def one_call(tested: Host, leaf: HostLeaf, regs: Regs) -> tuple[Regs, Outcome]:
    found: list[Regs] = []

    async def call() -> None:
        found.append(await tested.seamcalls(leaf, regs))

    outcome = run([Program(Task("caller", cpu=0), call), *tested.interrupt_contexts()])
    assert outcome.violation is None, outcome.message
    return found[0], outcome


def booted(*injections: Injection) -> Host:
    tested = host()
    tested.boot()
    tested.seamcalls.inject(*injections)
    return tested


def test_a_call_is_shown_with_its_operand_and_status() -> None:
    tested = booted(Injection(HostLeaf.TDH_MEM_PAGE_AUG, 1, BUSY))
    regs = Regs(HostLeaf.TDH_MEM_PAGE_AUG, 0x1000, 0x100_0000, 0x100_1000)
    answer, outcome = one_call(tested, HostLeaf.TDH_MEM_PAGE_AUG, regs)
    assert answer.rax == BUSY
    assert tested.counts["TDH.MEM.PAGE.AUG"] == {"TDX_OPERAND_BUSY": 1}
    shown = [event.text for event in outcome.trace.events if event.kind == "seamcall"]
    assert shown == ["TDH.MEM.PAGE.AUG gpa=0x1000 -> TDX_OPERAND_BUSY(SEPT_TREE)"]


@pytest.mark.parametrize("failures", [1, 5, RDRAND_RETRY_LOOPS - 1, RDRAND_RETRY_LOOPS])
def test_want_of_entropy_is_retried(failures: int) -> None:
    lacking = [Injection(HostLeaf.TDH_SYS_RD, 1 + i, NO_ENTROPY) for i in range(failures)]
    tested = booted(*lacking)
    before = tested.counts["TDH.SYS.RD"]["TDX_SUCCESS"]
    answer, _ = one_call(tested, HostLeaf.TDH_SYS_RD, Regs(HostLeaf.TDH_SYS_RD, 0, 0x0A00_0000_0000_0000))
    gives_up = failures == RDRAND_RETRY_LOOPS
    assert (answer.rax == NO_ENTROPY) == gives_up
    assert tested.counts["TDH.SYS.RD"]["TDX_RND_NO_ENTROPY"] == failures
    assert tested.counts["TDH.SYS.RD"].get("TDX_SUCCESS", 0) - before == (0 if gives_up else 1)


def test_an_injection_can_reach_the_module() -> None:
    """The module creates the TD, and the kernel is told that it did not: it frees a page that the module has."""
    vmm = Vmm(injections=[Injection(HostLeaf.TDH_MNG_CREATE, 1, BUSY, reaches=True)])
    with pytest.raises(Violation, match="the module uses it as TDR"):
        vmm.solo(vmm.init)


def test_occurrences_count_from_the_injection_on() -> None:
    vmm = Vmm()
    assert vmm.solo(vmm.build) == 0
    first = vmm.host.counts["TDH.MR.EXTEND"]["TDX_SUCCESS"]
    assert first == 32
    vmm.host.seamcalls.inject(Injection(HostLeaf.TDH_MEM_PAGE_AUG, 2, BUSY))
    other = Vmm(host=vmm.host, name="other")
    assert other.solo(other.build) == 0
    assert "TDH.MEM.PAGE.AUG" not in vmm.host.counts


def test_run_solo_gives_the_result() -> None:
    tested = booted()

    async def one() -> int:
        return tested.online_cpus()[-1]

    assert run_solo([Program(Task("one", cpu=0), one), *tested.interrupt_contexts()])[0] == SMALL.num_lps - 1
