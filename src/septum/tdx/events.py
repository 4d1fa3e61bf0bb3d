"""Exceptions that the module injects into a guest, and moving a guest past an instruction.

All of it is writes to the TD VMCS: the CPU delivers the event at the next VM entry.
Source: TDX Module 1.5.01, ``inject_*`` in ``src/common/helpers/helpers.{h,c}``, ``tdx_inject_ve`` in
``src/td_dispatcher/vm_exits/td_other_exits.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.status import Status
from septum.tdx.outcome import sanity
from septum.tdx.state.vp import VE_INFO_VALID, VeInfo
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.state.vp import Vp

_EXCEPTION: Final = vmcs.VALID | vmcs.TYPE_HARDWARE_EXCEPTION
_UD: Final = _EXCEPTION | vmcs.VECTOR_UD
_DF: Final = _EXCEPTION | vmcs.ERROR_CODE_VALID | vmcs.VECTOR_DF
_GP: Final = _EXCEPTION | vmcs.ERROR_CODE_VALID | vmcs.VECTOR_GP
_PF: Final = _EXCEPTION | vmcs.ERROR_CODE_VALID | vmcs.VECTOR_PF
_VE: Final = _EXCEPTION | vmcs.VECTOR_VE
_KIND: Final = vmcs.VALID | vmcs.TYPE_MASK | vmcs.VECTOR_MASK
RFLAGS_TF: Final = 1 << 8
_DEBUGCTL_BTF: Final = 1 << 1
PENDING_BS: Final = 1 << 14


def _inject(vp: Vp, event: int, error_code: int = 0) -> None:
    fields = vp.vmcs
    fields[vmcs.ENTRY_INTERRUPTION] = event
    if event & vmcs.ERROR_CODE_VALID:
        fields.store(vmcs.ENTRY_ERROR_CODE, error_code)
    fields[vmcs.GUEST_RFLAGS] = fields[vmcs.GUEST_RFLAGS] | vmcs.RFLAGS_RF


def inject_nmi(vp: Vp) -> None:
    """NMI."""
    vp.vmcs[vmcs.ENTRY_INTERRUPTION] = vmcs.VALID | vmcs.TYPE_NMI | vmcs.VECTOR_NMI


def inject_ud(vp: Vp) -> None:
    """#UD."""
    _inject(vp, _UD)


def inject_gp(vp: Vp) -> None:
    """#GP(0)."""
    _inject(vp, _GP)


def inject_ve(vp: Vp, reason: int, qualification: int, gpa: int = 0, gla: int = 0) -> None:
    """#VE with its information in VE_INFO; #DF while the guest has not yet read the last one."""
    if vp.tdvps.ve_info.valid:
        _inject(vp, _DF)
        return
    fields = vp.vmcs
    vp.tdvps.ve_info = VeInfo(
        reason,
        VE_INFO_VALID,
        qualification,
        gla,
        gpa,
        fields[vmcs.EPTP_INDEX],
        fields[vmcs.EXIT_INSTRUCTION_LENGTH],
        fields[vmcs.EXIT_INSTRUCTION_INFO],
    )
    _inject(vp, _VE)


def inject_pf(vp: Vp, gla: int, error_code: int) -> None:
    """#PF with ``gla`` in CR2; #DF if the exit came while a #PF or #VE was being delivered.

    :raises TdExit: a triple fault, if a #DF was being delivered; the VCPU is disabled.
    """
    vp.tdvps.cr2 = gla
    pending = vp.vmcs[vmcs.ENTRY_INTERRUPTION] & _KIND
    if pending == _EXCEPTION | vmcs.VECTOR_DF:
        raise TdExit(Status.TDX_NON_RECOVERABLE_VCPU, ExitReason.TRIPLE_FAULT)
    if pending in (_EXCEPTION | vmcs.VECTOR_PF, _VE):
        _inject(vp, _DF)
    else:
        _inject(vp, _PF, error_code)


def advance_rip(vp: Vp) -> None:
    """``advance_guest_rip``: past the instruction that exited, with what completing an instruction does.

    :raises ModuleHalt: when the exit has no instruction length.
    """
    fields = vp.vmcs
    length = fields[vmcs.EXIT_INSTRUCTION_LENGTH]
    sanity(length, "advance of RIP by no instruction")
    fields.store(vmcs.GUEST_RIP, fields[vmcs.GUEST_RIP] + length & (1 << 64) - 1)
    blocking = fields[vmcs.GUEST_INTERRUPTIBILITY]
    if blocking:
        fields.store(vmcs.GUEST_INTERRUPTIBILITY, blocking & ~(vmcs.BLOCKING_BY_MOV_SS | vmcs.BLOCKING_BY_STI))
    set_pending_step(vp)


def set_pending_step(vp: Vp) -> None:
    """``set_guest_pde_bs``: a single-step trap is pending exactly if the guest runs with RFLAGS.TF and without BTF."""
    fields = vp.vmcs
    pending = fields[vmcs.GUEST_PENDING_DEBUG]
    stepping = fields[vmcs.GUEST_RFLAGS] & RFLAGS_TF and not fields[vmcs.GUEST_DEBUGCTL] & _DEBUGCTL_BTF
    if stepping or pending:
        fields.store(vmcs.GUEST_PENDING_DEBUG, pending & ~PENDING_BS | (PENDING_BS if stepping else 0))


def is_in_64bit_mode(vp: Vp) -> bool:
    """EFER.LMA and CS.L of the guest."""
    return bool(vp.vmcs[vmcs.GUEST_EFER] & 1 << 10 and vp.vmcs[vmcs.GUEST_CS_ACCESS_RIGHTS] & 1 << 13)


def privilege_level(vp: Vp) -> int:
    """The guest's CPL: SS.DPL."""
    return vp.vmcs[vmcs.GUEST_SS_ACCESS_RIGHTS] >> 5 & 3
