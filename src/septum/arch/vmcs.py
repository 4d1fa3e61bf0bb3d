"""VMCS field encodings that the module acts upon, and the bits inside some of them.

Source: Intel SDM, volume 3, appendix B, and ``src/common/x86_defs/vmcs_defs.h`` of TDX Module 1.5.01. The names of all
fields that the metadata interface knows are in :mod:`septum.arch.metadata`.
"""

from typing import Final

VPID: Final = 0x0000
POSTED_INTERRUPT_VECTOR: Final = 0x0002
EPTP_INDEX: Final = 0x0004
GUEST_INTERRUPT_STATUS: Final = 0x0810
MSR_BITMAPS: Final = 0x2004
PML_ADDRESS: Final = 0x200E
TSC_OFFSET: Final = 0x2010
VIRTUAL_APIC: Final = 0x2012
POSTED_INTERRUPT_DESCRIPTOR: Final = 0x2016
EPTP: Final = 0x201A
VE_INFO_ADDRESS: Final = 0x202A
TSC_MULTIPLIER: Final = 0x2032
PROCBASED_CTLS3: Final = 0x2034
PASID_LOW: Final = 0x2038
PASID_HIGH: Final = 0x203A
SHARED_EPTP: Final = 0x203C
SPEC_CTRL_MASK: Final = 0x204A
SPEC_CTRL_SHADOW: Final = 0x204C
EXIT_GPA: Final = 0x2400
GUEST_DEBUGCTL: Final = 0x2802
GUEST_EFER: Final = 0x2806
PINBASED_CTLS: Final = 0x4000
PROCBASED_CTLS: Final = 0x4002
EXCEPTION_BITMAP: Final = 0x4004
PAGE_FAULT_MASK: Final = 0x4006
PAGE_FAULT_MATCH: Final = 0x4008
EXIT_CTLS: Final = 0x400C
ENTRY_CTLS: Final = 0x4012
ENTRY_INTERRUPTION: Final = 0x4016
ENTRY_ERROR_CODE: Final = 0x4018
ENTRY_INSTRUCTION_LENGTH: Final = 0x401A
PROCBASED_CTLS2: Final = 0x401E
HKID: Final = 0x4026
EXIT_REASON: Final = 0x4402
EXIT_INTERRUPTION: Final = 0x4404
EXIT_ERROR_CODE: Final = 0x4406
IDT_VECTORING: Final = 0x4408
IDT_VECTORING_ERROR_CODE: Final = 0x440A
EXIT_INSTRUCTION_LENGTH: Final = 0x440C
EXIT_INSTRUCTION_INFO: Final = 0x440E
GUEST_CS_ACCESS_RIGHTS: Final = 0x4816
GUEST_SS_ACCESS_RIGHTS: Final = 0x4818
GUEST_INTERRUPTIBILITY: Final = 0x4824
CR0_MASK: Final = 0x6000
CR4_MASK: Final = 0x6002
CR0_SHADOW: Final = 0x6004
CR4_SHADOW: Final = 0x6006
EXIT_QUALIFICATION: Final = 0x6400
EXIT_GLA: Final = 0x640A
GUEST_CR0: Final = 0x6800
GUEST_CR4: Final = 0x6804
GUEST_DR7: Final = 0x681A
GUEST_RSP: Final = 0x681C
GUEST_RIP: Final = 0x681E
GUEST_RFLAGS: Final = 0x6820
GUEST_PENDING_DEBUG: Final = 0x6822

VALID: Final = 1 << 31
"""Interruption information and IDT-vectoring information: the field counts."""
ERROR_CODE_VALID: Final = 1 << 11
TYPE_SHIFT: Final = 8
TYPE_MASK: Final = 7 << TYPE_SHIFT
TYPE_NMI: Final = 2 << TYPE_SHIFT
TYPE_HARDWARE_EXCEPTION: Final = 3 << TYPE_SHIFT
VECTOR_MASK: Final = 0xFF

VECTOR_NMI: Final = 2
VECTOR_UD: Final = 6
VECTOR_DF: Final = 8
VECTOR_GP: Final = 13
VECTOR_PF: Final = 14
VECTOR_MC: Final = 18
VECTOR_VE: Final = 20

BLOCKING_BY_STI: Final = 1 << 0
BLOCKING_BY_MOV_SS: Final = 1 << 1
BLOCKING_BY_NMI: Final = 1 << 3
"""Bits of the guest's interruptibility state."""

NMI_WINDOW_EXITING: Final = 1 << 22
MONITOR_TRAP_FLAG: Final = 1 << 27
"""Bits of the primary processor-based execution controls."""

RFLAGS_RF: Final = 1 << 16
