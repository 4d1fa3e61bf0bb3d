"""Virtual MSRs of a TD: values that TDH.MNG.INIT computes once, and the bitmaps of accesses that exit.

Source: TDX Module 1.5.01, ``virt_msr_helpers.{h,c}``, ``set_msr_bitmaps`` in ``helpers.c``, ``vmcs_defs.h``.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from septum.arch import platform_msrs as msrs
from septum.arch.msr import Bitmap, bitmap_bit, msr_table
from septum.arch.structures import TdAttributes
from septum.tdx.state.td import CpuidFlags
from septum.tdx.td_params.checks import CET_S, CET_U, LBR, PK, PT, ULI, has
from septum.tdx.td_params.cpuid import TSX_CTRL
from septum.tdx.td_params.native import NativeCpu

IA32_PERF_METRICS: Final = 0x329
DDPD_U: Final = 1 << 8
"""Bit of IA32_SPEC_CTRL."""


def _mask(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


# -- IA32_ARCH_CAPABILITIES ------------------------------------------------------------------------------------------

_ALLOWED: Final = _mask(4, 20, 24)
"""SSB_NO, BHI_NO, PBRSB_NO: the CPU's value if the host asks for it, else 0."""
_FORCED: Final = _mask(19)
"""RRSBA: 1 if the host asks for it, else the CPU's value."""
_FIXED0: Final = _mask(9, 10, 11, 16, 17, 18, 21, 22, 23, *range(25, 64))


def arch_capabilities(native: int, config: int, *, tsx: bool) -> int | None:
    """The virtual value of the MSR, or None when ``config`` has bits that the host has no say in."""
    if config & ~(_ALLOWED | _FORCED):
        return None
    value = native & ~_FIXED0 & (config | ~_ALLOWED) | config & _FORCED
    return value if tsx else value & ~(1 << TSX_CTRL)


_MUST_BE_1: Final = _mask(0, 1, 3, 5, 6, 8, 12, 13, 14, 15)
_RSBA: Final = _mask(2)


def virtual_arch_capabilities_allowed(native: int, value: int, *, tsx: bool) -> bool:
    """Whether a TD that comes from another platform can have this value (``check_virt_ia32_arch_capabilities``)."""
    if value & (_FIXED0 | _RSBA) or ~value & _MUST_BE_1:
        return False
    if value & ~native & _ALLOWED or native & ~value & _FORCED:
        return False
    return not tsx or has(value, TSX_CTRL)


# -- MSR bitmaps -----------------------------------------------------------------------------------------------------


def msr_bitmaps(cpu: NativeCpu, attributes: int, xfam: int, flags: CpuidFlags) -> bytes:
    """The 4 KiB of MSR_BITMAPS: a 1 for each access that exits (``set_msr_bitmaps``)."""
    perfmon = bool(attributes & TdAttributes.PERFMON)
    cleared = {
        Bitmap.FIXED_0: True,
        Bitmap.DYN_PERFMON: perfmon,
        Bitmap.DYN_XFAM_CET: has(xfam, CET_U) or has(xfam, CET_S),
        Bitmap.DYN_XFAM_PT: has(xfam, PT),
        Bitmap.DYN_XFAM_ULI: has(xfam, ULI),
        Bitmap.DYN_XFAM_LBR: has(xfam, LBR),
        Bitmap.DYN_UMWAIT: flags.waitpkg,
        Bitmap.DYN_PKS: bool(attributes & TdAttributes.PKS),
        Bitmap.DYN_XFD: flags.xfd,
        Bitmap.DYN_TSX: flags.tsx,
    }
    others = {
        msrs.IA32_PERF_CAPABILITIES: perfmon and has(xfam, PT),
        IA32_PERF_METRICS: perfmon and cpu.has_perf_metrics,
    }
    return _bitmaps(
        frozenset(meaning for meaning, holds in cleared.items() if holds),
        frozenset(address for address, holds in others.items() if holds),
    )


@cache
def _bitmaps(cleared: frozenset[Bitmap], others: frozenset[int]) -> bytes:
    bitmaps = bytearray(b"\xff" * 4096)
    for row in msr_table():
        for handling, write in ((row.read, False), (row.write, True)):
            if handling.bitmap in cleared or (handling.bitmap is Bitmap.DYN_OTHER and row.start in others):
                for address in range(row.start, row.end + 1):
                    place = bitmap_bit(address, write=write)
                    assert place is not None
                    bitmaps[place[0]] &= ~(1 << place[1])
    return bytes(bitmaps)


# -- IA32_VMX_* ------------------------------------------------------------------------------------------------------


class L2Control(NamedTuple):
    """A VM-execution control field of L2 VMs: what the module needs of it, and the bits that the L1 VMM may write."""

    needs: msrs.ControlNeeds
    writable: int

    def initial(self, cpu: NativeCpu) -> int:
        """The initial value for all TDs, with the bits that this CPU wants to be 1."""
        must = cpu.cpu.msr(self.needs.msr) & 0xFFFF_FFFF if self.needs.msr != msrs.IA32_VMX_PROCBASED_CTLS3 else 0
        return self.needs.l2_initial | must


PINBASED, PROCBASED, PROCBASED2, PROCBASED3, EXIT, ENTRY = (
    L2Control(needs, writable)
    for needs, writable in zip(msrs.CONTROL_NEEDS, (0, 0x48D9_9A04, 0x0C51_3E0C, 0xE, 0, 0x200), strict=True)
)

MWAIT_EXITING, RDPMC_EXITING, MONITOR_EXITING = _mask(10), _mask(11), _mask(29)
CTLS2_PCONFIG = _mask(27)
EXIT_PERF_GLOBAL_CTRL, ENTRY_PERF_GLOBAL_CTRL, ENTRY_PKRS = _mask(12, 30), _mask(13), _mask(22)

_CR4_WRITABLE: Final = 0x03FF_1FBF
_CR4_PKE, _CR4_CET, _CR4_PKS, _CR4_UINTR, _CR4_KEY_LOCKER = _mask(22), _mask(23), _mask(24), _mask(25), _mask(19)
_VMX_BASIC: Final = _mask(54, 55, 56)
"""Exit information on INS and OUTS, TRUE_* MSRs, event injection without error code."""
_VMX_MISC: Final = _mask(5, 6, 7, 14, 18, 29, 30)
"""EFER.LMA into the unrestricted-guest bit, HLT and shutdown states, PT in VMX, 4 CR3 targets, VMWRITE to any field,
injection with instruction length 0."""
_EPT_VPID_CAP: Final = _mask(0, 16, 17, 22)
"""Execute-only, 2 MiB and 1 GiB pages, advanced exit information."""
_SSS: Final = 1 << 23
_HLAT_PREFIX_SIZE: Final = 0x3F << 48


def _put(value: int, bits: int, on: object) -> int:
    return value | bits if on else value & ~bits


def l2_controls(cpu: NativeCpu, attributes: int, flags: CpuidFlags) -> dict[L2Control, int]:
    """Initial values of the control fields of L2 VMs, for a TD (``calc_l2_vmcs_*_init``)."""
    perf = attributes & (TdAttributes.PERFMON | TdAttributes.DEBUG)
    procbased = _put(PROCBASED.initial(cpu), MWAIT_EXITING | MONITOR_EXITING, not flags.monitor_mwait)
    procbased2 = PROCBASED2.initial(cpu)
    if not cpu.cpu.msr(msrs.IA32_VMX_PROCBASED_CTLS2) >> 32 & msrs.CTLS2_ENCLV:
        procbased2 &= ~msrs.CTLS2_ENCLV
    procbased2 = _put(procbased2, msrs.CTLS2_WAIT_PAUSE, flags.waitpkg)
    entry = _put(ENTRY.initial(cpu), ENTRY_PERF_GLOBAL_CTRL, perf)
    return {
        PINBASED: PINBASED.initial(cpu),
        PROCBASED: _put(procbased, RDPMC_EXITING, not attributes & TdAttributes.PERFMON),
        PROCBASED2: _put(procbased2, CTLS2_PCONFIG, flags.mktme),
        PROCBASED3: PROCBASED3.initial(cpu),
        EXIT: _put(EXIT.initial(cpu), EXIT_PERF_GLOBAL_CTRL, perf),
        ENTRY: _put(entry, ENTRY_PKRS, attributes & (TdAttributes.PKS | TdAttributes.DEBUG)),
    }


def cr4_writable(cpu: NativeCpu, attributes: int, xfam: int) -> int:
    """CR4 bits that the L1 VMM may change in an L2 VM (``calc_base_l2_cr4_write_mask``)."""
    mask = (
        _CR4_WRITABLE
        & ~cpu.cpu.msr(msrs.IA32_VMX_CR4_FIXED0)
        & cpu.cpu.msr(msrs.IA32_VMX_CR4_FIXED1)
        & ~_CR4_KEY_LOCKER
    )
    present = (
        (_CR4_PKE, has(xfam, PK)),
        (_CR4_CET, has(xfam, CET_S) and has(xfam, CET_U)),
        (_CR4_UINTR, has(xfam, ULI)),
        (_CR4_PKS, attributes & TdAttributes.PKS),
    )
    return mask & ~sum(bit for bit, has_feature in present if not has_feature)


def _allowed(initial: int, writable: int) -> int:
    """The form of the VMX control MSRs: bits that must be 1 below, bits that may be 1 above."""
    return initial & ~writable | (initial | writable) << 32


def vmx_msrs(cpu: NativeCpu, attributes: int, xfam: int, flags: CpuidFlags) -> dict[str, int]:
    """Virtual IA32_VMX_* MSRs by the last part of their metadata names (``init_virt_ia32_vmx_msrs``)."""
    controls = l2_controls(cpu, attributes, flags)
    cr4 = cr4_writable(cpu, attributes, xfam)
    procbased = _put(PROCBASED.writable, RDPMC_EXITING, attributes & TdAttributes.PERFMON)
    procbased2 = _put(PROCBASED2.writable, msrs.CTLS2_WAIT_PAUSE, flags.waitpkg)
    cap = _EPT_VPID_CAP | cpu.cpu.msr(msrs.IA32_VMX_EPT_VPID_CAP) & _HLAT_PREFIX_SIZE
    return {
        "BASIC": _VMX_BASIC,
        "MISC": _VMX_MISC,
        "CR0_FIXED0": msrs.GUEST_CR0 & ~msrs.L2_CR0_VARIABLE,
        "CR0_FIXED1": msrs.GUEST_CR0 | msrs.L2_CR0_VARIABLE,
        "CR4_FIXED0": msrs.GUEST_CR4 & ~cr4,
        "CR4_FIXED1": msrs.GUEST_CR4 | cr4,
        "PROCBASED_CTLS2": _allowed(controls[PROCBASED2], _put(procbased2, CTLS2_PCONFIG, flags.mktme)),
        "EPT_VPID_CAP": _put(cap, _SSS, has(xfam, CET_S)),
        "TRUE_PINBASED_CTLS": _allowed(controls[PINBASED], PINBASED.writable),
        "TRUE_PROCBASED_CTLS": _allowed(controls[PROCBASED], procbased),
        "TRUE_EXIT_CTLS": _allowed(controls[EXIT], EXIT.writable),
        "TRUE_ENTRY_CTLS": _allowed(controls[ENTRY], ENTRY.writable),
        "PROCBASED_CTLS3": controls[PROCBASED3] | PROCBASED3.writable,
        "VMFUNC": 0,
        "EXIT_CTLS2": 0,
    }
