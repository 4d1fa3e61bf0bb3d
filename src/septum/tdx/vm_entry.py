"""TDH.VP.ENTER: into the guest.

Source: TDX Module 1.5.01, ``src/td_transitions/tdh_vp_enter.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.op_state import LastExit, VcpuState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, is_shared_gpa
from septum.arch.status import Status
from septum.core.steps import emit
from septum.tdx import extended_state
from septum.tdx.call import SHARED, HostCall, lock_op_state
from septum.tdx.events import inject_ve
from septum.tdx.leave import leave_async
from septum.tdx.outcome import Fail, check
from septum.tdx.registers import GPR_BIT, GPR_NAMES, Regs
from septum.tdx.stepping import Entry, entry_filter
from septum.tdx.vcpu import associate, check_tdvps_pages, count_inside, lock_owner, lock_tdvpr
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

HOST_RECOVERABILITY_HINT: Final = 1 << 52
RESUME_L1: Final = 1 << 53
"""Flags in RCX beside the address of the TDVPR."""
GUEST_HINT: Final = 1 << 60
"""Where the guest finds the hint in the completion status of its TDCALL."""
IA32_TSC_ADJUST: Final = 0x3B
IA32_MISC_ENABLE: Final = 0x1A0
_LIMIT_CPUID_MAXVAL: Final = 1 << 22
_ENABLE_MONITOR: Final = 1 << 18
_DATA_WRITE: Final = 1 << 1
_NMI_UNBLOCKED_BY_IRET: Final = 1 << 12


def check_tsc_adjust(call: HostCall) -> None:
    """The host must not have changed IA32_TSC_ADJUST since TDH.SYS.INIT; else INCONSISTENT_MSR."""
    hardware = call.module.hardware
    unchanged = hardware.rdmsr(call.lp.index, IA32_TSC_ADJUST) == hardware.cpu.msr(IA32_TSC_ADJUST)
    check(unchanged, Status.TDX_INCONSISTENT_MSR, IA32_TSC_ADJUST)


async def tdh_vp_enter(call: HostCall) -> int:
    """TDH.VP.ENTER: the guest runs on this LP until a TD exit.

    RCX: TDVPR and flags. RBX, RBP, RSI, RDI, R8 to R15: for the guest, if it left with TDG.VP.VMCALL and wants them.
    TDVPR and TDR stay locked, shared, while the guest runs; a TD exit lets go of them.
    """
    module, regs, lp = call.module, call.regs, call.lp
    misc_enable = module.hardware.rdmsr(lp.index, IA32_MISC_ENABLE)
    check(not misc_enable & _LIMIT_CPUID_MAXVAL, Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    flags = regs.rcx & ~PAGE_MASK
    check(not flags & ~(HOST_RECOVERABILITY_HINT | RESUME_L1), Status.TDX_OPERAND_INVALID, Operand.RCX)
    tdvpr, vp = await lock_tdvpr(call, regs.rcx & PAGE_MASK, Operand.RCX, SHARED)
    td = await lock_owner(call, tdvpr)
    await lock_op_state(call, td)
    check_tdvps_pages(td, vp)
    await associate(call, td, vp)
    tdvps = vp.tdvps
    hint = bool(flags & HOST_RECOVERABILITY_HINT)
    check(not hint or tdvps.last_td_exit == LastExit.ASYNC_TRAP, Status.TDX_OPERAND_INVALID, Operand.RCX)
    check(not flags & RESUME_L1, Status.TDX_OPERAND_INVALID, Operand.RCX)
    check_tsc_adjust(call)
    elapsed = module.hardware.rdtsc() - tdvps.last_exit_tsc & (1 << 64) - 1
    check(not elapsed >> 63, Status.TDX_TSC_ROLLBACK)
    monitor_works = misc_enable & _ENABLE_MONITOR or not td.tdcs.cpuid_flags.monitor_mwait
    check(monitor_works, Status.TDX_INCORRECT_MSR_VALUE, IA32_MISC_ENABLE)

    await _join_epoch(call, td, vp)
    await _pass_stepping_filter(call, td, vp)
    await call.locks.release(td.op_state_lock)
    if tdvps.last_td_exit == LastExit.TDVMCALL:
        extended_state.take_xmms(vp, tdvps.gprs[1])
    tdvps.gprs = _guest_gprs(tdvps.gprs, tdvps.last_td_exit, regs, hint)
    if tdvps.pend_nmi and not tdvps.ve_info.valid:
        vp.vmcs[vmcs.PROCBASED_CTLS] = vp.vmcs[vmcs.PROCBASED_CTLS] | vmcs.NMI_WINDOW_EXITING
    tdvps.vcpu_state = VcpuState.ACTIVE
    if tdvps.last_epf_gpa_list_idx:
        await call.locks.release(td.secure_ept_lock)
    spec_ctrl = vp.fields["IA32_SPEC_CTRL", 0] & ~td.tdcs.ia32_spec_ctrl_mask
    vp.vmcs.store(vmcs.SPEC_CTRL_SHADOW, spec_ctrl)
    tdvps.lp_dependent_hpa_updated = tdvps.module_dependent_fields_updated = True
    lp.last_entry_tsc = module.hardware.rdtsc()
    lp.host_rbp = regs.rbp
    lp.running = vp.pa
    call.locks.hand_over()
    try:
        extended_state.restore(td, vp)
    except TdExit as end:
        regs.copy(await leave_async(module, lp, td, vp, end))
        return regs.rax
    emit("enter", f"{vp} enters", vp=vp.pa)
    return Status.TDX_SUCCESS


async def _join_epoch(call: HostCall, td: Td, vp: Vp) -> None:
    """``adjust_tlb_tracking_state``: the VCPU counts as inside since the present TD epoch.

    :raises Fail: OPERAND_BUSY with TD_EPOCH.
    """
    await call.locks.take(td.epoch_lock, SHARED, Operand.TD_EPOCH)
    epoch = td.tdcs.td_epoch
    await count_inside(td, epoch, 1)
    await call.locks.release(td.epoch_lock)
    vp.tdvps.vcpu_epoch = epoch


async def _pass_stepping_filter(call: HostCall, td: Td, vp: Vp) -> None:
    """Enters only if no zero-step attack is suspected, or what was suspected is over.

    :raises Fail: OPERAND_BUSY with SEPT_TREE; or the VM exit that the guest would make at once, with its details in the
        registers of a TD exit.
    """
    try:
        verdict, gpa = await entry_filter(call, td, vp)
    except Fail:
        await count_inside(td, vp.tdvps.vcpu_epoch, -1)
        raise
    if verdict is Entry.REFUSE:
        await count_inside(td, vp.tdvps.vcpu_epoch, -1)
        vp.tdvps.vcpu_state = VcpuState.READY
        vp.tdvps.last_td_exit = LastExit.ASYNC_FAULT
        for name in GPR_NAMES:
            if name != "rbp":
                setattr(call.regs, name, 0)
        call.regs.rcx, call.regs.r8 = _DATA_WRITE, gpa & -PAGE_4K
        raise Fail(ExitReason.EPT_VIOLATION)
    if verdict is Entry.NOTIFY:
        _notify(td, vp)


def _notify(td: Td, vp: Vp) -> None:
    """A #VE tells the guest of the suspicion, if its last exit was the EPT violation and it can take a #VE now."""
    fields = vp.vmcs
    reason, qualification = fields[vmcs.EXIT_REASON], fields[vmcs.EXIT_QUALIFICATION]
    gpa = fields[vmcs.EXIT_GPA]
    if reason & 0xFFFF != ExitReason.EPT_VIOLATION or is_shared_gpa(gpa, td.tdcs.gpaw):
        return
    blocked = fields[vmcs.GUEST_INTERRUPTIBILITY] & vmcs.BLOCKING_BY_NMI or qualification & _NMI_UNBLOCKED_BY_IRET
    if not blocked and not fields[vmcs.IDT_VECTORING] & vmcs.VALID and not vp.tdvps.ve_info.valid:
        inject_ve(vp, reason, qualification, gpa)


def _guest_gprs(gprs: tuple[int, ...], last_exit: int, host: Regs, hint: bool) -> tuple[int, ...]:
    """The registers with which the guest goes on, by the way it left."""
    if last_exit == LastExit.TDVMCALL:
        mask = gprs[1]
        rest = zip(gprs[2:], host.to_tuple()[2:], GPR_BIT[2:], strict=True)
        return (Status.TDX_SUCCESS.value, mask, *(theirs if mask & bit else mine for mine, theirs, bit in rest))
    if last_exit == LastExit.ASYNC_TRAP:
        return (gprs[0] & ~GUEST_HINT | (GUEST_HINT if hint else 0), *gprs[1:])
    return gprs
