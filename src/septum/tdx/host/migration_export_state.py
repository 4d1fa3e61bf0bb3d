"""TDH.EXPORT.STATE.IMMUTABLE, TD and VP: what is not in pages.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/migration_api_calls/tdh_export_state_{immutable,td,vp}.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from septum.arch.leaves import HostLeaf
from septum.arch.metadata import Access, Context
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, lock_op_state, lock_tdr
from septum.tdx.metadata import Scope
from septum.tdx.migration import mbmd
from septum.tdx.migration.mbmd import BundleType, Mbmd, immutable_body
from septum.tdx.migration.state_lists import PageList, Progress, export_page
from septum.tdx.migration.streams import (
    MIN_MIGS,
    begin_session,
    check_first_stream,
    check_forward_stream,
    check_same_call,
    count_bundle,
    init_if_needed,
    init_stream,
    lock_forward,
    lock_sessions,
    next_message,
    take_interrupted,
)
from septum.tdx.outcome import check
from septum.tdx.vcpu import associate, check_tdvps_pages, lock_owner, lock_tdvpr

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.migsc import Stream
    from septum.tdx.state.td import Td

MIN_IMMUTABLE_PAGES: Final = 3
MIN_TD_PAGES: Final = 2
MIN_VP_PAGES: Final = 5
SYS_PAGES: Final = 1
"""Pages of module metadata in a bundle of immutable state."""
MAX_EXPORT_COUNT: Final = 0x7FFF_FFFF


async def tdh_export_state_immutable(call: HostCall) -> int:
    """TDH.EXPORT.STATE.IMMUTABLE: begins an export session with what will not change any more.

    RCX: TDR. RDX returns how many pages were written. R8: buffer for the MBMD. R9: list of pages. R10: stream 0, and
    whether to resume. The contents of pages and MBMD are unverified.
    """
    regs = call.regs
    regs.rdx = 0
    td = await lock_tdr(call, regs.rcx, Operand.RCX, SHARED)
    await lock_op_state(call, td, EXCLUSIVE)
    await lock_sessions(call, td, EXCLUSIVE)
    tdcs = td.tdcs
    check(tdcs.attributes & TdAttributes.MIGRATABLE, Status.TDX_TD_NOT_MIGRATABLE)
    check(not tdcs.mig_count, Status.TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE)
    check(tdcs.num_migs >= MIN_MIGS, Status.TDX_MIN_MIGS_NOT_CREATED)
    mbmd_pa = mbmd.check_buffer(call, regs.r8)
    resume = check_first_stream(call)
    stream = await lock_forward(call, td)
    pages = PageList.decode(regs.r9)
    if resume:
        at = _resume(call, stream, (pages.raw,))
    else:
        pages.check_size(MIN_IMMUTABLE_PAGES)
        pages.check_address(call)
        begin_session(call, td)
        tdcs.dirty_count = 0
        init_stream(stream, tdcs.mig_enc_working_key)
        body = immutable_body(tdcs.num_migs - 1, SYS_PAGES)
        at = _begin(td, stream, BundleType.IMMUTABLE_TD_STATE, body)
        check(tdcs.export_count < MAX_EXPORT_COUNT, Status.TDX_MAX_EXPORTS_EXCEEDED)
        tdcs.export_count += 1

    scopes = (
        Scope(call.module, call.lp, Context.SYS, Access.EXPORT_IMMUTABLE),
        Scope(call.module, call.lp, Context.TD, Access.EXPORT_IMMUTABLE, td),
    )
    at, done = _export_pages(call, scopes, pages, at)
    regs.rdx = at.pages
    if not done:
        return at.interrupt(call, stream, (pages.raw,))
    _finish(call, stream, mbmd_pa, at)
    tdcs.total_mb_count = stream.migsc.next_mb_counter = 1
    tdcs.op_state = OpState.LIVE_EXPORT
    return Status.TDX_SUCCESS


async def tdh_export_state_td(call: HostCall) -> int:
    """TDH.EXPORT.STATE.TD: exports the mutable state of a paused TD.

    Registers as TDH.EXPORT.STATE.IMMUTABLE. R8 is looked at when all pages are written. The contents of pages and MBMD
    are unverified.
    """
    regs = call.regs
    regs.rdx = 0
    td = await lock_tdr(call, regs.rcx, Operand.RCX, SHARED)
    await lock_op_state(call, td, EXCLUSIVE)
    resume = check_first_stream(call)
    stream = await lock_forward(call, td)
    check(stream.migsc.initialised, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    pages = PageList.decode(regs.r9)
    if resume:
        at = _resume(call, stream, (pages.raw,))
    else:
        pages.check_size(MIN_TD_PAGES)
        at = _begin(td, stream, BundleType.MUTABLE_TD_STATE)
    pages.check_address(call)
    scope = Scope(call.module, call.lp, Context.TD, Access.EXPORT_MUTABLE, td)
    at, done = _export_pages(call, (scope,), pages, at)
    if not done:
        regs.rdx = at.pages
        return at.interrupt(call, stream, (pages.raw,))
    return await _finish_mutable(call, td, stream, at)


async def tdh_export_state_vp(call: HostCall) -> int:
    """TDH.EXPORT.STATE.VP: exports the state of a VCPU of a paused TD, once in a session.

    RCX: TDVPR. R10: any forward stream. The others as TDH.EXPORT.STATE.TD. The contents of pages and MBMD are
    unverified.
    """
    regs = call.regs
    regs.rdx = 0
    tdvpr, vp = await lock_tdvpr(call, regs.rcx, Operand.RCX, EXCLUSIVE)
    td = await lock_owner(call, tdvpr)
    await lock_op_state(call, td)
    check_tdvps_pages(td, vp)
    await associate(call, td, vp)
    check(vp.tdvps.export_count != td.tdcs.export_count, Status.TDX_VCPU_ALREADY_EXPORTED)
    wanted = check_forward_stream(call, td)
    stream = await lock_forward(call, td, wanted.stream)
    pages = PageList.decode(regs.r9)
    operands = (pages.raw, regs.rcx)
    if wanted.command:
        at = _resume(call, stream, operands)
    else:
        pages.check_size(MIN_VP_PAGES)
        init_if_needed(stream, td.tdcs.mig_enc_working_key)
        at = _begin(td, stream, BundleType.MUTABLE_VCPU_STATE, vp.tdvps.vcpu_index & 0xFFFF, wanted.stream)
    pages.check_address(call)
    scope = Scope(call.module, call.lp, Context.VP, Access.EXPORT_MUTABLE, td, vp)
    at, done = _export_pages(call, (scope,), pages, at)
    if not done:
        regs.rdx = at.pages
        return at.interrupt(call, stream, operands)
    status = await _finish_mutable(call, td, stream, at)
    vp.tdvps.export_count = td.tdcs.export_count
    return status


def _begin(td: Td, stream: Stream, mb_type: BundleType, body: int = 0, migs_index: int = 0) -> Progress:
    """A new bundle, whose header waits in the stream's context."""
    migsc, tdcs = stream.migsc, td.tdcs
    migsc.interrupted = None
    message = next_message(stream, migs_index)
    header = Mbmd(mb_type, tdcs.mig_working_version, migs_index, migsc.next_mb_counter, tdcs.mig_epoch, body=body)
    migsc.mbmd = header._replace(iv_counter=migsc.iv_counter)
    return Progress(message.with_aad(header.authenticated()))


def _resume(call: HostCall, stream: Stream, operands: tuple[int, ...]) -> Progress:
    interrupted = take_interrupted(stream)
    check_same_call(call, interrupted, operands)
    return Progress.of(stream, interrupted)


def _export_pages(call: HostCall, scopes: Sequence[Scope], pages: PageList, at: Progress) -> tuple[Progress, bool]:
    """Pages until all are written or a pending interrupt of the host stops the function."""
    done = False
    while not done:
        at, done = export_page(call, scopes, pages, at)
        if not done and call.module.hardware.interrupt_pending(call.lp.index):
            return at, False
    return at, True


def _finish(call: HostCall, stream: Stream, mbmd_pa: int, at: Progress) -> None:
    """The header goes out last, with the MAC over itself and all pages."""
    stream.migsc.mbmd = stream.migsc.mbmd._replace(mac=at.message.tag())
    mbmd.write(call.module, mbmd_pa, stream.migsc.mbmd)
    stream.migsc.interrupted = None


async def _finish_mutable(call: HostCall, td: Td, stream: Stream, at: Progress) -> int:
    _finish(call, stream, mbmd.check_buffer(call, call.regs.r8), at)
    await count_bundle(td)
    stream.migsc.next_mb_counter += 1
    call.regs.rdx = at.pages
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_EXPORT_STATE_IMMUTABLE: tdh_export_state_immutable,
    HostLeaf.TDH_EXPORT_STATE_TD: tdh_export_state_td,
    HostLeaf.TDH_EXPORT_STATE_VP: tdh_export_state_vp,
}
