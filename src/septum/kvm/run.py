"""KVM_RUN: the loop that a vCPU's thread spends its life in.

Source: Linux 6.16, ``arch/x86/kvm/x86.c``, ``virt/kvm/kvm_main.c``.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EIO
from typing import TYPE_CHECKING

from septum.core.interrupts import IrqsOff
from septum.core.steps import current_task, step, wait_until
from septum.kvm.abi import KVM_EXIT_INTR, KVM_EXIT_UNKNOWN
from septum.kvm.events import kvm_arch_vcpu_runnable
from septum.kvm.ipi import check_alone
from septum.kvm.lifetime import vcpu_load
from septum.kvm.mmu.roots import kvm_mmu_reload
from septum.kvm.requests import KVM_REQ_TLB_FLUSH, KVM_REQ_UNBLOCK, KVM_REQ_VM_DEAD, VcpuMode, kvm_check_request
from septum.kvm.signals import signal_pending
from septum.kvm.tdx.exits import tdx_handle_exit
from septum.kvm.tdx.run import Fastpath, tdx_vcpu_run
from septum.kvm.tdx.vcpu import tdx_vcpu_pre_run
from septum.kvm.vcpu import MpState

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.vcpu import Vcpu


async def kvm_arch_vcpu_ioctl_run(vcpu: Vcpu) -> int:
    """``kvm_arch_vcpu_ioctl_run``: with ``vcpu->mutex`` held. 0 with an exit in ``kvm_run``, or a negative errno."""
    async with vcpu_load(vcpu):
        kvm_vcpu_srcu_read_lock(vcpu)
        r = await _run(vcpu)
        kvm_vcpu_srcu_read_unlock(vcpu)
        return r


async def _run(vcpu: Vcpu) -> int:
    run = vcpu.run
    if vcpu.mp_state == MpState.UNINITIALIZED:
        if run.immediate_exit:
            return -EINTR
        kvm_vcpu_srcu_read_unlock(vcpu)
        await kvm_vcpu_block(vcpu)
        kvm_vcpu_srcu_read_lock(vcpu)
        if signal_pending(vcpu.kvm.host):
            run.leave(KVM_EXIT_INTR)
            return -EINTR
        return -EAGAIN
    if complete := vcpu.complete_userspace_io:
        vcpu.complete_userspace_io = None
        r = complete(vcpu)
        if r <= 0:
            return r
    if run.immediate_exit:
        return -EINTR
    r = tdx_vcpu_pre_run(vcpu)
    return r if r <= 0 else await vcpu_run(vcpu)


async def vcpu_run(vcpu: Vcpu) -> int:
    """``vcpu_run``: enters the guest again and again, until userspace or a signal is wanted."""
    vcpu.run.leave(KVM_EXIT_UNKNOWN)
    while True:
        running = vcpu.mp_state == MpState.RUNNABLE
        r = await vcpu_enter_guest(vcpu) if running else await vcpu_block(vcpu)
        if r <= 0:
            return r
        kvm_check_request(KVM_REQ_UNBLOCK, vcpu)
        if signal_pending(vcpu.kvm.host):
            vcpu.run.leave(KVM_EXIT_INTR)
            return -EINTR


async def vcpu_enter_guest(vcpu: Vcpu) -> int:
    """``vcpu_enter_guest``: serves requests, enters, handles the exit. 1 to go on, 0 for userspace, or an errno.

    Setting ``vcpu->mode`` before looking for requests, with interrupts off, is what makes a kick sure to be noticed.
    """
    await step("read", "vcpu->requests")
    if vcpu.requests:
        if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
            return -EIO
        # What is left are requests to flush TLBs and to look for events: entering the guest does both.
        flush = kvm_check_request(KVM_REQ_TLB_FLUSH, vcpu)
        vcpu.requests = 0
        if flush and vcpu.kvm.tdh_mem_track:
            await wait_until(lambda: not vcpu.kvm.tdh_mem_track, "TDH.MEM.TRACK of", vcpu.kvm)
    if r := await kvm_mmu_reload(vcpu):
        return r
    host = vcpu.kvm.host
    cpu = host.cpus[current_task().cpu]
    fastpath = Fastpath.NONE
    check_alone(cpu)
    async with IrqsOff(cpu):
        await step("write", "vcpu->mode")
        vcpu.mode = VcpuMode.IN_GUEST_MODE
        kvm_vcpu_srcu_read_unlock(vcpu)
        await step("read", "vcpu->requests")
        cancelled = kvm_vcpu_exit_request(vcpu)
        if not cancelled:
            fastpath = await tdx_vcpu_run(vcpu, cpu)
            vcpu.last_vmentry_cpu = cpu.index
            await step("write", "vcpu->mode")
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
    await take_interrupts(cpu)
    kvm_vcpu_srcu_read_lock(vcpu)
    return 1 if cancelled else await tdx_handle_exit(vcpu, fastpath)


def kvm_vcpu_exit_request(vcpu: Vcpu) -> bool:
    """``kvm_vcpu_exit_request``: there is something to do before the guest may run."""
    return vcpu.mode == VcpuMode.EXITING_GUEST_MODE or bool(vcpu.requests) or signal_pending(vcpu.kvm.host)


async def take_interrupts(cpu: Cpu) -> None:
    """``local_irq_enable``: interrupts that wait are taken before anything else."""
    if cpu.pending:
        await wait_until(lambda: not cpu.pending, "take interrupts on", cpu)


# -- halted vCPUs ------------------------------------------------------------------------------------------------------


async def vcpu_block(vcpu: Vcpu) -> int:
    """``vcpu_block``: the guest has halted; sleeps until there is an interrupt for it."""
    if not kvm_arch_vcpu_runnable(vcpu):
        kvm_vcpu_srcu_read_unlock(vcpu)
        await kvm_vcpu_block(vcpu)
        kvm_vcpu_srcu_read_lock(vcpu)
        if not kvm_arch_vcpu_runnable(vcpu):
            return 1
    vcpu.mp_state = MpState.RUNNABLE
    return 1


async def kvm_vcpu_block(vcpu: Vcpu) -> None:
    """``kvm_vcpu_block``: until somebody wakes the vCPU, an event is there, or a signal."""
    vcpu.blocking = True
    signals, name = vcpu.kvm.host.signals, current_task().name
    await wait_until(lambda: vcpu.woken or kvm_arch_vcpu_runnable(vcpu) or name in signals, "be woken", vcpu)
    vcpu.blocking = vcpu.woken = False


def kvm_vcpu_srcu_read_lock(vcpu: Vcpu) -> None:
    """``kvm_vcpu_srcu_read_lock``."""
    vcpu.srcu_idx = vcpu.kvm.srcu.read_lock()


def kvm_vcpu_srcu_read_unlock(vcpu: Vcpu) -> None:
    """``kvm_vcpu_srcu_read_unlock``."""
    vcpu.kvm.srcu.read_unlock(vcpu.srcu_idx)
