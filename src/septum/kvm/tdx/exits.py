"""TD exits: ``tdx_handle_exit`` and the handlers that need no TDVMCALL.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``. All handlers return 1 to go on in the guest, 0 for userspace, or a
negative errno.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from errno import EFAULT, EIO
from typing import TYPE_CHECKING, Final

from septum.arch.exits import VM_ENTRY_FAILED, ExitReason
from septum.arch.pages import PAGE_4K
from septum.arch.status import CODE, ERROR, NON_RECOVERABLE, Status
from septum.arch.vmcs import TYPE_MASK, TYPE_NMI, VECTOR_MASK, VECTOR_MC
from septum.core.steps import emit
from septum.kvm.abi import (
    KVM_EXIT_EXCEPTION,
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_SHUTDOWN,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
)
from septum.kvm.contention.fault import FAULT_POLICIES
from septum.kvm.mmu.fault import PFERR_FETCH, PFERR_PRIVATE_ACCESS, PFERR_WRITE, RetPf, kvm_mmu_page_fault
from septum.kvm.run_struct import ExceptionExit, FailEntryExit, InternalErrorExit, MemoryFaultExit
from septum.kvm.tdx.accept_level import tdx_honor_guest_accept_level
from septum.kvm.tdx.run import NO_EXIT, Fastpath, is_sw_error
from septum.kvm.tdx.tdvmcall import (
    handle_tdvmcall,
    tdx_emulate_cpuid,
    tdx_emulate_hlt,
    tdx_emulate_io,
    tdx_emulate_mmio,
    tdx_emulate_rdmsr,
    tdx_emulate_vmcall,
    tdx_emulate_wrmsr,
)
from septum.kvm.vm import kvm_bug_on, kvm_vm_dead
from septum.tdx.registers import GPR_NAMES

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

EPT_VIOLATION_ACC_WRITE: Final = 1 << 1
EPT_VIOLATION_ACC_INSTR: Final = 1 << 2
EPT_VIOLATION_PROT_MASK: Final = 7 << 3
EPT_VIOLATION_EXEC_FOR_RING3_LIN: Final = 1 << 6
MAX_SPURIOUS_FAULTS: Final = 8
PENDING_EPT_VIOLATION: Final = 6
"""Type (bits 3:0) of the extended exit qualification."""
_RCX, _RDX, _R8, _R9 = (GPR_NAMES.index(name) for name in ("rcx", "rdx", "r8", "r9"))

_HANDLERS: Final[Mapping[int, Callable[[Vcpu], int]]] = {
    ExitReason.CPUID_INSTRUCTION: tdx_emulate_cpuid,
    ExitReason.HLT_INSTRUCTION: tdx_emulate_hlt,
    ExitReason.TDCALL: handle_tdvmcall,
    ExitReason.VMCALL_INSTRUCTION: tdx_emulate_vmcall,
    ExitReason.IO_INSTRUCTION: tdx_emulate_io,
    ExitReason.MSR_READ: tdx_emulate_rdmsr,
    ExitReason.MSR_WRITE: tdx_emulate_wrmsr,
    ExitReason.EPT_MISCONFIGURATION: tdx_emulate_mmio,
}


async def tdx_handle_exit(vcpu: Vcpu, fastpath: Fastpath) -> int:
    """``tdx_handle_exit``."""
    if fastpath is not Fastpath.NONE:
        return 1
    ret, reason = vcpu.vp_enter_ret, vcpu.exit_reason
    basic = reason & 0xFFFF
    if ret == ExitReason.EPT_MISCONFIGURATION:
        await kvm_bug_on(True, vcpu.kvm, "a TD exit for an EPT misconfiguration")
        return -EIO
    if is_sw_error(ret):
        await kvm_bug_on(True, vcpu.kvm, "TDH_VP_ENTER did not reach the module")
        return _unhandled_exit(vcpu)
    if reason & VM_ENTRY_FAILED and reason != NO_EXIT:
        vcpu.kvm.host.log.warn_on(not ret & NON_RECOVERABLE, "VM entry failed, and the TD is not lost")
        return vcpu.run.leave(KVM_EXIT_FAIL_ENTRY, FailEntryExit(reason, vcpu.last_vmentry_cpu))
    if ret & (ERROR | NON_RECOVERABLE) and basic != ExitReason.TRIPLE_FAULT:
        vcpu.kvm.host.log.pr(f"TD vp_enter_ret {ret:#x}")
        return _unhandled_exit(vcpu)
    odd = basic != ExitReason.TRIPLE_FAULT and ret & CODE != Status.TDX_SUCCESS
    vcpu.kvm.host.log.warn_on(odd, "a TD exit that neither succeeded nor failed")
    if basic == ExitReason.EPT_VIOLATION:
        return await tdx_handle_ept_violation(vcpu)
    if basic == ExitReason.TRIPLE_FAULT:
        return vcpu.run.leave(KVM_EXIT_SHUTDOWN)
    if basic == ExitReason.EXCEPTION_OR_NMI:
        return tdx_handle_exception_nmi(vcpu)
    if basic in (ExitReason.INTERRUPT, ExitReason.SMI_OTHER_EVENT):
        return 1
    handler = _HANDLERS.get(basic, _unhandled_exit)
    return handler(vcpu)


def _unhandled_exit(vcpu: Vcpu) -> int:
    numbers = struct.pack("<2Q", vcpu.vp_enter_ret, vcpu.last_vmentry_cpu).ljust(128, b"\0")
    error = InternalErrorExit(KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, 2, numbers)
    return vcpu.run.leave(KVM_EXIT_INTERNAL_ERROR, error)


def tdx_handle_exception_nmi(vcpu: Vcpu) -> int:
    """``tdx_handle_exception_nmi``: NMIs and machine checks were handled before."""
    info = vcpu.vp_enter_args[_R9]
    if info & TYPE_MASK == TYPE_NMI or info & VECTOR_MASK == VECTOR_MC:
        return 1
    return vcpu.run.leave(KVM_EXIT_EXCEPTION, ExceptionExit(info & VECTOR_MASK))


def tdx_is_sept_violation_unexpected_pending(vcpu: Vcpu) -> bool:
    """``tdx_is_sept_violation_unexpected_pending``: the guest touched a page that it should have accepted."""
    qualification = vcpu.vp_enter_args[_RCX]
    if vcpu.vp_enter_args[_RDX] & 0xF != PENDING_EPT_VIOLATION:
        return False
    return not qualification & (EPT_VIOLATION_PROT_MASK | EPT_VIOLATION_EXEC_FOR_RING3_LIN)


def tdx_no_progress(vcpu: Vcpu, gpa: int, r: int) -> int:
    """What the guest came back for is mapped: after :data:`MAX_SPURIOUS_FAULTS` such faults in a row userspace is told.

    No kernel has this. The idea is Sean Christopherson's (Y8ljwsrrBBdh1aYw, lore.kernel.org), without a number.
    """
    vcpu.spurious_faults = vcpu.spurious_faults + 1 if r == RetPf.SPURIOUS else 0
    if vcpu.spurious_faults <= MAX_SPURIOUS_FAULTS:
        return r
    vcpu.spurious_faults = 0
    vcpu.run.leave(KVM_EXIT_MEMORY_FAULT, MemoryFaultExit(KVM_MEMORY_EXIT_FLAG_PRIVATE, gpa & -PAGE_4K, PAGE_4K))
    return -EFAULT


async def tdx_handle_ept_violation(vcpu: Vcpu) -> int:
    """``tdx_handle_ept_violation``: private violations count as writes and are dealt with without the guest, as long as
    they must be tried again: the kernel's fault policy."""
    kvm, gpa, qualification = vcpu.kvm, vcpu.vp_enter_args[_R8], vcpu.vp_enter_args[_RCX]
    if kvm.is_private_gpa(gpa):
        if tdx_is_sept_violation_unexpected_pending(vcpu):
            kvm.host.log.pr(f"Guest access before accepting {gpa:#x} on vCPU {vcpu.vcpu_id}")
            await kvm_vm_dead(kvm)
            return -EIO
        emit("fault", f"kvm_page_fault {vcpu} address {gpa:#x} private")
        if r := await tdx_honor_guest_accept_level(vcpu, gpa >> 12):
            return r
        error_code = PFERR_WRITE | PFERR_PRIVATE_ACCESS
        policy = FAULT_POLICIES[kvm.host.kernel.policies["fault"]]
        r = await policy(vcpu, gpa >> 12, lambda: kvm_mmu_page_fault(vcpu, gpa, error_code))
        return tdx_no_progress(vcpu, gpa, r) if kvm.host.kernel.has("no-progress-exits") else r
    fetch = qualification & EPT_VIOLATION_ACC_INSTR
    if await kvm_bug_on(fetch, kvm, "an instruction fetch from shared memory"):
        return -EIO
    emit("fault", f"kvm_page_fault {vcpu} address {gpa:#x} shared")
    write = PFERR_WRITE if qualification & EPT_VIOLATION_ACC_WRITE else 0
    return await kvm_mmu_page_fault(vcpu, gpa, write | (PFERR_FETCH if fetch else 0))
