"""From ``struct kvm_tdx_init_vm`` to TD_PARAMS, and what of it may be chosen: KVM_TDX_CAPABILITIES.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``setup_tdparams*`` and ``tdx_get_capabilities``.
"""

from __future__ import annotations

from dataclasses import replace
from errno import E2BIG, EBUSY, EFAULT, EINVAL, EIO
from typing import TYPE_CHECKING, Final

from septum.arch.structures import NUM_CPUID_CONFIG, ConfigFlags, CpuidValues, TdParams
from septum.kvm.abi import (
    KVM_MAX_CPUID_ENTRIES,
    TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT,
    Cpuid2,
    CpuidEntry2,
    TdxCapabilities,
    TdxInitVm,
)
from septum.kvm.sysinfo import GUEST_PHYS_BITS, has_unsupported

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.sysinfo import SysInfo
    from septum.kvm.user_memory import UserMemory, UserPtr
    from septum.kvm.vm import Vm

EPTP_MT_WB: Final = 6
EPTP_PWL_4: Final = 3 << 3
EPTP_PWL_5: Final = 4 << 3
TSC_UNIT_HZ: Final = 25_000_000
_NENT_OFFSET: Final = TdxInitVm.offset_of("cpuid")


def tdx_get_capabilities(host: Host, mm: UserMemory, flags: int, data: UserPtr) -> int:
    """``tdx_get_capabilities``: 0, -EINVAL, -EFAULT, -E2BIG, or -EIO where KVM and module have nothing in common."""
    if flags:
        return -EINVAL
    info = sysinfo(host)
    nent = mm.copy_from_user(data, 4, TdxCapabilities.offset_of("cpuid"))
    if nent is None:
        return -EFAULT
    entries = info.cpuid_config
    if int.from_bytes(nent, "little") < len(entries):
        return -E2BIG
    if not info.supported_attrs() or not info.supported_xfam():
        return -EIO
    caps = TdxCapabilities(
        supported_attrs=info.supported_attrs(),
        supported_xfam=info.supported_xfam(),
        user_tdvmcallinfo_1_r11=TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT,
        cpuid=Cpuid2(nent=len(entries)),
    )
    packed = caps.pack() + b"".join(entry.pack() for entry in entries)
    return 0 if mm.copy_to_user(data, packed) else -EFAULT


def sysinfo(host: Host) -> SysInfo:
    """What was read at bringup; TDX VMs exist only after it."""
    assert host.sysinfo is not None, "TDX VMs exist only on a host that has booted"
    return host.sysinfo


def read_init_vm(mm: UserMemory, data: UserPtr) -> tuple[TdxInitVm, tuple[CpuidEntry2, ...]] | int:
    """The copying part of ``tdx_td_init``: the structure with its entries, or -EFAULT, -E2BIG, -EINVAL."""
    head = mm.copy_from_user(data, TdxInitVm.size())
    if head is None:
        return -EFAULT
    init_vm = TdxInitVm.unpack(head)
    if init_vm.cpuid.nent > KVM_MAX_CPUID_ENTRIES:
        return -E2BIG
    size = CpuidEntry2.size()
    tail = mm.copy_from_user(data, size * init_vm.cpuid.nent, TdxInitVm.size())
    if tail is None:
        return -EFAULT
    if any(init_vm.reserved) or init_vm.cpuid.padding:
        return -EINVAL
    return init_vm, tuple(CpuidEntry2.unpack(tail, size * i) for i in range(init_vm.cpuid.nent))


def setup_tdparams(kvm: Vm, init_vm: TdxInitVm, cpuid: tuple[CpuidEntry2, ...]) -> TdParams | int:
    """``setup_tdparams``: TD_PARAMS, or -EBUSY, -EINVAL."""
    info = sysinfo(kvm.host)
    if kvm.created_vcpus:
        return -EBUSY
    if init_vm.attributes & ~info.supported_attrs() or init_vm.xfam & ~info.supported_xfam():
        return -EINVAL
    address = setup_tdparams_eptp_controls(cpuid)
    values = setup_tdparams_cpuids(info, cpuid)
    if address is None or values is None:
        return -EINVAL
    eptp_controls, config_flags = address
    return TdParams(
        attributes=init_vm.attributes | info.attributes_fixed1,
        xfam=init_vm.xfam | info.xfam_fixed1,
        max_vcpus=kvm.max_vcpus,
        eptp_controls=eptp_controls,
        config_flags=config_flags,
        tsc_frequency=kvm.host.platform.tsc_hz // TSC_UNIT_HZ,
        mr_config_id=init_vm.mrconfigid,
        mr_owner=init_vm.mrowner,
        mr_owner_config=init_vm.mrownerconfig,
        cpuid_config=values,
    )


def setup_tdparams_eptp_controls(cpuid: tuple[CpuidEntry2, ...]) -> tuple[int, int] | None:
    """``setup_tdparams_eptp_controls``: EPTP_CONTROLS and CONFIG_FLAGS; None for a width that is neither 48 nor 52."""
    entry = _find(cpuid, 0x8000_0008, 0)
    match entry and (entry.eax & GUEST_PHYS_BITS) >> 16:
        case 48:
            return EPTP_MT_WB | EPTP_PWL_4, ConfigFlags.NO_RBP_MOD
        case 52:
            return EPTP_MT_WB | EPTP_PWL_5, ConfigFlags.NO_RBP_MOD | ConfigFlags.GPAW
    return None


def setup_tdparams_cpuids(info: SysInfo, cpuid: tuple[CpuidEntry2, ...]) -> tuple[CpuidValues, ...] | None:
    """``setup_tdparams_cpuids``: the values in the module's order; None if a leaf cannot be configured."""
    values, copied = [CpuidValues()] * NUM_CPUID_CONFIG, 0
    for i, configurable in enumerate(info.cpuid_config):
        entry = _find(cpuid, configurable.function, configurable.index)
        if entry is None:
            continue
        if has_unsupported(entry):
            return None
        copied += 1
        values[i] = CpuidValues(entry.eax, entry.ebx, entry.ecx, entry.edx)
        if entry.function == 0x8000_0008:
            values[i] = replace(values[i], eax=entry.eax & ~GUEST_PHYS_BITS)
    return tuple(values) if copied == len(cpuid) else None


def _find(cpuid: tuple[CpuidEntry2, ...], function: int, index: int) -> CpuidEntry2 | None:
    """``kvm_find_cpuid_entry2``: entries whose index does not count match any."""
    for entry in cpuid:
        if entry.function == function and (not entry.flags & 1 or entry.index == index):
            return entry
    return None
