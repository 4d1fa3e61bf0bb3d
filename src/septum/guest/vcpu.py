"""A VCPU as a script sees it: TDCALLs, calls to the host, memory.

Everything here is made of instructions (:mod:`septum.guest.instructions`), so each of these coroutines can be left and
entered again by the host wherever the real code could. An exception that the module injects goes to the handler for
virtualization exceptions (:attr:`Vcpu.on_ve`) or, as :class:`GuestFault`, to the script.

Sources: TDX Module 1.5.01; Guest-Host Communication Interface (Intel 348552); Linux 6.16 ``arch/x86/coco/tdx/tdx.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple, TypeVar

from septum.arch import vmcs
from septum.arch.exits import ExitReason, exit_reason_name
from septum.arch.leaves import GuestLeaf
from septum.arch.pages import PAGE_2M, PAGE_4K, Level, is_aligned
from septum.arch.status import CODE, Status
from septum.arch.status import name as status_name
from septum.arch.structures import TdReport
from septum.guest.instructions import (
    FETCH,
    READ,
    WRITE,
    Accept,
    Access,
    Fault,
    Idle,
    Instruction,
    Progress,
    Publish,
    TakeInterrupts,
    Tdcall,
    WaitFor,
)
from septum.kvm.abi import (
    TDVMCALL_GET_TD_VM_CALL_INFO,
    TDVMCALL_MAP_GPA,
    TDVMCALL_REPORT_FATAL_ERROR,
    TDVMCALL_STATUS_RETRY,
    TDVMCALL_STATUS_SUCCESS,
)
from septum.tdx.registers import GPR_NAMES, Regs
from septum.tdx.state.vp import VeInfo

T = TypeVar("T")

REPORT_SIZE: Final = 1024
_RSP: Final = 4
_MASK_BIT: Final = {name: 1 << (i if i < _RSP else i + 1) for i, name in enumerate(GPR_NAMES)}
_STANDARD_MASK: Final = sum(_MASK_BIT[name] for name in ("r10", "r11", "r12", "r13", "r14", "r15"))
_MESSAGE_REGISTERS: Final = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
_IO_WRITE: Final = 1
_TRY_AGAIN: Final = (Status.TDX_OPERAND_BUSY, Status.TDX_OPERAND_BUSY_HOST_PRIORITY)
_MAP_GPA_STUCK: Final = 3
"""So often MapGPA may ask to be called again without having come further (Linux: ``max_retries_per_page``)."""


class GuestFault(Exception):
    """An exception that no handler of the guest takes. If the script does not either, the VCPU shuts down."""

    def __init__(self, vector: int, error_code: int = 0, why: str = "") -> None:
        super().__init__(f"exception {vector}" + (f": {why}" if why else ""))
        self.vector = vector
        self.error_code = error_code


class HostRefused(Exception):
    """A call to the host that the guest cannot do without failed; ``status`` is what came back in R10.

    If the script does not handle it, the guest reports a fatal error.
    """

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what} returned {status:#x}")
        self.status = status


class VpInfo(NamedTuple):
    """What TDG.VP.INFO tells."""

    gpa_width: int
    attributes: int
    num_vcpus: int
    max_vcpus: int
    vcpu_index: int
    sys_rd: bool


VeHandler = Callable[["Vcpu", VeInfo], Coroutine[Any, Any, object]]


async def accept_on_ve(vcpu: Vcpu, info: VeInfo) -> bool:
    """The handler that a VCPU has at first: accepts the page that was touched, so that the access can be made again.

    Returns whether it did. When somebody else is busy with the page it does not; then the access brings another #VE, or
    succeeds.

    :raises GuestFault: when it was something else than an access to a private page.
    """
    if info.exit_reason != ExitReason.EPT_VIOLATION or info.gpa & vcpu.shared_bit:
        raise GuestFault(vmcs.VECTOR_VE, why=f"{exit_reason_name(info.exit_reason)} at {info.gpa:#x}")
    # Larger first: a page of 2 MiB cannot be accepted in parts, and one of 4 KiB is told apart without a TD exit.
    status = await vcpu.accept_page(info.gpa & -PAGE_2M, Level.PD)
    if status & CODE in (Status.TDX_PAGE_SIZE_MISMATCH, *_TRY_AGAIN):
        status = await vcpu.accept_page(info.gpa & -PAGE_4K)
    if status & CODE not in (Status.TDX_SUCCESS, Status.TDX_PAGE_ALREADY_ACCEPTED, *_TRY_AGAIN):
        raise GuestFault(vmcs.VECTOR_VE, why=f"page {info.gpa:#x}: {status_name(status)}")
    return status & CODE == Status.TDX_SUCCESS


class Vcpu:
    """One VCPU. ``index`` is its number, ``shared_bit`` the bit that makes a guest physical address shared, ``hob`` the
    address of the list of memory that the host gave it (0: none).
    """

    __slots__ = ("_progress", "hob", "index", "on_ve", "shared_bit")

    def __init__(self, start: tuple[int, ...], progress: Progress) -> None:
        """:param start: the registers that the VCPU began with."""
        self._progress = progress
        regs = Regs.from_tuple(start)
        self.index = regs.rsi & 0xFFFF_FFFF
        self.shared_bit = 1 << (regs.rbx & 0x3F) - 1
        self.hob = regs.rcx
        self.on_ve: VeHandler = accept_on_ve

    # -- instructions ----------------------------------------------------------------------------------------------

    async def _complete(self, instruction: Instruction[T]) -> T:
        """Executes an instruction until it completes; exceptions are handled in between."""
        while True:
            result = await instruction
            if not isinstance(result, Fault):
                return result
            await self._handle(result)

    async def _handle(self, fault: Fault) -> None:
        if fault.vector != vmcs.VECTOR_VE:
            raise GuestFault(fault.vector, fault.error_code)
        await self.on_ve(self, await self.veinfo_get())

    async def tdcall(self, leaf: GuestLeaf, *, version: int = 0, **registers: int) -> Regs:
        """TDCALL with registers by name; returns the registers after it, the completion status in ``rax``."""
        regs = Regs.of(registers)
        regs.rax = leaf | version << 16
        return Regs.from_tuple(await self._complete(Tdcall(regs.to_tuple())))

    async def read(self, gpa: int, size: int = 8) -> bytes:
        """Reads memory, page by page."""
        parts = []
        while size:
            part = min(size, PAGE_4K - gpa % PAGE_4K)
            parts.append(await self._complete(Access(READ, gpa, part)))
            gpa += part
            size -= part
        return b"".join(parts)

    async def write(self, gpa: int, data: bytes) -> None:
        """Writes memory, page by page."""
        while data:
            part = data[: PAGE_4K - gpa % PAGE_4K]
            await self._complete(Access(WRITE, gpa, len(part), part))
            gpa += len(part)
            data = data[len(part) :]

    async def touch(self, gpa: int, right: int = WRITE) -> None:
        """Accesses an address (READ, WRITE or FETCH) without changing what is there."""
        await self._complete(Access(right, gpa, 0))

    async def fetch(self, gpa: int, size: int = 16) -> bytes:
        """Fetches an instruction."""
        return await self._complete(Access(FETCH, gpa, size))

    async def wait_for(self, gpa: int, content: bytes) -> None:
        """Spins until memory has this content."""
        await self._complete(WaitFor(gpa, content))

    async def publish(self, result: Any) -> None:
        """Makes a result known outside, for a script that does not come to return it."""
        await self._complete(Publish(self._progress, result))

    async def interrupts(self) -> tuple[int, ...]:
        """Takes the interrupts that were posted since the last time."""
        return await self._complete(TakeInterrupts())

    async def idle(self) -> None:
        """Computes for ever; only interrupts of the host's CPU come between."""
        await self._complete(Idle())

    # -- calls to the module ---------------------------------------------------------------------------------------

    async def accept_page(self, gpa: int, level: int = Level.PT) -> int:
        """TDG.MEM.PAGE.ACCEPT, once; returns the completion status."""
        return await self._complete(Accept(gpa | level))

    async def accept(self, start: int, end: int) -> tuple[int, int]:
        """Accepts all pages from ``start`` to ``end``, 2 MiB at a time where that succeeds, else 4 KiB (as Linux does).

        What is accepted already is passed over; a page of 4 KiB that the host is busy with is tried again. Returns how
        many pages of 4 KiB and how many of 2 MiB were accepted.

        :raises GuestFault: when a page cannot be accepted: a guest must not go on without knowing its memory.
        """
        accepted = [0, 0]
        small_until = start
        while start < end:
            large = start >= small_until and is_aligned(start, PAGE_2M) and end - start >= PAGE_2M
            level = Level.PD if large else Level.PT
            status = await self.accept_page(start, level)
            code = status & CODE
            if code == Status.TDX_SUCCESS:
                accepted[level] += 1
            elif code != Status.TDX_PAGE_ALREADY_ACCEPTED:
                if large:
                    small_until = start + PAGE_2M
                    continue
                if code in _TRY_AGAIN:
                    continue
                raise GuestFault(vmcs.VECTOR_GP, why=f"page {start:#x}: {status_name(status)}")
            start += PAGE_2M if large else PAGE_4K
        return accepted[0], accepted[1]

    async def vp_info(self) -> VpInfo:
        """TDG.VP.INFO."""
        regs = await self.tdcall(GuestLeaf.TDG_VP_INFO)
        return VpInfo(regs.rcx & 0x3F, regs.rdx, regs.r8 & 0xFFFF_FFFF, regs.r8 >> 32, regs.r9, bool(regs.r10 & 1))

    async def veinfo_get(self) -> VeInfo:
        """TDG.VP.VEINFO.GET.

        :raises GuestFault: when there is none.
        """
        regs = await self.tdcall(GuestLeaf.TDG_VP_VEINFO_GET)
        if regs.rax:
            raise GuestFault(vmcs.VECTOR_VE, why="no VE_INFO")
        length, information = regs.r10 & 0xFFFF_FFFF, regs.r10 >> 32
        return VeInfo(regs.rcx, 0, regs.rdx, regs.r8, regs.r9, 0, length, information)

    async def report(self, data: bytes, buffer: int) -> TdReport:
        """TDG.MR.REPORT with 64 bytes of report data, through two pages of private memory at ``buffer``.

        :raises GuestFault: when the module refuses, or the report's hashes are not those of its parts.
        """
        await self.write(buffer + PAGE_4K, data)
        regs = await self.tdcall(GuestLeaf.TDG_MR_REPORT, rcx=buffer, rdx=buffer + PAGE_4K)
        if regs.rax:
            raise GuestFault(vmcs.VECTOR_GP, why=f"TDG.MR.REPORT: {status_name(regs.rax)}")
        report = TdReport.unpack(await self.read(buffer, REPORT_SIZE))
        if not report.hashes_match() or report.mac.report_data != data:
            raise GuestFault(vmcs.VECTOR_GP, why="the TD report does not fit together")
        return report

    async def rtmr_extend(self, index: int, digest: bytes, buffer: int) -> int:
        """TDG.MR.RTMR.EXTEND with 48 bytes, through private memory at ``buffer``; returns the completion status."""
        await self.write(buffer, digest)
        return (await self.tdcall(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=buffer, rdx=index)).rax

    # -- calls to the host -----------------------------------------------------------------------------------------

    async def vmcall(self, function: int, **registers: int) -> Regs:
        """TDG.VP.VMCALL of a standard function of the GHCI with arguments from R12 on; returns the registers after it,
        the host's answer in ``r10``. Registers other than R10 to R15 are passed when they are given.

        :raises GuestFault: when the module refuses.
        """
        mask = _STANDARD_MASK
        for name in registers:
            mask |= _MASK_BIT[name]
        regs = await self.tdcall(GuestLeaf.TDG_VP_VMCALL, rcx=mask, r10=0, r11=function, **registers)
        if regs.rax:
            raise GuestFault(vmcs.VECTOR_GP, why=f"TDG.VP.VMCALL: {status_name(regs.rax)}")
        return regs

    async def get_td_vm_call_info(self, leaf: int = 0) -> Regs:
        """GetTdVmCallInfo: what the host can do."""
        return await self.vmcall(TDVMCALL_GET_TD_VM_CALL_INFO, r12=leaf)

    async def map_gpa(self, gpa: int, size: int, *, shared: bool) -> None:
        """MapGPA: asks the host to make memory shared or private; called again from where it stopped, as Linux does.

        Private memory must be accepted afterwards.

        :raises HostRefused: when the host does not, or gets no further.
        """
        start, end = gpa, gpa + size
        bit = self.shared_bit if shared else 0
        stuck = 0
        while stuck < _MAP_GPA_STUCK:
            regs = await self.vmcall(TDVMCALL_MAP_GPA, r12=start | bit, r13=end - start)
            if regs.r10 == TDVMCALL_STATUS_SUCCESS:
                return
            reached = regs.r11 & ~self.shared_bit
            if regs.r10 != TDVMCALL_STATUS_RETRY or not start <= reached < end:
                raise HostRefused("MapGPA", regs.r10)
            stuck = stuck + 1 if reached == start else 0
            start = reached
        raise HostRefused(f"MapGPA, again and again at {start:#x},", TDVMCALL_STATUS_RETRY)

    async def report_fatal_error(self, code: int, message: str = "") -> None:
        """ReportFatalError: tells the host that the guest cannot go on, with up to 64 bytes of text."""
        text = message.encode("ascii", "replace")[:64].ljust(64, b"\0")
        words = {name: int.from_bytes(text[8 * i :][:8], "little") for i, name in enumerate(_MESSAGE_REGISTERS)}
        await self.vmcall(TDVMCALL_REPORT_FATAL_ERROR, r12=code, **words)

    async def halt(self, *, interrupts_blocked: bool = True) -> None:
        """HLT: sleeps until the host wakes the VCPU."""
        await self.vmcall(ExitReason.HLT_INSTRUCTION, r12=int(interrupts_blocked))

    async def io_write(self, port: int, value: int, size: int) -> None:
        """OUT to a port.

        :raises HostRefused: when the host does not.
        """
        regs = await self.vmcall(ExitReason.IO_INSTRUCTION, r12=size, r13=_IO_WRITE, r14=port, r15=value)
        if regs.r10:
            raise HostRefused(f"OUT to port {port:#x}", regs.r10)

    async def io_read(self, port: int, size: int) -> int:
        """IN from a port.

        :raises HostRefused: when the host does not.
        """
        regs = await self.vmcall(ExitReason.IO_INSTRUCTION, r12=size, r13=0, r14=port)
        if regs.r10:
            raise HostRefused(f"IN from port {port:#x}", regs.r10)
        return regs.r11 & (1 << 8 * size) - 1
