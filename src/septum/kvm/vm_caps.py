"""KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

Source: Linux 6.16, ``arch/x86/kvm/x86.c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING, Final

from septum.kvm import abi

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.vm import Vm

KVM_EXIT_HYPERCALL_VALID_MASK: Final = 1 << abi.KVM_HC_MAP_GPA_RANGE
MAX_NR_RESERVED_IOAPIC_PINS: Final = 4096
_CONSTANTS: Final[Mapping[int, int]] = {
    abi.KVM_CAP_SPLIT_IRQCHIP: 1,
    abi.KVM_CAP_EXIT_HYPERCALL: KVM_EXIT_HYPERCALL_VALID_MASK,
    abi.KVM_CAP_USER_MEMORY2: 1,
    abi.KVM_CAP_MEMORY_FAULT_INFO: 1,
    abi.KVM_CAP_MEMORY_ATTRIBUTES: abi.KVM_MEMORY_ATTRIBUTE_PRIVATE,
    abi.KVM_CAP_GUEST_MEMFD: 1,
    abi.KVM_CAP_PRE_FAULT_MEMORY: 1,
}


def kvm_vm_ioctl_check_extension(host: Host, kvm: Vm | None, cap: int) -> int:
    """``kvm_vm_ioctl_check_extension`` for the capabilities that TDX VMs use; 0 for all others."""
    if cap == abi.KVM_CAP_VM_TYPES:
        return 1 << abi.KVM_X86_TDX_VM if host.sysinfo else 0
    if cap == abi.KVM_CAP_NR_VCPUS:
        return len(host.online_cpus())
    if cap == abi.KVM_CAP_MAX_VCPUS:
        return kvm.max_vcpus if kvm else abi.KVM_MAX_VCPUS
    return _CONSTANTS.get(cap, 0)


async def kvm_vm_ioctl_enable_cap(kvm: Vm, cap: int, flags: int, arg0: int) -> int:
    """``kvm_vm_ioctl_enable_cap``."""
    if flags:
        return -EINVAL
    match cap:
        case abi.KVM_CAP_SPLIT_IRQCHIP:
            return await _split_irqchip(kvm, arg0)
        case abi.KVM_CAP_EXIT_HYPERCALL if not arg0 & ~KVM_EXIT_HYPERCALL_VALID_MASK:
            kvm.hypercall_exit_enabled = arg0
            return 0
        case abi.KVM_CAP_MAX_VCPUS:
            return await _max_vcpus(kvm, arg0)
    return -EINVAL


async def _split_irqchip(kvm: Vm, pins: int) -> int:
    async with kvm.lock.locked():
        if pins > MAX_NR_RESERVED_IOAPIC_PINS:
            return -EINVAL
        if kvm.irqchip_split:
            return -EEXIST
        if kvm.created_vcpus:
            return -EINVAL
        kvm.irqchip_split = True
        return 0


async def _max_vcpus(kvm: Vm, count: int) -> int:
    async with kvm.lock.locked():
        if kvm.created_vcpus or not 0 < count <= kvm.max_vcpus:
            return -EINVAL
        kvm.max_vcpus = count
        return 0
