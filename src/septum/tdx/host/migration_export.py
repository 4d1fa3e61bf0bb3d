"""TDH.EXPORT.PAUSE, TRACK and ABORT: how an export session goes on and ends.

A session begins with TDH.EXPORT.STATE.IMMUTABLE and is over when it is aborted; the source TD of a migration that
succeeds is torn down. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/migration_api_calls/tdh_export_{pause,track,abort}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, lock_op_state, lock_tdr
from septum.tdx.migration import mbmd
from septum.tdx.migration.mbmd import OUT_OF_ORDER_EPOCH, BundleType, Mbmd
from septum.tdx.migration.streams import (
    check_first_stream,
    forget_streams,
    init_if_needed,
    is_genuine,
    lock_backward,
    lock_forward,
    lock_sessions,
    sealed,
)
from septum.tdx.outcome import check, sanity

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.td import Td


async def tdh_export_pause(call: HostCall) -> int:
    """TDH.EXPORT.PAUSE: the TD does not run any more, and its mutable state can be exported. RCX: TDR.

    A new TLB epoch begins, for the case that the session is aborted and the TD runs on.
    """
    td = await lock_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    sanity(td.tdcs.refcount == (0, 0), f"a VCPU of {td} runs although the TDR is locked exclusively")
    td.tdcs.td_epoch += 1
    td.tdcs.op_state = OpState.PAUSED_EXPORT
    return Status.TDX_SUCCESS


async def tdh_export_track(call: HostCall) -> int:
    """TDH.EXPORT.TRACK: begins the next migration epoch, with a token that the other side can check.

    RCX: TDR. R8: buffer for the MBMD. R10: stream 0; with bit 63, the last epoch begins, in which pages go in any order
    because nothing changes any more. The token's contents are unverified.
    """
    regs = call.regs
    td = await _lock_session(call)
    last = check_first_stream(call)
    token_pa = mbmd.check_buffer(call, regs.r8)
    stream = await lock_forward(call, td)
    migsc, tdcs = stream.migsc, td.tdcs
    check(migsc.initialised, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    if last:
        check(tdcs.op_state == OpState.PAUSED_EXPORT, Status.TDX_OP_STATE_INCORRECT)
        check(not tdcs.dirty_count, Status.TDX_EXPORTED_DIRTY_PAGES_REMAIN)
        tdcs.mig_epoch = OUT_OF_ORDER_EPOCH
        tdcs.op_state = OpState.POST_EXPORT
    else:
        check(tdcs.mig_epoch != OUT_OF_ORDER_EPOCH - 1, Status.TDX_MIGRATION_EPOCH_OVERFLOW)
        tdcs.mig_epoch += 1

    migsc.interrupted = None
    tdcs.total_mb_count += 1
    token = Mbmd(BundleType.EPOCH_TOKEN, tdcs.mig_version, mig_epoch=tdcs.mig_epoch, body=tdcs.total_mb_count)
    mbmd.write(call.module, token_pa, sealed(stream, token))
    migsc.next_mb_counter = 1
    return Status.TDX_SUCCESS


async def tdh_export_abort(call: HostCall) -> int:
    """TDH.EXPORT.ABORT: ends the session; the TD runs on here.

    RCX: TDR. R10: stream 0. R8: 0; but after the last TDH.EXPORT.TRACK the MBMD of an abort token, by which the other
    side shows that the TD will not run there. What a token must contain is unverified, beyond what its checks say.
    """
    td = await _lock_session(call)
    check(call.regs.r10 == 0, Status.TDX_OPERAND_INVALID, Operand.R10)
    if td.tdcs.op_state == OpState.POST_EXPORT:
        await _check_abort_token(call, td)
    else:
        check(call.regs.r8 == 0, Status.TDX_OPERAND_INVALID, Operand.R8)
    forget_streams(td)
    td.tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


async def _lock_session(call: HostCall) -> Td:
    td = await lock_tdr(call, call.regs.rcx, Operand.RCX, SHARED)
    await lock_op_state(call, td, EXCLUSIVE)
    await lock_sessions(call, td, EXCLUSIVE)
    return td


async def _check_abort_token(call: HostCall, td: Td) -> None:
    token = mbmd.read(call.module, mbmd.check_buffer(call, call.regs.r8))
    fits = token.fits(BundleType.ABORT_TOKEN, td.tdcs.mig_working_version, 0)
    check(fits and not token.body, Status.TDX_INVALID_MBMD)
    stream = await lock_backward(call, td)
    init_if_needed(stream, td.tdcs.mig_dec_working_key)
    stream.migsc.interrupted = None
    check(is_genuine(stream, token), Status.TDX_INCORRECT_MBMD_MAC)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_EXPORT_PAUSE: tdh_export_pause,
    HostLeaf.TDH_EXPORT_TRACK: tdh_export_track,
    HostLeaf.TDH_EXPORT_ABORT: tdh_export_abort,
}
