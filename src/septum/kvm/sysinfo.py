"""``struct tdx_sys_info``: what the kernel asks of the module about itself when it enables TDX.

Source: Linux 6.16, ``arch/x86/virt/vmx/tdx/tdx_global_metadata.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from septum.arch.cpuid import SUBLEAF_NA
from septum.arch.pages import PAGE_4K
from septum.kvm.abi import CpuidEntry2

KVM_SUPPORTED_TD_ATTRS: Final = 1 << 28
"""TDX_TD_ATTR_SEPT_VE_DISABLE: the one attribute that KVM lets userspace choose."""
KVM_SUPPORTED_XFAM: Final = 0x7_FFE7
"""``kvm_caps.supported_xcr0 | supported_xss`` of a KVM on Sapphire Rapids: x87, SSE, AVX, AVX-512, PKRU, AMX, CET."""
GUEST_PHYS_BITS: Final = 0xFF << 16
"""CPUID 0x80000008, EAX[23:16]: KVM's way to let userspace choose the width of guest physical addresses."""
TDX_FEATURE_TSX: Final = 1 << 4 | 1 << 11
WAITPKG: Final = 1 << 5
ENHANCED_DEMOTE_INTERRUPTIBILITY: Final = 1 << 51
"""In TDX_FEATURES0: TDH.MEM.PAGE.DEMOTE never returns TDX_INTERRUPTED_RESTARTABLE, unless there are L2 VMs."""


@dataclass(frozen=True, slots=True)
class SysInfo:
    """The fields that KVM uses (``struct tdx_sys_info_td_ctrl`` and ``_td_conf``)."""

    features0: int
    tdcs_base_size: int
    tdvps_base_size: int
    attributes_fixed0: int
    attributes_fixed1: int
    xfam_fixed0: int
    xfam_fixed1: int
    cpuid_config: tuple[CpuidEntry2, ...]
    """What userspace may configure, as KVM shows it (``td_init_cpuid_entry2``)."""

    def supports_demote_nointerrupt(self) -> bool:
        """``tdx_supports_demote_nointerrupt`` (huge pages v3)."""
        return bool(self.features0 & ENHANCED_DEMOTE_INTERRUPTIBILITY)

    @property
    def tdcs_nr_pages(self) -> int:
        """Pages of a TDCS."""
        return self.tdcs_base_size // PAGE_4K

    @property
    def tdcx_nr_pages(self) -> int:
        """Pages of a TDVPS after the TDVPR page."""
        return self.tdvps_base_size // PAGE_4K - 1

    def supported_attrs(self) -> int:
        """``tdx_get_supported_attrs``; 0 when KVM cannot run TDs on this module."""
        if KVM_SUPPORTED_TD_ATTRS & self.attributes_fixed1 != self.attributes_fixed1:
            return 0
        return KVM_SUPPORTED_TD_ATTRS & self.attributes_fixed0

    def supported_xfam(self) -> int:
        """``tdx_get_supported_xfam``; 0 when KVM cannot run TDs on this module."""
        if KVM_SUPPORTED_XFAM & self.xfam_fixed1 != self.xfam_fixed1:
            return 0
        return KVM_SUPPORTED_XFAM & self.xfam_fixed0


def td_init_cpuid_entry2(leaf_and_subleaf: int, low: int, high: int) -> CpuidEntry2:
    """``td_init_cpuid_entry2``: a CPUID leaf of the module's list, less what KVM does not support."""
    function, index = leaf_and_subleaf & 0xFFFF_FFFF, leaf_and_subleaf >> 32
    eax, ebx, ecx, edx = low & 0xFFFF_FFFF, low >> 32, high & 0xFFFF_FFFF, high >> 32
    if function == 0x8000_0008:
        eax |= GUEST_PHYS_BITS
    if function == 7 and index in (0, SUBLEAF_NA):
        ebx &= ~TDX_FEATURE_TSX
        ecx &= ~WAITPKG
    return CpuidEntry2(function, 0 if index == SUBLEAF_NA else index, 0, eax, ebx, ecx, edx)


def has_unsupported(entry: CpuidEntry2) -> bool:
    """``tdx_unsupported_cpuid``: TSX or WAITPKG."""
    return entry.function == 7 and entry.index == 0 and bool(entry.ebx & TDX_FEATURE_TSX or entry.ecx & WAITPKG)
