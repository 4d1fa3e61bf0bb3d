"""``struct kvm_run``: what KVM_RUN tells userspace, and what userspace answers before the next KVM_RUN.

Each exit has a record with the layout of its member of the union. Userspace answers by replacing it:
``run.exit = dataclasses.replace(run.exit, ret=0)``.
Source: ``include/uapi/linux/kvm.h`` of Linux 6.16.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from septum.arch.records import Record, raw, u8, u16, u32, u64
from septum.core.cells import Shared
from septum.kvm.abi import KVM_EXIT_NAMES, KVM_EXIT_UNKNOWN


@dataclass(frozen=True, slots=True)
class NoDetails(Record):
    """Exits whose reason says all."""


@dataclass(frozen=True, slots=True)
class ExceptionExit(Record):
    """KVM_EXIT_EXCEPTION."""

    exception: int = u32()
    error_code: int = u32()


@dataclass(frozen=True, slots=True)
class IoExit(Record):
    """KVM_EXIT_IO. The data are in ``KvmRun.pio_data``."""

    direction: int = u8()
    """0 in, 1 out."""
    size_bytes: int = u8()
    port: int = u16()
    count: int = u32()
    data_offset: int = u64()


@dataclass(frozen=True, slots=True)
class HypercallExit(Record):
    """KVM_EXIT_HYPERCALL."""

    nr: int = u64()
    arg0: int = u64()
    arg1: int = u64()
    arg2: int = u64()
    arg3: int = u64()
    arg4: int = u64()
    arg5: int = u64()
    ret: int = u64()
    flags: int = u64()


@dataclass(frozen=True, slots=True)
class MmioExit(Record):
    """KVM_EXIT_MMIO. For a read, userspace fills in ``data``."""

    phys_addr: int = u64()
    data: bytes = raw(8)
    length: int = u32()
    is_write: int = u8()


@dataclass(frozen=True, slots=True)
class FailEntryExit(Record):
    """KVM_EXIT_FAIL_ENTRY."""

    hardware_entry_failure_reason: int = u64()
    cpu: int = u32()


@dataclass(frozen=True, slots=True)
class InternalErrorExit(Record):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: int = u32()
    ndata: int = u32()
    data: bytes = raw(128)
    """``ndata`` numbers of 64 bits."""

    def numbers(self) -> tuple[int, ...]:
        """The data as numbers."""
        return struct.unpack_from(f"<{self.ndata}Q", self.data)


@dataclass(frozen=True, slots=True)
class SystemEventExit(Record):
    """KVM_EXIT_SYSTEM_EVENT. KVM_SYSTEM_EVENT_TDX_FATAL: the sixteen registers of the guest in order of number."""

    type: int = u32()
    ndata: int = u32()
    data: bytes = raw(128)

    def numbers(self) -> tuple[int, ...]:
        """The data as numbers."""
        return struct.unpack_from(f"<{self.ndata}Q", self.data)


@dataclass(frozen=True, slots=True)
class MemoryFaultExit(Record):
    """KVM_EXIT_MEMORY_FAULT; KVM_RUN returns an error."""

    flags: int = u64()
    gpa: int = u64()
    size_bytes: int = u64()


@dataclass(frozen=True, slots=True)
class TdxQuoteExit(Record):
    """KVM_EXIT_TDX for TDVMCALL<GetQuote>."""

    flags: int = u64()
    nr: int = u64()
    ret: int = u64()
    gpa: int = u64()
    size_bytes: int = u64()


@dataclass(frozen=True, slots=True)
class TdxInfoExit(Record):
    """KVM_EXIT_TDX for TDVMCALL<GetTdVmCallInfo>."""

    flags: int = u64()
    nr: int = u64()
    ret: int = u64()
    leaf: int = u64()
    r11: int = u64()
    r12: int = u64()
    r13: int = u64()
    r14: int = u64()


@dataclass(frozen=True, slots=True)
class TdxNotifyExit(Record):
    """KVM_EXIT_TDX for TDVMCALL<SetupEventNotifyInterrupt>."""

    flags: int = u64()
    nr: int = u64()
    ret: int = u64()
    vector: int = u64()


NO_DETAILS = NoDetails()


class KvmRun(Shared):
    """The page that KVM and userspace share for a vCPU."""

    exit_reason: int = KVM_EXIT_UNKNOWN
    immediate_exit: bool = False
    exit: Record = NO_DETAILS
    pio_data: int = 0

    def leave(self, reason: int, details: Record = NO_DETAILS) -> int:
        """KVM_RUN is to return with this exit; returns 0, which ends the run loop."""
        self.exit_reason = reason
        self.exit = details
        return 0

    def pack(self) -> bytes:
        """The structure up to the end of the union."""
        head = bytearray(32)
        head[1] = self.immediate_exit
        struct.pack_into("<I", head, 8, self.exit_reason)
        return bytes(head) + self.exit.pack().ljust(256, b"\0")

    def describe(self) -> str:
        """The exit in words, for reports."""
        name = KVM_EXIT_NAMES.get(self.exit_reason, f"exit {self.exit_reason}")
        return name if self.exit == NO_DETAILS else f"{name} {self.exit}"
