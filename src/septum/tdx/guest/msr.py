"""RDMSR and WRMSR exits.

Accesses that the MSR bitmaps let through never come here. What comes is in the module's table (an exception for most
MSRs, special handling for a few), or is unknown and gives a #VE.
Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/td_msr_access.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.msr import GP_UNLESS, Action, CpuidFeature, bitmap_bit, find_msr
from septum.arch.structures import TdAttributes
from septum.tdx.events import PENDING_BS, RFLAGS_TF, inject_gp
from septum.tdx.outcome import sanity
from septum.tdx.td_params.native import XSS_BITS

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import CpuidFlags, Td
    from septum.tdx.state.vp import Vp

U32: Final = (1 << 32) - 1
XAPIC_DISABLE_STATUS: Final = 0xBD
ARCH_CAPABILITIES: Final = 0x10A
MISC_ENABLE: Final = 0x1A0
DEBUGCTL: Final = 0x1D9
PERF_CAPABILITIES: Final = 0x345
XSS: Final = 0xDA0
EFER: Final = 0xC000_0080

_VIRTUAL: Final = {
    ARCH_CAPABILITIES: "VIRTUAL_IA32_ARCH_CAPABILITIES",
    **{
        0x480 + offset: f"VIRTUAL_IA32_VMX_{name}"
        for offset, name in {
            0x0: "BASIC", 0x5: "MISC", 0x6: "CR0_FIXED0", 0x7: "CR0_FIXED1", 0x8: "CR4_FIXED0", 0x9: "CR4_FIXED1",
            0xB: "PROCBASED_CTLS2", 0xC: "EPT_VPID_CAP", 0xD: "TRUE_PINBASED_CTLS", 0xE: "TRUE_PROCBASED_CTLS",
            0xF: "TRUE_EXIT_CTLS", 0x10: "TRUE_ENTRY_CTLS", 0x11: "VMFUNC", 0x12: "PROCBASED_CTLS3",
        }.items()
    },
}  # fmt: skip
"""MSRs that read as a field of TDCS."""
_DEBUGCTL_BTF, _DEBUGCTL_TR, _DEBUGCTL_BTS, _DEBUGCTL_UNCORE_PMI = 1 << 1, 1 << 6, 1 << 7, 1 << 13
_DEBUGCTL_RESERVED: Final = 7 << 3 | -1 << 16
_EFER_SCE, _EFER_LMA = 1, 1 << 10
_PERFMON_AVAILABLE, _PEBS_UNAVAILABLE = 1 << 7, 1 << 12
_PEBS_OUTPUT_PT: Final = 1 << 16
_XFAM_PT: Final = 1 << 8


def rdmsr(module: Module, lp: Lp, td: Td, vp: Vp) -> bool:
    """RDMSR of ECX into EDX:EAX; False when the guest is to get a #VE."""
    address = vp.tdvps.gprs[1] & U32
    value = _virtual_value(module, lp, td, vp, address)
    if value is None:
        return _by_table(td, vp, address, write=False)
    rest = vp.tdvps.gprs
    vp.tdvps.gprs = (value & U32, rest[1], value >> 32, *rest[3:])
    return True


def _virtual_value(module: Module, lp: Lp, td: Td, vp: Vp, address: int) -> int | None:
    """What an MSR with a value of its own reads as, else None."""
    perfmon = td.tdcs.attributes & TdAttributes.PERFMON
    if address in _VIRTUAL:
        return td.fields[_VIRTUAL[address], 0]
    if address == DEBUGCTL:
        return vp.vmcs[vmcs.GUEST_DEBUGCTL] & ~_DEBUGCTL_UNCORE_PMI
    if address == MISC_ENABLE:
        sanity(not perfmon, "RDMSR exit for IA32_MISC_ENABLE of a TD that has PERFMON")
        return module.hardware.rdmsr(lp.index, MISC_ENABLE) & ~_PERFMON_AVAILABLE | _PEBS_UNAVAILABLE
    if address == PERF_CAPABILITIES:
        sanity(not (perfmon and vp.tdvps.xfam & _XFAM_PT), "RDMSR exit for IA32_PERF_CAPABILITIES")
        return module.hardware.cpu.msr(PERF_CAPABILITIES) & ~_PEBS_OUTPUT_PT if perfmon else 0
    return 1 if address == XAPIC_DISABLE_STATUS else None


def wrmsr(module: Module, lp: Lp, td: Td, vp: Vp) -> bool:
    """WRMSR of EDX:EAX to ECX; False when the guest is to get a #VE."""
    rax, rcx, rdx = vp.tdvps.gprs[:3]
    address, value = rcx & U32, (rdx & U32) << 32 | rax & U32
    if address == XSS:
        return _write_xss(module, vp, value)
    if address == DEBUGCTL:
        return _write_debugctl(vp, value)
    if address == EFER:
        return _write_efer(vp, value)
    return _by_table(td, vp, address, write=True)


def _write_xss(module: Module, vp: Vp, value: int) -> bool:
    supported = module.hardware.cpu.cpuid(0xD, 1).ecx & XSS_BITS
    if value & ~(supported & vp.tdvps.xfam):
        inject_gp(vp)
    else:
        vp.tdvps.ia32_xss = value
    return True


def _write_debugctl(vp: Vp, value: int) -> bool:
    fields = vp.vmcs
    if value & _DEBUGCTL_RESERVED:
        inject_gp(vp)
        return True
    if value & _DEBUGCTL_TR and not value & _DEBUGCTL_BTS:
        return False
    old = fields[vmcs.GUEST_DEBUGCTL]
    value = value & ~_DEBUGCTL_UNCORE_PMI | old & _DEBUGCTL_UNCORE_PMI
    fields.store(vmcs.GUEST_DEBUGCTL, value)
    if fields[vmcs.GUEST_RFLAGS] & RFLAGS_TF and (old ^ value) & _DEBUGCTL_BTF:
        pending = fields[vmcs.GUEST_PENDING_DEBUG] & ~PENDING_BS
        fields.store(vmcs.GUEST_PENDING_DEBUG, pending | (PENDING_BS if old & _DEBUGCTL_BTF else 0))
    return True


def _write_efer(vp: Vp, value: int) -> bool:
    """Only SCE may change; LMA is read-only."""
    old = vp.vmcs[vmcs.GUEST_EFER]
    value = value & ~_EFER_LMA | old & _EFER_LMA
    if (old ^ value) & ~_EFER_SCE:
        return False
    vp.vmcs.store(vmcs.GUEST_EFER, value)
    return True


def _by_table(td: Td, vp: Vp, address: int, *, write: bool) -> bool:
    place = bitmap_bit(address, write=write)
    row = find_msr(address)
    if place is None or row is None:
        return False
    offset, bit = place
    sanity(td.tdcs.msr_bitmaps[offset] >> bit & 1, f"exit for MSR {address:#x}, which does not exit")
    action = (row.write if write else row.read).action
    if action is Action.VE:
        return False
    if action is Action.GP_OR_VE and _has(td.tdcs.cpuid_flags, GP_UNLESS[address]):
        return False
    sanity(action in (Action.GP, Action.GP_OR_VE), f"exit for MSR {address:#x} that the module has no answer to")
    inject_gp(vp)
    return True


def _has(flags: CpuidFlags, feature: CpuidFeature) -> bool:
    return {
        CpuidFeature.DCA: flags.dca,
        CpuidFeature.TME: flags.tme,
        CpuidFeature.MKTME: flags.mktme,
        CpuidFeature.TSC_DEADLINE: flags.tsc_deadline,
    }[feature]
