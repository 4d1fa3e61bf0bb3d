"""MSRs that TDH.SYS.INIT samples and checks, and that TDH.SYS.LP.INIT wants to be the same on every LP.

Sources: vmm_dispatcher/api_calls/tdh_sys_init.c and tdh_sys_lp_init.c, common/x86_defs/{vmcs,msr}_defs.h,
common/helpers/{smrrs,virt_msr_helpers}.h of TDX Module 1.5.01.
"""

from dataclasses import dataclass
from typing import Final

IA32_TSC_ADJUST: Final = 0x3B
IA32_MKTME_KEYID_PARTITIONING: Final = 0x87
"""Bits 31:0 number of the host's KeyIDs, 63:32 of private ones."""
IA32_WBINVDP: Final = 0x98
IA32_WBNOINVDP: Final = 0x99
"""Both read as the number of parts in which a package's cache is written back."""
IA32_MISC_PACKAGE_CTLS: Final = 0xBC
IA32_XAPIC_DISABLE_STATUS: Final = 0xBD
IA32_CORE_CAPABILITIES: Final = 0xCF
IA32_MTRRCAP: Final = 0xFE
IA32_ARCH_CAPABILITIES: Final = 0x10A
IA32_MISC_ENABLE: Final = 0x1A0
SMRR_BASE: Final = 0x1F2
SMRR_MASK: Final = 0x1F3
SMRR2_BASE: Final = 0x1F6
SMRR2_MASK: Final = 0x1F7
IA32_PERF_CAPABILITIES: Final = 0x345
IA32_VMX_BASIC: Final = 0x480
IA32_VMX_MISC: Final = 0x485
IA32_VMX_CR0_FIXED0: Final = 0x486
IA32_VMX_CR0_FIXED1: Final = 0x487
IA32_VMX_CR4_FIXED0: Final = 0x488
IA32_VMX_CR4_FIXED1: Final = 0x489
IA32_VMX_PROCBASED_CTLS2: Final = 0x48B
IA32_VMX_EPT_VPID_CAP: Final = 0x48C
IA32_VMX_TRUE_PINBASED_CTLS: Final = 0x48D
IA32_VMX_TRUE_PROCBASED_CTLS: Final = 0x48E
IA32_VMX_TRUE_EXIT_CTLS: Final = 0x48F
IA32_VMX_TRUE_ENTRY_CTLS: Final = 0x490
IA32_VMX_PROCBASED_CTLS3: Final = 0x492
IA32_TME_CAPABILITY: Final = 0x981
IA32_TME_ACTIVATE: Final = 0x982

BOOT_NT4: Final = 1 << 22
"""In IA32_MISC_ENABLE: limits CPUID."""

COMPARED_BEFORE_CPUID: Final = (
    IA32_CORE_CAPABILITIES, IA32_ARCH_CAPABILITIES, IA32_MISC_PACKAGE_CTLS, IA32_XAPIC_DISABLE_STATUS,
)  # fmt: skip
COMPARED_AFTER_CPUID: Final = (
    IA32_TSC_ADJUST, IA32_MTRRCAP, SMRR_BASE, SMRR_MASK, SMRR2_BASE, SMRR2_MASK, IA32_VMX_BASIC,
    IA32_VMX_TRUE_PINBASED_CTLS, IA32_VMX_TRUE_PROCBASED_CTLS, IA32_VMX_PROCBASED_CTLS2, IA32_VMX_PROCBASED_CTLS3,
    IA32_VMX_TRUE_EXIT_CTLS, IA32_VMX_TRUE_ENTRY_CTLS, IA32_VMX_MISC, IA32_VMX_EPT_VPID_CAP, IA32_VMX_CR0_FIXED0,
    IA32_VMX_CR0_FIXED1, IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1, IA32_PERF_CAPABILITIES, IA32_TME_CAPABILITY,
    IA32_TME_ACTIVATE, IA32_MKTME_KEYID_PARTITIONING, IA32_WBINVDP, IA32_WBNOINVDP,
)  # fmt: skip
"""What TDH.SYS.LP.INIT compares with the sampled values, in order; SMRR2 only where IA32_MTRRCAP says it exists."""

ARCH_CAPABILITIES_ONES: Final = sum(1 << bit for bit in (0, 1, 3, 5, 6, 8, 10, 11, 12, 13, 14, 15, 21))
ARCH_CAPABILITIES_ZEROS: Final = 1 << 2
"""IA32_ARCH_CAPABILITIES bits that must be 1, and that must be 0."""

ENERGY_FILTERING_ENABLE: Final = 1 << 0
LEGACY_XAPIC_DISABLED: Final = 1 << 0
PERF_FULL_WRITE: Final = 1 << 13

MTRRCAP_SMRR: Final = 1 << 11
MTRRCAP_SMRR2: Final = 1 << 13
MTRRCAP_SMRR_LOCK: Final = 1 << 14
SMRR_LOCK: Final = 1 << 10
SMRR_VALID: Final = 1 << 11
SMRR_ADDRESS: Final = 0xFFFF_F000
SMRR_WRITE_BACK: Final = 6

TME_LOCK: Final = 1 << 0
TME_KEYID_BITS_SHIFT: Final = 32
TME_KEYID_BITS_MASK: Final = 0xFF << TME_KEYID_BITS_SHIFT
"""IA32_TME_ACTIVATE: bits 35:32 number of KeyID bits, 39:36 how many of them are for private KeyIDs."""
TME_ACTIVATE_INTEGRITY: Final = 1 << 49 | 1 << 51
TME_CAPABILITY_INTEGRITY: Final = 1 << 1 | 1 << 3
"""AES-XTS with integrity, with 128-bit or 256-bit keys: one of the two is wanted."""
MAX_HKIDS: Final = 2048

VMX_BASIC_SIZE_SHIFT: Final = 32
VMX_BASIC_SIZE_MASK: Final = 0x1FFF
TD_VMCS_SIZE: Final = 2048
VMX_BASIC_ONES: Final = 1 << 54 | 1 << 55
"""Exit information for INS and OUTS; the "true" control MSRs exist."""
VMX_MISC_ONES: Final = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 14 | 1 << 29
VMX_MISC_CR3_TARGETS_SHIFT: Final = 16
MIN_CR3_TARGETS: Final = 4
EPT_VPID_CAP_ONES: Final = 0x101_0633_4041

CR0_PE_PG: Final = 1 << 0 | 1 << 31
GUEST_CR0: Final = 0x21
GUEST_CR4: Final = 0x2040
L2_CR0_VARIABLE: Final = 0x8005_001F
"""CR0 and CR4 as a guest begins, and the bits of CR0 that an L2 VM may change."""


@dataclass(frozen=True, slots=True)
class ControlNeeds:
    """What the module wants of a set of VMX controls: their initial value, those it switches later, and those it does
    not know and leaves as the CPU wants them."""

    msr: int
    initial: int
    variable: int
    unknown: int
    l2_initial: int
    l2_variable: int


CONTROL_NEEDS: Final = (
    ControlNeeds(IA32_VMX_TRUE_PINBASED_CTLS, 0x29, 0x80, 0xFFFF_FF16, 0x29, 0),
    ControlNeeds(IA32_VMX_TRUE_PROCBASED_CTLS, 0x9122_0088, 0x2040_0C00, 0x0404_6173, 0x9122_0088, 0x68D8_1E04),
    ControlNeeds(IA32_VMX_PROCBASED_CTLS2, 0x133C_B3FA, 0xCC00_0400, 0, 0x1338_B3FA, 0x0C51_3E0C),
    ControlNeeds(IA32_VMX_PROCBASED_CTLS3, 0x80, 0x20, 0xFFFF_FFFF_FFFF_FF40, 0x80, 0x2E),
    ControlNeeds(IA32_VMX_TRUE_EXIT_CTLS, 0x1F3C_8204, 0x4000_1000, 0x0003_6DFB, 0x1F3C_8204, 0x4000_1000),
    ControlNeeds(IA32_VMX_TRUE_ENTRY_CTLS, 0x003E_C004, 0x0040_2200, 0xFF80_11FB, 0x003E_C004, 0x0040_2200),
)
"""In the order of the checks. IA32_VMX_PROCBASED_CTLS3 tells with 64 bits what may be 1; the others tell with bits 31:0
what must be 1 and with bits 63:32 what may be 1."""
CTLS2_WAIT_PAUSE: Final = 1 << 26
"""Initially 1 where the CPU has WAITPKG."""
CTLS2_ENCLV: Final = 1 << 28
"""Initially 0 where the CPU does not know it."""
