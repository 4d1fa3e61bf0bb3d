"""From TD_PARAMS to a configured TDCS, in the module's order of checks.

Source: TDX Module 1.5.01, ``tdh_mng_init.c``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from septum.arch.cpuid import cpuid_table
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_MASK
from septum.arch.platform_msrs import IA32_TSC_ADJUST
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags, TdAttributes, TdParams
from septum.tdx.call import MIN_TDCS_PAGES
from septum.tdx.outcome import Fail, check
from septum.tdx.state.td import MAX_L2_VMS, SEPT_ROOT_PAGE
from septum.tdx.td_params.checks import (
    CONFIG_FLAGS_FIXED0,
    MAX_TSC_FREQUENCY,
    MIN_TSC_FREQUENCY,
    attributes_allowed,
    eptp_allowed,
    tsc_parameters,
    xbuff_layout,
    xfam_allowed,
)
from septum.tdx.td_params.cpuid import VirtualCpuid
from septum.tdx.td_params.msrs import DDPD_U, arch_capabilities, msr_bitmaps, vmx_msrs

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.state.td import Td

IA32_ARCH_CAPABILITIES_CONFIGURED: Final = 1
"""TD_PARAMS.MSR_CONFIG_CTLS: the host configures IA32_ARCH_CAPABILITIES."""
PENDING_VE_DISABLE: Final = 1
"""TD_CTLS."""
MAX_CPUID_VALUES: Final = 80
DEFAULT_HP_LOCK_TIMEOUT_US: Final = 1_000_000


def configure_td(call: HostCall, td: Td, params: TdParams) -> None:
    """Checks TD_PARAMS and sets up the TDCS.

    A failure leaves the TDCS as it was. The real module leaves what it had written until then; nobody can read that
    but a service TD that was bound before.

    :raises Fail: OPERAND_INVALID with the operand id of the part that is wrong (RDX for reserved fields), with the
        leaf in RCX for most CPUID_CONFIG errors; TDCS_NOT_ALLOCATED, INCONSISTENT_MSR, INCORRECT_MSR_VALUE.
    """
    hardware, cpu, tdcs = call.module.hardware, call.module.native_cpu, td.tdcs
    attributes, xfam, gpaw = params.attributes, params.xfam, params.config_flags & ConfigFlags.GPAW

    _check(attributes_allowed(attributes), Operand.ATTRIBUTES)
    _check(xfam_allowed(xfam, cpu), Operand.XFAM)
    _check(params.max_vcpus, Operand.MAX_VCPUS)
    _check(params.num_l2_vms <= MAX_L2_VMS, Operand.NUM_L2_VMS)
    check(td.tdr.num_tdcx >= MIN_TDCS_PAGES + params.num_l2_vms, Status.TDX_TDCS_NOT_ALLOCATED)
    _check(not any(params.reserved_0), Operand.RDX)
    _check(not params.config_flags & ~CONFIG_FLAGS_FIXED0, Operand.EXEC_CONTROLS)
    _check(eptp_allowed(params.eptp_controls, gpaw, cpu), Operand.EPTP_CONTROLS)
    _check(MIN_TSC_FREQUENCY <= params.tsc_frequency <= MAX_TSC_FREQUENCY, Operand.TSC_FREQUENCY)
    if hardware.rdmsr(call.lp.index, IA32_TSC_ADJUST) != call.module.sys.sampled_msr(IA32_TSC_ADJUST):
        raise Fail(Status.TDX_INCONSISTENT_MSR, IA32_TSC_ADJUST)
    tsc = hardware.rdtsc()
    _check(not any(params.reserved_1), Operand.RDX)
    _check(not params.msr_config_ctls & ~IA32_ARCH_CAPABILITIES_CONFIGURED, Operand.RDX)
    _check(not any(params.reserved_2), Operand.RDX)
    cpuid = VirtualCpuid(cpu, params, call.regs)
    _check(not any(params.reserved_3), Operand.RDX)
    arch_cap_config = params.ia32_arch_capabilities_config
    _check(params.msr_config_ctls or not arch_cap_config, Operand.IA32_ARCH_CAPABILITIES_CONFIG)
    arch_cap = arch_capabilities(cpu.arch_capabilities, arch_cap_config, tsx=cpuid.flags.tsx)
    if arch_cap is None:
        raise Fail(Status.TDX_OPERAND_INVALID, Operand.IA32_ARCH_CAPABILITIES_CONFIG)
    _check(not (attributes & TdAttributes.MIGRATABLE and params.num_l2_vms), Operand.RDX)

    native_hz = call.module.platform.tsc_hz
    tdcs.num_vcpus = tdcs.num_assoc_vcpus = 0
    tdcs.td_epoch = 1
    tdcs.refcount = (0, 0)
    tdcs.attributes = attributes
    tdcs.xfam = xfam
    tdcs.max_vcpus = params.max_vcpus
    tdcs.num_l2_vms = params.num_l2_vms
    tdcs.config_flags = params.config_flags
    tdcs.gpaw = bool(gpaw)
    tdcs.eptp = params.eptp_controls | call.module.pa_format.address(td.tdr.tdcx_pa[SEPT_ROOT_PAGE]) & PAGE_MASK
    tdcs.td_ctls = PENDING_VE_DISABLE if attributes & TdAttributes.SEPT_VE_DISABLE else 0
    tdcs.hp_lock_timeout = DEFAULT_HP_LOCK_TIMEOUT_US * native_hz // 1_000_000
    tdcs.tsc_frequency = params.tsc_frequency
    tdcs.tsc_multiplier, tdcs.tsc_offset = tsc_parameters(tsc, native_hz, params.tsc_frequency)
    tdcs.xbuff_offsets, tdcs.xbuff_size = xbuff_layout(xfam, cpu)
    tdcs.mrconfigid, tdcs.mrowner, tdcs.mrownerconfig = params.mr_config_id, params.mr_owner, params.mr_owner_config
    tdcs.cpuid_flags = cpuid.flags
    tdcs.cpuid_values = tuple(half for value in cpuid.values for half in (value.low, value.high))
    tdcs.cpuid_valid = _cpuid_valid()
    tdcs.ia32_spec_ctrl_mask = 0 if cpuid.flags.ddpd else DDPD_U
    tdcs.msr_bitmaps = msr_bitmaps(cpu, attributes, xfam, cpuid.flags)
    td.fields.store(("VIRTUAL_IA32_ARCH_CAPABILITIES", 0), arch_cap)
    for name, value in vmx_msrs(cpu, attributes, xfam, cpuid.flags).items():
        td.fields.store((f"VIRTUAL_IA32_VMX_{name}", 0), value)


def _check(condition: object, operand: Operand) -> None:
    check(condition, Status.TDX_OPERAND_INVALID, operand)


@cache
def _cpuid_valid() -> tuple[int, ...]:
    valid = tuple(int(not entry.faulting) for entry in cpuid_table())
    return valid + (0,) * (MAX_CPUID_VALUES - len(valid))
