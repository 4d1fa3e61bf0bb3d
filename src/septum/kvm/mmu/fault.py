"""Page faults: from an EPT violation, a prefault or the build of a TD to a mapping.

Source: Linux 6.16, ``arch/x86/kvm/mmu/{mmu,tdp_mmu}.c``.
"""

from __future__ import annotations

from enum import IntEnum
from errno import EAGAIN, EFAULT, EINTR, EIO, ENOENT
from typing import TYPE_CHECKING, Final

from septum.core.steps import emit, step
from septum.kvm.abi import KVM_EXIT_MEMORY_FAULT, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_EXIT_FLAG_PRIVATE
from septum.kvm.attributes import kvm_mem_is_private
from septum.kvm.gmem import kvm_gmem_get_pfn
from septum.kvm.memslot import KVM_MEMSLOT_INVALID, Memslot, gfn_to_memslot
from septum.kvm.mmu.invalidate import mmu_invalidate_retry_gfn
from septum.kvm.mmu.lpage_info import (
    disallowed_hugepage_adjust,
    kvm_mmu_hugepage_adjust,
    tdx_gmem_max_mapping_level,
)
from septum.kvm.mmu.mirror import tdp_mmu_set_spte_atomic
from septum.kvm.mmu.roots import mmu_topup_memory_caches, tdp_mmu_alloc_sp, tdp_mmu_free_sp
from septum.kvm.mmu.spte import (
    PG_LEVEL_4K,
    is_frozen_spte,
    is_last_spte,
    is_shadow_present_pte,
    make_mmio_spte,
    make_nonleaf_spte,
    make_spte,
)
from septum.kvm.mmu.walk import Found, walk_to
from septum.kvm.mmu.zap import rcu_read_lock
from septum.kvm.requests import KVM_REQ_VM_DEAD, kvm_check_request
from septum.kvm.run_struct import MemoryFaultExit
from septum.kvm.signals import signal_pending
from septum.kvm.vm import kvm_bug_on

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm

SPLIT_IN_FAULT: Final = "a fault would split a large mapping under shared mmu_lock"
PFERR_WRITE: Final = 1 << 1
PFERR_FETCH: Final = 1 << 4
PFERR_PRIVATE_ACCESS: Final = 1 << 49


class RetPf(IntEnum):
    """``RET_PF_*``: how handling a fault ended. All but CONTINUE let the guest go on; negative numbers are errnos."""

    CONTINUE = 0
    RETRY = 1
    EMULATE = 2
    INVALID = 4
    FIXED = 5
    SPURIOUS = 6


class PageFault:
    """``struct kvm_page_fault``: one attempt. ``page`` is what is to be mapped, with a reference (0: MMIO); not more
    than ``max_level`` around it is contiguous, and ``goal_level`` is to be mapped."""

    __slots__ = ("error_code", "gfn", "goal_level", "is_private", "max_level", "mmu_seq", "page", "prefetch", "slot")

    def __init__(self, gfn: int, error_code: int, slot: Memslot | None, *, prefetch: bool) -> None:
        self.gfn = gfn
        self.error_code = error_code
        self.is_private = bool(error_code & PFERR_PRIVATE_ACCESS)
        self.prefetch = prefetch
        self.slot = slot
        self.mmu_seq = 0
        self.page = 0
        self.max_level = self.goal_level = PG_LEVEL_4K


async def kvm_mmu_page_fault(vcpu: Vcpu, gpa: int, error_code: int) -> int:
    """``kvm_mmu_page_fault``: one fault of the guest. A :class:`RetPf`, or a negative errno."""
    r, _ = await kvm_mmu_do_page_fault(vcpu, gpa, error_code, prefetch=False)
    if await kvm_bug_on(r == RetPf.INVALID, vcpu.kvm, "a page fault without an answer"):
        return -EIO
    return r


async def kvm_mmu_do_page_fault(vcpu: Vcpu, gpa: int, error_code: int, *, prefetch: bool) -> tuple[int, int]:
    """``kvm_mmu_do_page_fault`` and ``kvm_tdp_mmu_page_fault``: what it came to, and the level that was gone for.

    The memslot is looked up once and used throughout.
    """
    kvm = vcpu.kvm
    await step("read", "memslots")
    gfn = gpa >> 12 & ~kvm.gfn_direct_bits
    fault = PageFault(gfn, error_code, gfn_to_memslot(kvm.memslots, gfn), prefetch=prefetch)
    r = mmu_topup_memory_caches(vcpu) or await kvm_tdp_mmu_page_fault(vcpu, fault)
    return r, fault.goal_level


async def kvm_tdp_mmu_page_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """``kvm_tdp_mmu_page_fault``."""
    kvm = vcpu.kvm
    r = await kvm_mmu_faultin_pfn(vcpu, fault)
    if r != RetPf.CONTINUE:
        return r
    async with kvm.mmu_lock.read():
        if fault.slot and mmu_invalidate_retry_gfn(kvm, fault.mmu_seq, fault.gfn):
            r = RetPf.RETRY
        else:
            r = await kvm_tdp_mmu_map(vcpu, fault)
        kvm_release_page(kvm, fault)
    if r == RetPf.EMULATE and fault.is_private:
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    return r


def kvm_release_page(kvm: Vm, fault: PageFault) -> None:
    """``kvm_mmu_finish_page_fault``: the fault's reference to the page goes."""
    if fault.page:
        kvm.host.pages.put(fault.page)


def kvm_mmu_prepare_memory_fault_exit(vcpu: Vcpu, fault: PageFault) -> None:
    """``kvm_mmu_prepare_memory_fault_exit``: tells userspace which page the guest wanted, and how."""
    flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if fault.is_private else 0
    vcpu.run.leave(KVM_EXIT_MEMORY_FAULT, MemoryFaultExit(flags, fault.gfn << 12, 4096))


async def kvm_mmu_faultin_pfn(vcpu: Vcpu, fault: PageFault) -> int:
    """``kvm_mmu_faultin_pfn``: finds the page to map. The snapshot of the sequence count comes before all checks."""
    kvm, gfn = vcpu.kvm, fault.gfn
    await step("read", "mmu_invalidate_seq")
    fault.mmu_seq = kvm.mmu_invalidate_seq
    await step("read", "memory attributes")
    if fault.is_private != kvm_mem_is_private(kvm, gfn):
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    if fault.slot is None:
        return kvm_handle_noslot_fault(vcpu, fault)
    if fault.slot.flags & KVM_MEMSLOT_INVALID:
        if fault.prefetch and kvm.host.kernel.has("prefault-eagain-on-invalid-slot"):
            return -EAGAIN
        return RetPf.RETRY
    if mmu_invalidate_retry_gfn(kvm, fault.mmu_seq, gfn):
        return RetPf.RETRY
    page = await (
        kvm_mmu_faultin_pfn_private(kvm, fault) if fault.is_private else kvm.mm.get_user_pages_fast(fault.slot.hva(gfn))
    )
    if page < 0:
        if fault.is_private:
            kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return page
    fault.page = page
    if mmu_invalidate_retry_gfn(kvm, fault.mmu_seq, gfn):
        kvm_release_page(kvm, fault)
        return RetPf.RETRY
    return RetPf.CONTINUE


def kvm_handle_noslot_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """``kvm_handle_noslot_fault``: private memory must be in a memslot; anything else is MMIO."""
    if fault.is_private:
        kvm_mmu_prepare_memory_fault_exit(vcpu, fault)
        return -EFAULT
    return RetPf.CONTINUE


async def kvm_mmu_faultin_pfn_private(kvm: Vm, fault: PageFault) -> int:
    """``kvm_mmu_faultin_pfn_private``: the page of the guest_memfd file, or a negative errno."""
    assert fault.slot is not None
    if not fault.slot.flags & KVM_MEM_GUEST_MEMFD:
        return -EFAULT
    page, fault.max_level = await kvm_gmem_get_pfn(kvm, fault.slot, fault.gfn)
    if fault.max_level > PG_LEVEL_4K:
        await step("read", "TD state")
        fault.max_level = min(fault.max_level, tdx_gmem_max_mapping_level(kvm))
    return page


async def kvm_tdp_mmu_map(vcpu: Vcpu, fault: PageFault) -> int:
    """``kvm_tdp_mmu_map``: links tables down to the goal and maps the page, with ``mmu_lock`` held for read.

    RETRY whenever somebody else was faster, or the module busy. A leaf above the goal would be split here, but for
    private memory that takes ``mmu_lock`` held for write (huge pages v3); those who want less than a leaf maps have
    split it before.
    """
    kvm, mirror = vcpu.kvm, fault.is_private
    root = vcpu.mirror_root if mirror else vcpu.direct_root
    emit("fault", f"kvm_mmu_spte_requested gfn {fault.gfn:#x}")
    kvm_mmu_hugepage_adjust(fault)
    async with rcu_read_lock():
        while True:
            found = walk_to(kvm, root, mirror, fault.gfn, fault.goal_level)
            if mirror and disallowed_hugepage_adjust(fault, found):
                continue
            if is_frozen_spte(found.spte):
                return RetPf.RETRY
            if found.level == fault.goal_level:
                return await tdp_mmu_map_handle_target_level(vcpu, fault, found)
            if kvm.host.log.warn_on(is_shadow_present_pte(found.spte), SPLIT_IN_FAULT):
                return RetPf.RETRY
            spt = tdp_mmu_alloc_sp(kvm, found.gfn, found.level - 1, mirror=mirror, external=mirror)
            if await tdp_mmu_set_spte_atomic(kvm, found, make_nonleaf_spte(spt), mirror):
                tdp_mmu_free_sp(kvm, spt)
                return RetPf.RETRY


async def tdp_mmu_map_handle_target_level(vcpu: Vcpu, fault: PageFault, found: Found) -> int:
    """``tdp_mmu_map_handle_target_level``."""
    if is_shadow_present_pte(found.spte) and is_last_spte(found.spte, found.level):
        return RetPf.SPURIOUS
    offset = fault.gfn - found.gfn << 12
    new = make_spte(fault.page - offset, found.level) if fault.page else make_mmio_spte(found.gfn)
    if new == found.spte:
        return RetPf.SPURIOUS
    if await tdp_mmu_set_spte_atomic(vcpu.kvm, found, new, fault.is_private):
        return RetPf.RETRY
    return RetPf.FIXED if fault.page else RetPf.EMULATE


async def kvm_tdp_map_page(vcpu: Vcpu, gpa: int, error_code: int) -> int:
    """``kvm_tdp_map_page``: maps a page before the guest asks, again and again while it must be tried again.

    The level that was mapped, or a negative errno: -EINTR for a signal, -EIO for a VM that died, -ENOENT where is no
    memory.
    """
    while True:
        if signal_pending(vcpu.kvm.host):
            return -EINTR
        if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
            return -EIO
        r, level = await kvm_mmu_do_page_fault(vcpu, gpa, error_code, prefetch=True)
        if r != RetPf.RETRY:
            break
    if r < 0:
        return r
    if r in (RetPf.FIXED, RetPf.SPURIOUS):
        return level
    if r == RetPf.EMULATE:
        return -ENOENT
    vcpu.kvm.host.log.warn_on(True, "could not fix page fault during prefault")
    return -EIO


async def kvm_tdp_mmu_map_private_pfn(vcpu: Vcpu, gfn: int, page: int) -> int:
    """``kvm_tdp_mmu_map_private_pfn`` (6.19): maps a page of a TD that is being built, with ``slots_lock`` held.

    0; -EINTR for a signal, -EIO for a VM that died, or where something is mapped already.
    """
    kvm = vcpu.kvm
    fault = PageFault(gfn, PFERR_PRIVATE_ACCESS, gfn_to_memslot(kvm.memslots, gfn), prefetch=True)
    fault.page = page
    if r := mmu_topup_memory_caches(vcpu):
        return r
    while True:
        if signal_pending(kvm.host):
            return -EINTR
        if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
            return -EIO
        async with kvm.mmu_lock.read():
            r = await kvm_tdp_mmu_map(vcpu, fault)
        if r != RetPf.RETRY:
            return 0 if r == RetPf.FIXED else -EIO
