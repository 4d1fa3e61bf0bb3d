"""A guest that accepts less than is mapped: KVM must split, or the guest's TDG.MEM.PAGE.ACCEPT exits again and again.

Source: huge pages v3 (20260106101646.24809-1-yan.y.zhao), ``arch/x86/kvm/vmx/tdx.c``, ``tdx_honor_guest_accept_level``.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING, Final

from septum.core.steps import step
from septum.kvm.memslot import gfn_to_memslot
from septum.kvm.mmu.lpage_info import hugepage_set_guest_inhibit, hugepage_test_guest_inhibit
from septum.kvm.mmu.split import kvm_split_cross_boundary_leafs
from septum.kvm.mmu.spte import PG_LEVEL_2M, PG_LEVEL_4K, pages_per_hpage
from septum.kvm.mmu.zap import GfnRange, Roots

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

TDX_EXT_EXIT_QUAL_TYPE_MASK: Final = 0xF
TDX_EXT_EXIT_QUAL_TYPE_ACCEPT: Final = 1
TDX_EXT_EXIT_QUAL_INFO_SHIFT: Final = 32
_RDX: Final = 2


async def tdx_honor_guest_accept_level(vcpu: Vcpu, gfn: int) -> int:
    """``tdx_honor_guest_accept_level``: forbids mappings above the level of the guest's TDG.MEM.PAGE.ACCEPT, for all
    vCPUs and for ever, and splits the one that is there. 0, 1 to let the guest try again, or a negative errno.

    Nothing is to be done for a violation of an access: what the guest will accept later is not known then. The bit is
    looked up without ``mmu_lock`` first, which is safe because it is set after the split, and never cleared.
    """
    kvm = vcpu.kvm
    policy = kvm.host.kernel.policies["accept"]
    level = _accept_level(vcpu)
    slot = gfn_to_memslot(kvm.memslots, gfn)
    if not kvm.host.state.enable_tdx_huge_page or policy == "ignore" or slot is None or level is None:
        return 0
    await step("read", "lpage_info")
    if hugepage_test_guest_inhibit(slot, gfn, level + 1):
        return 0
    pages, shared = pages_per_hpage(level), policy == "split-shared"
    first = gfn & -pages
    gfns = GfnRange(slot, first, first + pages, Roots.MIRROR)
    async with kvm.mmu_lock.read() if shared else kvm.mmu_lock.write():
        if r := await kvm_split_cross_boundary_leafs(kvm, gfns, shared=shared):
            return 1 if r == -EBUSY else r
        hugepage_set_guest_inhibit(slot, gfn, level + 1)
        if level == PG_LEVEL_4K:
            hugepage_set_guest_inhibit(slot, gfn, level + 2)
    return 0


def _accept_level(vcpu: Vcpu) -> int | None:
    """The level at which the guest accepts, if that is what the EPT violation comes from."""
    extended = vcpu.vp_enter_args[_RDX]
    if extended & TDX_EXT_EXIT_QUAL_TYPE_MASK != TDX_EXT_EXIT_QUAL_TYPE_ACCEPT:
        return None
    level = (extended >> TDX_EXT_EXIT_QUAL_INFO_SHIFT & 7) + 1
    return level if level in (PG_LEVEL_4K, PG_LEVEL_2M) else None
