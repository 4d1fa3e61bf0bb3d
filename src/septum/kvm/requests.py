"""Requests to vCPUs, and getting them out of the guest.

Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``Documentation/virt/kvm/vcpu-requests.rst``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from septum.core.steps import current_task, step

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm


class VcpuMode(IntEnum):
    """``vcpu->mode``."""

    OUTSIDE_GUEST_MODE = 0
    IN_GUEST_MODE = 1
    EXITING_GUEST_MODE = 2


@dataclass(frozen=True, slots=True)
class Request:
    """A request: its bit in ``vcpu->requests``, and how it is made.

    ``wait``: the maker waits until the vCPU has left the guest. ``no_wakeup``: a blocked vCPU stays blocked.
    ``no_action``: nothing is left for the vCPU to do, it only has to leave the guest.
    """

    name: str
    bit: int
    wait: bool = False
    no_wakeup: bool = False
    no_action: bool = False


KVM_REQ_TLB_FLUSH: Final = Request("TLB_FLUSH", 1 << 0, wait=True, no_wakeup=True)
KVM_REQ_VM_DEAD: Final = Request("VM_DEAD", 1 << 1, wait=True, no_wakeup=True)
KVM_REQ_UNBLOCK: Final = Request("UNBLOCK", 1 << 2)
KVM_REQ_OUTSIDE_GUEST_MODE: Final = Request("OUTSIDE_GUEST_MODE", 0, wait=True, no_action=True)


def kvm_check_request(request: Request, vcpu: Vcpu) -> bool:
    """``kvm_check_request``: whether the request was made; it is taken back."""
    if not vcpu.requests & request.bit:
        return False
    vcpu.requests &= ~request.bit
    return True


async def kvm_make_all_cpus_request(kvm: Vm, request: Request) -> None:
    """``kvm_make_all_cpus_request``: to every vCPU. May wait for them by spinning."""
    cpus = set()
    for vcpu in kvm.vcpus:
        if not request.no_action:
            await step("make request", vcpu)
            vcpu.requests |= request.bit
        await step("kick", vcpu)
        if not request.no_wakeup and kvm_vcpu_wake_up(vcpu):
            continue
        if kvm_request_needs_ipi(vcpu, request) and vcpu.cpu not in (-1, current_task().cpu):
            cpus.add(vcpu.cpu)
    if cpus:
        await kvm.host.ipis.call_many(sorted(cpus), "ack_kick", wait=request.wait)


def kvm_request_needs_ipi(vcpu: Vcpu, request: Request) -> bool:
    """``kvm_request_needs_ipi``: whether the vCPU is in the guest, or, for a request that waits, not yet out of it."""
    mode = kvm_vcpu_exiting_guest_mode(vcpu)
    return mode != VcpuMode.OUTSIDE_GUEST_MODE if request.wait else mode == VcpuMode.IN_GUEST_MODE


def kvm_vcpu_exiting_guest_mode(vcpu: Vcpu) -> VcpuMode:
    """``kvm_vcpu_exiting_guest_mode``: one cmpxchg from IN_GUEST_MODE to EXITING_GUEST_MODE; returns the old mode."""
    mode = vcpu.mode
    if mode == VcpuMode.IN_GUEST_MODE:
        vcpu.mode = VcpuMode.EXITING_GUEST_MODE
    return mode


def kvm_vcpu_wake_up(vcpu: Vcpu) -> bool:
    """``kvm_vcpu_wake_up``: wakes the vCPU's thread if it sleeps because the guest is halted; whether it did."""
    if not vcpu.blocking or vcpu.woken:
        return False
    vcpu.woken = True
    return True
