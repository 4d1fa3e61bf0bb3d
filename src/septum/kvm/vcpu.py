"""``struct kvm_vcpu`` with what ``struct vcpu_tdx`` adds, and loading it on a CPU.

Source: Linux 6.16, ``include/linux/kvm_host.h``, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/vmx/tdx.{h,c}``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

from septum.core.cells import Shared, SharedMap
from septum.core.klocks import Mutex
from septum.kvm.requests import VcpuMode
from septum.kvm.run_struct import KvmRun

if TYPE_CHECKING:
    from septum.kvm.abi import CpuidEntry2
    from septum.kvm.guest_protocol import Guest
    from septum.kvm.vm import Vm


class VcpuTdState(IntEnum):
    """``enum vcpu_tdx_state``."""

    UNINITIALIZED = 0
    INITIALIZED = 1


class MpState(IntEnum):
    """``vcpu->arch.mp_state``."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    HALTED = 3


class Vcpu(Shared):
    """A vCPU. ``on_list`` is the CPU whose list of associated vCPUs it is on (-1: none).

    ``vp_enter_args`` are the registers that TDH.VP.ENTER left, and that the next one passes to the guest, in the order
    of :data:`septum.tdx.registers.GPR_NAMES`.
    """

    kvm: Vm
    vcpu_id: int
    mutex: Mutex
    run: KvmRun
    msrs: SharedMap[int, int | None]

    cpu: int = -1
    on_list: int = -1
    mode: VcpuMode = VcpuMode.OUTSIDE_GUEST_MODE
    requests: int = 0
    mp_state: MpState = MpState.UNINITIALIZED
    blocking: bool = False
    """Its thread sleeps because the guest has halted."""
    woken: bool = False
    srcu_idx: int = 0
    last_vmentry_cpu: int = -1
    complete_userspace_io: Callable[[Vcpu], int] | None = None
    mirror_root: int = 0
    direct_root: int = 0

    cpuid: tuple[CpuidEntry2, ...] = ()

    state: VcpuTdState = VcpuTdState.UNINITIALIZED
    tdvpr_page: int = 0
    tdcx_pages: tuple[int, ...] = ()
    guest: Guest | None = None
    vp_enter_ret: int = 0
    vp_enter_args: tuple[int, ...] = (0,) * 15
    exit_reason: int = 0
    spurious_faults: int = 0
    """How often in a row the guest came back for a page that is mapped ("no-progress-exits")."""
    map_gpa_next: int = 0
    map_gpa_end: int = 0
    posted: tuple[int, ...] = ()
    """Vectors in the posted-interrupt descriptor, ascending."""

    @classmethod
    def create(cls, kvm: Vm, vcpu_id: int) -> Vcpu:
        """A vCPU as ``kvm_vcpu_init`` leaves it."""
        name = f"VM{kvm.number}.vCPU{vcpu_id}"
        mutex = Mutex(f"vcpu->mutex[{kvm.number * 10_000 + vcpu_id}]")
        return cls(
            name, kvm=kvm, vcpu_id=vcpu_id, mutex=mutex, run=KvmRun(f"{name}.kvm_run"), msrs=SharedMap(f"{name}.msrs")
        )
