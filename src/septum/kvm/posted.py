"""Interrupts for guests: posted to the vCPU, without the module.

Source: Linux 6.16, ``arch/x86/kvm/vmx/{tdx,common}.{c,h}``, ``tdx_deliver_interrupt`` and what it calls.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING, Final

from septum.core.steps import current_task, emit, step
from septum.kvm.requests import VcpuMode, kvm_vcpu_wake_up

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm

FIRST_VECTOR: Final = 16
LAST_VECTOR: Final = 255


async def kvm_send_userspace_msi(kvm: Vm, vcpu_id: int, vector: int) -> int:
    """``kvm_send_userspace_msi``: 1 when it was delivered, 0 when there is no such vCPU, -EINVAL for a bad vector."""
    if not FIRST_VECTOR <= vector <= LAST_VECTOR:
        return -EINVAL
    for vcpu in kvm.vcpus:
        if vcpu.vcpu_id == vcpu_id:
            await vt_deliver_posted_interrupt(vcpu, vector)
            return 1
    return 0


async def vt_deliver_posted_interrupt(vcpu: Vcpu, vector: int) -> None:
    """``__vmx_deliver_posted_interrupt``: into the descriptor; then the CPU is notified, or the thread woken.

    The notification reaches a running guest without an exit; one that waits for it looks at the descriptor.
    """
    await step("write PIR of", vcpu)
    if vector in vcpu.posted:
        return
    vcpu.posted = tuple(sorted((*vcpu.posted, vector)))
    emit("interrupt", f"vector {vector} -> {vcpu}")
    await step("read", "vcpu->mode")
    running_here = vcpu.cpu == current_task().cpu
    if vcpu.mode != VcpuMode.IN_GUEST_MODE or running_here:
        kvm_vcpu_wake_up(vcpu)
