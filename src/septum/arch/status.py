"""Completion status codes: the 64-bit value that every SEAMCALL and TDCALL leaf leaves in RAX.

Layout: bit 63 error, 62 non-recoverable, 61 fatal, 60 host recoverability hint, 47:40 class, 39:32 detail within the
class, 31:0 details. What the details mean depends on the code: mostly an operand id, in the status of a TD exit the VMX
exit reason, else a number (see :func:`decode`).

Sources: include/auto_gen/tdx_error_codes_defs.h, include/tdx_api_defs.h (api_error_code_t) and td_transitions/td_exit.c
of TDX Module 1.5.01; arch/x86/include/asm/tdx.h of Linux 6.16 for the codes that the kernel makes up.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from septum.arch.errors import UsageError
from septum.arch.exits import VM_ENTRY_FAILED, exit_reason_name
from septum.arch.operands import operand_name

ERROR: Final = 1 << 63
NON_RECOVERABLE: Final = 1 << 62
"""Calling again with the same operands cannot succeed."""
FATAL: Final = 1 << 61
"""The TD is lost: it can only be torn down."""
HOST_RECOVERABILITY_HINT: Final = 1 << 60
DETAILS: Final = 0xFFFF_FFFF
CODE: Final = 0xFFFF_FFFF_0000_0000
_CLASS_SHIFT: Final = 40

SW_ERROR: Final = ERROR | 0xFF << _CLASS_SHIFT
"""TDX_SW_ERROR: the class that Linux uses for SEAMCALLs that never reached the module."""


class Status(IntEnum):
    """Every completion status of TDX Module 1.5.01 with zero details. Members are ints: compare them as such."""

    TDX_SUCCESS = 0x0000_0000_0000_0000
    TDX_NON_RECOVERABLE_VCPU = 0x4000_0001_0000_0000
    TDX_NON_RECOVERABLE_TD = 0x6000_0002_0000_0000
    TDX_INTERRUPTED_RESUMABLE = 0x8000_0003_0000_0000
    TDX_INTERRUPTED_RESTARTABLE = 0x8000_0004_0000_0000
    TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005_0000_0000
    TDX_INVALID_RESUMPTION = 0xC000_0006_0000_0000
    TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE = 0xE000_0007_0000_0000
    TDX_CROSS_TD_FAULT = 0x8000_0008_0000_0000
    TDX_CROSS_TD_TRAP = 0x9000_0009_0000_0000
    TDX_NON_RECOVERABLE_TD_CORRUPTED_MD = 0x6000_000A_0000_0000
    TDX_OPERAND_INVALID = 0xC000_0100_0000_0000
    TDX_OPERAND_ADDR_RANGE_ERROR = 0xC000_0101_0000_0000
    TDX_OPERAND_BUSY = 0x8000_0200_0000_0000
    TDX_PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201_0000_0000
    TDX_SYS_BUSY = 0x8000_0202_0000_0000
    TDX_RND_NO_ENTROPY = 0x8000_0203_0000_0000
    TDX_OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204_0000_0000
    TDX_HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205_0000_0000
    TDX_PAGE_METADATA_INCORRECT = 0xC000_0300_0000_0000
    TDX_PAGE_ALREADY_FREE = 0x0000_0301_0000_0000
    TDX_PAGE_NOT_OWNED_BY_TD = 0xC000_0302_0000_0000
    TDX_PAGE_NOT_FREE = 0xC000_0303_0000_0000
    TDX_TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400_0000_0000
    TDX_SYS_INIT_NOT_PENDING = 0xC000_0500_0000_0000
    TDX_SYS_LP_INIT_NOT_DONE = 0xC000_0502_0000_0000
    TDX_SYS_LP_INIT_DONE = 0xC000_0503_0000_0000
    TDX_SYS_NOT_READY = 0xC000_0505_0000_0000
    TDX_SYS_SHUTDOWN = 0xC000_0506_0000_0000
    TDX_SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507_0000_0000
    TDX_SYS_STATE_INCORRECT = 0xC000_0508_0000_0000
    TDX_SYS_INVALID_HANDOFF = 0xC000_0509_0000_0000
    TDX_SYS_INCOMPATIBLE_SIGSTRUCT = 0xC000_050A_0000_0000
    TDX_SYS_LP_INIT_NOT_PENDING = 0xC000_050B_0000_0000
    TDX_SYS_CONFIG_NOT_PENDING = 0xC000_050C_0000_0000
    TDX_INCOMPATIBLE_SEAM_CAPABILITIES = 0xC000_050D_0000_0000
    TDX_TD_FATAL = 0xE000_0604_0000_0000
    TDX_TD_NON_DEBUG = 0xC000_0605_0000_0000
    TDX_TDCS_NOT_ALLOCATED = 0xC000_0606_0000_0000
    TDX_LIFECYCLE_STATE_INCORRECT = 0xC000_0607_0000_0000
    TDX_OP_STATE_INCORRECT = 0xC000_0608_0000_0000
    TDX_NO_VCPUS = 0xC000_0609_0000_0000
    TDX_TDCX_NUM_INCORRECT = 0xC000_0610_0000_0000
    TDX_VCPU_STATE_INCORRECT = 0xC000_0700_0000_0000
    TDX_VCPU_ASSOCIATED = 0x8000_0701_0000_0000
    TDX_VCPU_NOT_ASSOCIATED = 0x8000_0702_0000_0000
    TDX_NO_VALID_VE_INFO = 0xC000_0704_0000_0000
    TDX_MAX_VCPUS_EXCEEDED = 0xC000_0705_0000_0000
    TDX_TSC_ROLLBACK = 0xC000_0706_0000_0000
    TDX_TD_VMCS_FIELD_NOT_INITIALIZED = 0xC000_0730_0000_0000
    TD_VMCS_FIELD_ERROR = 0xC000_0731_0000_0000
    TDX_KEY_GENERATION_FAILED = 0x8000_0800_0000_0000
    TDX_TD_KEYS_NOT_CONFIGURED = 0x8000_0810_0000_0000
    TDX_KEY_STATE_INCORRECT = 0xC000_0811_0000_0000
    TDX_KEY_CONFIGURED = 0x0000_0815_0000_0000
    TDX_WBCACHE_NOT_COMPLETE = 0x8000_0817_0000_0000
    TDX_HKID_NOT_FREE = 0xC000_0820_0000_0000
    TDX_NO_HKID_READY_TO_WBCACHE = 0x0000_0821_0000_0000
    TDX_WBCACHE_RESUME_ERROR = 0xC000_0823_0000_0000
    TDX_FLUSHVP_NOT_DONE = 0x8000_0824_0000_0000
    TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED = 0xC000_0825_0000_0000
    TDX_INCORRECT_CPUID_VALUE = 0xC000_0900_0000_0000
    TDX_LIMIT_CPUID_MAXVAL_SET = 0xC000_0901_0000_0000
    TDX_INCONSISTENT_CPUID_FIELD = 0xC000_0902_0000_0000
    TDX_CPUID_MAX_SUBLEAVES_UNRECOGNIZED = 0xC000_0903_0000_0000
    TDX_CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xC000_0904_0000_0000
    TDX_INVALID_WBINVD_SCOPE = 0xC000_0905_0000_0000
    TDX_INVALID_PKG_ID = 0xC000_0906_0000_0000
    TDX_ENABLE_MONITOR_FSM_NOT_SET = 0xC000_0907_0000_0000
    TDX_CPUID_LEAF_NOT_SUPPORTED = 0xC000_0908_0000_0000
    TDX_SMRR_NOT_LOCKED = 0xC000_0910_0000_0000
    TDX_INVALID_SMRR_CONFIGURATION = 0xC000_0911_0000_0000
    TDX_SMRR_OVERLAPS_CMR = 0xC000_0912_0000_0000
    TDX_SMRR_LOCK_NOT_SUPPORTED = 0xC000_0913_0000_0000
    TDX_SMRR_NOT_SUPPORTED = 0xC000_0914_0000_0000
    TDX_INCONSISTENT_MSR = 0xC000_0920_0000_0000
    TDX_INCORRECT_MSR_VALUE = 0xC000_0921_0000_0000
    TDX_SEAMREPORT_NOT_AVAILABLE = 0xC000_0930_0000_0000
    TDX_SEAMDB_GETREF_NOT_AVAILABLE = 0xC000_0931_0000_0000
    TDX_SEAMDB_REPORT_NOT_AVAILABLE = 0xC000_0932_0000_0000
    TDX_SEAMVERIFYREPORT_NOT_AVAILABLE = 0xC000_0933_0000_0000
    TDX_INVALID_TDMR = 0xC000_0A00_0000_0000
    TDX_NON_ORDERED_TDMR = 0xC000_0A01_0000_0000
    TDX_TDMR_OUTSIDE_CMRS = 0xC000_0A02_0000_0000
    TDX_TDMR_ALREADY_INITIALIZED = 0x0000_0A03_0000_0000
    TDX_INVALID_PAMT = 0xC000_0A10_0000_0000
    TDX_PAMT_OUTSIDE_CMRS = 0xC000_0A11_0000_0000
    TDX_PAMT_OVERLAP = 0xC000_0A12_0000_0000
    TDX_INVALID_RESERVED_IN_TDMR = 0xC000_0A20_0000_0000
    TDX_NON_ORDERED_RESERVED_IN_TDMR = 0xC000_0A21_0000_0000
    TDX_CMR_LIST_INVALID = 0xC000_0A22_0000_0000
    TDX_EPT_WALK_FAILED = 0xC000_0B00_0000_0000
    TDX_EPT_ENTRY_FREE = 0xC000_0B01_0000_0000
    TDX_EPT_ENTRY_NOT_FREE = 0xC000_0B02_0000_0000
    TDX_EPT_ENTRY_NOT_PRESENT = 0xC000_0B03_0000_0000
    TDX_EPT_ENTRY_NOT_LEAF = 0xC000_0B04_0000_0000
    TDX_EPT_ENTRY_LEAF = 0xC000_0B05_0000_0000
    TDX_GPA_RANGE_NOT_BLOCKED = 0xC000_0B06_0000_0000
    TDX_GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07_0000_0000
    TDX_TLB_TRACKING_NOT_DONE = 0xC000_0B08_0000_0000
    TDX_EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09_0000_0000
    TDX_PAGE_ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
    TDX_PAGE_SIZE_MISMATCH = 0xC000_0B0B_0000_0000
    TDX_GPA_RANGE_BLOCKED = 0xC000_0B0C_0000_0000
    TDX_EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D_0000_0000
    TDX_EPT_PAGE_NOT_FREE = 0xC000_0B0E_0000_0000
    TDX_L2_SEPT_WALK_FAILED = 0xC000_0B0F_0000_0000
    TDX_L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10_0000_0000
    TDX_PAGE_ATTR_INVALID = 0xC000_0B11_0000_0000
    TDX_L2_SEPT_PAGE_NOT_PROVIDED = 0xC000_0B12_0000_0000
    TDX_METADATA_FIELD_ID_INCORRECT = 0xC000_0C00_0000_0000
    TDX_METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01_0000_0000
    TDX_METADATA_FIELD_NOT_READABLE = 0xC000_0C02_0000_0000
    TDX_METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03_0000_0000
    TDX_METADATA_LIST_OVERFLOW = 0xC000_0C04_0000_0000
    TDX_INVALID_METADATA_LIST_HEADER = 0xC000_0C05_0000_0000
    TDX_REQUIRED_METADATA_FIELD_MISSING = 0xC000_0C06_0000_0000
    TDX_METADATA_ELEMENT_SIZE_INCORRECT = 0xC000_0C07_0000_0000
    TDX_METADATA_LAST_ELEMENT_INCORRECT = 0xC000_0C08_0000_0000
    TDX_METADATA_FIELD_CURRENTLY_NOT_WRITABLE = 0xC000_0C09_0000_0000
    TDX_METADATA_WR_MASK_NOT_VALID = 0xC000_0C0A_0000_0000
    TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B_0000_0000
    TDX_METADATA_FIELD_SKIP = 0x0000_0C0C_0000_0000
    TDX_SERVTD_ALREADY_BOUND_FOR_TYPE = 0xC000_0D00_0000_0000
    TDX_SERVTD_TYPE_MISMATCH = 0xC000_0D01_0000_0000
    TDX_SERVTD_ATTR_MISMATCH = 0xC000_0D02_0000_0000
    TDX_SERVTD_INFO_HASH_MISMATCH = 0xC000_0D03_0000_0000
    TDX_SERVTD_UUID_MISMATCH = 0xC000_0D04_0000_0000
    TDX_SERVTD_NOT_BOUND = 0xC000_0D05_0000_0000
    TDX_SERVTD_BOUND = 0xC000_0D06_0000_0000
    TDX_TARGET_UUID_MISMATCH = 0xC000_0D07_0000_0000
    TDX_TARGET_UUID_UPDATED = 0xC000_0D08_0000_0000
    TDX_INVALID_MBMD = 0xC000_0E00_0000_0000
    TDX_INCORRECT_MBMD_MAC = 0xC000_0E01_0000_0000
    TDX_NOT_WRITE_BLOCKED = 0xC000_0E02_0000_0000
    TDX_ALREADY_WRITE_BLOCKED = 0x0000_0E03_0000_0000
    TDX_NOT_EXPORTED = 0xC000_0E04_0000_0000
    TDX_MIGRATION_STREAM_STATE_INCORRECT = 0xC000_0E05_0000_0000
    TDX_MAX_MIGS_NUM_EXCEEDED = 0xC000_0E06_0000_0000
    TDX_EXPORTED_DIRTY_PAGES_REMAIN = 0xC000_0E07_0000_0000
    TDX_MIGRATION_DECRYPTION_KEY_NOT_SET = 0xC000_0E08_0000_0000
    TDX_TD_NOT_MIGRATABLE = 0xC000_0E09_0000_0000
    TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xC000_0E0A_0000_0000
    TDX_NUM_MIGS_HIGHER_THAN_CREATED = 0xC000_0E0B_0000_0000
    TDX_IMPORT_MISMATCH = 0xC000_0E0C_0000_0000
    TDX_MIGRATION_EPOCH_OVERFLOW = 0xC000_0E0D_0000_0000
    TDX_MAX_EXPORTS_EXCEEDED = 0xC000_0E0E_0000_0000
    TDX_INVALID_PAGE_MAC = 0xC000_0E0F_0000_0000
    TDX_MIGRATED_IN_CURRENT_EPOCH = 0xC000_0E10_0000_0000
    TDX_DISALLOWED_IMPORT_OVER_REMOVED = 0xC000_0E11_0000_0000
    TDX_SOME_VCPUS_NOT_MIGRATED = 0xC000_0E12_0000_0000
    TDX_ALL_VCPUS_IMPORTED = 0xC000_0E13_0000_0000
    TDX_MIN_MIGS_NOT_CREATED = 0xC000_0E14_0000_0000
    TDX_VCPU_ALREADY_EXPORTED = 0xC000_0E15_0000_0000
    TDX_INVALID_MIGRATION_DECRYPTION_KEY = 0xC000_0E16_0000_0000
    TDX_INVALID_CPUSVN = 0xC000_1000_0000_0000
    TDX_INVALID_REPORTMACSTRUCT = 0xC000_1001_0000_0000
    TDX_L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100_0000_0000
    TDX_L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101_0000_0000
    TDX_L2_EXIT_PENDING_INTERRUPT = 0x0000_1102_0000_0000
    TDX_PENDING_INTERRUPT = 0x0000_1120_0000_0000
    TDX_TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140_0000_0000
    TDX_TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141_0000_0000
    TDX_TD_EXIT_ON_L2_TO_L1 = 0x0000_1142_0000_0000
    TDX_GLA_NOT_CANONICAL = 0xC000_1160_0000_0000


class SeamcallFailure(IntEnum):
    """What Linux's __seamcall() returns when the SEAMCALL instruction itself fails (arch/x86/include/asm/tdx.h)."""

    TDX_SEAMCALL_UD = SW_ERROR | 6
    TDX_SEAMCALL_GP = SW_ERROR | 13
    TDX_SEAMCALL_VMFAILINVALID = SW_ERROR | 0xFFFF_0000


CLASS_NAMES: Final[dict[int, str]] = {
    0x00: "general",
    0x01: "invalid operand",
    0x02: "resource busy",
    0x03: "page metadata",
    0x04: "dependent resources",
    0x05: "TDX module state",
    0x06: "TD state",
    0x07: "TD vCPU state",
    0x08: "key management",
    0x09: "platform state",
    0x0A: "physical memory",
    0x0B: "guest TD memory",
    0x0C: "metadata",
    0x0D: "service TD",
    0x0E: "migration",
    0x10: "attestation",
    0x11: "TD partitioning",
    0xFF: "software-defined (host kernel)",
}
"""Names of the class field (bits 47:40). The names of 0x10 and 0x11 follow their members: unverified."""

_NAMES: Final[dict[int, str]] = {status.value: status.name for status in Status}
_FAILURE_NAMES: Final[dict[int, str]] = {failure.value: failure.name for failure in SeamcallFailure}
_VALUES: Final[dict[str, int]] = {**{s.name: s.value for s in Status}, **{f.name: f.value for f in SeamcallFailure}}

_WITH_OPERAND: Final[frozenset[int]] = frozenset(
    {
        Status.TDX_OPERAND_INVALID,
        Status.TDX_OPERAND_ADDR_RANGE_ERROR,
        Status.TDX_OPERAND_BUSY,
        Status.TDX_OPERAND_BUSY_HOST_PRIORITY,
        Status.TDX_PAGE_METADATA_INCORRECT,
        Status.TDX_EPT_WALK_FAILED,
        Status.TDX_EPT_ENTRY_FREE,
        Status.TDX_EPT_ENTRY_NOT_FREE,
        Status.TDX_EPT_ENTRY_NOT_PRESENT,
        Status.TDX_EPT_ENTRY_NOT_LEAF,
        Status.TDX_EPT_ENTRY_LEAF,
        Status.TDX_GPA_RANGE_NOT_BLOCKED,
        Status.TDX_GPA_RANGE_ALREADY_BLOCKED,
        Status.TDX_GPA_RANGE_BLOCKED,
        Status.TDX_TLB_TRACKING_NOT_DONE,
        Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS,
        Status.TDX_EPT_ENTRY_STATE_INCORRECT,
        Status.TDX_EPT_PAGE_NOT_FREE,
        Status.TDX_TD_VMCS_FIELD_NOT_INITIALIZED,
        Status.TDX_IMPORT_MISMATCH,
        Status.TDX_INVALID_PAGE_MAC,
        Status.TDX_MIGRATED_IN_CURRENT_EPOCH,
        Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED,
    }
)
_WITH_EXIT_REASON: Final[frozenset[int]] = frozenset(
    {
        Status.TDX_SUCCESS,
        Status.TDX_NON_RECOVERABLE_VCPU,
        Status.TDX_NON_RECOVERABLE_TD,
        Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        Status.TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
        Status.TDX_NON_RECOVERABLE_TD_CORRUPTED_MD,
        Status.TDX_CROSS_TD_FAULT,
        Status.TDX_CROSS_TD_TRAP,
        Status.TDX_HOST_PRIORITY_BUSY_TIMEOUT,
        Status.TDX_L2_EXIT_HOST_ROUTED_ASYNC,
        Status.TDX_L2_EXIT_HOST_ROUTED_TDVMCALL,
        Status.TDX_L2_EXIT_PENDING_INTERRUPT,
        Status.TDX_TD_EXIT_BEFORE_L2_ENTRY,
        Status.TDX_TD_EXIT_ON_L2_VM_EXIT,
        Status.TDX_TD_EXIT_ON_L2_TO_L1,
    }
)
_DETAIL_FORMS: Final[dict[int, str]] = {
    Status.TDX_INCORRECT_MSR_VALUE: "MSR {0:#x}",
    Status.TDX_INCONSISTENT_MSR: "MSR {0:#x}",
    Status.TDX_CPUID_LEAF_NOT_SUPPORTED: "CPUID leaf {0:#x}",
    Status.TDX_INVALID_PKG_ID: "package {0}",
    Status.TDX_SMRR_NOT_LOCKED: "SMRR {0}",
    Status.TDX_INVALID_SMRR_CONFIGURATION: "SMRR {0}",
    Status.TDX_SMRR_OVERLAPS_CMR: "SMRR {1}, CMR {2}",
    Status.TDX_PAGE_SIZE_MISMATCH: "level {0}",
    Status.TDX_PAGE_ALREADY_ACCEPTED: "level {0}",
    Status.TDX_L2_SEPT_WALK_FAILED: "VM {3}, level {1}",
    Status.TDX_L2_SEPT_ENTRY_NOT_FREE: "VM {3}, level {1}",
    Status.TDX_INVALID_TDMR: "TDMR {1}",
    Status.TDX_NON_ORDERED_TDMR: "TDMR {1}",
    Status.TDX_TDMR_OUTSIDE_CMRS: "TDMR {1}",
    Status.TDX_INVALID_PAMT: "TDMR {1}, PAMT level {2}",
    Status.TDX_PAMT_OUTSIDE_CMRS: "TDMR {1}, PAMT level {2}",
    Status.TDX_PAMT_OVERLAP: "TDMR {1}, PAMT level {2}, other TDMR {3}",
    Status.TDX_INVALID_RESERVED_IN_TDMR: "TDMR {1}, reserved area {2}",
    Status.TDX_NON_ORDERED_RESERVED_IN_TDMR: "TDMR {1}, reserved area {2}",
    Status.TDX_SERVTD_NOT_BOUND: "slot {0}",
}
"""How to read the details of the codes that carry numbers: {0} all 32 bits, {1} to {4} their bytes from the lowest."""


def with_operand(status: int, operand_id: int) -> int:
    """The completion status for a failure that concerns one operand (api_error_with_operand_id)."""
    return status + operand_id


def with_details(status: int, *details: int) -> int:
    """The completion status with up to four one-byte details, lowest first (api_error_with_multiple_info)."""
    return status + int.from_bytes(bytes(details), "little")


def base(status: int) -> int:
    """The code without its details: bits 63:32. Comparing bases is how KVM (v6.16) tells errors apart.

    A status of Linux's own software-defined class is returned whole, because its low half is part of the code.
    """
    return status if is_sw_error(status) else status & CODE


def is_error(status: int) -> bool:
    """Bit 63. TD exits of a lost TD, ``TDX_NON_RECOVERABLE_TD`` for one, do not set it."""
    return status & ERROR != 0


def is_busy(status: int) -> bool:
    """Whether this is TDX_OPERAND_BUSY, whatever the operand: the test that KVM (v6.16) makes."""
    return status & CODE == Status.TDX_OPERAND_BUSY


def is_sw_error(status: int) -> bool:
    """Whether the host kernel made up this status because the SEAMCALL instruction failed."""
    return status & SW_ERROR == SW_ERROR


def name(status: int) -> str:
    """The ABI name of a status, without its details; hexadecimal when no code of 1.5.01 matches.

    The module may add the FATAL bit to a code (api_error_fatal); the name stays that of the code.
    """
    if is_sw_error(status):
        return _FAILURE_NAMES.get(status, "TDX_SW_ERROR")
    code = status & CODE
    return _NAMES.get(code) or _NAMES.get(code & ~FATAL) or f"{status:#018x}"


def code_by_name(text: str) -> int:
    """The code of an ABI name such as ``TDX_OPERAND_BUSY`` (the prefix may be left out).

    Raises UsageError when there is no such status.
    """
    wanted = text.strip().upper()
    for candidate in (wanted, f"TDX_{wanted}"):
        if candidate in _VALUES:
            return _VALUES[candidate]
    raise UsageError(f"{text!r} is no TDX completion status; give a name like TDX_OPERAND_BUSY or a 64-bit number")


@dataclass(frozen=True, slots=True)
class Decoded:
    """A completion status in words."""

    code: int
    name: str
    status_class: str
    operand: str | None
    """The operand the details point at; None when they mean something else."""
    details: int
    """Bits 31:0 as a number."""
    detail_text: str | None
    """What the details say: an operand, an exit reason, an MSR ...; None when they say nothing."""
    error: bool
    recoverable: bool
    """Bit 62 is clear: the same call may succeed later."""
    fatal: bool
    known: bool
    """The code is one of module 1.5.01 or of Linux's own class."""


def decode(status: int) -> Decoded:
    """Explain a completion status.

    Raises UsageError when the number does not fit in 64 bits.
    """
    if not 0 <= status < 1 << 64:
        raise UsageError(f"{status:#x} is no completion status: give an unsigned number of at most 64 bits")
    details = status & DETAILS
    code = status & CODE
    known = is_sw_error(status) or code in _NAMES or code & ~FATAL in _NAMES
    if code not in _NAMES:
        code &= ~FATAL
    operand, text = (None, None) if is_sw_error(status) else _explain(code, details)
    return Decoded(
        code=status,
        name=name(status),
        status_class=CLASS_NAMES.get(status >> _CLASS_SHIFT & 0xFF, "unknown"),
        operand=operand,
        details=details,
        detail_text=text,
        error=is_error(status),
        recoverable=not status & NON_RECOVERABLE,
        fatal=bool(status & FATAL),
        known=known,
    )


def _explain(code: int, details: int) -> tuple[str | None, str | None]:
    """The operand's name and the meaning of the details of a code."""
    if code in _WITH_OPERAND:
        operand = operand_name(details) or f"{details:#x}"
        return operand, f"operand {operand}"
    if code in _DETAIL_FORMS:
        return None, _DETAIL_FORMS[code].format(details, *details.to_bytes(4, "little"))
    if code in _WITH_EXIT_REASON and (details or code != Status.TDX_SUCCESS):
        entry = ", VM entry failed" if details & VM_ENTRY_FAILED else ""
        return None, f"exit reason {details & 0xFFFF} {exit_reason_name(details)}{entry}"
    return None, f"details {details:#x}" if details else None
