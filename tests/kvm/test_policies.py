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
from septum.kvm.arguments import Region
from septum.kvm.contention import policy_of
from septum.kvm.kernel import DESIGNS, Kernel
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
