"""Numbers and structures of KVM's userspace interface, as far as TDX VMs use it (x86-64, little endian).

Sources: ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h`` of Linux 6.16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from septum.arch.records import Record, nested, raw, u32, u64

KVM_API_VERSION: Final = 12

# ioctls -------------------------------------------------------------------------------------------------------------

KVM_CREATE_VM: Final = 0xAE01
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION2: Final = 0x40A0AE49
KVM_RUN: Final = 0xAE80
KVM_ENABLE_CAP: Final = 0x4068AEA3
KVM_SIGNAL_MSI: Final = 0x4020AEA5
KVM_MEMORY_ENCRYPT_OP: Final = 0xC008AEBA
KVM_SET_MEMORY_ATTRIBUTES: Final = 0x4020AED2
KVM_CREATE_GUEST_MEMFD: Final = 0xC040AED4
KVM_PRE_FAULT_MEMORY: Final = 0xC040AED5

KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_TDX_VM: Final = 5

KVM_MAX_VCPUS: Final = 4096
KVM_CAP_NR_VCPUS: Final = 9
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_CAP_EXIT_HYPERCALL: Final = 201
KVM_CAP_USER_MEMORY2: Final = 231
KVM_CAP_MEMORY_FAULT_INFO: Final = 232
KVM_CAP_MEMORY_ATTRIBUTES: Final = 233
KVM_CAP_GUEST_MEMFD: Final = 234
KVM_CAP_VM_TYPES: Final = 235
KVM_CAP_PRE_FAULT_MEMORY: Final = 236

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
KVM_USER_MEM_SLOTS: Final = 0x7FFF - 3
"""KVM_MEM_SLOTS_NUM less the three that KVM keeps for itself."""

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2

# sub-commands of KVM_MEMORY_ENCRYPT_OP --------------------------------------------------------------------------------

KVM_TDX_CAPABILITIES: Final = 0
KVM_TDX_INIT_VM: Final = 1
KVM_TDX_INIT_VCPU: Final = 2
KVM_TDX_INIT_MEM_REGION: Final = 3
KVM_TDX_FINALIZE_VM: Final = 4
KVM_TDX_GET_CPUID: Final = 5
KVM_TDX_MEASURE_MEMORY_REGION: Final = 1 << 0
"""Flag of KVM_TDX_INIT_MEM_REGION."""
KVM_MAX_CPUID_ENTRIES: Final = 256
TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT: Final = 1 << 1

# what KVM_RUN returns with --------------------------------------------------------------------------------------------

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_EXIT_TDX: Final = 40
KVM_EXIT_NAMES: Final = {value: name for name, value in globals().items() if name.startswith("KVM_EXIT_")}

KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
KVM_SYSTEM_EVENT_TDX_FATAL: Final = 7
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1 << 0
KVM_HC_MAP_GPA_RANGE: Final = 12
KVM_MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4
KVM_MAP_GPA_RANGE_DECRYPTED: Final = 0

# TDVMCALLs (Guest-Host Communication Interface) -----------------------------------------------------------------------

TDVMCALL_GET_TD_VM_CALL_INFO: Final = 0x10000
TDVMCALL_MAP_GPA: Final = 0x10001
TDVMCALL_GET_QUOTE: Final = 0x10002
TDVMCALL_REPORT_FATAL_ERROR: Final = 0x10003
TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT: Final = 0x10004

TDVMCALL_STATUS_SUCCESS: Final = 0
TDVMCALL_STATUS_RETRY: Final = 1
TDVMCALL_STATUS_INVALID_OPERAND: Final = 1 << 63
TDVMCALL_STATUS_ALIGN_ERROR: Final = 1 << 63 | 2
TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED: Final = 1 << 63 | 3


# structures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TdxCmd(Record):
    """``struct kvm_tdx_cmd``, the argument of KVM_MEMORY_ENCRYPT_OP. ``data`` is a user address."""

    id: int = u32()
    flags: int = u32()
    data: int = u64()
    hw_error: int = u64()


@dataclass(frozen=True, slots=True)
class CpuidEntry2(Record):
    """``struct kvm_cpuid_entry2``."""

    function: int = u32()
    index: int = u32()
    flags: int = u32()
    eax: int = u32()
    ebx: int = u32()
    ecx: int = u32()
    edx: int = u32()
    padding: bytes = raw(12)


KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1 << 0


@dataclass(frozen=True, slots=True)
class Cpuid2(Record):
    """The head of ``struct kvm_cpuid2``; ``nent`` entries follow."""

    nent: int = u32()
    padding: int = u32()


@dataclass(frozen=True, slots=True)
class TdxCapabilities(Record):
    """``struct kvm_tdx_capabilities`` without the CPUID entries that follow it."""

    supported_attrs: int = u64()
    supported_xfam: int = u64()
    kernel_tdvmcallinfo_1_r11: int = u64()
    user_tdvmcallinfo_1_r11: int = u64()
    kernel_tdvmcallinfo_1_r12: int = u64()
    user_tdvmcallinfo_1_r12: int = u64()
    reserved: bytes = raw(2000)
    cpuid: Cpuid2 = nested(Cpuid2)  # noqa: RUF009 - a frozen record


@dataclass(frozen=True, slots=True)
class TdxInitVm(Record):
    """``struct kvm_tdx_init_vm`` without the CPUID entries that follow it."""

    attributes: int = u64()
    xfam: int = u64()
    mrconfigid: bytes = raw(48)
    mrowner: bytes = raw(48)
    mrownerconfig: bytes = raw(48)
    reserved: bytes = raw(96)
    cpuid: Cpuid2 = nested(Cpuid2)  # noqa: RUF009 - a frozen record


@dataclass(frozen=True, slots=True)
class TdxInitMemRegion(Record):
    """``struct kvm_tdx_init_mem_region``. KVM advances all three fields past what it has done."""

    source_addr: int = u64()
    gpa: int = u64()
    nr_pages: int = u64()


@dataclass(frozen=True, slots=True)
class CreateGuestMemfd(Record):
    """``struct kvm_create_guest_memfd``."""

    size_bytes: int = u64()
    flags: int = u64()
    reserved: bytes = raw(48)


@dataclass(frozen=True, slots=True)
class UserspaceMemoryRegion2(Record):
    """``struct kvm_userspace_memory_region2``. Size 0 deletes the slot."""

    slot: int = u32()
    flags: int = u32()
    guest_phys_addr: int = u64()
    memory_size: int = u64()
    userspace_addr: int = u64()
    guest_memfd_offset: int = u64()
    guest_memfd: int = u32()
    pad1: int = u32()
    pad2: bytes = raw(112)


@dataclass(frozen=True, slots=True)
class MemoryAttributes(Record):
    """``struct kvm_memory_attributes``."""

    address: int = u64()
    size_bytes: int = u64()
    attributes: int = u64()
    flags: int = u64()


@dataclass(frozen=True, slots=True)
class PreFaultMemory(Record):
    """``struct kvm_pre_fault_memory``. KVM advances address and size past what it has done."""

    gpa: int = u64()
    size_bytes: int = u64()
    flags: int = u64()
    padding: bytes = raw(40)


@dataclass(frozen=True, slots=True)
class EnableCap(Record):
    """``struct kvm_enable_cap``."""

    cap: int = u32()
    flags: int = u32()
    arg0: int = u64()
    arg1: int = u64()
    arg2: int = u64()
    arg3: int = u64()
    pad: bytes = raw(64)


@dataclass(frozen=True, slots=True)
class Msi(Record):
    """``struct kvm_msi``."""

    address_lo: int = u32()
    address_hi: int = u32()
    data: int = u32()
    flags: int = u32()
    devid: int = u32()
    pad: bytes = raw(12)


def cpuid2_buffer(nent: int) -> bytearray:
    """``struct kvm_cpuid2`` with room for ``nent`` entries."""
    return bytearray(Cpuid2(nent=nent).pack() + bytes(CpuidEntry2.size() * nent))


def unpack_cpuid2(data: bytes, offset: int = 0) -> tuple[CpuidEntry2, ...]:
    """The entries of a ``struct kvm_cpuid2``."""
    first, size = offset + Cpuid2.size(), CpuidEntry2.size()
    return tuple(CpuidEntry2.unpack(data, first + size * i) for i in range(Cpuid2.unpack(data, offset).nent))
