"""KVM_SET_CPUID2, and what TDVMCALL<CPUID> answers from it.

Source: Linux 6.16, ``arch/x86/kvm/cpuid.c``.
"""

from __future__ import annotations

from errno import E2BIG
from typing import TYPE_CHECKING

from septum.kvm.abi import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, CpuidEntry2

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu


async def kvm_vcpu_ioctl_set_cpuid2(vcpu: Vcpu, entries: tuple[CpuidEntry2, ...]) -> int:
    """``kvm_vcpu_ioctl_set_cpuid2``."""
    if len(entries) > KVM_MAX_CPUID_ENTRIES:
        return -E2BIG
    vcpu.cpuid = entries
    return 0


def kvm_cpuid(vcpu: Vcpu, function: int, index: int) -> tuple[int, int, int, int]:
    """``kvm_cpuid`` with exact matches only: EAX, EBX, ECX, EDX; zeros for what userspace did not set."""
    for entry in vcpu.cpuid:
        significant = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        if entry.function == function and (not significant or entry.index == index):
            return entry.eax, entry.ebx, entry.ecx, entry.edx
    return 0, 0, 0, 0
