"""Kick all vCPUs out of the guest, and try exactly once more.

With ``mmu_lock`` held for write the only others who can hold the module's locks are vCPUs: in TDH.VP.ENTER, or in a
TDCALL. Once they are out and kept out, the second attempt must succeed.
Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_no_vcpus_enter_start`` and ``_stop`` (commit 4b2abc49712b).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.core.steps import step
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.requests import KVM_REQ_OUTSIDE_GUEST_MODE, kvm_make_all_cpus_request

if TYPE_CHECKING:
    from septum.kvm.contention import Attempt
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs


async def kick_and_retry_once(kvm: Vm, attempt: Attempt) -> Regs:
    """Linux 6.16: a flag keeps vCPUs from entering between the kick and the end of the second attempt."""
    regs = await attempt()
    if tdx_operand_busy(regs.rax):
        await step("write", "wait_for_sept_zap")
        kvm.wait_for_sept_zap = True
        await kvm_make_all_cpus_request(kvm, KVM_REQ_OUTSIDE_GUEST_MODE)
        regs = await attempt()
        await step("write", "wait_for_sept_zap")
        kvm.wait_for_sept_zap = False
    return regs


async def kick_without_flag(kvm: Vm, attempt: Attempt) -> Regs:
    """A mutant: vCPUs are kicked, but may enter again before the second attempt."""
    regs = await attempt()
    if tdx_operand_busy(regs.rax):
        await kvm_make_all_cpus_request(kvm, KVM_REQ_OUTSIDE_GUEST_MODE)
        regs = await attempt()
    return regs
