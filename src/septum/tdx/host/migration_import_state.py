"""TDH.IMPORT.STATE.IMMUTABLE, TD and VP: what is not in pages.

From where a session has begun, every error fails the import for good: the TD can only be torn down. Errors in what the
pages hold are told after all pages, if the MAC is right. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/migration_api_calls/tdh_import_state_{immutable,td,vp}.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from septum.arch.leaves import HostLeaf
from septum.arch.metadata import Access, Context
from septum.arch.op_state import OpState, VcpuState
from septum.arch.operands import Operand
from septum.arch.platform_msrs import BOOT_NT4, IA32_MISC_ENABLE
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE, HostCall, lock_op_state
from septum.tdx.host.migration_import import lock_import
from septum.tdx.metadata import Scope, finish_immutable_state
from septum.tdx.migration import mbmd
from septum.tdx.migration.mbmd import BundleType, Mbmd, open_immutable_body
from septum.tdx.migration.state_lists import PageList, Progress, import_page
from septum.tdx.migration.streams import (
    MIN_MIGS,
    begin_session,
    check_first_stream,
    check_forward_stream,
    check_same_call,
    count_bundle,
    failing_import,
    init_if_needed,
    init_stream,
    lock_forward,
    message,
    take_interrupted,
)
from septum.tdx.outcome import Fail, check
from septum.tdx.vcpu import atomic, check_tdvps_pages, count_associated, lock_owner, lock_tdvpr, tie_to_lp
from septum.tdx.vmcs_init import init_management, init_vmcs

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.migsc import Interrupted, Stream
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

MIN_TD_PAGES: Final = 1
"""Also of the TD's part of immutable state."""
MIN_VP_PAGES: Final = 4


async def tdh_import_state_immutable(call: HostCall) -> int:
    """TDH.IMPORT.STATE.IMMUTABLE: begins an import session with what will not change any more.

    RCX: TDR. R8: the MBMD. R9: list of pages. R10: stream 0, and whether to resume. RCX and RDX tell which field is
    wrong, or are as before when a pending interrupt of the host stopped the function. The contents of pages and MBMD
    are unverified.
    """
    module, regs = call.module, call.regs
    operands = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    boot_nt4 = module.hardware.rdmsr(call.lp.index, IA32_MISC_ENABLE) & BOOT_NT4
    check(not boot_nt4, Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    td = await lock_import(call, operands[0])
    tdcs = td.tdcs
    check(tdcs.num_migs >= MIN_MIGS, Status.TDX_MIN_MIGS_NOT_CREATED)
    resume = check_first_stream(call)
    stream = await lock_forward(call, td)
    pages = PageList.decode(regs.r9)
    interrupted: Interrupted | None = None
    if resume:
        interrupted = take_interrupted(stream)
    else:
        begin_session(call, td)
        init_stream(stream, tdcs.mig_dec_working_key)
    with failing_import(td):
        if interrupted is not None:
            at = _resume(call, stream, interrupted, (pages.raw,))
        else:
            at = _begin_immutable(call, td, stream)
        _, sys_pages = open_immutable_body(stream.migsc.mbmd.body) or (0, 0)
        pages.check_size(MIN_TD_PAGES + sys_pages)
        pages.check_address(call)
        scopes = (
            Scope(module, call.lp, Context.SYS, Access.IMPORT_IMMUTABLE),
            Scope(module, call.lp, Context.TD, Access.IMPORT_IMMUTABLE, td),
        )
        at, done = _import_pages(call, scopes, pages, at, (sys_pages - 1, pages.last))
        if done:
            _check_pages(call, stream, at)
            check(finish_immutable_state(module, td), Status.TDX_OPERAND_INVALID, Operand.RDX)
    if not done:
        regs.rcx, regs.rdx = operands
        return at.interrupt(call, stream, (pages.raw,))
    tdcs.total_mb_count = 1
    tdcs.op_state = OpState.MEMORY_IMPORT
    return Status.TDX_SUCCESS


def _begin_immutable(call: HostCall, td: Td, stream: Stream) -> Progress:
    header = mbmd.read(call.module, mbmd.check_buffer(call, call.regs.r8))
    stream.migsc.mbmd = header
    counts = open_immutable_body(header.body)
    fits = header.fits(BundleType.IMMUTABLE_TD_STATE, td.tdcs.mig_working_version, 0)
    if not fits or header.mb_counter or header.mig_epoch or counts is None or not counts[1]:
        raise Fail(Status.TDX_INVALID_MBMD)
    check(counts[0] <= td.tdcs.num_migs - 1, Status.TDX_NUM_MIGS_HIGHER_THAN_CREATED)
    return _begin(stream, header)


async def tdh_import_state_td(call: HostCall) -> int:
    """TDH.IMPORT.STATE.TD: imports the mutable state of the TD. Registers as TDH.IMPORT.STATE.IMMUTABLE.

    The contents of pages and MBMD are unverified.
    """
    regs = call.regs
    operands = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = await lock_import(call, operands[0])
    resume = check_first_stream(call)
    stream = await lock_forward(call, td)
    check(stream.migsc.initialised, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    interrupted = take_interrupted(stream) if resume else None
    stream.migsc.interrupted = None
    pages = PageList.decode(regs.r9)
    with failing_import(td):
        if interrupted is not None:
            at = _resume(call, stream, interrupted, (pages.raw,))
        else:
            header = _read_mutable(call, td, stream, BundleType.MUTABLE_TD_STATE, 0)
            check(not header.body, Status.TDX_INVALID_MBMD)
            at = _begin(stream, header)
        pages.check_size(MIN_TD_PAGES)
        pages.check_address(call)
        scope = Scope(call.module, call.lp, Context.TD, Access.IMPORT_MUTABLE, td)
        at, done = _import_pages(call, (scope,), pages, at, (pages.last,))
        if done:
            _check_pages(call, stream, at)
    if not done:
        regs.rcx, regs.rdx = operands
        return at.interrupt(call, stream, (pages.raw,))
    await count_bundle(td)
    td.tdcs.op_state = OpState.STATE_IMPORT
    return Status.TDX_SUCCESS


async def tdh_import_state_vp(call: HostCall) -> int:
    """TDH.IMPORT.STATE.VP: imports the state of a VCPU that has its pages but is not initialised.

    RCX: TDVPR. R10: any forward stream. The others as TDH.IMPORT.STATE.IMMUTABLE. The VCPU is associated with this LP.
    At the end OP_STATE is let go of last. The contents of pages and MBMD are unverified.
    """
    regs, locks = call.regs, call.locks
    operands = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    tdvpr, vp = await lock_tdvpr(call, operands[0], Operand.RCX, EXCLUSIVE)
    mark = locks.mark()
    td = await lock_owner(call, tdvpr)
    pages_of_vcpu = (*locks.since(mark), *reversed(tdvpr.locks))
    await lock_op_state(call, td)
    locks.first_out = pages_of_vcpu
    check_tdvps_pages(td, vp)
    wanted = check_forward_stream(call, td)
    stream = await lock_forward(call, td, wanted.stream)
    locks.first_out = (stream.lock, *pages_of_vcpu)
    pages = PageList.decode(regs.r9)
    remembered = (pages.raw, operands[0])
    interrupted: Interrupted | None = None
    if wanted.command:
        interrupted = take_interrupted(stream)
    else:
        init_if_needed(stream, td.tdcs.mig_dec_working_key)
        stream.migsc.interrupted = None
    with failing_import(td):
        if interrupted is not None:
            at = _resume(call, stream, interrupted, remembered)
            resumable = (VcpuState.IMPORT, VcpuState.DISABLED)
            check(vp.tdvps.vcpu_state in resumable, Status.TDX_VCPU_STATE_INCORRECT)
            await tie_to_lp(call, td, vp)
        else:
            check(vp.tdvps.vcpu_state == VcpuState.UNINITIALIZED, Status.TDX_VCPU_STATE_INCORRECT)
            header = _read_mutable(call, td, stream, BundleType.MUTABLE_VCPU_STATE, wanted.stream)
            check(not header.body >> 16, Status.TDX_INVALID_MBMD)
            at = _begin(stream, header, wanted.stream)
            await _prepare_vcpu(call, td, vp)
        pages.check_size(MIN_VP_PAGES)
        pages.check_address(call)
        scope = Scope(call.module, call.lp, Context.VP, Access.IMPORT_MUTABLE, td, vp)
        at, done = _import_pages(call, (scope,), pages, at, (pages.last,))
        if done:
            _check_pages(call, stream, at)
            await atomic("NUM_MIGRATED_VCPUS")
            td.tdcs.num_migrated_vcpus += 1
            check(td.tdcs.num_migrated_vcpus <= td.tdcs.num_vcpus, Status.TDX_ALL_VCPUS_IMPORTED)
    if vp.tdvps.vcpu_state != VcpuState.DISABLED:
        vp.tdvps.vcpu_state = VcpuState.READY if done else VcpuState.IMPORT
    if not done:
        regs.rcx, regs.rdx = operands
        return at.interrupt(call, stream, remembered)
    await count_bundle(td)
    return Status.TDX_SUCCESS


async def _prepare_vcpu(call: HostCall, td: Td, vp: Vp) -> None:
    """The VCPU as the module sets it up here; what is imported comes on top."""
    vp.tdvps.assoc_lpid = call.lp.index
    await count_associated(td, 1)
    vp.tdvps.last_exit_tsc = call.module.hardware.rdtsc()
    vp.tdvps.xfam = td.tdcs.xfam
    init_vmcs(call.module, td, vp, 0, imported=True)
    init_management(call.module, td, vp)


# -- bundles ---------------------------------------------------------------------------------------------------------


def _read_mutable(call: HostCall, td: Td, stream: Stream, mb_type: BundleType, migs_index: int) -> Mbmd:
    """The header of a bundle of mutable state, which must be the next one of the stream.

    :raises Fail: OPERAND_INVALID with R8, INVALID_MBMD.
    """
    header = mbmd.read(call.module, mbmd.check_buffer(call, call.regs.r8))
    stream.migsc.mbmd = header
    fits = header.fits(mb_type, td.tdcs.mig_working_version, migs_index)
    fits = fits and header.mb_counter == stream.migsc.expected_mb_counter and header.mig_epoch == td.tdcs.mig_epoch
    check(fits, Status.TDX_INVALID_MBMD)
    return header


def _begin(stream: Stream, header: Mbmd, migs_index: int = 0) -> Progress:
    """The header is part of the message; the stream takes no bundle with its number any more."""
    stream.migsc.expected_mb_counter += 1
    return Progress(message(stream, header.iv_counter, migs_index).with_aad(header.authenticated()))


def _resume(call: HostCall, stream: Stream, interrupted: Interrupted, operands: tuple[int, ...]) -> Progress:
    check_same_call(call, interrupted, operands)
    return Progress.of(stream, interrupted)


def _import_pages(
    call: HostCall, scopes: Sequence[Scope], pages: PageList, at: Progress, last_in_scope: Sequence[int]
) -> tuple[Progress, bool]:
    """Pages until all are read or a pending interrupt of the host stops the function."""
    while at.pages <= pages.last:
        at = import_page(call, scopes, pages, at, last_in_scope)
        if at.pages <= pages.last and call.module.hardware.interrupt_pending(call.lp.index):
            return at, False
    return at, True


def _check_pages(call: HostCall, stream: Stream, at: Progress) -> None:
    """The MAC over header and pages, then whether their contents were good; if not, RCX and RDX tell where.

    :raises Fail: INCORRECT_MBMD_MAC, or the first error in the pages.
    """
    check(at.message.tag() == stream.migsc.mbmd.mac, Status.TDX_INCORRECT_MBMD_MAC)
    status, *where = at.error
    if status:
        call.regs.rcx, call.regs.rdx = where
        raise Fail(status)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_IMPORT_STATE_IMMUTABLE: tdh_import_state_immutable,
    HostLeaf.TDH_IMPORT_STATE_TD: tdh_import_state_td,
    HostLeaf.TDH_IMPORT_STATE_VP: tdh_import_state_vp,
}
