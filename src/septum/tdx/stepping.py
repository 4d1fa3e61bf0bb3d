"""Defences against a host that steps through a guest by its EPT violations or by interrupts.

*Zero-step*: EPT violations on private addresses, one after another without progress of RIP, are counted per VCPU.
From the seventh on their addresses go into a list; while it is not empty, TDH.VP.ENTER refuses to enter as long as an
access to one of them would fault again. *Single-step*: an interrupt that comes very soon after entry makes the module
run a random number of instructions before it lets the host have it.

Source: TDX Module 1.5.01, ``src/td_transitions/td_exit_stepping.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from septum.arch import sept, vmcs
from septum.arch.exits import ExitReason
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE
from septum.tdx.ept import Walk, translate_private
from septum.tdx.events import set_pending_step
from septum.tdx.outcome import sanity
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp
    from septum.tdx.vm_exit import VmExit

EPF_THRESHOLD: Final = 6
"""EPT violations at one RIP that arouse no suspicion."""
TSC_THRESHOLD: Final = 4096
RIP_THRESHOLD: Final = 32
_IA32_APIC_BASE: Final = 0x1B
_APIC_ENABLED: Final = 1 << 11
_LFSR_POLYNOMIAL: Final = 0xB4BC_D35C
_DR_FIELDS: Final = tuple((1 << 2 * n | 2 << 2 * n, 0xF << 16 + 4 * n, f"DR{n}") for n in range(4))
_PENDING_DEBUG: Final = 1 << 12 | 1 << 14 | 1 << 16
"""Pending debug exceptions: an enabled breakpoint, single-step, RTM."""
_NOTIFY_EPT_FAULTS: Final = 1


class Entry(Enum):
    """What the zero-step defence says at TDH.VP.ENTER."""

    GO_ON = 0
    NOTIFY = 1
    """Go on, and tell the TD of the suspicion."""
    REFUSE = 2


async def entry_filter(call: HostCall, td: Td, vp: Vp) -> tuple[Entry, int]:
    """``td_entry_stepping_filter``: the verdict, and the address that would fault again.

    With a list that is not empty the Secure EPT tree lock is taken exclusively; it stays held unless entry is refused.

    :raises Fail: OPERAND_BUSY with SEPT_TREE.
    """
    tdvps = vp.tdvps
    call.lp.rip_on_entry = vp.vmcs[vmcs.GUEST_RIP]
    suspects = tdvps.last_epf_gpa_list[: tdvps.last_epf_gpa_list_idx]
    if not suspects:
        return Entry.GO_ON, 0
    await call.locks.take(td.secure_ept_lock, EXCLUSIVE, Operand.SEPT_TREE)
    for gpa in suspects:
        if translate_private(call.module, td, gpa, sept.RWX).walk not in (Walk.SUCCESS, Walk.CONVERTIBLE):
            await call.locks.release(td.secure_ept_lock)
            return Entry.REFUSE, gpa
    return Entry.NOTIFY if td.tdcs.notify_enables & _NOTIFY_EPT_FAULTS else Entry.GO_ON, 0


def log_ept_violation(lp: Lp, vp: Vp, gpa: int) -> None:
    """``td_exit_epf_stepping_log``: a TD exit for an EPT violation on a private address is about to happen."""
    tdvps = vp.tdvps
    if vp.vmcs[vmcs.GUEST_RIP] != lp.rip_on_entry:
        _forget_suspicion(vp)
    count = tdvps.last_epf_gpa_list_idx
    gpas = tdvps.last_epf_gpa_list
    if tdvps.possibly_epf_stepping < EPF_THRESHOLD:
        tdvps.possibly_epf_stepping += 1
    elif count < len(gpas) and gpa not in gpas[:count]:
        tdvps.last_epf_gpa_list = (*gpas[:count], gpa, *gpas[count + 1 :])
        tdvps.last_epf_gpa_list_idx = count + 1


def _forget_suspicion(vp: Vp) -> None:
    tdvps = vp.tdvps
    if tdvps.last_epf_gpa_list_idx or tdvps.possibly_epf_stepping:
        tdvps.last_epf_gpa_list_idx = 0
        tdvps.possibly_epf_stepping = 0


def resumes_guest(module: Module, lp: Lp, vp: Vp, exit_: VmExit) -> bool:
    """``vmexit_stepping_filter``: whether the guest goes on at once because the module steps through it.

    :raises TdExit: the local APIC is disabled, so that the interrupt could not be put back; the TD is killed.
    """
    rip = vp.vmcs[vmcs.GUEST_RIP]
    moved = abs(rip - lp.rip_on_entry)
    if moved:
        _forget_suspicion(vp)
    reason = exit_.reason & 0xFFFF
    is_nmi = reason == ExitReason.EXCEPTION_OR_NMI and exit_.interruption & vmcs.VECTOR_MASK == vmcs.VECTOR_NMI
    is_smi = reason == ExitReason.SMI_OTHER_EVENT and not exit_.qualification & 1
    if is_nmi or is_smi or reason in (ExitReason.INTERRUPT, ExitReason.MTF, ExitReason.INIT_EVENT):
        if not lp.is_single_stepping:
            since_entry = vp.tdvps.last_exit_tsc - lp.last_entry_tsc & (1 << 64) - 1
            if exit_.ran_long or moved > RIP_THRESHOLD or since_entry > TSC_THRESHOLD:
                return False
            _start(module, lp, vp, exit_)
        lp.nmi_while_stepping |= is_nmi
        lp.init_while_stepping |= reason == ExitReason.INIT_EVENT
        if lp.steps_left:
            _hold_back_interrupts(vp, rip)
            lp.steps_left -= 1
            return True
    if lp.is_single_stepping:
        _set_monitor_trap(vp, on=False)
        lp.is_single_stepping = lp.nmi_while_stepping = lp.init_while_stepping = False
        lp.steps_left = 0
        if reason == ExitReason.MTF:
            lp.last_entry_tsc = 0
            return True
    return False


def _start(module: Module, lp: Lp, vp: Vp, exit_: VmExit) -> None:
    """Chooses a number of instructions; the interrupt goes back to the APIC until they are done."""
    if not module.hardware.rdmsr(lp.index, _IA32_APIC_BASE) & _APIC_ENABLED:
        raise TdExit(
            Status.TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
            exit_.reason,
            exit_.qualification,
            interruption=exit_.interruption,
        )
    lp.lfsr = lp.lfsr >> 1 ^ (_LFSR_POLYNOMIAL if lp.lfsr & 1 else 0)
    sanity(lp.lfsr, "shift register ran empty")
    lp.steps_left = (lp.lfsr & 0x1F) + 1
    lp.is_single_stepping = True
    _set_monitor_trap(vp, on=True)


def _set_monitor_trap(vp: Vp, *, on: bool) -> None:
    controls = vp.vmcs[vmcs.PROCBASED_CTLS] & ~vmcs.MONITOR_TRAP_FLAG
    vp.vmcs[vmcs.PROCBASED_CTLS] = controls | (vmcs.MONITOR_TRAP_FLAG if on else 0)


def _hold_back_interrupts(vp: Vp, rip: int) -> None:
    """MOV SS blocking lets no event in before the next instruction, unless a debug event is due there."""
    fields = vp.vmcs
    blocking = fields[vmcs.GUEST_INTERRUPTIBILITY]
    debug_due = fields[vmcs.GUEST_PENDING_DEBUG] & _PENDING_DEBUG or _is_breakpoint(vp, rip)
    if not debug_due and not blocking & vmcs.BLOCKING_BY_STI:
        set_pending_step(vp)
        fields[vmcs.GUEST_INTERRUPTIBILITY] = blocking | vmcs.BLOCKING_BY_MOV_SS


def _is_breakpoint(vp: Vp, rip: int) -> bool:
    """Whether an enabled breakpoint in DR7 is for execution of the instruction at ``rip``."""
    dr7 = vp.vmcs[vmcs.GUEST_DR7]
    return any(dr7 & on and not dr7 & kind and vp.fields[name, 0] == rip for on, kind, name in _DR_FIELDS)
