"""Contention policies, each by itself: how often it calls, what it lets go, and what the kernel says when it sleeps."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.metadata import field_table
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.core.run import at_random, run
from septum.core.steps import Violation, wait_until
from septum.guest.vcpu import Vcpu
from septum.kvm.arguments import Region
from septum.kvm.contention import policy_of
from septum.kvm.kernel import DESIGNS, Kernel
from septum.kvm.requests import KVM_REQ_TLB_FLUSH
from septum.kvm.seamcall import Injection
from septum.tdx.registers import Regs
from tests.kvm.machines import BUILT, Vmm
from tests.kvm.test_v6_19 import built

PAGE = 4096
TREE = with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE)
ENTRY = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
BLOCK = HostLeaf.TDH_MEM_RANGE_BLOCK
XFAM = field_table("td").named("XFAM").id


def attempts(policy: str, *answers: int) -> tuple[int, int]:
    """How often a policy calls when the answers are these, and then success; and the status that it returns."""
    vmm = Vmm()
    made = 0

    async def attempt() -> Regs:
        nonlocal made
        made += 1
        return Regs(answers[made - 1] if made <= len(answers) else 0)

    async def main() -> int:
        assert await vmm.init() == 0
        return (await policy_of(policy)(vmm.kvm, attempt)).rax

    status = vmm.solo(main)
    return made, status


@pytest.mark.parametrize(
    ("policy", "answers", "expected"),
    [
        ("unwind", [TREE], (1, TREE)),
        ("once", [ENTRY], (1, ENTRY)),
        ("retry:0", [TREE], (1, TREE)),
        ("retry:2", [TREE, ENTRY], (3, 0)),
        ("retry:2", [TREE] * 9, (3, TREE)),
        ("retry-exact:16", [TREE] * 16, (17, 0)),
        ("retry-exact:16", [TREE] * 17, (17, TREE)),
        ("retry-exact:16", [TREE, ENTRY], (2, ENTRY)),
        ("loop", [TREE, ENTRY] * 50, (101, 0)),
        ("loop", [TREE, Status.TDX_PREVIOUS_TLB_EPOCH_BUSY], (2, Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)),
        ("loop-on:RCX", [ENTRY] * 40, (41, 0)),
        ("loop-on:RCX", [ENTRY, TREE], (2, TREE)),
        ("needbreak", [TREE] * 5, (6, 0)),
    ],
)
def test_how_often_it_calls(policy: str, answers: list[int], expected: tuple[int, int]) -> None:
    assert attempts(policy, *answers) == expected


def punch(kernel: Kernel, *busy: int) -> Vmm:
    """A hole is punched while TDH.MEM.RANGE.BLOCK gives these answers first."""
    vmm = Vmm(kernel, injections=[Injection(BLOCK, i, status) for i, status in enumerate(busy, 1)])

    async def main() -> int:
        assert await vmm.build() == 0
        return await vmm.punch(BUILT, PAGE)

    assert vmm.solo(main) == 0
    return vmm


@pytest.mark.parametrize(
    ("design", "bugged"),
    [("retry-exact", True), ("retry", False), ("unwind-and-refault", True), ("local-retry", True), ("kick", False)],
)
def test_a_zap_that_meets_a_guest_at_an_entry(design: str, bugged: bool) -> None:
    """Twice: comparing the whole status misses what a guest has locked (RCX, not SEPT_TREE), as v11 did."""
    vmm = punch(Kernel().with_design(design), *[ENTRY] * (1 if design == "kick" else 2))
    assert bool(vmm.kvm.vm_bugged) == bugged


def test_kicking_once_is_not_enough_for_a_module_that_is_always_busy() -> None:
    assert punch(Kernel().with_design("kick"), ENTRY, ENTRY).kvm.vm_bugged == "TDH_MEM_RANGE_BLOCK failed"


def test_waiting_under_mmu_lock_is_reported_with_locks_and_call_path() -> None:
    with pytest.raises(Violation, match="may sleep in the waitqueue of SEAMCALLs") as found:
        punch(Kernel().with_design("wait"), ENTRY, ENTRY)
    text = str(found.value)
    assert "kvm->mmu_lock[0], RCU read section" in text
    assert "filemap_invalidate_lock[0]" in text
    path = "kvm_gmem_punch_hole > kvm_gmem_invalidate_begin"
    assert path in text
    assert text.index("tdx_sept_remove_private_spte") < text.index("waitqueue)")


def test_waiting_where_sleep_is_allowed_ends_when_another_call_returns() -> None:
    add, kernel = HostLeaf.TDH_MEM_PAGE_ADD, Kernel("v6.16").with_policy("build", "waitqueue")
    for seed in range(20):
        vmm = built(Injection(add, 1, TREE), kernel=kernel)

        async def one_page(vmm: Vmm = vmm) -> int:
            source = vmm.process.mmap(PAGE)
            vmm.process.write(source, bytes(PAGE))
            return await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(source, BUILT, 1), 0)

        async def another_call(vmm: Vmm = vmm) -> int:
            await wait_until(lambda: bool(vmm.host.seamcall_returns.waiting), "somebody waits")
            return (await vmm.host.seamcalls.tdh_mng_rd(vmm.kvm.tdr_page, XFAM)).rax

        outcome = run(vmm.threads(one_page, another_call), choose=at_random(seed), max_steps=20_000)
        assert outcome.violation is None, outcome.message
        assert outcome.results[:2] == [0, 0]
        assert vmm.host.counts["TDH.MEM.PAGE.ADD"]["TDX_OPERAND_BUSY"] == 1


def test_busy_without_another_call_waits_for_ever() -> None:
    """A module that says BUSY though no other call is under way hangs this design: nobody returns, so nobody wakes."""
    kernel = Kernel("v6.16").with_policy("build", "waitqueue")
    vmm = built(Injection(HostLeaf.TDH_MEM_PAGE_ADD, 1, TREE), kernel=kernel)
    source = vmm.process.mmap(PAGE)
    vmm.process.write(source, bytes(PAGE))

    async def one_page() -> int:
        return await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(source, BUILT, 1), 0)

    outcome = run(vmm.threads(one_page), choose=at_random(1), max_steps=20_000)
    assert outcome.violation == "no deadlock"
    assert "wait for a SEAMCALL to return" in outcome.message


def test_needbreak_lets_mmu_lock_go() -> None:
    kernel = Kernel().with_policy("zap", "needbreak")
    vmm = Vmm(kernel, injections=[Injection(BLOCK, i, TREE) for i in (1, 2, 3)])
    free = 0

    async def main() -> int:
        assert await vmm.build() == 0
        lock = vmm.kvm.mmu_lock
        right: Callable[..., object] = type(lock).let_go

        def noted(self: object, *, shared: bool) -> object:
            nonlocal free
            free += self is lock
            return right(self, shared=shared)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(lock), "let_go", noted)
            return await vmm.punch(BUILT, PAGE)

    assert vmm.solo(main) == 0
    assert free >= 3
    assert not vmm.kvm.vm_bugged


def test_a_build_that_meets_another_call() -> None:
    """Unwinding hands BUSY to userspace, retrying hides it."""
    for policy, errno in (("unwind", -EBUSY), ("retry:1", 0), ("retry-exact:16", -EBUSY)):
        vmm = built(Injection(HostLeaf.TDH_MEM_PAGE_ADD, 1, ENTRY), kernel=Kernel().with_policy("build", policy))

        async def add(vmm: Vmm = vmm) -> int:
            source = vmm.process.mmap(PAGE)
            vmm.process.write(source, bytes(PAGE))
            return await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(source, BUILT, 1), 0)

        assert vmm.solo(add) == errno


def test_every_design_runs_a_td() -> None:
    for design in DESIGNS:
        vmm = Vmm(Kernel().with_design(design))
        assert vmm.solo(lambda: vmm.build(1, 2)) == 0  # noqa: B023 - runs at once
        vmm.solo(vmm.process.exit)
        vmm.assert_clean()


@pytest.mark.parametrize(("policy", "calls"), [("bounded", 10), ("unbounded", 30)])
def test_how_often_a_cache_write_back_is_resumed(policy: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each of two packages five times, or as long as the module says that it was interrupted."""
    monkeypatch.setattr("septum.kvm.tdx.keys.TDX_SEAMCALL_RETRIES", 5)
    leaf, interrupted = HostLeaf.TDH_PHYMEM_CACHE_WB, Status.TDX_INTERRUPTED_RESUMABLE
    injections = [Injection(leaf, i, interrupted) for i in range(1, 31)]
    vmm = Vmm(Kernel().with_policy("cache-wb", policy), injections=injections)

    async def life() -> int:
        r = await vmm.build()
        await vmm.process.exit()
        return r

    assert vmm.solo(life) == 0
    assert vmm.host.counts["TDH.PHYMEM.CACHE.WB"]["TDX_INTERRUPTED_RESUMABLE"] == calls


def test_v11_tracks_until_it_may() -> None:
    vmm = Vmm(Kernel("v11-2023"), injections=[Injection(HostLeaf.TDH_MEM_TRACK, i, TREE) for i in range(1, 40)])

    async def main() -> int:
        assert await vmm.build() == 0
        return await vmm.punch(BUILT, PAGE)

    assert vmm.solo(main) == 0
    assert vmm.host.counts["TDH.MEM.TRACK"]["TDX_OPERAND_BUSY"] == 39
    assert vmm.kvm.tdh_mem_track == 0
    assert not vmm.kvm.vm_bugged


def test_a_vcpu_that_serves_a_flush_waits_for_the_end_of_tracking() -> None:
    """v11: with the count up it does not enter the guest; with nobody to take the count back it never does."""
    for count, violation in ((0, None), (1, "no deadlock")):
        vmm = Vmm(Kernel("v11-2023"))

        async def leaves(vcpu: Vcpu) -> None:
            await vcpu.io_write(0x80, 1, 1)

        async def main(vmm: Vmm = vmm) -> int:
            return await vmm.process.run(vmm.vcpus[0])

        assert vmm.solo(vmm.build) == 0
        vmm.attach(leaves)
        vmm.kvm.tdh_mem_track = count
        vmm.kvm.vcpus[0].requests |= KVM_REQ_TLB_FLUSH.bit
        outcome = run(vmm.threads(main), choose=at_random(0))
        assert outcome.violation == violation, outcome.message
        assert ("TDH.VP.ENTER" in vmm.host.counts) == (not count)
