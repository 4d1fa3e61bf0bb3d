"""TDH.IMPORT.TRACK, COMMIT, END and ABORT: how an import session goes on and ends.

A session begins with TDH.IMPORT.STATE.IMMUTABLE. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/migration_api_calls/tdh_import_{track,commit,end,abort}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import FATAL, Status
from septum.tdx.call import EXCLUSIVE, HostCall, lock_op_state, lock_tdr
from septum.tdx.migration import mbmd
from septum.tdx.migration.mbmd import OUT_OF_ORDER_EPOCH, BundleType, Mbmd
from septum.tdx.migration.streams import (
    count_bundle,
    failing_import,
    init_if_needed,
    is_genuine,
    lock_backward,
    lock_forward,
    sealed,
)
from septum.tdx.outcome import check

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.td import Td


async def lock_import(call: HostCall, td_pa: int) -> Td:
    """The TD that is imported, whose TDR is locked exclusively, so that no other lock is needed.

    :raises Fail: as :func:`~septum.tdx.call.lock_tdr` with RCX and :func:`~septum.tdx.call.lock_op_state`.
    """
    td = await lock_tdr(call, td_pa, Operand.RCX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    return td


async def tdh_import_track(call: HostCall) -> int:
    """TDH.IMPORT.TRACK: checks the token that begins the next migration epoch.

    RCX: TDR. R8: the MBMD. R10: 0. A wrong token fails the import for good. A token must tell how many bundles came
    before it; what else it contains is unverified.
    """
    regs = call.regs
    td = await lock_import(call, regs.rcx)
    check(regs.r10 == 0, Status.TDX_OPERAND_INVALID, Operand.R10)
    token_pa = mbmd.check_buffer(call, regs.r8)
    stream = await lock_forward(call, td)
    migsc, tdcs = stream.migsc, td.tdcs
    check(migsc.initialised, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    migsc.interrupted = None
    token = mbmd.read(call.module, token_pa)
    with failing_import(td):
        fits = token.fits(BundleType.EPOCH_TOKEN, tdcs.mig_working_version, 0) and token.mb_counter == 0
        fits = fits and token.mig_epoch > tdcs.mig_epoch and token.body == tdcs.total_mb_count + 1
        check(fits, Status.TDX_INVALID_MBMD)
        check(is_genuine(stream, token), Status.TDX_INCORRECT_MBMD_MAC)
        if token.mig_epoch == OUT_OF_ORDER_EPOCH:
            check(tdcs.num_migrated_vcpus == tdcs.num_vcpus, Status.TDX_SOME_VCPUS_NOT_MIGRATED)
            tdcs.op_state = OpState.POST_IMPORT
    migsc.expected_mb_counter = 1
    await count_bundle(td)
    tdcs.mig_epoch = token.mig_epoch
    return Status.TDX_SUCCESS


async def tdh_import_commit(call: HostCall) -> int:
    """TDH.IMPORT.COMMIT: the TD may run while the rest of its pages are imported; the session cannot fail any more.

    RCX: TDR.
    """
    td = await lock_import(call, call.regs.rcx)
    td.tdcs.import_count += 1
    td.tdcs.op_state = OpState.LIVE_IMPORT
    return Status.TDX_SUCCESS


async def tdh_import_end(call: HostCall) -> int:
    """TDH.IMPORT.END: all pages that were to be imported are here. RCX: TDR."""
    td = await lock_import(call, call.regs.rcx)
    if td.tdcs.op_state != OpState.LIVE_IMPORT:
        td.tdcs.import_count += 1
    td.tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


async def tdh_import_abort(call: HostCall) -> int:
    """TDH.IMPORT.ABORT: the TD will not run here; makes a token by which the other side can let it run there.

    RCX: TDR. R8: buffer for the MBMD. R10: 0. Success has the FATAL bit: the TD can only be torn down. The token's
    contents are unverified.
    """
    regs = call.regs
    td = await lock_import(call, regs.rcx)
    check(regs.r10 == 0, Status.TDX_OPERAND_INVALID, Operand.R10)
    token_pa = mbmd.check_buffer(call, regs.r8)
    stream = await lock_backward(call, td)

    td.tdcs.op_state = OpState.FAILED_IMPORT
    init_if_needed(stream, td.tdcs.mig_enc_working_key)
    stream.migsc.interrupted = None
    counter = stream.migsc.next_mb_counter
    token = Mbmd(BundleType.ABORT_TOKEN, td.tdcs.mig_working_version, mb_counter=counter)
    mbmd.write(call.module, token_pa, sealed(stream, token))
    stream.migsc.next_mb_counter = counter + 1
    return Status.TDX_SUCCESS | FATAL


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_IMPORT_TRACK: tdh_import_track,
    HostLeaf.TDH_IMPORT_COMMIT: tdh_import_commit,
    HostLeaf.TDH_IMPORT_END: tdh_import_end,
    HostLeaf.TDH_IMPORT_ABORT: tdh_import_abort,
}
