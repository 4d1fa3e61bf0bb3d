"""What TDH.SYS.INIT wants of the CPU and the platform, and what TDH.SYS.LP.INIT compares on each LP.

All LPs have the same CPUID here, and a CPU model that passes the table of verified CPUID bits is taken to have
consistent topology, cache, PMU and address-width leaves too.
Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_sys_init.c``, ``tdh_sys_lp_init.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from septum.arch import platform_msrs as msrs
from septum.arch.cpuid import (
    CPUID_FIRST_EXTENDED_LEAF,
    CPUID_MIN_CPU_BASE_LEAF,
    CPUID_MIN_CPU_EXTENDED_LEAF,
    NO_BITS,
    CpuModel,
    cpuid_table,
)
from septum.arch.pages import MODULE_MAX_PA, PAGE_4K, is_aligned, is_valid_range, overlaps
from septum.arch.status import Status, with_details
from septum.arch.tdmr import MemoryRange
from septum.tdx.outcome import Fail, check, sanity

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.registers import Regs
    from septum.tdx.state.platform import Lp

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
_WAITPKG = 1 << 5
_COMPARED = (*msrs.COMPARED_BEFORE_CPUID, *msrs.COMPARED_AFTER_CPUID)


class _Msrs:
    """RDMSR on one LP, and the failure that names an MSR."""

    def __init__(self, module: Module, lp: Lp) -> None:
        self._module = module
        self._lp = lp.index

    def __getitem__(self, address: int) -> int:
        return self._module.hardware.rdmsr(self._lp, address)

    def want(self, address: int, ok: bool) -> None:
        check(ok, Status.TDX_INCORRECT_MSR_VALUE, None if ok else address)


def check_platform(module: Module, lp: Lp, regs: Regs) -> tuple[tuple[int, int], ...]:
    """``check_platform_config_and_cpu_enumeration``: returns the MSRs that are sampled.

    :raises Fail: with the first thing that is wrong. For CPUID, RCX tells the leaf, RDX and R8 the bits that were
        looked at, R9 and R10 what they should be.
    """
    read = _Msrs(module, lp)
    _check_capabilities(read)
    check(not read[msrs.IA32_MISC_ENABLE] & msrs.BOOT_NT4, Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    _check_cpuid(module.hardware.cpu, regs)
    _check_vmx(read, bool(module.hardware.cpu.cpuid(7).ecx & _WAITPKG))
    _check_keys(read)
    check(_are_valid_cmrs(module.platform.cmrs, module.pa_format.hkid_mask), Status.TDX_CMR_LIST_INVALID)
    _check_smrrs(read, module.platform.cmrs)
    return tuple((address, read[address]) for address in _COMPARED)


def compare_with_platform(module: Module, lp: Lp) -> None:
    """``check_enumeration_and_compare_configuration``.

    :raises Fail: INCONSISTENT_MSR with the MSR that is not as TDH.SYS.INIT sampled it, or LIMIT_CPUID_MAXVAL_SET.
    """
    read = _Msrs(module, lp)
    sampled = dict(module.sys.sampled)
    for address in msrs.COMPARED_BEFORE_CPUID:
        check(read[address] == sampled[address], Status.TDX_INCONSISTENT_MSR, address)
    check(not read[msrs.IA32_MISC_ENABLE] & msrs.BOOT_NT4, Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    has_smrr2 = sampled[msrs.IA32_MTRRCAP] & msrs.MTRRCAP_SMRR2
    for address in msrs.COMPARED_AFTER_CPUID:
        if has_smrr2 or address not in (msrs.SMRR2_BASE, msrs.SMRR2_MASK):
            check(read[address] == sampled[address], Status.TDX_INCONSISTENT_MSR, address)


def _check_capabilities(read: _Msrs) -> None:
    arch = read[msrs.IA32_ARCH_CAPABILITIES]
    wanted = arch & (msrs.ARCH_CAPABILITIES_ONES | msrs.ARCH_CAPABILITIES_ZEROS) == msrs.ARCH_CAPABILITIES_ONES
    read.want(msrs.IA32_ARCH_CAPABILITIES, wanted)
    read.want(msrs.IA32_XAPIC_DISABLE_STATUS, read[msrs.IA32_XAPIC_DISABLE_STATUS] == msrs.LEGACY_XAPIC_DISABLED)
    for address, bit in (
        (msrs.IA32_MISC_PACKAGE_CTLS, msrs.ENERGY_FILTERING_ENABLE),
        (msrs.IA32_PERF_CAPABILITIES, msrs.PERF_FULL_WRITE),
    ):
        read.want(address, bool(read[address] & bit))


def _check_cpuid(cpu: CpuModel, regs: Regs) -> None:
    last_base, last_extended = cpu.cpuid(0).eax, cpu.cpuid(CPUID_FIRST_EXTENDED_LEAF).eax
    for last, least in ((last_base, CPUID_MIN_CPU_BASE_LEAF), (last_extended, CPUID_MIN_CPU_EXTENDED_LEAF)):
        check(last >= least, Status.TDX_CPUID_LEAF_NOT_SUPPORTED, least)
    for entry in cpuid_table():
        last = last_extended if entry.leaf >= CPUID_FIRST_EXTENDED_LEAF else last_base
        native = cpu.cpuid(entry.leaf, entry.subleaf) if entry.leaf <= last else NO_BITS
        if native & entry.verify_mask != entry.verify_value:
            regs.rcx = entry.leaf_subleaf
            regs.rdx, regs.r8 = entry.verify_mask.low, entry.verify_mask.high
            regs.r9, regs.r10 = entry.verify_value.low, entry.verify_value.high
            raise Fail(Status.TDX_INCORRECT_CPUID_VALUE)


def _suits(must: int, may: int, initial: int, variable: int, unknown: int) -> bool:
    """Whether controls can be initialised and switched as the module needs (``check_allowed_vmx_ctls`` and its kin)."""
    sanity(not must & ~may, "a VMX control that must be 1 may not be 1")
    return not (must & ~(initial | unknown) or initial & ~may or (must | ~may) & variable)


def _check_controls(read: _Msrs, has_waitpkg: bool, *, l2: bool) -> None:
    for needs in msrs.CONTROL_NEEDS:
        value = read[needs.msr]
        must, may = (0, value) if needs.msr == msrs.IA32_VMX_PROCBASED_CTLS3 else (value & U32, value >> 32)
        initial, variable = (needs.l2_initial, needs.l2_variable) if l2 else (needs.initial, needs.variable)
        if needs.msr == msrs.IA32_VMX_PROCBASED_CTLS2:
            initial = initial & ~msrs.CTLS2_WAIT_PAUSE | msrs.CTLS2_WAIT_PAUSE * has_waitpkg
            if not may & msrs.CTLS2_ENCLV:
                initial &= ~msrs.CTLS2_ENCLV
        read.want(needs.msr, _suits(must, may, initial, variable, needs.unknown))


def _check_vmx(read: _Msrs, has_waitpkg: bool) -> None:
    basic = read[msrs.IA32_VMX_BASIC]
    fits = basic >> msrs.VMX_BASIC_SIZE_SHIFT & msrs.VMX_BASIC_SIZE_MASK <= msrs.TD_VMCS_SIZE
    read.want(msrs.IA32_VMX_BASIC, fits and basic & msrs.VMX_BASIC_ONES == msrs.VMX_BASIC_ONES)
    _check_controls(read, has_waitpkg, l2=False)
    misc = read[msrs.IA32_VMX_MISC]
    enough = misc >> msrs.VMX_MISC_CR3_TARGETS_SHIFT & 0x1FF >= msrs.MIN_CR3_TARGETS
    read.want(msrs.IA32_VMX_MISC, enough and misc & msrs.VMX_MISC_ONES == msrs.VMX_MISC_ONES)
    ept = read[msrs.IA32_VMX_EPT_VPID_CAP]
    read.want(msrs.IA32_VMX_EPT_VPID_CAP, ept & msrs.EPT_VPID_CAP_ONES == msrs.EPT_VPID_CAP_ONES)

    fixed0 = read[msrs.IA32_VMX_CR0_FIXED0] & ~msrs.CR0_PE_PG
    fixed1 = read[msrs.IA32_VMX_CR0_FIXED1]
    read.want(msrs.IA32_VMX_CR0_FIXED0, not fixed0 & ~msrs.GUEST_CR0)
    read.want(msrs.IA32_VMX_CR0_FIXED1, not ~fixed1 & msrs.GUEST_CR0)
    read.want(msrs.IA32_VMX_CR4_FIXED0, not read[msrs.IA32_VMX_CR4_FIXED0] & ~msrs.GUEST_CR4)
    read.want(msrs.IA32_VMX_CR4_FIXED1, not ~read[msrs.IA32_VMX_CR4_FIXED1] & msrs.GUEST_CR4)
    _check_controls(read, has_waitpkg, l2=True)
    read.want(msrs.IA32_VMX_CR0_FIXED0, _suits(fixed0, fixed1, msrs.GUEST_CR0, msrs.L2_CR0_VARIABLE, 0))


def _check_keys(read: _Msrs) -> None:
    """Memory encryption with integrity, number of KeyIDs, parts of the cache (``check_key_management_config``)."""
    activate = read[msrs.IA32_TME_ACTIVATE]
    read.want(msrs.IA32_TME_ACTIVATE, bool(activate & msrs.TME_LOCK))
    read.want(msrs.IA32_TME_CAPABILITY, bool(read[msrs.IA32_TME_CAPABILITY] & msrs.TME_CAPABILITY_INTEGRITY))
    read.want(msrs.IA32_TME_ACTIVATE, bool(activate & msrs.TME_ACTIVATE_INTEGRITY))
    partitioning = read[msrs.IA32_MKTME_KEYID_PARTITIONING]
    last_hkid = (partitioning & U32) + (partitioning >> 32) & U32
    check(last_hkid < msrs.MAX_HKIDS, Status.TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, msrs.MAX_HKIDS)
    read.want(msrs.IA32_WBNOINVDP, read[msrs.IA32_WBNOINVDP] == read[msrs.IA32_WBINVDP])


def _are_valid_cmrs(cmrs: Sequence[MemoryRange], hkid_mask: int) -> bool:
    end = 0
    for cmr in cmrs:
        last = cmr.end - 1
        ok = (
            is_valid_range(*cmr)
            and not (cmr.base | last) & hkid_mask
            and last < 1 << MODULE_MAX_PA
            and is_aligned(cmr.base, PAGE_4K)
            and is_aligned(cmr.size, PAGE_4K)
            and cmr.base >= end
        )
        if not ok:
            return False
        end = cmr.end
    return True


def _check_smrrs(read: _Msrs, cmrs: Sequence[MemoryRange]) -> None:
    """``check_and_store_smrr_smrr2``. That SMRR2 counts wherever IA32_MTRRCAP has it is unverified: the loader can say
    that it does not."""
    capability = read[msrs.IA32_MTRRCAP]
    check(capability & msrs.MTRRCAP_SMRR, Status.TDX_SMRR_NOT_SUPPORTED)
    check(capability & msrs.MTRRCAP_SMRR_LOCK, Status.TDX_SMRR_LOCK_NOT_SUPPORTED)
    pairs = [(msrs.SMRR_BASE, msrs.SMRR_MASK), (msrs.SMRR2_BASE, msrs.SMRR2_MASK)]
    smrrs = [(read[b], read[m]) for b, m in pairs[: 2 if capability & msrs.MTRRCAP_SMRR2 else 1]]
    for number, (_, mask) in enumerate(smrrs):
        check(mask & msrs.SMRR_LOCK, with_details(Status.TDX_SMRR_NOT_LOCKED, number))
    for number, (base, mask) in enumerate(smrrs):
        if not mask & msrs.SMRR_VALID:
            continue
        size = mask & msrs.SMRR_ADDRESS & -(mask & msrs.SMRR_ADDRESS)
        holes = mask & msrs.SMRR_ADDRESS ^ msrs.SMRR_ADDRESS & -size
        ok = size and not holes and is_aligned(base & msrs.SMRR_ADDRESS, size)
        check(ok, with_details(Status.TDX_INVALID_SMRR_CONFIGURATION, number))
        for i, cmr in enumerate(cmrs):
            apart = not overlaps(base & msrs.SMRR_ADDRESS, size, *cmr)
            check(apart, with_details(Status.TDX_SMRR_OVERLAPS_CMR, number, i))
