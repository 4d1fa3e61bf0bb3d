"""Building a TD as Linux 6.19 does: TDH.MEM.PAGE.ADD inside the change of the mirror. 7.0 pins the source first."""

from __future__ import annotations

from errno import EFAULT, EIO

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.kvm.arguments import Region
from septum.kvm.kernel import FIXES, Kernel
from septum.kvm.mmu.fault import kvm_tdp_mmu_map_private_pfn
from septum.kvm.seamcall import Injection
from tests.kvm.machines import BUILT, Vmm
from tests.kvm.test_errnos import region

HARD = with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
BUSY = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)


def test_a_release_has_the_fixes_of_those_before() -> None:
    fixes = [Kernel(name).fixes or frozenset() for name in ("v6.16", "v6.18", "v6.19")]
    assert fixes[0] < fixes[1] < fixes[2]
    assert {name for name in FIXES if Kernel("v6.19").has(name)} == {
        name for name, fix in FIXES.items() if fix.since in ("v6.16", "v6.18", "v6.19")
    }


@pytest.mark.parametrize("kernel", ["v6.18", "v6.19"])
def test_builds_the_same_td(kernel: str) -> None:
    measured = []
    for name in ("v6.16", kernel):
        vmm = Vmm(kernel=Kernel(name))
        assert vmm.solo(lambda: vmm.build(2, 4)) == 0  # noqa: B023 - runs at once
        measured.append(vmm.host.module.td(vmm.kvm.tdr_page).tdcs.mrtd)
        vmm.solo(vmm.process.exit)
        vmm.assert_clean()
    assert measured[0] == measured[1]


def built(*injections: Injection, kernel: Kernel | None = None) -> Vmm:
    """A TD with a vCPU and memory, to which nothing was added yet."""
    vmm = Vmm(kernel=kernel or Kernel("v6.19"), injections=injections)

    async def ready() -> None:
        assert await vmm.init() == 0
        assert await vmm.add_vcpus(1) == 0
        assert await vmm.add_memory() == 0

    vmm.solo(ready)
    return vmm


def test_a_page_that_is_busy_is_tried_again() -> None:
    vmm = built(Injection(HostLeaf.TDH_MEM_PAGE_ADD, 1, BUSY))
    assert vmm.solo(lambda: region(vmm, pages=2)) == 0
    assert vmm.host.counts["TDH.MEM.PAGE.ADD"] == {"TDX_OPERAND_BUSY": 1, "TDX_SUCCESS": 2}
    assert vmm.kvm.page_add_src == vmm.kvm.nr_premapped == 0


def test_a_page_that_cannot_be_added_bugs_the_vm_and_leaves_no_spte() -> None:
    vmm = built(Injection(HostLeaf.TDH_MEM_PAGE_ADD, 1, HARD))
    assert vmm.solo(lambda: region(vmm)) == -EIO
    assert set(vmm.host.log.bugs) == {"TDH_MEM_PAGE_ADD failed"}
    assert vmm.kvm.page_add_src == 0


def test_a_gpa_that_is_mapped_already() -> None:
    vmm = built()

    async def twice() -> int:
        assert await region(vmm) == 0
        page = vmm.host.pages.alloc()
        async with vmm.kvm.slots_lock.locked():
            return await kvm_tdp_mmu_map_private_pfn(vmm.kvm.vcpus[0], BUILT >> 12, page)

    assert vmm.solo(twice) == -EIO
    assert not vmm.host.log.bugs


def test_the_source_is_pinned_before_the_lock_of_the_file() -> None:
    for kernel, order in ((Kernel("v6.19"), "lock"), (Kernel("v6.19").with_("gup-before-gmem-lock"), "gup")):
        vmm = built(kernel=kernel)
        seen: list[str] = []
        file = vmm.kvm.memslots[0].gmem_file
        assert file is not None
        gup, lock = vmm.kvm.mm.get_user_pages_fast, file.private_data.invalidate_lock

        async def noted(address: int) -> int:
            seen.append("lock" if lock.writer else "gup")  # noqa: B023 - runs at once
            return await gup(address)  # noqa: B023

        object.__setattr__(vmm.kvm.mm, "get_user_pages_fast", noted)
        assert vmm.solo(lambda: region(vmm)) == 0  # noqa: B023
        assert seen == [order]


def test_a_source_that_is_not_there() -> None:
    vmm = built()

    async def nowhere() -> int:
        return await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(0x10_0000_0000, BUILT, 1), 0)

    assert vmm.solo(nowhere) == -EFAULT
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()
