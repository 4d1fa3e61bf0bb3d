"""A VM exit of a running guest: into the module, and out of it to the guest or to the host.

Source: TDX Module 1.5.01, ``src/td_dispatcher/tdx_td_dispatcher.c``, ``src/td_transitions/td_exit.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import leaves, vmcs
from septum.arch.errors import UsageError
from septum.arch.exits import BUS_LOCK_PREEMPTED, VM_ENTRY_FAILED, ExitReason
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.events import advance_rip, inject_gp, is_in_64bit_mode
from septum.tdx.guest import HANDLERS
from septum.tdx.guest.call import GuestCall
from septum.tdx.guest.exits import handle_exit
from septum.tdx.leave import leave_async, leave_vmcall
from septum.tdx.outcome import Fail, check, sanity
from septum.tdx.registers import Regs
from septum.tdx.stepping import resumes_guest
from septum.tdx.vm_exit import Interrupted, ResumeGuest, TdExit, TdVmcall, VmExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

_DEBUG: Final = TdAttributes.DEBUG.value
_RESERVED_REASON: Final = 0x3FF << 16 | 7 << 28
"""Bits of an exit reason that only debug TDs may have."""
_IDT_VECTORING_REASONS: Final = (ExitReason.TASK_SWITCH, ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION)
_BASIC: Final = VM_ENTRY_FAILED | 0xFFFF
"""The basic reason, and whether the guest was entered at all."""


async def td_exit(module: Module, lp: Lp, exit_: VmExit) -> Regs | None:
    """Handles a VM exit: None when the guest goes on, the host's registers when the TD was left.

    :raises UsageError: when no guest runs on the LP.
    """
    if not lp.running:
        raise UsageError(f"no guest runs on {lp.name}: there is no VM exit without TDH.VP.ENTER before")
    vp = module.vp(lp.running)
    td = module.td(module.pamt_entry(vp.pa).owner)
    try:
        _record(module, lp, vp, exit_)
        await _handle(module, lp, td, vp, exit_)
    except TdExit as end:
        return await leave_async(module, lp, td, vp, end)
    except TdVmcall:
        return await leave_vmcall(module, lp, td, vp)
    return None


def _record(module: Module, lp: Lp, vp: Vp, exit_: VmExit) -> None:
    """What the CPU saves at a VM exit, and the module at once after it."""
    fields, tdvps = vp.vmcs, vp.tdvps
    event = fields[vmcs.ENTRY_INTERRUPTION]
    if event & vmcs.VALID:
        fields.store(vmcs.ENTRY_INTERRUPTION, event & ~vmcs.VALID)
    fields.store(vmcs.IDT_VECTORING, 0)
    if exit_.vmcs:
        for encoding, value in exit_.vmcs.items():
            fields.store(encoding, value)
    for encoding, value in (
        (vmcs.EXIT_REASON, exit_.reason),
        (vmcs.EXIT_QUALIFICATION, exit_.qualification),
        (vmcs.EXIT_GPA, exit_.gpa),
        (vmcs.EXIT_GLA, exit_.gla),
        (vmcs.EXIT_INTERRUPTION, exit_.interruption),
        (vmcs.EXIT_INSTRUCTION_LENGTH, exit_.instruction_length),
    ):
        fields.store(encoding, value)
    tdvps.last_exit_tsc = module.hardware.rdtsc()
    if exit_.gprs is not None:
        tdvps.gprs = exit_.gprs.to_tuple()
    if not exit_.reason & VM_ENTRY_FAILED:
        tdvps.vm_launched = True
    if exit_.reason & BUS_LOCK_PREEMPTED:
        lp.bus_lock_preempted = True


async def _handle(module: Module, lp: Lp, td: Td, vp: Vp, exit_: VmExit) -> None:
    """Up to the point where the guest goes on.

    :raises TdExit, TdVmcall: the host has to act.
    """
    debug = bool(td.tdcs.attributes & _DEBUG)
    if td.tdr.fatal:
        # A machine check on another LP: nothing in the TD's memory may be touched any more.
        raise TdExit(
            Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
            exit_.reason,
            exit_.qualification,
            interruption=exit_.interruption,
        )
    sanity(debug or not exit_.reason & _RESERVED_REASON, f"exit reason {exit_.reason:#x} is corrupted")
    if not resumes_guest(module, lp, vp, exit_):
        if vp.vmcs[vmcs.IDT_VECTORING] & vmcs.VALID:
            _repeat_event(vp, exit_, debug=debug)
        try:
            if exit_.reason & _BASIC == ExitReason.TDCALL:
                await tdcall(module, lp, td, vp)
            else:
                handle_exit(module, lp, td, vp, exit_)
            _complete_instruction(vp)
        except ResumeGuest:
            pass
        if lp.bus_lock_preempted:
            raise TdExit(Status.TDX_SUCCESS, ExitReason.BUS_LOCK)
    if debug and _is_intercepted(vp):
        interruption = vp.vmcs[vmcs.ENTRY_INTERRUPTION]
        raise TdExit(Status.TDX_SUCCESS, ExitReason.EXCEPTION_OR_NMI, interruption=interruption)


def _repeat_event(vp: Vp, exit_: VmExit, *, debug: bool) -> None:
    """The exit came while the CPU delivered an event: it is delivered again at the next entry."""
    fields = vp.vmcs
    if exit_.reason & _BASIC not in _IDT_VECTORING_REASONS:
        sanity(debug, "IDT vectoring with an exit that it cannot cause")
        raise TdExit(Status.TDX_SUCCESS, exit_.reason, exit_.qualification)
    event = fields[vmcs.IDT_VECTORING]
    if event & vmcs.TYPE_MASK == vmcs.TYPE_NMI:
        fields.store(vmcs.GUEST_INTERRUPTIBILITY, fields[vmcs.GUEST_INTERRUPTIBILITY] & ~vmcs.BLOCKING_BY_NMI)
    fields[vmcs.ENTRY_INTERRUPTION] = event & _EVENT
    if event & vmcs.ERROR_CODE_VALID:
        fields.store(vmcs.ENTRY_ERROR_CODE, fields[vmcs.IDT_VECTORING_ERROR_CODE])
    fields.store(vmcs.ENTRY_INSTRUCTION_LENGTH, fields[vmcs.EXIT_INSTRUCTION_LENGTH])


_EVENT: Final = vmcs.VALID | vmcs.ERROR_CODE_VALID | vmcs.TYPE_MASK | vmcs.VECTOR_MASK


def _complete_instruction(vp: Vp) -> None:
    """Past the instruction that exited, unless an event was injected instead."""
    fields, tdvps = vp.vmcs, vp.tdvps
    if fields[vmcs.ENTRY_INTERRUPTION] & vmcs.VALID:
        return
    if tdvps.pend_nmi and not tdvps.ve_info.valid:
        fields[vmcs.PROCBASED_CTLS] = fields[vmcs.PROCBASED_CTLS] | vmcs.NMI_WINDOW_EXITING
    advance_rip(vp)


def _is_intercepted(vp: Vp) -> bool:
    """``is_voe_in_exception_bitmap``: the debugger of the TD wants to see the exception that is to be injected."""
    fields = vp.vmcs
    event = fields[vmcs.ENTRY_INTERRUPTION]
    if event & (vmcs.VALID | vmcs.TYPE_MASK) != vmcs.VALID | vmcs.TYPE_HARDWARE_EXCEPTION:
        return False
    vector = event & vmcs.VECTOR_MASK
    if not fields[vmcs.EXCEPTION_BITMAP] >> vector & 1:
        return False
    error_code = fields[vmcs.EXIT_ERROR_CODE] & fields[vmcs.PAGE_FAULT_MASK]
    return vector != vmcs.VECTOR_PF or error_code == fields[vmcs.PAGE_FAULT_MATCH]


# -- TDCALL ------------------------------------------------------------------------------------------------------------


async def tdcall(module: Module, lp: Lp, td: Td, vp: Vp) -> None:
    """``td_call``: the leaf in RAX; its completion status goes to RAX.

    :raises TdExit, TdVmcall, ResumeGuest: as the leaf says, after its locks are dropped.
    """
    tdvps = vp.tdvps
    if not is_in_64bit_mode(vp):
        inject_gp(vp)
        return
    regs = Regs.from_tuple(tdvps.gprs)
    call = GuestCall(module, lp, td, vp, regs)
    try:
        status = await _dispatch(call)
    except Fail as fail:
        status = fail.status
    except (TdExit, TdVmcall, ResumeGuest) as end:
        await call.locks.drop()
        tdvps.gprs = regs.to_tuple()
        if isinstance(end, Interrupted):
            tdvps.hp_lock_busy = False
        raise
    await call.locks.drop()
    timed_out = False
    if status >> 32 == Status.TDX_OPERAND_BUSY_HOST_PRIORITY >> 32:
        status = Status.TDX_OPERAND_BUSY | status & 0xFFFF_FFFF
        timed_out = _has_waited_too_long(module, td, vp)
    elif tdvps.hp_lock_busy:
        tdvps.hp_lock_busy = False
    regs.rax = status
    tdvps.gprs = regs.to_tuple()
    if timed_out:
        raise TdExit(Status.TDX_HOST_PRIORITY_BUSY_TIMEOUT, report_bus_lock=False)


async def _dispatch(call: GuestCall) -> int:
    rax = call.regs.rax
    reserved = rax & leaves.RESERVED_MASK or (call.version and call.leaf != leaves.GuestLeaf.TDG_VM_RD)
    handler = HANDLERS.get(call.leaf)
    check(not reserved and handler is not None, Status.TDX_OPERAND_INVALID, Operand.RAX)
    assert handler is not None
    return await handler(call)


def _has_waited_too_long(module: Module, td: Td, vp: Vp) -> bool:
    """The guest gave way to a host that wants a lock; the host has HP_LOCK_TIMEOUT to come back for it."""
    tdvps, now = vp.tdvps, module.hardware.rdtsc
    if not tdvps.hp_lock_busy:
        tdvps.hp_lock_busy = True
        tdvps.hp_lock_busy_start = now()
        return False
    if now() - tdvps.hp_lock_busy_start < td.tdcs.hp_lock_timeout:
        return False
    tdvps.hp_lock_busy = False
    return True
