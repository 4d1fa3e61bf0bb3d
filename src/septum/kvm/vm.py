"""``struct kvm`` with what ``struct kvm_tdx`` adds: a VM's locks and state.

Source: Linux 6.16, ``include/linux/kvm_host.h``, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/vmx/tdx.h``.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING

from septum.core.cells import Shared, SharedMap
from septum.core.klocks import Mutex, RwLock, SpinLock, Srcu
from septum.core.steps import emit
from septum.kvm.requests import KVM_REQ_VM_DEAD, kvm_make_all_cpus_request

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.memslot import Memslot
    from septum.kvm.mmu.spte import Sp
    from septum.kvm.user_memory import UserMemory
    from septum.kvm.vcpu import Vcpu
    from septum.tdx.registers import Regs


class TdState(IntEnum):
    """``enum kvm_tdx_state``."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2


class Vm(Shared):
    """A VM. Fields up to ``srcu`` never change."""

    host: Host
    mm: UserMemory
    number: int
    vm_type: int
    max_vcpus: int
    lock: Mutex
    slots_lock: Mutex
    slots_arch_lock: Mutex
    mmu_lock: RwLock
    tdp_mmu_pages_lock: SpinLock
    srcu: Srcu
    mem_attrs: SharedMap[int, int]
    """``mem_attr_array``: for 512 pages each, a bit for every page that is private."""
    mirror_sptes: SharedMap[int, int]
    """Mirror page tables: address of the entry to SPTE."""
    sps: SharedMap[int, Sp]
    """``struct kvm_mmu_page`` by the address of the page table."""

    users_count: int = 1
    vm_dead: bool = False
    vm_bugged: str = ""
    """The condition that was true, if a KVM_BUG_ON was hit."""
    created_vcpus: int = 0
    vcpus: tuple[Vcpu, ...] = ()
    """Those that ``online_vcpus`` counts."""
    vcpu_allocations: int = 0
    slot_allocations: int = 0
    gmem_allocations: int = 0
    irqchip_split: bool = False
    hypercall_exit_enabled: int = 0
    memslots: tuple[Memslot, ...] = ()
    """The active set, by ascending ``base_gfn``."""
    mmu_invalidate_seq: int = 0
    mmu_invalidate_in_progress: int = 0
    mmu_invalidate_range: tuple[int, int] = (0, 0)
    mirror_root: int = 0
    direct_root: int = 0
    """Addresses of the root page tables; 0: not allocated."""

    gfn_direct_bits: int = 0
    pre_fault_allowed: bool = False
    state: TdState = TdState.UNINITIALIZED
    hkid: int = -1
    tdr_page: int = 0
    tdcs_pages: tuple[int, ...] = ()
    """Those that the module has; an address is 0 once the page is freed."""
    nr_premapped: int = 0
    page_add_src: int = 0
    """The page whose content TDH.MEM.PAGE.ADD is to take (6.19); 0: none is being added."""
    wait_for_sept_zap: bool = False
    tdh_mem_track: int = 0
    """How many threads begin a TLB epoch and keep vCPUs out meanwhile (v11)."""
    shadow_flushed: bool = False
    """The process's memory has gone, and the KeyID with it (before the fix "hkid-outlives-mm")."""
    attributes: int = 0
    xfam: int = 0

    @classmethod
    def create(cls, host: Host, mm: UserMemory, number: int, vm_type: int) -> Vm:
        """A VM as ``kvm_create_vm`` leaves it, before the architecture's part."""
        return cls(
            f"VM{number}",
            host=host,
            mm=mm,
            number=number,
            vm_type=vm_type,
            max_vcpus=len(host.cpus),
            lock=Mutex(f"kvm->lock[{number}]"),
            slots_lock=Mutex(f"kvm->slots_lock[{number}]"),
            slots_arch_lock=Mutex(f"kvm->slots_arch_lock[{number}]"),
            mmu_lock=RwLock(f"kvm->mmu_lock[{number}]"),
            tdp_mmu_pages_lock=SpinLock(f"tdp_mmu_pages_lock[{number}]"),
            srcu=Srcu(f"kvm->srcu[{number}]"),
            mem_attrs=SharedMap(f"mem_attr_array[{number}]", 0),
            mirror_sptes=SharedMap(f"mirror SPTEs[{number}]", 1 << 63),
            sps=SharedMap(f"page tables[{number}]", None),
        )

    def is_private_gpa(self, gpa: int) -> bool:
        """``vt_is_tdx_private_gpa``: the SHARED bit is clear."""
        return not gpa >> 12 & self.gfn_direct_bits

    @property
    def shared_gpa_bit(self) -> int:
        """``gfn_to_gpa(kvm_gfn_direct_bits(kvm))``."""
        return self.gfn_direct_bits << 12

    @property
    def is_hkid_assigned(self) -> bool:
        """``is_hkid_assigned``."""
        return self.hkid > 0


def slots_lock(kvm: Vm) -> AbstractAsyncContextManager[None]:
    """``slots_lock`` for a TDX ioctl: nothing where the kernel takes it with all others before (fix "state-locks")."""
    return nullcontext() if kvm.host.kernel.has("state-locks") else kvm.slots_lock.locked()


async def kvm_vm_dead(kvm: Vm) -> None:
    """``kvm_vm_dead``: every later ioctl fails with -EIO, and vCPUs that run are told."""
    kvm.vm_dead = True
    await kvm_make_all_cpus_request(kvm, KVM_REQ_VM_DEAD)


async def kvm_bug_on(condition: object, kvm: Vm, what: str) -> bool:
    """``KVM_BUG_ON(condition, kvm)``: a condition that only a bug can bring about kills the VM. Returns whether it is
    true."""
    if condition and not kvm.vm_bugged:
        kvm.host.log.bugs[what] += 1
        emit("bug", f"KVM_BUG_ON: {what}", vm=kvm.number)
        kvm.vm_bugged = what
        await kvm_vm_dead(kvm)
    return bool(condition)


async def seamcall_bug_on(kvm: Vm, leaf: str, regs: Regs, *outputs: str) -> bool:
    """``KVM_BUG_ON(err, kvm)`` after a SEAMCALL, with ``pr_tdx_error`` of the status and some output registers."""
    if not regs.rax:
        return False
    await kvm_bug_on(True, kvm, f"{leaf} failed")
    kvm.host.log.seamcall_failed(leaf, regs.rax, **{name: getattr(regs, name) for name in outputs})
    return True
