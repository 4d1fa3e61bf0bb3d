"""TDG.SERVTD.RD and TDG.SERVTD.WR: a service TD reads and writes fields of a TD that it is bound to.

What goes wrong with the target TD is the host's doing, so the host gets it, as a cross-TD exit. The service TD finds
the status in RAX when it runs again.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/migration_api_calls/tdg_servtd_rd_wr.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.leaves import GuestLeaf
from septum.arch.metadata import Access, Context
from septum.arch.op_state import SERVTD_ALLOWED
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.tdx.call import SHARED, check_build_state, lock_tdr
from septum.tdx.measurement import tee_info_hash
from septum.tdx.metadata import Scope, answer_read, answer_write, clear_outputs
from septum.tdx.outcome import Fail, check
from septum.tdx.servtd import (
    IGNORE_TDINFO_MASK,
    IGNORE_TDINFO_SHIFT,
    MAX_SERVTDS,
    Binding,
    BindingState,
    open_handle,
)
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler
    from septum.tdx.guest.call import GuestCall
    from septum.tdx.state.td import Td

_CLASS_SHIFT: Final = 32
"""A status without its details."""


async def tdg_servtd_rd(call: GuestCall) -> int:
    """TDG.SERVTD.RD: reads a field of the target TD. RCX: binding handle; RDX: field id; R10 to R13: target's TD_UUID.

    Out RDX: next field id; R8: value; R10 to R13: the target's TD_UUID if an import has changed it.
    """
    field_id = call.regs.rdx
    clear_outputs(call.regs, iterate=True)
    return answer_read(await _target(call), call.regs, field_id, iterate=True)


async def tdg_servtd_wr(call: GuestCall) -> int:
    """TDG.SERVTD.WR: writes a field of the target TD. RCX: binding handle; RDX: field id; R8: value; R9: write mask;
    R10 to R13: target's TD_UUID.

    Out R8: old value; R10 to R13: the target's TD_UUID if an import has changed it.
    """
    regs, value = call.regs, call.regs.r8
    clear_outputs(regs, iterate=False)
    return await answer_write(await _target(call), regs, regs.rdx, value, regs.r9)


async def _target(call: GuestCall) -> Scope:
    """The target TD, with shared locks on its TDR, OP_STATE and bindings, if the caller is the TD bound to it.

    :raises Fail: OPERAND_INVALID, OPERAND_BUSY, TARGET_UUID_UPDATED or TARGET_UUID_MISMATCH.
    :raises TdExit: whatever else is wrong with the target or the binding.
    """
    regs, own = call.regs, call.td
    pa, slot = open_handle(regs.rcx, own.tdr.td_uuid)
    check(slot < MAX_SERVTDS, Status.TDX_OPERAND_INVALID, Operand.RCX)
    try:
        target = await lock_tdr(call, pa, Operand.TDR, SHARED)
        check_build_state(target)
        await call.locks.take(target.op_state_lock, SHARED, Operand.OP_STATE)
        check(target.tdcs.op_state in SERVTD_ALLOWED[call.leaf], Status.TDX_OP_STATE_INCORRECT)
    except Fail as fail:
        # To give way to the host counts as the target's state, and not as busy.
        if fail.status >> _CLASS_SHIFT == Status.TDX_OPERAND_BUSY >> _CLASS_SHIFT:
            raise
        raise _cross_td_exit(call, fail.status, pa) from None
    _check_uuid(call, target)
    await call.locks.take(target.servtd_bindings_lock, SHARED, Operand.SERVTD_BINDINGS)
    binding = Binding.unpack(target.tdcs.servtd_bindings_table)
    try:
        check(binding.state == BindingState.BOUND, Status.TDX_SERVTD_NOT_BOUND, slot)
        check(binding.uuid == own.tdr.td_uuid, Status.TDX_SERVTD_UUID_MISMATCH)
    except Fail as fail:
        raise _cross_td_exit(call, fail.status, pa) from None
    await call.locks.take(own.rtmr_lock, SHARED, Operand.RTMR)
    info_hash = tee_info_hash(own.tdcs, binding.attributes >> IGNORE_TDINFO_SHIFT & IGNORE_TDINFO_MASK)
    await call.locks.release(own.rtmr_lock)
    if binding.info_hash != info_hash:
        raise _cross_td_exit(call, Status.TDX_SERVTD_INFO_HASH_MISMATCH, pa)
    return Scope(call.module, call.lp, Context.TD, Access.SERVICE_TD, target)


def _check_uuid(call: GuestCall, target: Td) -> None:
    """Whether the caller means this TD. One that it was bound to before an import has a new UUID, which it is told."""
    regs, uuid = call.regs, target.tdr.td_uuid
    meant = (regs.r10, regs.r11, regs.r12, regs.r13)
    if meant == uuid:
        return
    before_import = target.tdcs.pre_import_uuid
    check(meant == before_import, Status.TDX_TARGET_UUID_MISMATCH)
    regs.r10, regs.r11, regs.r12, regs.r13 = uuid
    raise Fail(Status.TDX_TARGET_UUID_UPDATED)


def _cross_td_exit(call: GuestCall, status: int, target_pa: int) -> TdExit:
    """``async_tdexit_cross_td``: past the TDCALL to the host, with the reason in RDX and the target's TDR in R8."""
    call.regs.rax = status
    return TdExit(Status.TDX_CROSS_TD_TRAP, extended=status, gpa=target_pa, report_bus_lock=False)


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_SERVTD_RD: tdg_servtd_rd,
    GuestLeaf.TDG_SERVTD_WR: tdg_servtd_wr,
}
