"""Private memory mapped 2 MiB at a time: which faults get it, what splits it, and that nothing is lost."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_2M, PAGE_4K, Level
from septum.arch.platform import profile
from septum.arch.status import Status, with_operand
from septum.core.cells import Tracking, World
from septum.core.run import at_random
from septum.core.steps import wait_until
from septum.guest.scripted import Script
from septum.guest.vcpu import Vcpu
from septum.kvm.arguments import Region
from septum.kvm.host import MODULE_FEATURES, Host
from septum.kvm.kernel import Kernel
from septum.kvm.mmu.lpage_info import hugepage_test_guest_inhibit, hugepage_test_mixed
from septum.kvm.mmu.spte import PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K
from septum.kvm.mmu.walk import walk_to
from septum.kvm.seamcall import Injection
from septum.tdx.module import Module
from tests.kvm.machines import Vmm

HUGE = Kernel().with_("huge-pages", "no-page-pinning", "hole-invalidates-folios")
BLOCK = PAGE_2M
"""The second 2 MiB of the guest's memory: nothing is added there at build."""
BUSY = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)


def made(vmm: Vmm, leaf: str) -> int:
    """How many calls of a leaf succeeded."""
    return vmm.host.counts.get(leaf, {}).get("TDX_SUCCESS", 0)


def levels(vmm: Vmm) -> Counter[int]:
    """The levels at which the private pages of the block are mapped."""
    kvm = vmm.kvm
    found = [walk_to(kvm, kvm.mirror_root, True, gfn, PG_LEVEL_4K) for gfn in range(512, 1024)]
    return Counter(at.level for at in found if at.spte & 1)


def live(*scripts: Script, kernel: Kernel = HUGE) -> Vmm:
    """A TD from build to end; every script comes to its end, and nothing is lost."""
    vmm = Vmm(kernel)
    outcome = vmm.run(*scripts)
    assert outcome.violation is None, outcome.message
    assert all(guest.finished for guest in vmm.guests)
    vmm.assert_clean()
    return vmm


def built(kernel: Kernel = HUGE, *, pages: int = 2) -> Vmm:
    """A TD that can run, its block mapped ahead of the guest."""
    vmm = Vmm(kernel)
    assert vmm.solo(lambda: vmm.build(1, pages)) == 0
    assert prefault(vmm) == 0
    return vmm


def prefault(vmm: Vmm, gpa: int = BLOCK, pages: int = 512) -> int:
    """KVM_PRE_FAULT_MEMORY."""
    result: int = vmm.solo(lambda: vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, gpa, pages)))
    return result


def end(vmm: Vmm) -> None:
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()


async def accepts_all(vcpu: Vcpu) -> tuple[int, int]:
    accepted = await vcpu.accept(BLOCK, 2 * BLOCK)
    await vcpu.write(BLOCK + 0x5000, b"mine")
    return accepted


def test_a_fault_maps_2m_and_the_guest_accepts_them_at_once() -> None:
    vmm = live(accepts_all)
    assert vmm.guests[0].result == (0, 1)
    assert (made(vmm, "TDH.MEM.PAGE.AUG"), made(vmm, "TDH.MEM.PAGE.DEMOTE")) == (1, 0)


def test_other_kernels_and_modules_map_4k() -> None:
    vmm = live(accepts_all, kernel=Kernel())
    assert vmm.guests[0].result == (512, 0)
    Tracking.world = World()
    host = Host(profile("small"), HUGE, module=Module(profile("small"), features=MODULE_FEATURES))
    host.boot()
    assert not host.state.enable_tdx_huge_page, "a module whose TDH.MEM.PAGE.DEMOTE can be interrupted"


def test_memory_of_the_build_stays_4k() -> None:
    """A page that was added has a table around it, and tables are not merged."""
    vmm = built()
    assert prefault(vmm, 0, 8) == 0
    assert walk_to(vmm.kvm, vmm.kvm.mirror_root, True, 5, PG_LEVEL_4K).level == PG_LEVEL_4K
    assert levels(vmm) == {PG_LEVEL_2M: 512}
    end(vmm)


def test_a_hole_splits_and_leaves_the_rest_as_it_is() -> None:
    vmm = built()
    assert vmm.solo(lambda: vmm.punch(BLOCK + 0x3000, 0x2000)) == 0
    assert levels(vmm) == {PG_LEVEL_4K: 510}
    assert made(vmm, "TDH.MEM.PAGE.DEMOTE") == 1
    assert vmm.solo(lambda: vmm.punch(BLOCK, PAGE_2M)) == 0
    assert levels(vmm) == {}
    assert made(vmm, "TDH.MEM.PAGE.DEMOTE") == 1
    assert prefault(vmm) == 0
    assert levels(vmm) == {PG_LEVEL_4K: 512}, "the folio is whole again, but the table stays"
    end(vmm)


def test_a_whole_block_goes_at_once() -> None:
    vmm = built()
    assert vmm.solo(lambda: vmm.punch(BLOCK, PAGE_2M)) == 0
    assert (made(vmm, "TDH.MEM.PAGE.DEMOTE"), made(vmm, "TDH.MEM.PAGE.REMOVE")) == (0, 1)
    assert made(vmm, "TDH.PHYMEM.PAGE.WBINVD") == 512
    assert prefault(vmm) == 0
    assert levels(vmm) == {PG_LEVEL_2M: 512}
    end(vmm)


def test_a_conversion_splits_and_the_guest_keeps_its_data() -> None:
    async def script(vcpu: Vcpu) -> bytes:
        await accepts_all(vcpu)
        await vcpu.map_gpa(BLOCK + 0x3000, PAGE_4K, shared=True)
        await vcpu.map_gpa(BLOCK + 0x3000, PAGE_4K, shared=False)
        await vcpu.accept(BLOCK + 0x3000, BLOCK + 0x4000)
        return await vcpu.read(BLOCK + 0x5000, 4)

    vmm = live(script)
    assert vmm.guests[0].result == b"mine"
    assert made(vmm, "TDH.MEM.PAGE.DEMOTE") == 1


def test_mixed_pages_forbid_2m() -> None:
    vmm = built()
    (slot,) = vmm.kvm.memslots
    set_attributes = vmm.process.set_memory_attributes
    assert vmm.solo(lambda: set_attributes(vmm.vm, BLOCK + 0x3000, PAGE_4K, 0)) == 0
    assert hugepage_test_mixed(slot, 600, PG_LEVEL_2M)
    assert vmm.solo(lambda: vmm.punch(BLOCK, PAGE_2M)) == 0
    assert prefault(vmm, BLOCK, 1) == 0
    assert levels(vmm) == {PG_LEVEL_4K: 1}
    assert vmm.solo(lambda: set_attributes(vmm.vm, BLOCK, PAGE_2M, 8)) == 0
    assert not hugepage_test_mixed(slot, 600, PG_LEVEL_2M)
    end(vmm)


def test_a_guest_that_accepts_4k_gets_4k_for_ever() -> None:
    """TDG.MEM.PAGE.ACCEPT of less than is mapped exits to KVM, which splits and remembers."""

    async def script(vcpu: Vcpu) -> int:
        first = await vcpu.accept_page(BLOCK + 0x1000)
        await vcpu.publish(first | await vcpu.accept_page(BLOCK, Level.PD))
        await vcpu.io_write(0x80, 0, 1)
        return first

    vmm = built()
    (slot,) = vmm.kvm.memslots
    assert not hugepage_test_guest_inhibit(slot, 600, PG_LEVEL_2M)
    vmm.attach(script)
    assert vmm.solo(lambda: vmm.process.run(vmm.vcpus[0])) == 0
    assert vmm.guests[0].result == with_operand(Status.TDX_PAGE_SIZE_MISMATCH, Level.PD)
    assert levels(vmm) == {PG_LEVEL_4K: 512}
    assert all(hugepage_test_guest_inhibit(slot, 600, level) for level in (PG_LEVEL_2M, PG_LEVEL_1G))
    assert vmm.solo(lambda: vmm.punch(BLOCK, PAGE_2M)) == 0
    assert prefault(vmm, BLOCK, 1) == 0
    assert levels(vmm) == {PG_LEVEL_4K: 1}
    end(vmm)


def test_a_guest_that_accepts_first_is_never_split() -> None:
    """What Linux guests do: KVM knows the level before it maps anything."""

    async def script(vcpu: Vcpu) -> int:
        return await vcpu.accept_page(BLOCK + 0x1000)

    assert made(live(script), "TDH.MEM.PAGE.DEMOTE") == 0


@pytest.mark.parametrize("leaf", [HostLeaf.TDH_MEM_RANGE_BLOCK, HostLeaf.TDH_MEM_TRACK, HostLeaf.TDH_MEM_PAGE_DEMOTE])
def test_busy_in_a_split_is_retried_once_and_then_bugs_the_vm(leaf: HostLeaf) -> None:
    for times in (1, 2):
        vmm = built(Kernel().with_("huge-pages"))
        vmm.host.seamcalls.inject(*(Injection(leaf, 1 + i, BUSY) for i in range(times)))
        assert vmm.solo(partial(vmm.punch, BLOCK + 0x3000, 0x1000)) == 0
        name = f"{leaf.abi_name.replace('.', '_')} failed"
        assert vmm.kvm.vm_bugged == ("" if times == 1 else name)


def test_no_memory_for_a_split_is_userspaces_to_know() -> None:
    vmm = built()
    pages = vmm.host.pages
    while pages.alloc_huge():
        pass
    while pages.alloc():
        pass
    assert vmm.solo(lambda: vmm.punch(BLOCK + 0x3000, 0x1000)) == -12
    assert levels(vmm) == {PG_LEVEL_2M: 512}
    assert (before := vmm.kvm.mmu_invalidate_in_progress) == 0
    convert = lambda: vmm.process.set_memory_attributes(vmm.vm, BLOCK, PAGE_4K, 0)  # noqa: E731
    assert vmm.solo(convert) == -12
    assert vmm.kvm.mmu_invalidate_in_progress == before + 1, "as posted, nobody ends the invalidation"


@pytest.mark.parametrize("seed", range(6))
def test_vcpus_and_holes_at_random(seed: int) -> None:
    """Two guests, one of them content with 4 KiB, while a page that neither needs comes and goes."""

    async def large(vcpu: Vcpu) -> bytes:
        await vcpu.accept(BLOCK, 2 * BLOCK)
        await vcpu.write(BLOCK + 0x7000, b"kept")
        await vcpu.map_gpa(BLOCK + 0x3000, 0x1000, shared=True)
        return await vcpu.read(BLOCK + 0x7000, 4)

    async def small(vcpu: Vcpu) -> bytes:
        await vcpu.accept(BLOCK + 0x9000, BLOCK + 0xA000)
        return b"kept"

    vmm = Vmm(HUGE)

    async def holes() -> None:
        await wait_until(lambda: vmm.progress.ready, "the TD is built")
        for _ in range(3):
            assert await vmm.punch(BLOCK + 0xC000, 0x2000) == 0

    outcome = vmm.run(large, small, choose=at_random(seed), others=[holes])
    assert outcome.violation is None, outcome.message
    assert [guest.result for guest in vmm.guests] == [b"kept"] * 2
    vmm.assert_clean()
