"""Races: what KVM of 6.16 does about them, what goes wrong in it, and what its later fixes change."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from errno import EAGAIN, EBUSY, EFAULT, EINTR, EIO
from typing import Any

import pytest

from septum.arch.errors import UsageError
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import CODE, Status, with_operand
from septum.core.run import Outcome, at_random, round_robin, run
from septum.core.steps import Program, Task, wait_until
from septum.guest.vcpu import Vcpu
from septum.kvm.arguments import Region
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.hotplug import cpu_down, cpu_up
from septum.kvm.invariants import mirror_agrees, no_bug
from septum.kvm.kernel import Kernel
from septum.kvm.memslot import KVM_MEMSLOT_INVALID
from septum.kvm.seamcall import Injection
from septum.kvm.vm import Vm
from tests.kvm.machines import BUILT, MEMORY, Vmm

PAGE = 4096
BUSY = with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE)
Body = Callable[[], Coroutine[Any, Any, Any]]


def test_what_counts_as_busy() -> None:
    assert tdx_operand_busy(0x8000_0200_0000_0092)
    assert tdx_operand_busy(0x8000_0200_0000_0001)
    assert not tdx_operand_busy(Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    assert not tdx_operand_busy(Status.TDX_SYS_BUSY)
    assert not tdx_operand_busy(0)


# -- zaps against running guests ---------------------------------------------------------------------------------------


async def computes(vcpu: Vcpu) -> None:
    """Accepts a page of its own, then computes for ever."""
    page = 0x10_0000 + vcpu.index * PAGE
    await vcpu.accept(page, page + PAGE)
    await vcpu.publish(True)
    await vcpu.idle()


def vms(vmm: Vmm) -> list[Vm]:
    """The VM, while it runs."""
    return [vmm.kvm] if vmm.progress.ready and vmm.process.files.peek(vmm.vm) else []


def zap_while_running(vmm: Vmm, seed: int, zap: Body, **options: Any) -> Outcome:
    """Two vCPUs run; once they compute, a third thread zaps."""

    async def other() -> Any:
        await wait_until(lambda: bool(vmm.guests) and all(g.finished for g in vmm.guests), "guests compute")
        return await zap()

    outcome = vmm.run(computes, computes, choose=at_random(seed), others=[other], max_steps=60_000, **options)
    assert outcome.violation is None, outcome.message
    return outcome


@pytest.mark.parametrize("seed", range(8))
def test_a_zap_gets_running_vcpus_out_of_the_guest(seed: int) -> None:
    """TDH.MEM.TRACK and the flush make them exit; they notice at once, though they never exit of themselves."""
    vmm = Vmm()
    outcome = zap_while_running(vmm, seed, lambda: vmm.punch(0x10_0000, PAGE))
    assert outcome.results[3] == 0
    assert vmm.host.counts["TDH.VP.ENTER"]["INTERRUPT"] >= 2
    vmm.assert_clean()


@pytest.mark.parametrize("leaf", [HostLeaf.TDH_MEM_RANGE_BLOCK, HostLeaf.TDH_MEM_TRACK, HostLeaf.TDH_MEM_PAGE_REMOVE])
def test_busy_in_a_zap_kicks_vcpus_and_keeps_them_out(leaf: HostLeaf) -> None:
    vmm = Vmm(injections=[Injection(leaf, 1, BUSY)])
    seen = set()

    def flag() -> None:
        for kvm in vms(vmm):
            seen.add(kvm.wait_for_sept_zap)

    zap_while_running(vmm, 5, lambda: vmm.punch(0x10_0000, PAGE), invariants=[flag])
    assert seen == {False, True}
    vmm.assert_clean()


def test_without_a_second_attempt_busy_bugs_the_vm() -> None:
    for kernel, bugged in ((Kernel(), False), (Kernel().with_policy("zap", "once"), True)):
        vmm = Vmm(kernel, injections=[Injection(HostLeaf.TDH_MEM_RANGE_BLOCK, 1, BUSY)])

        async def main(vmm: Vmm = vmm) -> int:
            assert await vmm.build() == 0
            return await vmm.punch(BUILT, PAGE)

        assert vmm.solo(main) == 0
        assert bool(vmm.kvm.vm_bugged) == bugged


def test_kick_without_the_flag_also_tries_once_more() -> None:
    kernel = Kernel().with_policy("zap", "kick-without-flag")
    vmm = Vmm(kernel, injections=[Injection(HostLeaf.TDH_MEM_RANGE_BLOCK, 1, BUSY)])

    async def main() -> int:
        assert await vmm.build() == 0
        return await vmm.punch(BUILT, PAGE)

    assert vmm.solo(main) == 0
    assert not vmm.kvm.vm_bugged


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_busy_fault_is_retried_without_the_guest() -> None:
    """Local retry enters the guest once for the page; re-entering costs one TDH.VP.ENTER for each BUSY."""
    entries = {}
    for policy in ("retry-locally", "re-enter"):
        busy = [Injection(HostLeaf.TDH_MEM_PAGE_AUG, i, BUSY) for i in range(1, 6)]
        vmm = Vmm(Kernel().with_policy("fault", policy), injections=busy)

        async def one_page(vcpu: Vcpu) -> int:
            return (await vcpu.accept(0x10_0000, 0x10_1000))[0]

        outcome = vmm.run(one_page)
        assert outcome.violation is None, outcome.message
        assert vmm.guests[0].result == 1
        vmm.assert_clean()
        entries[policy] = vmm.host.counts["TDH.VP.ENTER"]["EPT_VIOLATION"]
    assert entries["re-enter"] == entries["retry-locally"] + 5


def test_zero_step_suspicion_locks_the_secure_ept() -> None:
    """More than six violations at one instruction: TDH.VP.ENTER answers with the violation, without entering."""
    busy = [Injection(HostLeaf.TDH_MEM_PAGE_AUG, i, BUSY) for i in range(1, 11)]
    vmm = Vmm(Kernel().with_policy("fault", "re-enter"), injections=busy)

    async def one_page(vcpu: Vcpu) -> int:
        return (await vcpu.accept(0x10_0000, 0x10_1000))[0]

    outcome = vmm.run(one_page)
    assert outcome.violation is None, outcome.message
    assert vmm.guests[0].result == 1
    vmm.assert_clean()


@pytest.mark.parametrize("seed", range(6))
def test_faults_of_several_vcpus_on_one_page(seed: int) -> None:
    async def same_page(vcpu: Vcpu) -> int:
        while (await vcpu.accept_page(0x10_0000)) & CODE not in (0, Status.TDX_PAGE_ALREADY_ACCEPTED):
            pass
        return 1

    vmm = Vmm()
    invariants = [mirror_agrees(lambda: vms(vmm)), no_bug(vmm.host, lambda: vms(vmm))]
    outcome = vmm.run(*[same_page] * 3, choose=at_random(seed), invariants=invariants)
    assert outcome.violation is None, outcome.message
    assert [guest.result for guest in vmm.guests] == [1, 1, 1]
    vmm.assert_clean()


def test_accepting_a_page_that_another_vcpu_has_added() -> None:
    """The module takes whether the entry is a leaf from before it has the lock, all else from after. So a page of 4 KiB
    that is added in between is said to have another size."""
    found = set()

    async def same_page(vcpu: Vcpu) -> int:
        while True:
            status = await vcpu.accept_page(0x10_0000) & CODE
            found.add(status)
            if status in (0, Status.TDX_PAGE_ALREADY_ACCEPTED):
                return 1

    for seed in range(6):
        vmm = Vmm()
        assert vmm.run(*[same_page] * 3, choose=at_random(seed)).violation is None
    assert Status.TDX_PAGE_SIZE_MISMATCH in found


# -- memslots and readers that do not leave ----------------------------------------------------------------------------


STALLED = 6_000
"""More steps than either needs."""


def delete_the_slot(kernel: Kernel, user: Callable[[Vmm], Body], busy: int = 0) -> Outcome:
    """``user`` adds four pages in one section of ``kvm->srcu``; meanwhile another thread deletes their slot.

    :param busy: how many attempts to add a page are answered with OPERAND_BUSY.
    """
    vmm = Vmm(kernel)
    assert vmm.solo(vmm.build) == 0
    vmm.host.seamcalls.inject(*[Injection(HostLeaf.TDH_MEM_PAGE_AUG, 1 + i, BUSY) for i in range(busy)])

    async def delete() -> int:
        await wait_until(lambda: "TDH.MEM.PAGE.AUG" in vmm.host.counts, "pages are added")
        return await vmm.process.set_user_memory_region2(vmm.vm, vmm.slot(memory_size=0))

    outcome = run(vmm.threads(user(vmm), delete), at_random(0), max_steps=STALLED, keep_events=False)
    assert outcome.violation is None, outcome.message
    return outcome


def prefaults(vmm: Vmm) -> Body:
    return lambda: vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, 0x10_0000, 4))


def accepts(vmm: Vmm) -> Body:
    async def four_pages(vcpu: Vcpu) -> None:
        await vcpu.accept(0x10_0000, 0x10_4000)

    vmm.attach(four_pages)
    return lambda: vmm.process.run(vmm.vcpus[0])


def test_prefault_and_slot_deletion() -> None:
    """6.16: the prefault retries as long as the slot is invalid, and the deletion waits for it to leave: for ever.
    With the fix it leaves with what it has done so far."""
    assert delete_the_slot(Kernel(), prefaults).results[:2] == [None, None]
    fixed = delete_the_slot(Kernel().with_("prefault-eagain-on-invalid-slot"), prefaults)
    assert fixed.results[:2] == [0, 0]


def test_prefault_of_an_invalid_slot_is_to_be_tried_again() -> None:
    vmm = Vmm(Kernel().with_("prefault-eagain-on-invalid-slot"))
    assert vmm.solo(vmm.build) == 0
    kvm = vmm.kvm

    async def prefault() -> int:
        await wait_until(lambda: any(slot.flags & KVM_MEMSLOT_INVALID for slot in kvm.memslots), "slot is invalid")
        return await vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, 0x10_0000, 1))

    async def delete() -> int:
        return await vmm.process.set_user_memory_region2(vmm.vm, vmm.slot(memory_size=0))

    outcome = run(vmm.threads(prefault, delete), at_random(0), keep_events=False)
    assert outcome.results[:2] == [-EAGAIN, 0]


def test_local_retry_and_slot_deletion() -> None:
    """6.16: the vCPU retries its fault without leaving the section, which the deletion waits for. With the fix it
    leaves, and gets the memory fault exit for a page that is in no slot."""
    assert delete_the_slot(Kernel(), accepts, busy=29).results[:2] == [None, None]
    fixed = delete_the_slot(Kernel().with_("no-local-retry-on-invalid-slot"), accepts, busy=29)
    assert fixed.results[:2] == [-EFAULT, 0]


# -- ioctls of two threads ---------------------------------------------------------------------------------------------


def two_threads(kernel: Kernel, first: Callable[[Vmm], Body], second: Callable[[Vmm], Body], seeds: int) -> list[Any]:
    """Results of two ioctls that race on a TD with two vCPUs that are not initialised, over some schedules."""
    found = []
    for seed in range(seeds):
        vmm = Vmm(kernel)

        async def build(vmm: Vmm = vmm) -> int:
            assert await vmm.init() == 0
            vmm.vcpus = [await vmm.process.create_vcpu(vmm.vm, i) for i in range(3)]
            assert await vmm.process.tdx_init_vcpu(vmm.vcpus[2]) == 0
            return await vmm.add_memory()

        assert vmm.solo(build) == 0
        outcome = run(vmm.threads(first(vmm), second(vmm)), at_random(seed), keep_events=False)
        assert outcome.violation is None, outcome.message
        found.append((*outcome.results[:2], bool(vmm.kvm.vm_bugged)))
    return found


def init_vcpu(index: int) -> Callable[[Vmm], Body]:
    return lambda vmm: lambda: vmm.process.tdx_init_vcpu(vmm.vcpus[index])


def init_region(vmm: Vmm) -> Body:
    async def body() -> int:
        source = vmm.process.mmap(PAGE)
        return await vmm.process.tdx_init_mem_region(vmm.vcpus[2], Region(source, BUILT, 1), 1)

    return body


def finalize(vmm: Vmm) -> Body:
    return lambda: vmm.process.tdx_finalize_vm(vmm.vm)


RACES = {
    "INIT_VCPU twice": (init_vcpu(0), init_vcpu(1)),
    "INIT_VCPU and INIT_MEM_REGION": (init_vcpu(0), init_region),
    "INIT_VCPU and FINALIZE": (init_vcpu(0), finalize),
}


@pytest.mark.parametrize("race", RACES)
def test_racing_ioctls_bug_the_vm_until_state_locks(race: str) -> None:
    first, second = RACES[race]
    before = two_threads(Kernel(), first, second, 25)
    assert any(bugged for *_, bugged in before), "some schedule finds an operand busy"
    after = two_threads(Kernel().with_("state-locks"), first, second, 25)
    assert not any(bugged for *_, bugged in after)
    assert {r for *results, _ in after for r in results} <= {0, -22}


def test_state_locks_wait_for_no_vcpu_that_is_being_created() -> None:
    vmm = Vmm(Kernel().with_("state-locks"))

    async def main() -> int:
        assert await vmm.init() == 0
        assert await vmm.add_vcpus(1) == 0
        vmm.kvm.created_vcpus += 1
        return await vmm.process.tdx_init_vcpu(vmm.vcpus[0])

    assert vmm.solo(main) == -EBUSY


def test_a_whole_life_with_all_fixes() -> None:
    kernel = Kernel().with_(
        "state-locks",
        "mr-extend-bugs-vm",
        "flush-on-vcpu-free",
        "vp-init-excludes-zaps",
        "prefault-eagain-on-invalid-slot",
        "no-local-retry-on-invalid-slot",
    )
    vmm = Vmm(kernel)

    async def one_page(vcpu: Vcpu) -> int:
        return (await vcpu.accept(0x10_0000, 0x10_1000))[0]

    outcome = vmm.run(one_page, one_page, choose=at_random(2))
    assert outcome.violation is None, outcome.message
    vmm.assert_clean()


def test_mr_extend_bugs_the_vm_since_6_19() -> None:
    for kernel, bugged in ((Kernel(), False), (Kernel().with_("mr-extend-bugs-vm"), True)):
        vmm = Vmm(kernel, injections=[Injection(HostLeaf.TDH_MR_EXTEND, 3, BUSY)])
        assert vmm.solo(vmm.build) == -EIO
        assert bool(vmm.kvm.vm_bugged) == bugged


# -- processes and CPUs ------------------------------------------------------------------------------------------------


def test_unmapping_shared_memory() -> None:
    """``munmap`` unmaps what the TD uses as shared memory, and nothing private."""
    vmm = Vmm()

    async def shares(vcpu: Vcpu) -> int:
        await vcpu.write(0x20_0000 | vcpu.shared_bit, b"hello")
        await vcpu.io_write(0x80, 0, 1)
        await vcpu.touch(0x20_0000 | vcpu.shared_bit)
        return 1

    async def main() -> list[Any]:
        assert await vmm.build() == 0
        vmm.attach(shares)
        process = vmm.process
        assert await process.set_memory_attributes(vmm.vm, 0x20_0000, PAGE, 0) == 0
        found: list[Any] = [await process.run(vmm.vcpus[0])]
        found.append(process.read(vmm.shared_memory + 0x20_0000, 5))
        found.append(await process.munmap(vmm.shared_memory, MEMORY))
        found.append(await process.run(vmm.vcpus[0]))
        return found

    assert vmm.solo(main) == [0, b"hello", 0, -14]
    assert vmm.host.counts.get("TDH.MEM.RANGE.BLOCK") is None
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()


def test_cpus_go_offline() -> None:
    """A CPU that goes flushes its vCPUs; the last one of a package stays as long as there are TDs."""
    vmm = Vmm()
    host = vmm.host

    async def main() -> list[int]:
        assert await vmm.build() == 0
        found = [await cpu_down(host, 3), await cpu_down(host, 2)]
        found.append(await cpu_up(host, 3))
        return found

    assert vmm.solo(main, cpu=1) == [0, -EBUSY, 0]
    assert any("all packages to have an online CPU" in message for message in host.log.messages)
    vcpu = vmm.process.vcpu(vmm.vcpus[0])
    assert vcpu.cpu == 1

    async def move() -> int:
        r = await cpu_down(host, 1)
        await vmm.process.exit()
        return r or await cpu_down(host, 2) or await cpu_down(host, 3)

    assert vmm.solo(move) == 0
    assert host.online_cpus() == [0]
    vmm.assert_clean()


@pytest.mark.parametrize("seed", range(10))
def test_a_cpu_goes_offline_while_its_vcpu_moves(seed: int) -> None:
    """The flush that the new CPU asks for and that of the CPU that goes meet; one of them does it."""
    vmm = Vmm()

    async def build() -> int:
        return await vmm.build()

    async def moves() -> int:
        return await vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, 0x10_0000, 1))

    async def offline() -> int:
        return await cpu_down(vmm.host, 3)

    assert vmm.solo(build, cpu=3) == 0
    outcome = run(vmm.threads(moves, offline), at_random(seed), keep_events=False)
    assert outcome.violation is None, outcome.message
    assert outcome.results[:2] == [0, 0]
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()


def test_two_vcpus_cannot_share_a_cpu() -> None:
    vmm = Vmm()
    assert vmm.solo(lambda: vmm.build(2)) == 0

    async def computes_at_once(vcpu: Vcpu) -> None:
        await vcpu.idle()

    vmm.attach(computes_at_once, computes_at_once)
    programs = [
        Program(Task(f"same{i}", cpu=1), lambda i=i: vmm.process.run(vmm.vcpus[i]))  # type: ignore[misc]
        for i in range(2)
    ]
    with pytest.raises(UsageError, match="a CPU of its own"):
        run([*programs, *vmm.host.interrupt_contexts()], round_robin, max_steps=5_000)


def test_a_signal_ends_a_local_retry() -> None:
    """The fault is given up for now; KVM_RUN returns -EINTR."""
    busy = [Injection(HostLeaf.TDH_MEM_PAGE_AUG, i, BUSY) for i in range(1, 500)]
    vmm = Vmm()
    assert vmm.solo(vmm.build) == 0
    vmm.host.seamcalls.inject(*busy)

    async def one_page(vcpu: Vcpu) -> int:
        return (await vcpu.accept(0x10_0000, 0x10_1000))[0]

    vmm.attach(one_page)

    async def enter() -> int:
        return await vmm.process.run(vmm.vcpus[0])

    async def signal() -> None:
        await wait_until(lambda: vmm.host.counts.get("TDH.MEM.PAGE.AUG") is not None, "retries")
        vmm.process.kill("thread0")

    outcome = run(vmm.threads(enter, signal), at_random(1), keep_events=False)
    assert outcome.violation is None, outcome.message
    assert outcome.results[0] == -EINTR
