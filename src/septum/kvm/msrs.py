"""MSRs that KVM emulates for a TD: those that the module turns into #VE and the guest into a TDVMCALL.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_has_emulated_msr``; values at reset from ``arch/x86/kvm/{x86,mtrr,
lapic}.c``. What the registers do (timers, machine checks) is not modelled: they hold what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

IA32_APICBASE: Final = 0x1B
IA32_FEAT_CTL: Final = 0x3A
IA32_UCODE_REV: Final = 0x8B
IA32_TSC_DEADLINE: Final = 0x6E0
EFER: Final = 0xC000_0080
X2APIC_ID: Final = 0x802
_MTRR_CAP: Final = 0xFE
_MTRR_DEF_TYPE: Final = 0x2FF
_X2APIC: Final = range(0x800, 0x900)
_X2APIC_IN_HARDWARE: Final = frozenset({0x808, 0x80A, 0x80B, *range(0x810, 0x828)})
"""TPR, PPR, EOI, ISR, TMR, IRR: the CPU virtualises them, KVM cannot see them."""
_RANGES: Final = (range(0x200, 0x270), range(0x400, 0x480), range(0x280, 0x2A0))
"""MTRRs, machine-check banks and their second control registers."""
_SINGLE: Final = frozenset(
    {
        IA32_APICBASE, IA32_FEAT_CTL, IA32_UCODE_REV, 0xCE, _MTRR_CAP, 0x10A, 0x140, 0x179, 0x17A, 0x17B, 0x1A0, 0x1FC,
        0x277, _MTRR_DEF_TYPE, 0x4D0, IA32_TSC_DEADLINE, EFER, 0x4B56_4D05,
    }
)  # fmt: skip
_READ_ONLY: Final = frozenset({IA32_APICBASE, EFER, IA32_FEAT_CTL})
_RESET: Final[Mapping[int, int]] = {
    IA32_APICBASE: 0xFEE0_0C00,
    IA32_FEAT_CTL: 1,
    _MTRR_CAP: 0x508,
    0x1A0: 1,
    0x277: 0x0007_0406_0007_0406,
    EFER: 0xD01,
    0x803: 0x0105_0015,
    0x80F: 0xFF,
    0x4B56_4D05: 1,
}


def tdx_has_emulated_msr(address: int) -> bool:
    """``tdx_has_emulated_msr``."""
    if address in _X2APIC:
        return address not in _X2APIC_IN_HARDWARE
    return address in _SINGLE or any(address in block for block in _RANGES)


def tdx_get_msr(vcpu: Vcpu, address: int) -> int | None:
    """``tdx_get_msr``: the value; None where the guest gets an error."""
    if not tdx_has_emulated_msr(address):
        return None
    written = vcpu.msrs[address]
    if written is not None:
        return written
    if address == X2APIC_ID:
        return vcpu.vcpu_id
    return _RESET.get(address, 0)


def tdx_set_msr(vcpu: Vcpu, address: int, value: int) -> bool:
    """``tdx_set_msr``: False where the guest gets an error."""
    if address in _READ_ONLY or not tdx_has_emulated_msr(address):
        return False
    vcpu.msrs[address] = value
    return True
