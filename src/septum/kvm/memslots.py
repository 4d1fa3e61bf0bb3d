"""KVM_SET_USER_MEMORY_REGION2: creating, deleting, moving memslots.

vCPUs read the active set under SRCU. A slot that goes is first replaced by a copy marked INVALID; when no reader can
have the old one any more, its pages are unmapped; then a set without it becomes active.
Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/x86.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K
from septum.core.cells import SharedMap
from septum.core.steps import emit, step
from septum.kvm.abi import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_USER_MEM_SLOTS,
    UserspaceMemoryRegion2,
)
from septum.kvm.attributes import kvm_mmu_init_memslot_memory_attributes
from septum.kvm.gmem import kvm_gmem_bind, kvm_gmem_unbind
from septum.kvm.memslot import KVM_MEMSLOT_INVALID, Memslot
from septum.kvm.mmu.zap import kvm_mmu_zap_memslot
from septum.kvm.user_memory import TASK_SIZE

if TYPE_CHECKING:
    from septum.kvm.files import File
    from septum.kvm.vm import Vm

KVM_MEM_MAX_NR_PAGES: Final = (1 << 31) - 1
KVM_MMU_MAX_GFN: Final = (1 << 52 - 12) - 1
"""``kvm_mmu_max_gfn`` with a physical address width of 52."""


class Change(Enum):
    """``enum kvm_mr_change``."""

    CREATE = 0
    DELETE = 1
    MOVE = 2
    FLAGS_ONLY = 3


async def kvm_vm_ioctl_set_memory_region(kvm: Vm, mem: UserspaceMemoryRegion2, fget: Callable[[], File | None]) -> int:
    """``kvm_vm_ioctl_set_memory_region``. ``fget`` looks up ``mem.guest_memfd``."""
    if mem.slot & 0xFFFF >= KVM_USER_MEM_SLOTS:
        return -EINVAL
    async with kvm.slots_lock.locked():
        return await kvm_set_memory_region(kvm, mem, fget)


def check_memory_region_flags(mem: UserspaceMemoryRegion2) -> int:
    """``check_memory_region_flags`` of a VM with private memory. TDX VMs can't have read-only memory."""
    valid = KVM_MEM_GUEST_MEMFD
    if not mem.flags & KVM_MEM_GUEST_MEMFD:
        valid |= KVM_MEM_LOG_DIRTY_PAGES
    return -EINVAL if mem.flags & ~valid else 0


async def kvm_set_memory_region(kvm: Vm, mem: UserspaceMemoryRegion2, fget: Callable[[], File | None]) -> int:
    """``kvm_set_memory_region``."""
    if r := check_memory_region_flags(mem):
        return r
    slot_id, private = mem.slot & 0xFFFF, bool(mem.flags & KVM_MEM_GUEST_MEMFD)
    if mem.memory_size % PAGE_4K or mem.guest_phys_addr % PAGE_4K:
        return -EINVAL
    if mem.userspace_addr % PAGE_4K or mem.userspace_addr + mem.memory_size > TASK_SIZE:
        return -EINVAL
    if private and (mem.guest_memfd_offset % PAGE_4K or mem.guest_memfd_offset + mem.memory_size >= 1 << 64):
        return -EINVAL
    if mem.slot >> 16 or mem.guest_phys_addr + mem.memory_size >= 1 << 64:
        return -EINVAL
    base_gfn, npages = mem.guest_phys_addr // PAGE_4K, mem.memory_size // PAGE_4K
    if npages > KVM_MEM_MAX_NR_PAGES:
        return -EINVAL

    old = next((slot for slot in kvm.memslots if slot.id == slot_id), None)
    if not npages:
        return await kvm_set_memslot(kvm, old, None, Change.DELETE) if old else -EINVAL
    if old is None:
        change = Change.CREATE
    else:
        if private or mem.userspace_addr != old.userspace_addr or npages != old.npages:
            return -EINVAL
        if base_gfn == old.base_gfn and mem.flags == old.flags:
            return 0
        change = Change.MOVE if base_gfn != old.base_gfn else Change.FLAGS_ONLY
    if change is not Change.FLAGS_ONLY and any(
        slot.id != slot_id and slot.base_gfn < base_gfn + npages and base_gfn < slot.base_gfn + slot.npages
        for slot in kvm.memslots
    ):
        return -EEXIST

    new = _allocate(kvm, slot_id, base_gfn, npages, mem.flags, mem.userspace_addr)
    if private and (r := await kvm_gmem_bind(kvm, new, fget(), mem.guest_memfd_offset)):
        return r
    r = await kvm_set_memslot(kvm, old, new, change)
    if r and private:
        await kvm_gmem_unbind(kvm, new)
    return r


def _allocate(kvm: Vm, slot_id: int, base_gfn: int, npages: int, flags: int, userspace_addr: int) -> Memslot:
    number = kvm.slot_allocations
    kvm.slot_allocations += 1
    key = ("memslot", kvm.number, number, slot_id, base_gfn, npages, flags, userspace_addr)
    name = f"VM{kvm.number}.slot{slot_id}" + (".invalid" if flags & KVM_MEMSLOT_INVALID else "")
    return kvm.host.once(
        key,
        lambda: Memslot(
            name,
            id=slot_id,
            base_gfn=base_gfn,
            npages=npages,
            flags=flags,
            userspace_addr=userspace_addr,
            lpage_info=SharedMap(f"{name}.lpage_info", 0),
        ),
    )


async def kvm_set_memslot(kvm: Vm, old: Memslot | None, new: Memslot | None, change: Change) -> int:
    """``kvm_set_memslot``: with ``slots_lock`` held. ``slots_arch_lock`` is let go before each wait for readers."""
    await kvm.slots_arch_lock.take(shared=False)
    gone = old
    if change in (Change.DELETE, Change.MOVE):
        assert old is not None
        flags = old.flags | KVM_MEMSLOT_INVALID
        gone = _allocate(kvm, old.id, old.base_gfn, old.npages, flags, old.userspace_addr)
        await kvm_swap_active_memslots(kvm, old, gone)
        await kvm_mmu_zap_memslot(kvm, old)
        await kvm.slots_arch_lock.take(shared=False)
    if r := kvm_arch_prepare_memory_region(kvm, new):
        if gone is not old:
            await kvm_swap_active_memslots(kvm, gone, old)
        else:
            kvm.slots_arch_lock.let_go(shared=False)
        return r
    await kvm_swap_active_memslots(kvm, gone, new)
    emit("memslot", f"{change.name.lower()} {new or old}")
    if change is Change.DELETE and old is not None and old.flags & KVM_MEM_GUEST_MEMFD:
        await kvm_gmem_unbind(kvm, old)
    return 0


def kvm_arch_prepare_memory_region(kvm: Vm, new: Memslot | None) -> int:
    """``kvm_arch_prepare_memory_region``: a slot must lie where page frames are, and below the SHARED bit."""
    if new is None:
        return 0
    last = new.base_gfn + new.npages - 1
    if last > KVM_MMU_MAX_GFN or last & kvm.gfn_direct_bits:
        return -EINVAL
    kvm_mmu_init_memslot_memory_attributes(kvm, new)
    return 0


async def kvm_swap_active_memslots(kvm: Vm, old: Memslot | None, new: Memslot | None) -> None:
    """``kvm_swap_active_memslots``: publishes a set with ``new`` in the place of ``old``, and waits until nobody has
    the set before."""
    await step("publish", "memslots")
    slots = [slot for slot in kvm.memslots if slot is not old]
    if new is not None:
        slots.append(new)
    kvm.memslots = tuple(sorted(slots, key=lambda slot: slot.base_gfn))
    kvm.slots_arch_lock.let_go(shared=False)
    await kvm.srcu.synchronize()
