"""VM exits other than TDCALL: what the module emulates, turns into an exception for the guest, or hands to the host.

Source: TDX Module 1.5.01, ``tdx_td_dispatcher.c``, ``td_other_exits.c``, ``td_ept_violation.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch import sept, vmcs
from septum.arch.exits import VM_ENTRY_FAILED, ExitReason
from septum.arch.pages import PA_MASK, PAGE_4K, Level, gpa_width, is_shared_gpa
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.events import inject_gp, inject_nmi, inject_pf, inject_ud, inject_ve, privilege_level
from septum.tdx.guest.call import ExtendedExit, ept_violation, pending_exits_to_host
from septum.tdx.guest.control_registers import cr_access, xsetbv
from septum.tdx.guest.cpuid import cpuid
from septum.tdx.guest.msr import rdmsr, wrmsr
from septum.tdx.outcome import ModuleHalt, sanity
from septum.tdx.secure_ept import walk_sept
from septum.tdx.stepping import log_ept_violation
from septum.tdx.vm_exit import TdExit, VmExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

_R: Final = ExitReason
_DATA_WRITE: Final = 1 << 1
_FETCH: Final = 1 << 2
_GLA_VALID: Final = 1 << 7
_NMI_UNBLOCKED_BY_IRET: Final = 1 << 12
_SHADOW_STACK: Final = 1 << 13
_PF_PRESENT, _PF_WRITE, _PF_USER, _PF_RESERVED, _PF_FETCH, _PF_SHADOW_STACK = (1 << n for n in (0, 1, 2, 3, 4, 6))
_MACHINE_CHECK_SMI: Final = 1
"""Exit qualification of an SMI."""
_CONTEXT_INVALID: Final = 1
"""Exit qualification of a notification."""


class Exit(NamedTuple):
    """A VM exit and whose it is."""

    module: Module
    lp: Lp
    td: Td
    vp: Vp
    exit_: VmExit

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG of the TD."""
        return bool(self.td.tdcs.attributes & TdAttributes.DEBUG)

    def to_host(self, status: Status = Status.TDX_SUCCESS, *, interruption: bool = False) -> TdExit:
        """The exit as it is, for the host."""
        exit_ = self.exit_
        return TdExit(status, exit_.reason, exit_.qualification, interruption=exit_.interruption if interruption else 0)


def handle_exit(module: Module, lp: Lp, td: Td, vp: Vp, exit_: VmExit) -> None:
    """Handles any exit but TDCALL.

    :raises TdExit: the host has to act.
    :raises ModuleHalt: an exit that cannot be.
    """
    exit_of = Exit(module, lp, td, vp, exit_)
    if exit_.reason & VM_ENTRY_FAILED:
        raise _failed_entry(exit_of)
    _HANDLERS.get(exit_.reason & 0xFFFF, _unexpected)(exit_of)


def _failed_entry(e: Exit) -> Exception:
    reason = e.exit_.reason & 0xFFFF
    if reason == _R.FAILED_VMENTER_GS:
        return e.to_host(Status.TDX_SUCCESS if e.debug else Status.TDX_NON_RECOVERABLE_TD)
    if reason == _R.FAILED_VMENTER_MC:
        return e.to_host(Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE)
    return ModuleHalt(f"VM entry failed with reason {reason}")


def _ve(e: Exit) -> None:
    inject_ve(e.vp, e.exit_.reason, e.exit_.qualification)


def _ud(e: Exit) -> None:
    inject_ud(e.vp)


def _gp(e: Exit) -> None:
    inject_gp(e.vp)


def _to_host(e: Exit) -> None:
    raise e.to_host()


def _interrupt(e: Exit) -> None:
    raise e.to_host(interruption=True)


def _unexpected(e: Exit) -> None:
    """Controls that cause such exits are set only for debug TDs."""
    raise e.to_host(Status.TDX_SUCCESS if e.debug else Status.TDX_NON_RECOVERABLE_TD)


def _exception_or_nmi(e: Exit) -> None:
    event = e.exit_.interruption
    if event & vmcs.TYPE_MASK == vmcs.TYPE_NMI:
        raise e.to_host(interruption=True)
    if event & vmcs.VECTOR_MASK == vmcs.VECTOR_MC:
        raise e.to_host(Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE, interruption=True)
    sanity(e.debug, "exception that no TD exits for")
    raise e.to_host(interruption=True)


def _triple_fault(e: Exit) -> None:
    raise e.to_host(Status.TDX_NON_RECOVERABLE_VCPU)


def _smi(e: Exit) -> None:
    fatal = e.exit_.qualification & _MACHINE_CHECK_SMI
    raise e.to_host(Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE if fatal else Status.TDX_SUCCESS, interruption=True)


def _notification(e: Exit) -> None:
    _block_nmi_again(e)
    invalid = e.exit_.qualification & _CONTEXT_INVALID
    raise e.to_host(Status.TDX_NON_RECOVERABLE_TD if invalid else Status.TDX_SUCCESS)


def _block_nmi_again(e: Exit) -> None:
    """An IRET had unblocked NMIs before the exit."""
    if e.exit_.qualification & _NMI_UNBLOCKED_BY_IRET:
        fields = e.vp.vmcs
        fields[vmcs.GUEST_INTERRUPTIBILITY] = fields[vmcs.GUEST_INTERRUPTIBILITY] | vmcs.BLOCKING_BY_NMI


def _nmi_window(e: Exit) -> None:
    """The NMI that the host asked for, unless the guest has a #VE to handle first."""
    tdvps, fields = e.vp.tdvps, e.vp.vmcs
    if tdvps.pend_nmi and not tdvps.ve_info.valid:
        inject_nmi(e.vp)
        tdvps.pend_nmi = False
    fields[vmcs.PROCBASED_CTLS] = fields[vmcs.PROCBASED_CTLS] & ~vmcs.NMI_WINDOW_EXITING


def _rdpmc(e: Exit) -> None:
    if not e.td.tdcs.attributes & TdAttributes.PERFMON:
        inject_gp(e.vp)
        return
    sanity(e.debug, "RDPMC exit of a TD that has PERFMON")
    raise e.to_host()


def _pml_full(e: Exit) -> None:
    sanity(e.debug, "page modification log of a TD that is not debuggable")
    raise e.to_host()


def _ept_misconfiguration(e: Exit) -> None:
    gpa = e.exit_.gpa
    sanity(is_shared_gpa(gpa, e.td.tdcs.gpaw), "EPT misconfiguration of a private address")
    raise TdExit(Status.TDX_SUCCESS, e.exit_.reason, gpa=gpa & -PAGE_4K)


def _ept_violation(e: Exit) -> None:
    """A reserved-bit #PF for an address above SHARED, a #VE for a pending page, a TD exit for all else."""
    qualification, gpa, tdcs = e.exit_.qualification, e.exit_.gpa, e.td.tdcs
    _block_nmi_again(e)
    if gpa & PA_MASK >= 1 << gpa_width(tdcs.gpaw) and qualification & _GLA_VALID:
        inject_pf(e.vp, e.exit_.gla, _page_fault_code(e))
        return
    extended = ExtendedExit.NONE
    if not is_shared_gpa(gpa, tdcs.gpaw):
        if sept.is_guest_acceptable(walk_sept(e.module, e.td, gpa, Level.PT).value):
            if not pending_exits_to_host(e.td):
                inject_ve(e.vp, e.exit_.reason, qualification, gpa, e.exit_.gla)
                return
            extended = ExtendedExit.PENDING_EPT_VIOLATION
        log_ept_violation(e.lp, e.vp, gpa)
    end = ept_violation(gpa, qualification, extended)
    end.reason = e.exit_.reason
    raise end


def _page_fault_code(e: Exit) -> int:
    qualification = e.exit_.qualification
    bits = (
        (_PF_WRITE, qualification & _DATA_WRITE),
        (_PF_USER, privilege_level(e.vp) == 3),
        (_PF_FETCH, qualification & _FETCH),
        (_PF_SHADOW_STACK, qualification & _SHADOW_STACK),
    )
    return _PF_PRESENT | _PF_RESERVED | sum(bit for bit, on in bits if on)


def _cr_access(e: Exit) -> None:
    if not cr_access(e.module, e.td, e.vp, e.exit_.qualification):
        _unexpected(e)


def _msr(e: Exit) -> None:
    access = wrmsr if e.exit_.reason & 0xFFFF == _R.MSR_WRITE else rdmsr
    if not access(e.module, e.lp, e.td, e.vp):
        inject_ve(e.vp, e.exit_.reason, 0)


_HANDLERS: dict[int, Callable[[Exit], None]] = {
    _R.EXCEPTION_OR_NMI: _exception_or_nmi,
    _R.INTERRUPT: _interrupt,
    _R.TRIPLE_FAULT: _triple_fault,
    _R.INIT_EVENT: _to_host,
    _R.SMI_OTHER_EVENT: _smi,
    _R.NMI_WINDOW: _nmi_window,
    _R.TASK_SWITCH: _to_host,
    _R.CPUID_INSTRUCTION: lambda e: cpuid(e.module, e.td, e.vp),
    _R.RDPMC_INSTRUCTION: _rdpmc,
    _R.CR_ACCESS: _cr_access,
    _R.MSR_READ: _msr,
    _R.MSR_WRITE: _msr,
    _R.C_STATE_SMI: _interrupt,
    _R.EPT_VIOLATION: _ept_violation,
    _R.EPT_MISCONFIGURATION: _ept_misconfiguration,
    _R.XSETBV_INSTRUCTION: lambda e: xsetbv(e.module, e.vp),
    _R.EPT_PML_FULL: _pml_full,
    _R.ENQCMD_PASID_TRANSLATION_FAILURE: _gp,
    _R.BUS_LOCK: _to_host,
    _R.NOTIFICATION: _notification,
    **dict.fromkeys(
        (
            _R.HLT_INSTRUCTION, _R.INVD_INSTRUCTION, _R.VMCALL_INSTRUCTION, _R.IO_INSTRUCTION, _R.MWAIT_INSTRUCTION,
            _R.MONITOR_INSTRUCTION, _R.WBINVD_INSTRUCTION, _R.APIC_WRITE, _R.PCONFIG,
        ),
        _ve,
    ),
    **dict.fromkeys(
        (
            _R.GETSEC_INSTRUCTION, _R.RSM_INSTRUCTION, _R.VMCLEAR_INSTRUCTION, _R.VMLAUNCH_INSTRUCTION,
            _R.VMPTRLD_INSTRUCTION, _R.VMPTRST_INSTRUCTION, _R.VMREAD_INSTRUCTION, _R.VMRESUME_INSTRUCTION,
            _R.VMWRITE_INSTRUCTION, _R.VMXOFF_INSTRUCTION, _R.VMXON_INSTRUCTION, _R.INVLEPT, _R.INVLVPID,
            _R.VMFUNC_INSTRUCTION, _R.ENCLS_INSTRUCTION, _R.ENCLV_INSTRUCTION,
            _R.ENQCMDS_PASID_TRANSLATION_FAILURE, _R.SEAMCALL,
        ),
        _ud,
    ),
}  # fmt: skip
