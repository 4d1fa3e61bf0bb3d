"""A vCPU's life: created with KVM_CREATE_VCPU, initialised by KVM_TDX_INIT_VCPU, freed with the VM.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from errno import EINVAL, EIO, ENOMEM
from typing import TYPE_CHECKING, Final

from septum.arch.vmcs import PINBASED_CTLS, POSTED_INTERRUPT_DESCRIPTOR, POSTED_INTERRUPT_VECTOR
from septum.core.steps import require, step
from septum.kvm.tdx.associate import tdx_flush_vp_on_cpu
from septum.kvm.tdx.keys import tdx_reclaim_control_page
from septum.kvm.tdx.params import sysinfo
from septum.kvm.tdx.sept import td_vmcs_write
from septum.kvm.vcpu import MpState, VcpuTdState
from septum.kvm.vm import TdState, seamcall_bug_on

if TYPE_CHECKING:
    from septum.kvm.tdx.cmd import Cmd
    from septum.kvm.vcpu import Vcpu

POSTED_INTR_VECTOR: Final = 0xF2
PIN_BASED_POSTED_INTR: Final = 1 << 7
PI_DESC_ADDRESS: Final = 1 << 20
"""Where the posted-interrupt descriptors are, 64 bytes each: memory of Linux itself."""


def tdx_vcpu_create(vcpu: Vcpu) -> int:
    """``tdx_vcpu_create``: 0, -EIO when the TD is not being built, -EINVAL without split irqchip."""
    if vcpu.kvm.state != TdState.INITIALIZED:
        return -EIO
    return 0 if vcpu.kvm.irqchip_split else -EINVAL


async def tdx_vcpu_init(vcpu: Vcpu, cmd: Cmd) -> int:
    """``tdx_vcpu_init``: KVM_TDX_INIT_VCPU. The command's data is what the guest finds in RCX."""
    if cmd.flags or vcpu.state != VcpuTdState.UNINITIALIZED:
        return -EINVAL
    initial_rcx = cmd.data if isinstance(cmd.data, int) else 0
    if ret := await tdx_td_vcpu_init(vcpu, initial_rcx):
        return ret
    descriptor = PI_DESC_ADDRESS + 64 * (vcpu.kvm.number * 1024 + vcpu.vcpu_id)
    await td_vmcs_write(vcpu, POSTED_INTERRUPT_VECTOR, POSTED_INTR_VECTOR, 0xFFFF)
    await td_vmcs_write(vcpu, POSTED_INTERRUPT_DESCRIPTOR, descriptor, (1 << 64) - 1)
    await td_vmcs_write(vcpu, PINBASED_CTLS, PIN_BASED_POSTED_INTR, PIN_BASED_POSTED_INTR)
    await step("write", "TD vCPU state")
    vcpu.state = VcpuTdState.INITIALIZED
    return 0


async def tdx_td_vcpu_init(vcpu: Vcpu, initial_rcx: int) -> int:
    """``tdx_td_vcpu_init``: pages and SEAMCALLs. 0, -ENOMEM, or -EIO with the VM bugged.

    Pages that the module got stay with the vCPU until it is freed; the others are freed here.
    """
    kvm, host, tdh = vcpu.kvm, vcpu.kvm.host, vcpu.kvm.host.seamcalls
    nr_pages = sysinfo(host).tdcx_nr_pages
    if not host.pages.available(1 + nr_pages):
        return -ENOMEM
    vcpu.tdvpr_page = host.pages.alloc()
    vcpu.tdcx_pages = tuple(host.pages.alloc() for _ in range(nr_pages))

    regs = await tdh.tdh_vp_create(kvm.tdr_page, vcpu.tdvpr_page)
    if await seamcall_bug_on(kvm, "TDH_VP_CREATE", regs):
        for page in (*vcpu.tdcx_pages, vcpu.tdvpr_page):
            host.pages.free(page)
        vcpu.tdvpr_page, vcpu.tdcx_pages = 0, ()
        return -EIO
    for added, page in enumerate(vcpu.tdcx_pages):
        regs = await tdh.tdh_vp_addcx(vcpu.tdvpr_page, page)
        if await seamcall_bug_on(kvm, "TDH_VP_ADDCX", regs):
            for left in vcpu.tdcx_pages[added:]:
                host.pages.free(left)
            vcpu.tdcx_pages = vcpu.tdcx_pages[:added]
            return -EIO
    x2apicid = vcpu.vcpu_id if host.kernel.has("vp-init-x2apic-id") else None
    if host.kernel.has("vp-init-excludes-zaps"):
        async with kvm.mmu_lock.write():
            regs = await tdh.tdh_vp_init(vcpu.tdvpr_page, initial_rcx, x2apicid)
    else:
        regs = await tdh.tdh_vp_init(vcpu.tdvpr_page, initial_rcx, x2apicid)
    if await seamcall_bug_on(kvm, "TDH_VP_INIT", regs):
        return -EIO
    vcpu.mp_state = MpState.RUNNABLE
    return 0


async def tdx_vcpu_free(vcpu: Vcpu) -> None:
    """``tdx_vcpu_free``: takes the pages back; while the KeyID is assigned that is not possible, and they leak.

    :raises Violation: when the vCPU is still on a CPU's list, which then points to freed memory.
    """
    host = vcpu.kvm.host
    if host.kernel.has("flush-on-vcpu-free") and vcpu.cpu != -1:
        await tdx_flush_vp_on_cpu(vcpu)
    require(
        vcpu.on_list == -1,
        "no list corruption",
        f"{vcpu} is freed while it is on the list of CPU {vcpu.on_list}",
    )
    if vcpu.kvm.is_hkid_assigned:
        for page in (*vcpu.tdcx_pages, vcpu.tdvpr_page):
            if page:
                host.pages.leak(page, f"KeyID {vcpu.kvm.hkid} was not released")
        return
    for page in vcpu.tdcx_pages:
        await tdx_reclaim_control_page(vcpu.kvm, page)
    if vcpu.tdvpr_page:
        await tdx_reclaim_control_page(vcpu.kvm, vcpu.tdvpr_page)
    vcpu.tdvpr_page, vcpu.tdcx_pages = 0, ()
    vcpu.state = VcpuTdState.UNINITIALIZED


def tdx_vcpu_pre_run(vcpu: Vcpu) -> int:
    """``tdx_vcpu_pre_run``: 1, or -EINVAL when vCPU or TD cannot run yet."""
    ready = vcpu.state == VcpuTdState.INITIALIZED and vcpu.kvm.state == TdState.RUNNABLE
    return 1 if ready else -EINVAL
