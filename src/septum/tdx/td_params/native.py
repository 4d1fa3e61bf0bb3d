"""What TDH.SYS.INIT samples of the CPU, as far as a TD's configuration depends on it.

Source: TDX Module 1.5.01, ``tdh_sys_init.c``, ``complete_cpuid_handling`` in ``helpers.c``, ``cpuid_fms.c``.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final, NamedTuple

from septum.arch import platform_msrs as msrs
from septum.arch.cpuid import KNOWN_FMS, NO_BITS, XFAM_FIXED0, CpuidEntry, CpuModel, Registers, cpuid_table

XCR0_BITS: Final = 0x602FF
"""Extended features of user mode, which XCR0 enables."""
XSS_BITS: Final = 0x1FD00
"""Extended features of supervisor mode, which IA32_XSS enables."""
MAX_XFAM_BIT: Final = 18

_XSTATE_LEAF: Final = 0xD
_ALIGN_64: Final = 1 << 1
_XFD_FAULTING: Final = 1 << 2
_XFD_SUPPORTED: Final = 1 << 4
_STEPPING: Final = 0xF


class XsaveComponent(NamedTuple):
    """A component in the extended region of an XSAVE area: its size in bytes; whether it begins at a multiple of 64."""

    size: int
    aligned: bool


class NativeCpu:
    """Facts of a CPU model, each computed when it is first asked for."""

    def __init__(self, cpu: CpuModel) -> None:
        self.cpu = cpu

    @cached_property
    def cpuid_values(self) -> tuple[Registers, ...]:
        """CPUID of each entry of ``cpuid_table``, with the bits that are fixed for all TDs filled in."""
        return tuple((self._sampled(e) & ~e.fixed0_or_dynamic) | e.fixed1 for e in cpuid_table())

    def _sampled(self, entry: CpuidEntry) -> Registers:
        extended = entry.leaf & 0x8000_0000
        if entry.leaf > self.cpu.cpuid(extended).eax:
            return NO_BITS
        values = self.cpu.cpuid(entry.leaf, entry.subleaf)
        return values._replace(eax=self.cpu.fms) if entry.leaf == 1 else values

    @cached_property
    def max_pa(self) -> int:
        """Physical address width in bits."""
        return self.cpu.cpuid(0x8000_0008).eax & 0xFF

    @cached_property
    def has_5_level_ept(self) -> bool:
        """Whether EPT page walks can have five levels."""
        return bool(self.cpu.msr(msrs.IA32_VMX_EPT_VPID_CAP) >> 7 & 1)

    @cached_property
    def xfam_fixed0(self) -> int:
        """XFAM bits that a TD may have."""
        user, supervisor = self.cpu.cpuid(_XSTATE_LEAF, 0).eax, self.cpu.cpuid(_XSTATE_LEAF, 1).ecx
        return XFAM_FIXED0 & (user & XCR0_BITS | supervisor & XSS_BITS)

    @cached_property
    def xsave_components(self) -> tuple[XsaveComponent, ...]:
        """By XFAM bit; those of bits 0 and 1 are not in the extended region."""
        leaves = (self.cpu.cpuid(_XSTATE_LEAF, bit) if bit > 1 else NO_BITS for bit in range(MAX_XFAM_BIT + 1))
        return tuple(XsaveComponent(leaf.eax, bool(leaf.ecx & _ALIGN_64)) for leaf in leaves)

    @cached_property
    def xfd_mask(self) -> int:
        """XFAM bits whose first use can be made to fault by IA32_XFD."""
        if not self.cpu.cpuid(_XSTATE_LEAF, 1).eax & _XFD_SUPPORTED:
            return 0
        bits = range(2, MAX_XFAM_BIT + 1)
        return sum(1 << bit for bit in bits if self.cpu.cpuid(_XSTATE_LEAF, bit).ecx & _XFD_FAULTING)

    @cached_property
    def arch_capabilities(self) -> int:
        """IA32_ARCH_CAPABILITIES."""
        return self.cpu.msr(msrs.IA32_ARCH_CAPABILITIES)

    @cached_property
    def has_perf_metrics(self) -> bool:
        """IA32_PERF_CAPABILITIES.PERF_METRICS_AVAILABLE."""
        return bool(self.cpu.msr(msrs.IA32_PERF_CAPABILITIES) >> 15 & 1)

    @cached_property
    def allowed_fms(self) -> tuple[int, ...]:
        """Family/model/stepping values that a migratable TD may present: the CPU's own first, then older CPUs'."""
        fms = self.cpu.fms
        own = next(place for place, known in enumerate(KNOWN_FMS) if same_model(known, fms))
        return (fms, *KNOWN_FMS[own + 1 :])

    def allows_fms(self, fms: int) -> bool:
        """``check_fms_config``: one of those, with the same or a lower stepping."""
        return any(same_model(fms, allowed) and fms & _STEPPING <= allowed & _STEPPING for allowed in self.allowed_fms)


def same_model(fms: int, other: int) -> bool:
    """Whether two family/model/stepping values differ in the stepping at most."""
    return (fms ^ other) & ~_STEPPING == 0
