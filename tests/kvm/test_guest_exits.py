"""What guests leave for: TDVMCALLs, exits to userspace and back, interrupts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from errno import EINTR, EIO
from typing import Any

import pytest

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.status import Status
from septum.core.run import at_random, run, solo
from septum.core.steps import CALLS, Program, Task, wait_until
from septum.guest.scripted import Script
from septum.guest.vcpu import Vcpu
from septum.kvm import abi
from septum.kvm.abi import CpuidEntry2
from septum.kvm.guest_protocol import GuestCpu
from septum.kvm.run_struct import (
    ExceptionExit,
    FailEntryExit,
    HypercallExit,
    InternalErrorExit,
    IoExit,
    KvmRun,
    MmioExit,
    SystemEventExit,
    TdxInfoExit,
    TdxNotifyExit,
    TdxQuoteExit,
)
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import VmExit
from tests.kvm.machines import Vmm

PAGE = 4096
Answer = Callable[[KvmRun], None]


class Session:
    """A TD with one vCPU, entered exit by exit."""

    def __init__(self, script: Script | None = None, *, hypercalls: bool = True) -> None:
        self.vmm = Vmm()

        async def main() -> int:
            r = await self.vmm.build()
            if not hypercalls:
                r = await self.vmm.process.enable_cap(self.vmm.vm, abi.KVM_CAP_EXIT_HYPERCALL, 0)
            return r

        assert self.vmm.solo(main) == 0
        self.fd = self.vmm.vcpus[0]
        self.run = self.vmm.process.kvm_run(self.fd)
        if script is not None:
            self.vmm.attach(script)

    def enter(self, **answer: Any) -> int:
        """Answers the last exit, and enters again."""
        if answer:
            self.run.exit = replace(self.run.exit, **answer)
        result = self.vmm.solo(lambda: self.vmm.process.run(self.fd))
        assert isinstance(result, int)
        return result

    @property
    def result(self) -> Any:
        return self.vmm.guests[0].result

    def finish(self, **answer: Any) -> Any:
        """Answers the last exit; the script returns, and its vCPU halts until a signal comes."""
        process, task = self.vmm.process, Task("vmm", cpu=0)

        async def enter() -> int:
            return await process.run(self.fd)

        async def signal() -> None:
            await wait_until(lambda: self.vmm.guests[0].finished, "end of script")
            process.kill(task)

        if answer:
            self.run.exit = replace(self.run.exit, **answer)
        contexts = self.vmm.host.interrupt_contexts()
        outcome = run([Program(task, enter), Program(Task("signal", cpu=1), signal), *contexts], solo, level=CALLS)
        assert outcome.violation is None, outcome.message
        assert outcome.results[0] == -EINTR
        assert self.run.exit_reason == abi.KVM_EXIT_INTR
        process.take_signal(task)
        return self.result


# -- MapGPA ------------------------------------------------------------------------------------------------------------


def map_gpa(gpa: int, size: int, *, shared: bool = True) -> Script:
    async def script(vcpu: Vcpu) -> tuple[int, int]:
        regs = await vcpu.vmcall(abi.TDVMCALL_MAP_GPA, r12=gpa | (vcpu.shared_bit if shared else 0), r13=size)
        return regs.r10, regs.r11

    return script


def test_map_gpa_goes_to_userspace_in_parts_of_2_mib() -> None:
    session = Session(map_gpa(0x10_0000, 0x50_0000))
    parts = []
    assert session.enter() == 0
    for _ in range(2):
        parts.append(session.run.exit)
        assert session.enter(ret=0) == 0
    parts.append(session.run.exit)
    assert session.finish(ret=0) == (abi.TDVMCALL_STATUS_SUCCESS, abi.TDVMCALL_MAP_GPA)
    assert parts == [
        HypercallExit(abi.KVM_HC_MAP_GPA_RANGE, gpa, size // PAGE, abi.KVM_MAP_GPA_RANGE_DECRYPTED, flags=1)
        for gpa, size in ((0x10_0000, 2 << 20), (0x30_0000, 2 << 20), (0x50_0000, 1 << 20))
    ]
    assert struct.unpack_from("<2Q", HypercallExit(12, 5).pack()) == (12, 5)
    assert HypercallExit.offset_of("ret") == 56
    assert HypercallExit.offset_of("flags") == 64


def test_map_gpa_to_private() -> None:
    session = Session(map_gpa(0x10_0000, PAGE, shared=False))
    assert session.enter() == 0
    assert isinstance(session.run.exit, HypercallExit)
    assert session.run.exit.arg2 == abi.KVM_MAP_GPA_RANGE_ENCRYPTED


def test_userspace_refuses_map_gpa() -> None:
    session = Session(map_gpa(0x10_0000, PAGE))
    assert session.enter() == 0
    assert session.finish(ret=22) == (abi.TDVMCALL_STATUS_INVALID_OPERAND, 0x10_0000 | 1 << 51)


def test_an_interrupt_ends_map_gpa_between_two_parts() -> None:
    session = Session(map_gpa(0x10_0000, 0x30_0000))
    assert session.enter() == 0
    vmm = session.vmm
    assert vmm.solo(lambda: vmm.process.signal_msi(vmm.vm, 0, 0x40)) == 1
    status, reached = session.finish(ret=0)
    assert status == abi.TDVMCALL_STATUS_RETRY
    assert reached & (1 << 51) - 1 == 0x30_0000


@pytest.mark.parametrize(
    ("gpa", "size", "status"),
    [
        (0x10_0000, 0, abi.TDVMCALL_STATUS_INVALID_OPERAND),
        ((1 << 51) - PAGE, 2 * PAGE, abi.TDVMCALL_STATUS_INVALID_OPERAND),
        (1 << 60, PAGE, abi.TDVMCALL_STATUS_INVALID_OPERAND),
        (0x10_0001, PAGE, abi.TDVMCALL_STATUS_ALIGN_ERROR),
        (0x10_0000, 100, abi.TDVMCALL_STATUS_ALIGN_ERROR),
    ],
)
def test_map_gpa_of_a_bad_range(gpa: int, size: int, status: int) -> None:
    assert Session(map_gpa(gpa, size, shared=False)).finish() == (status, gpa)


def test_map_gpa_when_userspace_does_not_want_it() -> None:
    session = Session(map_gpa(0x10_0000, PAGE, shared=False), hypercalls=False)
    assert session.finish() == (abi.TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED, 0x10_0000)


# -- other TDVMCALLs ---------------------------------------------------------------------------------------------------


def vmcall(function: int, **registers: int) -> Script:
    async def script(vcpu: Vcpu) -> tuple[int, ...]:
        regs = await vcpu.vmcall(function, **registers)
        return regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15

    return script


INVALID = abi.TDVMCALL_STATUS_INVALID_OPERAND
UNSUPPORTED = abi.TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED


def test_td_vm_call_info() -> None:
    assert Session(vmcall(abi.TDVMCALL_GET_TD_VM_CALL_INFO, r12=0)).finish()[:5] == (0, 0, 0, 0, 0)
    assert Session(vmcall(abi.TDVMCALL_GET_TD_VM_CALL_INFO, r12=2)).finish()[0] == INVALID
    session = Session(vmcall(abi.TDVMCALL_GET_TD_VM_CALL_INFO, r12=1))
    assert session.enter() == 0
    assert session.run.exit_reason == abi.KVM_EXIT_TDX
    assert session.run.exit == TdxInfoExit(nr=abi.TDVMCALL_GET_TD_VM_CALL_INFO, leaf=1)
    assert session.finish(r11=2, r12=3, r13=4, r14=5)[:5] == (0, 2, 3, 4, 5)


def test_get_quote() -> None:
    shared = 1 << 51
    session = Session(vmcall(abi.TDVMCALL_GET_QUOTE, r12=0x7000 | shared, r13=0x2000))
    assert session.enter() == 0
    quote = TdxQuoteExit(nr=abi.TDVMCALL_GET_QUOTE, ret=UNSUPPORTED, gpa=0x7000, size_bytes=0x2000)
    assert session.run.exit == quote
    assert struct.unpack_from("<I", session.run.pack(), 8) == (abi.KVM_EXIT_TDX,)
    assert session.finish(ret=0)[0] == 0
    assert Session(vmcall(abi.TDVMCALL_GET_QUOTE, r12=0x7000, r13=0x2000)).finish()[0] == INVALID


def test_setup_event_notify_interrupt() -> None:
    session = Session(vmcall(abi.TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT, r12=0x50))
    assert session.enter() == 0
    assert isinstance(session.run.exit, TdxNotifyExit)
    assert session.run.exit.vector == 0x50
    assert session.finish()[0] == UNSUPPORTED
    for vector in (31, 256):
        assert Session(vmcall(abi.TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT, r12=vector)).finish()[0] == INVALID


def test_report_fatal_error() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.report_fatal_error(7, "no way on")

    session = Session(script)
    assert session.enter() == 0
    assert session.run.exit_reason == abi.KVM_EXIT_SYSTEM_EVENT
    event = session.run.exit
    assert isinstance(event, SystemEventExit)
    assert (event.type, event.ndata) == (abi.KVM_SYSTEM_EVENT_TDX_FATAL, 16)
    registers = event.numbers()
    assert registers[12] == 7
    assert registers[14].to_bytes(8, "little") == b"no way o"


def test_unknown_tdvmcalls() -> None:
    assert Session(vmcall(0x12345)).finish()[0] == UNSUPPORTED


def test_vendor_calls_are_kvm_hypercalls() -> None:
    async def script(vcpu: Vcpu) -> int:
        from septum.arch.leaves import GuestLeaf  # noqa: PLC0415

        regs = await vcpu.tdcall(GuestLeaf.TDG_VP_VMCALL, rcx=0xFC00, r10=1, r11=5)
        return regs.r10

    assert Session(script).finish() == -1000 & (1 << 64) - 1


# -- instructions ------------------------------------------------------------------------------------------------------


def test_port_io() -> None:
    async def script(vcpu: Vcpu) -> int:
        await vcpu.io_write(0x3F8, 0x41, 1)
        return await vcpu.io_read(0x608, 4)

    session = Session(script)
    assert session.enter() == 0
    assert session.run.exit_reason == abi.KVM_EXIT_IO
    assert session.run.exit == IoExit(1, 1, 0x3F8, 1, PAGE)
    assert session.run.pio_data == 0x41
    assert session.enter() == 0
    assert session.run.exit == IoExit(0, 4, 0x608, 1, PAGE)
    session.run.pio_data = 0x1_2345_6789
    assert session.finish() == 0x2345_6789


@pytest.mark.parametrize(("size", "direction"), [(3, 0), (8, 1), (1, 2)])
def test_bad_port_io(size: int, direction: int) -> None:
    script = vmcall(ExitReason.IO_INSTRUCTION, r12=size, r13=direction, r14=0x80, r15=0)
    assert Session(script).finish()[0] == INVALID


def test_mmio() -> None:
    shared = 1 << 51

    async def script(vcpu: Vcpu) -> int:
        await vcpu.vmcall(ExitReason.EPT_VIOLATION, r12=4, r13=1, r14=0xFEC0_0000 | shared, r15=0xAABB_CCDD)
        return (await vcpu.vmcall(ExitReason.EPT_VIOLATION, r12=2, r13=0, r14=0xFEC0_0010 | shared)).r11

    session = Session(script)
    assert session.enter() == 0
    assert session.run.exit_reason == abi.KVM_EXIT_MMIO
    assert session.run.exit == MmioExit(0xFEC0_0000, b"\xdd\xcc\xbb\xaa\0\0\0\0", 4, 1)
    assert session.enter() == 0
    assert session.run.exit == MmioExit(0xFEC0_0010, bytes(8), 2, 0)
    assert session.finish(data=b"\x34\x12\xff\xff\xff\xff\xff\xff") == 0x1234


@pytest.mark.parametrize(("size", "direction", "gpa"), [(3, 0, 1 << 51), (4, 2, 1 << 51), (4, 0, 0x1000)])
def test_bad_mmio(size: int, direction: int, gpa: int) -> None:
    script = vmcall(ExitReason.EPT_VIOLATION, r12=size, r13=direction, r14=gpa, r15=0)
    assert Session(script).finish()[0] == INVALID


def test_cpuid_is_what_userspace_set() -> None:
    async def script(vcpu: Vcpu) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for leaf, subleaf in ((0x40, 0), (0x41, 1), (0x41, 2)):
            regs = await vcpu.vmcall(ExitReason.CPUID_INSTRUCTION, r12=leaf, r13=subleaf)
            found.append((regs.r12, regs.r13, regs.r14, regs.r15))
        return found

    session = Session(script)
    entries = (CpuidEntry2(0x40, 0, 0, 1, 2, 3, 4), CpuidEntry2(0x41, 1, 1, 5, 6, 7, 8))
    vmm = session.vmm
    assert vmm.solo(lambda: vmm.process.set_cpuid2(session.fd, entries)) == 0
    assert session.finish() == [(1, 2, 3, 4), (5, 6, 7, 8), (0, 0, 0, 0)]


def test_msrs() -> None:
    async def script(vcpu: Vcpu) -> list[tuple[int, int]]:
        found = []
        for msr in (0x1B, 0x802, 0x808, 0x1234, 0x2FF):
            regs = await vcpu.vmcall(ExitReason.MSR_READ, r12=msr)
            found.append((regs.r10, regs.r11 if not regs.r10 else 0))
        for msr in (0x2FF, 0x1B, 0x1234):
            regs = await vcpu.vmcall(ExitReason.MSR_WRITE, r12=msr, r13=0xC06)
            found.append((regs.r10, 0))
        return [*found, (0, (await vcpu.vmcall(ExitReason.MSR_READ, r12=0x2FF)).r11)]

    reads = [(0, 0xFEE0_0C00), (0, 0), (INVALID, 0), (INVALID, 0), (0, 0)]
    writes = [(0, 0), (INVALID, 0), (INVALID, 0), (0, 0xC06)]
    assert Session(script).finish() == [*reads, *writes]


# -- exits without TDVMCALL --------------------------------------------------------------------------------------------


class OneExit:
    """A guest that leaves for one reason, again and again."""

    def __init__(self, exit_: VmExit) -> None:
        self.exit = exit_

    async def run(self, cpu: GuestCpu) -> VmExit:
        return self.exit

    def deliver(self, cpu: GuestCpu) -> None:
        pass


def leave(exit_: VmExit) -> tuple[int, Session]:
    session = Session()
    session.vmm.process.attach_guest(session.fd, OneExit(exit_))
    return session.enter(), session


def test_triple_fault() -> None:
    r, session = leave(VmExit(ExitReason.TRIPLE_FAULT))
    assert (r, session.run.exit_reason) == (0, abi.KVM_EXIT_SHUTDOWN)
    assert "KVM_EXIT_SHUTDOWN" in session.run.describe()


def test_a_guest_that_touches_what_it_has_not_accepted() -> None:
    """With SEPT_VE_DISABLE the host is told; the VM is dead from then on."""

    async def script(vcpu: Vcpu) -> None:
        await vcpu.touch(0x10_0000)

    session = Session(script)
    assert session.enter() == -EIO
    (message,) = session.vmm.host.log.messages
    assert message == "Guest access before accepting 0x100000 on vCPU 0"
    assert session.vmm.kvm.vm_dead
    assert not session.vmm.kvm.vm_bugged
    assert session.enter() == -EIO


def test_an_instruction_fetch_from_shared_memory_bugs_the_vm() -> None:
    r, session = leave(VmExit(ExitReason.EPT_VIOLATION, 4, gpa=1 << 51 | 0x1000))
    assert r == -EIO
    assert set(session.vmm.host.log.bugs) == {"an instruction fetch from shared memory"}


def _answer(session: Session, rax: int, **registers: int) -> int:
    """KVM handles a TD exit that the module never made."""
    from septum.kvm.tdx.exits import tdx_handle_exit  # noqa: PLC0415
    from septum.kvm.tdx.run import Fastpath, tdx_to_vmx_exit_reason  # noqa: PLC0415

    vcpu = session.vmm.process.vcpu(session.fd)
    regs = Regs.of(registers)
    regs.rax = rax
    vcpu.vp_enter_ret, vcpu.vp_enter_args = rax, regs.to_tuple()
    vcpu.last_vmentry_cpu = 3
    vcpu.exit_reason = tdx_to_vmx_exit_reason(vcpu)
    result = session.vmm.solo(lambda: tdx_handle_exit(vcpu, Fastpath.NONE))
    assert isinstance(result, int)
    return result


def test_exits_that_the_module_hardly_makes() -> None:
    session = Session()
    nmi, machine_check, debug = (vmcs.VALID | vmcs.TYPE_NMI | 2, vmcs.VALID | 3 << 8 | 18, vmcs.VALID | 3 << 8 | 1)
    assert _answer(session, ExitReason.EXCEPTION_OR_NMI, r9=nmi) == 1
    assert _answer(session, ExitReason.EXCEPTION_OR_NMI, r9=machine_check) == 1
    assert _answer(session, ExitReason.EXCEPTION_OR_NMI, r9=debug) == 0
    assert session.run.exit == ExceptionExit(1)
    assert _answer(session, ExitReason.SMI_OTHER_EVENT) == 1
    assert _answer(session, ExitReason.INTERRUPT) == 1

    assert _answer(session, ExitReason.WBINVD_INSTRUCTION) == 0
    error = session.run.exit
    assert isinstance(error, InternalErrorExit)
    assert error.numbers() == (ExitReason.WBINVD_INSTRUCTION, 3)

    failed = Status.TDX_NON_RECOVERABLE_TD | 1 << 31 | ExitReason.FAILED_VMENTER_GS
    assert _answer(session, failed) == 0
    assert session.run.exit == FailEntryExit(1 << 31 | ExitReason.FAILED_VMENTER_GS, 3)

    assert _answer(session, Status.TDX_NON_RECOVERABLE_TD | ExitReason.TRIPLE_FAULT) == 0
    assert session.run.exit_reason == abi.KVM_EXIT_SHUTDOWN
    assert not session.vmm.host.log.bugs

    assert _answer(session, ExitReason.EPT_MISCONFIGURATION) == -EIO
    assert set(session.vmm.host.log.bugs) == {"a TD exit for an EPT misconfiguration"}


def test_shared_memory_without_a_slot_is_mmio() -> None:
    """KVM prepares a #VE: the next access goes to the guest's own handler."""

    async def script(vcpu: Vcpu) -> str:
        from septum.guest.vcpu import GuestFault  # noqa: PLC0415

        try:
            await vcpu.touch(0xFEC0_0000 | vcpu.shared_bit)
        except GuestFault as fault:
            return f"vector {fault.vector}"
        return "nothing happened"

    assert Session(script).finish() == f"vector {vmcs.VECTOR_VE}"


# -- interrupts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_halted_vcpu_is_woken_by_an_interrupt(seed: int) -> None:
    async def script(vcpu: Vcpu) -> tuple[int, ...]:
        await vcpu.halt(interrupts_blocked=False)
        return await vcpu.interrupts()

    session = Session(script)
    vmm, process = session.vmm, session.vmm.process

    async def enter() -> int:
        return await process.run(session.fd)

    async def interrupt() -> int:
        return await process.signal_msi(vmm.vm, 0, 0x41)

    async def signal() -> None:
        await wait_until(lambda: vmm.guests[0].finished, "end of script")
        process.kill("thread0")

    outcome = run(vmm.threads(enter, interrupt, signal), at_random(seed))
    assert outcome.violation is None, outcome.message
    assert outcome.results[:2] == [-EINTR, 1]
    assert session.result == (0x41,)


def test_a_vcpu_that_is_not_initialised_waits_for_a_signal() -> None:
    """KVM_RUN on an application processor before KVM_TDX_INIT_VCPU blocks."""
    vmm = Vmm()

    async def build() -> int:
        return await vmm.init() or await vmm.add_vcpus(1)

    assert vmm.solo(build) == 0

    async def enter() -> int:
        fd = await vmm.process.create_vcpu(vmm.vm, 1)
        return await vmm.process.run(fd)

    async def signal() -> None:
        vmm.process.kill("thread0")

    outcome = run(vmm.threads(enter, signal), solo, level=CALLS)
    assert outcome.violation is None, outcome.message
    assert outcome.results[0] == -EINTR
