"""KVM_TDX_GET_CPUID: the CPUID values that the module shows to the guest.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_read_cpuid`` and ``tdx_vcpu_get_cpuid``.
"""

from __future__ import annotations

from dataclasses import replace
from errno import E2BIG, EFAULT, EINVAL, EIO
from typing import TYPE_CHECKING, Final

from septum.arch.cpuid import SUBLEAF_NA
from septum.arch.metadata import field_table
from septum.kvm.abi import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Cpuid2, CpuidEntry2
from septum.kvm.sysinfo import GUEST_PHYS_BITS

if TYPE_CHECKING:
    from septum.kvm.tdx.cmd import Cmd
    from septum.kvm.vcpu import Vcpu

UNREADABLE_LEAF: Final = 0x7FFF_FF80
MAX_SUBLEAF: Final = 0x7F


async def tdx_read_cpuid(vcpu: Vcpu, leaf: int, subleaf: int | None, count: int) -> CpuidEntry2 | int:
    """``tdx_read_cpuid``: a leaf or sub-leaf (None: the leaf has none) by two TDH.MNG.RD, or -EINVAL, -EIO."""
    if (subleaf or 0) > MAX_SUBLEAF or count >= KVM_MAX_CPUID_ENTRIES or leaf & UNREADABLE_LEAF:
        return -EINVAL
    kvm, tdh = vcpu.kvm, vcpu.kvm.host.seamcalls
    base = field_table("td").named("CPUID_VALUES").id
    field = base.with_cpuid_leaf(leaf, SUBLEAF_NA if subleaf is None else subleaf)
    low = await tdh.tdh_mng_rd(kvm.tdr_page, field)
    if low.rax:
        return -EIO
    high = await tdh.tdh_mng_rd(kvm.tdr_page, field + 1)
    if kvm.host.log.warn_on(high.rax, "half of a CPUID leaf cannot be read"):
        return -EIO
    entry = CpuidEntry2(
        function=leaf,
        index=subleaf or 0,
        flags=0 if subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax=low.r8 & 0xFFFF_FFFF,
        ebx=low.r8 >> 32,
        ecx=high.r8 & 0xFFFF_FFFF,
        edx=high.r8 >> 32,
    )
    if leaf == 0x8000_0008:
        width = kvm.shared_gpa_bit.bit_length()
        entry = replace(entry, eax=entry.eax & ~GUEST_PHYS_BITS | width << 16)
    return entry


async def tdx_vcpu_get_cpuid_leaf(vcpu: Vcpu, leaf: int, entries: list[CpuidEntry2]) -> bool:
    """``tdx_vcpu_get_cpuid_leaf``: adds the leaf, or all its sub-leaves. Whether there was anything."""
    entry = await tdx_read_cpuid(vcpu, leaf, None, len(entries))
    if isinstance(entry, CpuidEntry2):
        entries.append(entry)
        return True
    if entry != -EIO:
        return False
    subleaf = 0
    while isinstance(entry := await tdx_read_cpuid(vcpu, leaf, subleaf, len(entries)), CpuidEntry2):
        entries.append(entry)
        subleaf += 1
    return subleaf > 0


async def tdx_vcpu_get_cpuid(vcpu: Vcpu, cmd: Cmd) -> int:
    """``tdx_vcpu_get_cpuid``: 0, -EFAULT, -EIO, or -E2BIG with the number of entries that are needed."""
    mm = vcpu.kvm.mm
    head = mm.copy_from_user(cmd.data, Cpuid2.size())
    if head is None:
        return -EFAULT
    entries: list[CpuidEntry2] = []
    for first in (0, 0x8000_0000):
        if not await tdx_vcpu_get_cpuid_leaf(vcpu, first, entries):
            return -EIO
        last = entries[0].eax if not first else entries[-1].eax
        for leaf in range(first + 1, last + 1):
            await tdx_vcpu_get_cpuid_leaf(vcpu, leaf, entries)
    if not mm.copy_to_user(cmd.data, Cpuid2(nent=len(entries)).pack()):
        return -EFAULT
    if Cpuid2.unpack(head).nent < len(entries):
        return -E2BIG
    packed = b"".join(entry.pack() for entry in entries)
    return 0 if mm.copy_to_user(cmd.data, packed, Cpuid2.size()) else -EFAULT
