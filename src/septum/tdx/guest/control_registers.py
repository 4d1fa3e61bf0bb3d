"""Exits for writes of CR0, CR4 and XCR0: bits that the module owns, and values that a TD may not have.

Source: TDX Module 1.5.01, ``td_other_exits.c`` and ``td_xsetbv.c`` in ``src/td_dispatcher/vm_exits``, ``helpers.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.structures import TdAttributes
from septum.tdx.events import inject_gp, inject_ve
from septum.tdx.outcome import sanity
from septum.tdx.td_params.checks import xcr0_allowed
from septum.tdx.vmcs_init import IA32_VMX_CR0_FIXED0, IA32_VMX_CR0_FIXED1, IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

_PE, _NE, _WP, _NW, _CD, _PG = 1, 1 << 5, 1 << 16, 1 << 29, 1 << 30, 1 << 31
_CR0_HIGH: Final = -1 << 32
_CR0_IGNORED: Final = 0x3FF << 19 | 1 << 17 | 0x3FF << 6
"""Reserved bits that a write silently leaves as they are."""
_LMSW_BITS: Final = 0xE
_VMXE, _KEY_LOCKER, _PKE, _CET, _PKS, _UINTR = (1 << n for n in (13, 19, 22, 23, 24, 25))
_MOV_TO_CR, _LMSW = 0, 3
_RSP: Final = 4


class Write(Enum):
    """What comes of a write to a control register."""

    DONE = 0
    GP = 1
    VE = 2


def cr_access(module: Module, td: Td, vp: Vp, qualification: int) -> bool:
    """A control-register access that exits; False for one that only a debugger can have asked to see."""
    access = qualification >> 4 & 3
    if access == _LMSW:
        cr0 = vp.vmcs[vmcs.GUEST_CR0]
        sanity(cr0 & _PE, "LMSW of a guest in real mode")
        vp.vmcs[vmcs.GUEST_CR0] = qualification >> 16 & _LMSW_BITS | cr0 & ~_LMSW_BITS
        return True
    register = qualification & 0xF
    if access != _MOV_TO_CR or register not in (0, 4):
        return False
    number = qualification >> 8 & 0xF
    gprs = vp.tdvps.gprs
    value = vp.vmcs[vmcs.GUEST_RSP] if number == _RSP else gprs[number if number < _RSP else number - 1]
    outcome = _write_cr4(module, td, vp, value) if register else _write_cr0(module, vp, value)
    if outcome is Write.GP:
        inject_gp(vp)
    elif outcome is Write.VE:
        inject_ve(vp, ExitReason.CR_ACCESS, qualification)
    return True


def _write_cr0(module: Module, vp: Vp, value: int) -> Write:
    msr, fields = module.hardware.cpu.msr, vp.vmcs
    must_be_1 = msr(IA32_VMX_CR0_FIXED0) & ~(_PE | _PG)
    invalid = ~value & must_be_1 or value & ~msr(IA32_VMX_CR0_FIXED1) or (value & _PG and not value & _PE)
    if invalid or (fields[vmcs.GUEST_CR4] & _CET and not value & _WP):
        return Write.GP
    if not value & _PE or not value & _NE or value & (_NW | _CD | _CR0_HIGH):
        return Write.VE
    fields[vmcs.GUEST_CR0] = value & ~_CR0_IGNORED | fields[vmcs.GUEST_CR0] & _CR0_IGNORED
    return Write.DONE


def _write_cr4(module: Module, td: Td, vp: Vp, value: int) -> Write:
    """Valid writes of CR4 do not exit: what is not wrong for every CPU is wrong for a TD."""
    msr, xfam = module.hardware.cpu.msr, vp.tdvps.xfam
    invalid = ~value & msr(IA32_VMX_CR4_FIXED0) & ~_VMXE or value & ~msr(IA32_VMX_CR4_FIXED1)
    absent = (
        _KEY_LOCKER
        | (0 if xfam >> 9 & 1 else _PKE)
        | (0 if xfam >> 11 & 3 == 3 else _CET)
        | (0 if xfam >> 14 & 1 else _UINTR)
        | (0 if td.tdcs.attributes & TdAttributes.PKS else _PKS)
    )
    unprotected = value & _CET and not vp.vmcs[vmcs.GUEST_CR0] & _WP
    return Write.GP if invalid or value & absent or unprotected else Write.VE


def xsetbv(module: Module, vp: Vp) -> None:
    """XSETBV: EDX:EAX to XCR0 if the TD may have all of it, else #GP."""
    tdvps = vp.tdvps
    rax, rcx, rdx = tdvps.gprs[:3]
    value = (rdx << 32 | rax & 0xFFFF_FFFF) & (1 << 64) - 1
    if rcx & 0xFFFF_FFFF or not xcr0_allowed(value, tdvps.xfam, module.native_cpu):
        inject_gp(vp)
        return
    tdvps.xcr0 = value
