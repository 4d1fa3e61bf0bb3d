"""What a script can do to the world: instructions, which the vCPU executes as the CPU would.

A script only asks (``await Tdcall(...)``); it never touches a cell itself. So it is a function from the results it has
got to the instruction that comes next, and can be brought to any place again by giving it the same results.

Source of what the CPU does: Intel SDM, volume 3, "EPT violations" and "Virtualization exceptions".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Final, Generic, NamedTuple, TypeVar

from septum.arch import sept, vmcs
from septum.arch.exits import ExitReason, exit_reason_name
from septum.arch.leaves import LEAF_MASK, GuestLeaf, leaf_name
from septum.arch.pages import PAGE_4K, SIZE_NAMES, is_shared_gpa
from septum.arch.status import name as status_name
from septum.core.cells import Shared
from septum.core.steps import ctx, emit, step, wait_until
from septum.guest.tlb import CachingCpu
from septum.kvm.abi import (
    TDVMCALL_GET_QUOTE,
    TDVMCALL_GET_TD_VM_CALL_INFO,
    TDVMCALL_MAP_GPA,
    TDVMCALL_REPORT_FATAL_ERROR,
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT,
)
from septum.kvm.guest_protocol import GuestCpu, external_interrupt
from septum.tdx.ept import Translation, Walk, translate_private, translate_shared
from septum.tdx.registers import Regs
from septum.tdx.state.vp import VE_INFO_VALID, VeInfo
from septum.tdx.vm_exit import VmExit

T = TypeVar("T")

GHCI_FUNCTIONS: Final = {
    TDVMCALL_GET_TD_VM_CALL_INFO: "GetTdVmCallInfo",
    TDVMCALL_MAP_GPA: "MapGPA",
    TDVMCALL_GET_QUOTE: "GetQuote",
    TDVMCALL_REPORT_FATAL_ERROR: "ReportFatalError",
    TDVMCALL_SETUP_EVENT_NOTIFY_INTERRUPT: "SetupEventNotifyInterrupt",
}
"""Functions of the GHCI in R11 of TDG.VP.VMCALL; the others are exit reasons."""
READ: Final = sept.R
WRITE: Final = sept.W
FETCH: Final = sept.X
_ACCESS_NAMES: Final = {READ: "reads", WRITE: "writes", FETCH: "fetches from"}
_GLA_VALID: Final = 1 << 7 | 1 << 8
"""In the exit qualification: there is a linear address, and the access was to its translation."""
_LONG_MODE_EFER: Final = 0xD01
"""SCE, LME, LMA, NXE."""
_CS_LONG: Final = 1 << 13
_CS_DEFAULT_SIZE: Final = 1 << 14


class Fault(NamedTuple):
    """An exception that was delivered instead of completing the instruction."""

    vector: int
    error_code: int = 0


class Progress(Shared):
    """Where a scripted guest is.

    ``place`` is a number that the guest alone can read; ``result`` is what the script published or returned, once it
    has (``finished``).
    """

    place: int = 0
    finished: bool = False
    result: Any = None


class Instruction(ABC, Generic[T]):
    """One instruction. Awaiting it in a script gives its result, or the exception that came instead."""

    __slots__ = ()

    def __await__(self) -> Generator[Instruction[Any], T | Fault, T | Fault]:
        return (yield self)

    @abstractmethod
    async def execute(self, cpu: GuestCpu) -> T | Fault | VmExit:
        """Its result, an exception, or the VM exit that it causes."""

    def completed(self, cpu: GuestCpu) -> T:
        """Its result, after it caused a VM exit and RIP moved on."""
        raise RuntimeError(f"{self} cannot be completed by a VM exit")


class Tdcall(Instruction[tuple[int, ...]]):
    """TDCALL with these registers (in the order of ``GPR_NAMES``). The result is the registers after it."""

    __slots__ = ("gprs",)

    def __init__(self, gprs: tuple[int, ...]) -> None:
        self.gprs = gprs

    async def execute(self, cpu: GuestCpu) -> VmExit:
        return _tdcall(Regs.from_tuple(self.gprs))

    def completed(self, cpu: GuestCpu) -> tuple[int, ...]:
        return _completed(self.gprs[0] & LEAF_MASK, cpu)


class Accept(Instruction[int]):
    """TDG.MEM.PAGE.ACCEPT of a page. The result is the completion status alone: guests make this call for each page
    that they have, and what a script has seen is kept."""

    __slots__ = ("gpa_and_level",)

    def __init__(self, gpa_and_level: int) -> None:
        self.gpa_and_level = gpa_and_level

    async def execute(self, cpu: GuestCpu) -> VmExit:
        return _tdcall(Regs(GuestLeaf.TDG_MEM_PAGE_ACCEPT, self.gpa_and_level))

    def completed(self, cpu: GuestCpu) -> int:
        return _completed(GuestLeaf.TDG_MEM_PAGE_ACCEPT, cpu)[0]


def _tdcall(regs: Regs) -> VmExit:
    if ctx.trace is not None:
        emit("tdcall", _describe(regs))
    return VmExit.tdcall(regs)


def _completed(leaf: int, cpu: GuestCpu) -> tuple[int, ...]:
    """The registers after a TDCALL."""
    gprs = cpu.vp.tdvps.gprs
    if ctx.trace is not None and gprs[0]:
        emit("tdcall", f"{leaf_name(leaf, guest=True)} -> {status_name(gprs[0])}")
    return gprs


def _describe(regs: Regs) -> str:
    """A TDCALL as diagrams show it."""
    leaf = regs.rax & LEAF_MASK
    if leaf == GuestLeaf.TDG_VP_VMCALL:
        name = GHCI_FUNCTIONS.get(regs.r11) or exit_reason_name(regs.r11)
        return f"TDG.VP.VMCALL {name} R12={regs.r12:#x}"
    if leaf == GuestLeaf.TDG_MEM_PAGE_ACCEPT:
        return f"TDG.MEM.PAGE.ACCEPT {regs.rcx & -PAGE_4K:#x} {SIZE_NAMES[regs.rcx & 7]}"
    return leaf_name(leaf, guest=True)


class Access(Instruction[bytes]):
    """A load or fetch of ``size`` bytes, or a store of ``data``, inside one page of 4 KiB.

    The result of a load or fetch is what was there.
    """

    __slots__ = ("data", "gpa", "right", "size")

    def __init__(self, right: int, gpa: int, size: int, data: bytes = b"") -> None:
        if gpa % PAGE_4K + size > PAGE_4K:
            raise ValueError(f"an access to {size} bytes at {gpa:#x} crosses a page")
        self.right = right
        self.gpa = gpa
        self.size = size
        self.data = data

    async def execute(self, cpu: GuestCpu) -> bytes | Fault | VmExit:
        await step("access", self)
        found = translate(cpu, self.gpa, self.right)
        if found.walk is not Walk.SUCCESS:
            return violation(cpu, self.gpa, self.right, found)
        if ctx.trace is not None:
            emit("access", str(self))
        if self.right != WRITE:
            return cpu.module.memory.read(found.pa, self.size)
        if self.data:
            cpu.module.memory.write(found.pa, self.data)
        return b""

    def __repr__(self) -> str:
        return f"{_ACCESS_NAMES[self.right]} {self.gpa:#x}"


class WaitFor(Instruction[None]):
    """Reads memory again and again (with PAUSE) until ``content`` is there."""

    __slots__ = ("content", "gpa")

    def __init__(self, gpa: int, content: bytes) -> None:
        self.gpa = gpa
        self.content = content

    async def execute(self, cpu: GuestCpu) -> Fault | VmExit | None:
        await wait_until(lambda: cpu.interrupted() or self._is_over(cpu), "see", self)
        if not self._is_over(cpu):
            return external_interrupt()
        found = translate(cpu, self.gpa, READ)
        return None if found.walk is Walk.SUCCESS else violation(cpu, self.gpa, READ, found)

    def _is_over(self, cpu: GuestCpu) -> bool:
        """Whether how the address translates, or what is there, ends the waiting."""
        found = translate(cpu, self.gpa, READ, only_look=True)
        return found.walk is not Walk.SUCCESS or cpu.module.memory.read(found.pa, len(self.content)) == self.content

    def __repr__(self) -> str:
        return f"{self.content.hex()} at {self.gpa:#x}"


class Begin(Instruction[tuple[int, ...]]):
    """What comes before the script: the VCPU goes to 64-bit mode. The result is the registers that it began with."""

    __slots__ = ()

    async def execute(self, cpu: GuestCpu) -> tuple[int, ...]:
        fields = cpu.vp.vmcs
        fields[vmcs.GUEST_EFER] = _LONG_MODE_EFER
        fields[vmcs.GUEST_CS_ACCESS_RIGHTS] = fields[vmcs.GUEST_CS_ACCESS_RIGHTS] & ~_CS_DEFAULT_SIZE | _CS_LONG
        return cpu.vp.tdvps.gprs


class TakeInterrupts(Instruction[tuple[int, ...]]):
    """The vectors of the interrupts that were posted to the VCPU since the last time, lowest first."""

    __slots__ = ()

    async def execute(self, cpu: GuestCpu) -> tuple[int, ...]:
        return cpu.posted()


class Idle(Instruction[None]):
    """Computes, without exits of its own, for ever."""

    __slots__ = ()

    async def execute(self, cpu: GuestCpu) -> VmExit:
        return await cpu.idle()


class TripleFault(Instruction[None]):
    """An exception that nobody handles: the VCPU shuts down."""

    __slots__ = ()

    async def execute(self, cpu: GuestCpu) -> VmExit:
        emit("guest", "triple fault")
        return VmExit(ExitReason.TRIPLE_FAULT)


class Publish(Instruction[None]):
    """Makes ``result`` known outside; None does not replace what is known already.

    (No instruction of a CPU, but a script has no other way to tell.)
    """

    __slots__ = ("progress", "result")

    def __init__(self, progress: Progress, result: Any) -> None:
        self.progress = progress
        self.result = result

    async def execute(self, cpu: GuestCpu) -> None:
        if self.result is not None or not self.progress.finished:
            self.progress.result = self.result
            self.progress.finished = True


def translate(cpu: GuestCpu, gpa: int, right: int, *, only_look: bool = False) -> Translation:
    """The CPU's walk for an access of the guest, or what it held of an earlier one.

    With ``only_look`` nothing is kept or checked.

    :raises Violation: when it held a translation that must be gone.
    """
    if is_shared_gpa(gpa, cpu.td.tdcs.gpaw):
        return translate_shared(cpu.module, cpu.td, cpu.vp, gpa, right)
    tlb = cpu.tlb if isinstance(cpu, CachingCpu) else None
    held = tlb.look_up(cpu, gpa) if tlb is not None else None
    if tlb is None or only_look:
        return translate_private(cpu.module, cpu.td, gpa, right) if held is None else _held(held)
    if held is not None:
        tlb.check(cpu, gpa, held)
        return _held(held)
    found = translate_private(cpu.module, cpu.td, gpa, right)
    if found.walk is Walk.SUCCESS:
        tlb.keep(cpu, gpa, found.pa)
    return found


def _held(pa: int) -> Translation:
    """The translation to ``pa`` that a CPU held. (Private pages are mapped with all rights or none.)"""
    return Translation(Walk.SUCCESS, pa, 0, sept.RWX)


def violation(cpu: GuestCpu, gpa: int, right: int, found: Translation) -> Fault | VmExit:
    """What the CPU does about a walk that failed: a VM exit, or at once a #VE, if the entry does not suppress it and
    the guest has read the last one's information.
    """
    if found.walk is Walk.MISCONFIGURED:
        return VmExit(ExitReason.EPT_MISCONFIGURATION, gpa=gpa)
    qualification = right | found.rights << 3 | _GLA_VALID
    tdvps = cpu.vp.tdvps
    if found.walk is Walk.CONVERTIBLE and not tdvps.ve_info.valid:
        index = cpu.vp.vmcs[vmcs.EPTP_INDEX]
        tdvps.ve_info = VeInfo(ExitReason.EPT_VIOLATION, VE_INFO_VALID, qualification, gpa, gpa, index)
        return Fault(vmcs.VECTOR_VE)
    return VmExit(ExitReason.EPT_VIOLATION, qualification, gpa, gpa)
