"""The VMCS that TDH.VP.INIT gives to a VCPU, one for the TD itself (VM 0) and one for each of its L2 VMs.

Fields of the module's own host state are not modelled.
Source: TDX Module 1.5.01, ``src/common/data_structures/td_vmcs_init.c``, ``init_tdvps_fields`` in ``helpers.c``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.metadata import td_vmcs_init
from septum.arch.structures import TdAttributes
from septum.tdx.state.td import SEPT_ROOT_PAGE, CpuidFlags
from septum.tdx.state.vp import L2_VM_SHIFT
from septum.tdx.td_params.msrs import (
    ENTRY,
    EXIT,
    PINBASED,
    PROCBASED,
    PROCBASED2,
    PROCBASED3,
    cr4_writable,
    l2_controls,
)

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

U64: Final = (1 << 64) - 1
NULL_PA: Final = U64

MSR_BITMAPS_PAGE: Final = 2
ZERO_PAGE: Final = 4
L2_SEPT_ROOT_PAGES: Final = 6
"""Indices of TDCX pages; from the last on, one for each L2 VM."""
VE_INFO_PAGE: Final = 0
VAPIC_PAGE: Final = 2
L2_MSR_BITMAPS_PAGE: Final = 7
PAGES_PER_L2_VM: Final = 3
"""Indices of TDVPS pages."""

_CONTROL_FIELDS: Final = {
    PINBASED: vmcs.PINBASED_CTLS,
    PROCBASED: vmcs.PROCBASED_CTLS,
    PROCBASED2: vmcs.PROCBASED_CTLS2,
    PROCBASED3: vmcs.PROCBASED_CTLS3,
    EXIT: vmcs.EXIT_CTLS,
    ENTRY: vmcs.ENTRY_CTLS,
}
_ENCLV_BITMAP: Final = 0x2036
_ENCLV_EXITING: Final = 1 << 28
_EPT_VIOLATION_VE: Final = 1 << 18
"""Secondary control that only the TD itself has: EPT violations may become #VE."""
_GPAW: Final = 1 << 5
"""Tertiary control."""
_MAX_HKID_FOR_VPID: Final = 4096
IA32_VMX_CR0_FIXED0, IA32_VMX_CR0_FIXED1, IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1 = range(0x486, 0x48A)
_CPUID_7_WAITPKG: Final = 1 << 5
_CPUID_7_2_DDPD_U: Final = 1 << 3
_SPEC_CTRL_DDPD_U: Final = 1 << 8

_L2_CR_FIELDS: Final = {
    vmcs.CR0_MASK: U64,
    vmcs.CR0_SHADOW: 1 | 1 << 5,
    vmcs.CR4_MASK: U64,
    vmcs.CR4_SHADOW: 1 << 6 | 1 << 13,
}
_CR_SHADOWS: Final = {
    "SHADOW_CR0_GUEST_HOST_MASK": (vmcs.CR0_MASK, U64),
    "SHADOW_CR0_READ_SHADOW": (vmcs.CR0_SHADOW, 0),
    "SHADOW_CR4_GUEST_HOST_MASK": (vmcs.CR4_MASK, U64),
    "SHADOW_CR4_READ_SHADOW": (vmcs.CR4_SHADOW, 0),
}
"""Fields of TDVPS: whose value they have for the TD itself, and their value for an L2 VM."""
_NULL_ADDRESSES: Final = (
    "SHADOW_SHARED_EPTP",
    "L2_ENTER_GUEST_STATE_GPA",
    "L2_ENTER_GUEST_STATE_HPA",
    "L2_VAPIC_GPA",
    "L2_VAPIC_HPA",
    "TSC_DEADLINE",
)


def _bits(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


_CR0_RESERVED: Final = _bits(63, 32) | _bits(28, 19) | 1 << 17 | _bits(15, 6)


def _control_fields(module: Module, td: Td, vm: int) -> dict[int, int]:
    tdcs = td.tdcs
    controls = l2_controls(module.native_cpu, tdcs.attributes, tdcs.cpuid_flags)
    fields = {_CONTROL_FIELDS[control]: value for control, value in controls.items()}
    fields[vmcs.PROCBASED_CTLS2] |= 0 if vm else _EPT_VIOLATION_VE
    fields[vmcs.PROCBASED_CTLS3] |= _GPAW if tdcs.gpaw else 0
    return fields


def _cr_fields(module: Module, td: Td) -> dict[int, int]:
    """Which bits of CR0 and CR4 belong to the module, and how they read."""
    msr, tdcs = module.hardware.cpu.msr, td.tdcs
    fixed0 = msr(IA32_VMX_CR0_FIXED0)
    cr0 = (fixed0 | ~msr(IA32_VMX_CR0_FIXED1) & U64) & ~(1 << 31)
    cr0 |= 1 | 1 << 5 | 1 << 29 | 1 << 30 | _CR0_RESERVED
    fixed4 = msr(IA32_VMX_CR4_FIXED0)
    cr4 = fixed4 | ~msr(IA32_VMX_CR4_FIXED1) & U64 | 1 << 6 | _bits(15, 13) | _bits(63, 26)
    xfam, attributes = tdcs.xfam, tdcs.attributes
    cr4 |= (not xfam >> 9 & 1) << 22 | (xfam >> 11 & 3 != 3) << 23 | (not xfam >> 14 & 1) << 25
    cr4 |= (not attributes & TdAttributes.KL) << 19 | (not attributes & TdAttributes.PKS) << 24
    return {
        vmcs.CR0_MASK: cr0,
        vmcs.CR0_SHADOW: fixed0 | 1 | 1 << 5,
        vmcs.CR4_MASK: cr4,
        vmcs.CR4_SHADOW: fixed4 & ~(1 << 13) | 1 << 6,
    }


def _address_fields(module: Module, td: Td, vp: Vp, vm: int) -> dict[int, int]:
    tdcx, tdvps = td.tdr.tdcx_pa, vp.tdvps.tdvps_page_pa
    zero = tdcx[ZERO_PAGE]
    root = tdcx[L2_SEPT_ROOT_PAGES + vm - 1 if vm else SEPT_ROOT_PAGE]
    fields = {
        vmcs.PASID_LOW: zero,
        vmcs.PASID_HIGH: zero,
        vmcs.SHARED_EPTP: zero,
        vmcs.HKID: td.tdr.hkid,
        vmcs.EPTP: module.pa_format.address(root) | td.tdcs.eptp & 0xFFF,
        vmcs.VPID: td.tdr.hkid << 2 | vm if td.tdr.hkid < _MAX_HKID_FOR_VPID else 0,
    }
    if vm:
        bitmaps = tdvps[L2_MSR_BITMAPS_PAGE + PAGES_PER_L2_VM * (vm - 1)]
        return fields | {vmcs.VIRTUAL_APIC: NULL_PA, vmcs.MSR_BITMAPS: bitmaps, vmcs.VE_INFO_ADDRESS: NULL_PA}
    return fields | {
        vmcs.VIRTUAL_APIC: tdvps[VAPIC_PAGE],
        vmcs.MSR_BITMAPS: tdcx[MSR_BITMAPS_PAGE],
        vmcs.VE_INFO_ADDRESS: tdvps[VE_INFO_PAGE],
    }


def vmcs_fields(module: Module, td: Td, vp: Vp, vm: int, *, imported: bool = False) -> Iterator[tuple[int, int]]:
    """Encoding and initial value of every field that is not 0 (``init_td_vmcs``).

    Of a VCPU that is ``imported``, fields that come from the other platform are left out.
    """
    controls = _control_fields(module, td, vm)
    for row in td_vmcs_init():
        if imported and row.migrated:
            continue
        if row.encoding != _ENCLV_BITMAP or controls[vmcs.PROCBASED_CTLS2] & _ENCLV_EXITING:
            yield row.encoding, row.value
    yield from controls.items()
    yield from _address_fields(module, td, vp, vm).items()
    yield from (_L2_CR_FIELDS if vm else _cr_fields(module, td)).items()
    yield vmcs.TSC_MULTIPLIER, td.tdcs.tsc_multiplier
    yield vmcs.TSC_OFFSET, td.tdcs.tsc_offset
    yield vmcs.SPEC_CTRL_MASK, td.tdcs.ia32_spec_ctrl_mask


def init_vmcs(module: Module, td: Td, vp: Vp, vm: int, *, imported: bool = False) -> None:
    """Writes the initial VMCS of a VM, and the fields of TDVPS that metadata reads show in place of some of its."""
    for encoding, value in vmcs_fields(module, td, vp, vm, imported=imported):
        vp.vmcs.store(vm << L2_VM_SHIFT | encoding, value)
    for name, (encoding, of_l2) in _CR_SHADOWS.items():
        vp.fields.store((name, vm), of_l2 if vm else vp.vmcs[encoding])


def init_management(module: Module, td: Td, vp: Vp) -> None:
    """``init_tdvps_fields``: fields that only metadata reads and L2 VMs see."""
    cpu, native, fields = module.hardware.cpu, module.native_cpu, vp.fields
    waitpkg = bool(cpu.cpuid(7).ecx & _CPUID_7_WAITPKG)
    controls = l2_controls(native, 0, CpuidFlags(waitpkg=waitpkg))
    fields.store(("LAST_SEAMDB_INDEX", 0), td.tdr.seamdb_index)
    fields["SHADOW_PID_HPA", 0] = NULL_PA
    fields["SHADOW_PINBASED_EXEC_CTLS", 0] = controls[PINBASED]
    fields["SHADOW_POSTED_INT_NOTIFICATION_VECTOR", 0] = 0xFFFF
    for vm in range(td.tdcs.num_l2_vms + 1):
        fields["SHADOW_PROCBASED_EXEC_CTLS2", vm] = controls[PROCBASED2] | (0 if vm else _EPT_VIOLATION_VE)
        for name in _NULL_ADDRESSES:
            fields[name, vm] = NULL_PA
    fixed0, fixed1 = cpu.msr(IA32_VMX_CR0_FIXED0), cpu.msr(IA32_VMX_CR0_FIXED1)
    free = ~(1 << 31 | 1)
    owned = (fixed0 | ~fixed1) & free | 1 << 5 | 1 << 29 | 1 << 30 | _CR0_RESERVED
    fields["BASE_L2_CR0_GUEST_HOST_MASK", 0] = owned & U64
    fields["BASE_L2_CR0_READ_SHADOW", 0] = fixed0 & free | 1 << 5
    fields["BASE_L2_CR4_GUEST_HOST_MASK", 0] = ~cr4_writable(native, td.tdcs.attributes, td.tdcs.xfam) & U64
    fields["BASE_L2_CR4_READ_SHADOW", 0] = cpu.msr(IA32_VMX_CR4_FIXED0) | 1 << 6 | 1 << 13
    if cpu.cpuid(7, 2).edx & _CPUID_7_2_DDPD_U and not td.tdcs.cpuid_flags.ddpd:
        fields["IA32_SPEC_CTRL", 0] = _SPEC_CTRL_DDPD_U
