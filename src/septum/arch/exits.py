"""VM exit reasons, as they stand in the low half of the status with which TDH.VP.ENTER returns.

Source: src/common/x86_defs/vmcs_defs.h of TDX Module 1.5.01 and the Intel SDM, volume 3, appendix C.
"""

from enum import IntEnum
from typing import Final


class ExitReason(IntEnum):
    """Basic VM exit reason: bits 15:0 of the exit reason."""

    EXCEPTION_OR_NMI = 0
    INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_EVENT = 3
    SIPI_EVENT = 4
    SMI_IO_EVENT = 5
    SMI_OTHER_EVENT = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID_INSTRUCTION = 10
    GETSEC_INSTRUCTION = 11
    HLT_INSTRUCTION = 12
    INVD_INSTRUCTION = 13
    INVLPG_INSTRUCTION = 14
    RDPMC_INSTRUCTION = 15
    RDTSC_INSTRUCTION = 16
    RSM_INSTRUCTION = 17
    VMCALL_INSTRUCTION = 18
    VMCLEAR_INSTRUCTION = 19
    VMLAUNCH_INSTRUCTION = 20
    VMPTRLD_INSTRUCTION = 21
    VMPTRST_INSTRUCTION = 22
    VMREAD_INSTRUCTION = 23
    VMRESUME_INSTRUCTION = 24
    VMWRITE_INSTRUCTION = 25
    VMXOFF_INSTRUCTION = 26
    VMXON_INSTRUCTION = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    MSR_READ = 31
    MSR_WRITE = 32
    FAILED_VMENTER_GS = 33
    FAILED_VMENTER_MSR = 34
    VMEXIT_FAILURE = 35
    MWAIT_INSTRUCTION = 36
    MTF = 37
    MONITOR_INSTRUCTION = 39
    PAUSE_INSTRUCTION = 40
    FAILED_VMENTER_MC = 41
    C_STATE_SMI = 42
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR_ACCESS = 46
    LDTR_TR_ACCESS = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVLEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER_EXPIRED = 52
    INVLVPID = 53
    WBINVD_INSTRUCTION = 54
    XSETBV_INSTRUCTION = 55
    APIC_WRITE = 56
    RDRAND_INSTRUCTION = 57
    INVPCID_INSTRUCTION = 58
    VMFUNC_INSTRUCTION = 59
    ENCLS_INSTRUCTION = 60
    RDSEED_INSTRUCTION = 61
    EPT_PML_FULL = 62
    XSAVES_INSTRUCTION = 63
    XRSTORS_INSTRUCTION = 64
    PCONFIG = 65
    SPP_INDUCED = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWK_INSTRUCTION = 69
    ENCLV_INSTRUCTION = 70
    SGX_CONFLICT = 71
    ENQCMD_PASID_TRANSLATION_FAILURE = 72
    ENQCMDS_PASID_TRANSLATION_FAILURE = 73
    BUS_LOCK = 74
    NOTIFICATION = 75
    SEAMCALL = 76
    TDCALL = 77


BUS_LOCK_PREEMPTED: Final = 1 << 26
"""Exit reason bit: a bus lock exit was preempted by another VM exit."""
ENCLAVE_INTERRUPTION: Final = 1 << 27
PENDING_MTF: Final = 1 << 28
VM_ENTRY_FAILED: Final = 1 << 31
"""Exit reason bit: the guest was not entered at all."""

_NAMES: dict[int, str] = {reason.value: reason.name for reason in ExitReason}


def exit_reason_name(reason: int) -> str:
    """The name of the basic reason (bits 15:0) of a 32-bit exit reason; ``reason N`` when the number is unassigned."""
    basic = reason & 0xFFFF
    return _NAMES.get(basic, f"reason {basic}")
