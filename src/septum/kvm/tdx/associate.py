"""Which CPU may hold state of a vCPU, and flushing it from there.

Each CPU has a list of the vCPUs associated with it, which only that CPU changes, with interrupts off.
Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.status import Status
from septum.core.interrupts import Cpu, IrqsOff
from septum.core.steps import current_task, require, step
from septum.kvm.ipi import check_alone
from septum.kvm.vcpu import VcpuTdState
from septum.kvm.vm import kvm_bug_on

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.vcpu import Vcpu


def list_add(vcpu: Vcpu, cpu: int) -> None:
    """``list_add(&tdx->cpu_list, ...)``.

    :raises Violation: when the vCPU is on a list already: both lists would be corrupt.
    """
    require(
        vcpu.on_list == -1,
        "no list corruption",
        f"{vcpu} is added to the list of CPU {cpu} while it is on that of CPU {vcpu.on_list}",
    )
    lists = vcpu.kvm.host.associated_tdvcpus
    lists[cpu] = (vcpu, *lists[cpu])
    vcpu.on_list = cpu


def list_del(vcpu: Vcpu) -> None:
    """``list_del(&tdx->cpu_list)``.

    :raises Violation: when the vCPU is on no list.
    """
    require(vcpu.on_list != -1, "no list corruption", f"{vcpu} is taken from a list while it is on none")
    lists = vcpu.kvm.host.associated_tdvcpus
    lists.store(vcpu.on_list, tuple(other for other in lists[vcpu.on_list] if other is not vcpu))
    vcpu.on_list = -1


async def tdx_vcpu_load(vcpu: Vcpu, cpu: int) -> None:
    """``tdx_vcpu_load``: moves the vCPU from the list of its old CPU to that of ``cpu``, the caller's."""
    await step("read", "vcpu->cpu")
    if vcpu.cpu == cpu or not vcpu.kvm.is_hkid_assigned:
        return
    await tdx_flush_vp_on_cpu(vcpu)
    await kvm_bug_on(cpu != current_task().cpu, vcpu.kvm, "a vCPU is loaded on another CPU")
    check_alone(vcpu.kvm.host.cpus[cpu])
    async with IrqsOff(vcpu.kvm.host.cpus[cpu]):
        list_add(vcpu, cpu)


async def tdx_flush_vp_on_cpu(vcpu: Vcpu) -> None:
    """``tdx_flush_vp_on_cpu``: has the CPU that the vCPU is associated with flush it."""
    cpu = vcpu.cpu
    if cpu == -1:
        return
    await step("IPI for", vcpu)
    err = await vcpu.kvm.host.ipis.call_single(cpu, "tdx_flush_vp", vcpu)
    if await kvm_bug_on(err, vcpu.kvm, "TDH_VP_FLUSH failed"):
        vcpu.kvm.host.log.seamcall_failed("TDH_VP_FLUSH", err)


async def tdx_flush_vp(host: Host, cpu: Cpu, vcpu: Vcpu) -> int:
    """``tdx_flush_vp``: in interrupt context on the vCPU's CPU. Returns the status of TDH.VP.FLUSH if it failed.

    The vCPU may have left the CPU meanwhile, because the CPU went offline.
    """
    if vcpu.cpu != cpu.index and host.kernel.has("flush-rechecks-cpu"):
        return 0
    err = 0
    if vcpu.state != VcpuTdState.UNINITIALIZED:
        err = (await host.seamcalls.tdh_vp_flush(vcpu.tdvpr_page)).rax
        if err == Status.TDX_VCPU_NOT_ASSOCIATED:
            err = 0
    list_del(vcpu)
    vcpu.cpu = -1
    return err


async def tdx_disable_virtualization_cpu(host: Host, cpu: Cpu) -> None:
    """``tdx_disable_virtualization_cpu``: the CPU goes offline; all vCPUs on its list are flushed. On that CPU."""
    async with IrqsOff(cpu):
        for vcpu in host.associated_tdvcpus[cpu.index]:
            await tdx_flush_vp(host, cpu, vcpu)
