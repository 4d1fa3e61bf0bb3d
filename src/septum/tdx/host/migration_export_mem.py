"""TDH.EXPORT.BLOCKW, UNBLOCKW, RESTORE and MEM: pages of a TD that is exported, while it runs or when it is paused.

A page is exported after writes to it were blocked; a write of the guest makes the host unblock it, and then it is dirty
and must be exported again. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/migration_api_calls/tdh_export_{blockw,unblockw,restore,mem}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch import op_state, sept
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, Level
from septum.arch.status import Status, with_operand
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, check_shared_hpa, lock_td
from septum.tdx.migration import entries, mbmd
from septum.tdx.migration.gpa_list import (
    DONE,
    INVALID_PAGE,
    L2_MAP,
    PENDING,
    EntryStatus,
    GpaList,
    Operation,
    change_listed,
    find_listed,
    operation,
    read_slot,
    with_operation,
    with_status,
    write_slot,
)
from septum.tdx.migration.mac_list import MacLists
from septum.tdx.migration.mbmd import BundleType, Mbmd
from septum.tdx.migration.streams import (
    check_forward_stream,
    check_same_call,
    count_bundle,
    init_if_needed,
    lock_forward,
    lock_sessions,
    next_message,
    sealed,
    take_interrupted,
)
from septum.tdx.outcome import check, sanity
from septum.tdx.secure_ept import (
    SeptEntry,
    check_entry_allows,
    decode_page_info,
    is_tlb_tracked,
    lock_sept_and_walk,
    write_entry,
)
from septum.tdx.state.migsc import Interrupted, Stream
from septum.tdx.vcpu import atomic

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.td import Td

_U64: Final = (1 << 64) - 1


# -- single entries --------------------------------------------------------------------------------------------------


async def tdh_export_blockw(call: HostCall) -> int:
    """TDH.EXPORT.BLOCKW: takes the right to write away from the pages of a list, and notes the TLB epoch.

    Registers as :func:`~septum.tdx.migration.gpa_list.change_listed`.
    """
    return await change_listed(call, _block_writes)


async def _block_writes(call: HostCall, td: Td, entry: SeptEntry) -> None:
    await write_entry(call, entry, entries.block_writes(entry.value))
    td.tdcs.bw_epoch = td.tdcs.td_epoch


async def tdh_export_restore(call: HostCall) -> int:
    """TDH.EXPORT.RESTORE: after an aborted session, pages of a list are exported no longer.

    Registers as :func:`~septum.tdx.migration.gpa_list.change_listed`.
    """
    return await change_listed(call, _restore)


async def _restore(call: HostCall, td: Td, entry: SeptEntry) -> None:
    await atomic("MIG_COUNT")
    sanity(td.tdcs.mig_count, f"{td} has an exported page and MIG_COUNT 0")
    td.tdcs.mig_count -= 1
    await write_entry(call, entry, entries.restored(entry.value))


async def tdh_export_unblockw(call: HostCall) -> int:
    """TDH.EXPORT.UNBLOCKW: gives the right to write back; a page that was exported is dirty from now on.

    RCX: GPA and level (4 KiB). RDX: TDR. On an error that concerns the entry's state or the walk RCX and RDX tell it;
    not so when it is busy.
    """
    regs = call.regs
    gpa_and_level, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    info = decode_page_info(gpa_and_level, Level.PT, Level.PT)
    entry = await lock_sept_and_walk(call, td, info.gpa, info.level, SHARED, Operand.RCX)
    await call.locks.take(entry.lock, EXCLUSIVE, Operand.RCX)
    entry.value = call.module.sept[entry.pa]
    check_entry_allows(call, entry)
    blocked = entry.value
    await write_entry(call, entry, entries.unblock_writes(blocked))
    if sept.is_exported_clean(blocked):
        await _count_dirty(td, 1)
    return Status.TDX_SUCCESS


async def _count_dirty(td: Td, change: int) -> None:
    await atomic("DIRTY_COUNT")
    td.tdcs.dirty_count = td.tdcs.dirty_count + change & _U64


# -- TDH.EXPORT.MEM --------------------------------------------------------------------------------------------------


class _Operands(NamedTuple):
    """Where the host wants what, once that is checked."""

    gpas: GpaList
    buffers_pa: int
    macs: MacLists
    mbmd_pa: int


async def tdh_export_mem(call: HostCall) -> int:
    """TDH.EXPORT.MEM: exports the pages of a list, or cancels their export, as one migration bundle.

    RCX: GPA list; it returns the entry to go on with. RDX: TDR; it returns how many pages of the host are used. R8:
    buffer for the MBMD. R9: list of buffers for pages. R10: stream, and whether to resume. R11, R12: lists of MACs.
    What the bundle holds is unverified.
    """
    module, regs, locks = call.module, call.regs, call.locks
    gpas = GpaList.decode(regs.rcx)
    td = await lock_td(call, regs.rdx)
    await lock_sessions(call, td, SHARED)
    wanted = check_forward_stream(call, td)
    stream = await lock_forward(call, td, wanted.stream)
    locks.first_out = (stream.lock,)
    await locks.take(td.secure_ept_lock, SHARED, Operand.SEPT_TREE)
    operands = _check_operands(call, gpas)
    used = _resume(call, td, stream, gpas) if wanted.command else _begin(call, td, stream, operands)

    problems = 0
    for number in range(gpas.first, gpas.last + 1):
        regs.rcx = gpas.at(number)
        item, buffer = read_slot(module, gpas.pa, number), read_slot(module, operands.buffers_pa, number)
        entry, status = await find_listed(call, td, gpas, number, item, _NO_OPERATION)
        if entry is not None and status is EntryStatus.SUCCESS:
            item, buffer, status = await _export(call, td, entry, item, buffer)
        if status is not EntryStatus.SUCCESS:
            item, buffer = with_status(item, status), buffer | INVALID_PAGE
        problems += status not in DONE

        message = next_message(stream, wanted.stream).with_aad(item.to_bytes(8, "little"))
        if entry is not None and not buffer & INVALID_PAGE:
            check_shared_hpa(call, buffer & PAGE_MASK, PAGE_4K, Operand.MIG_BUFF_LIST_ENTRY)
            message, cipher = message.encrypt(module.memory.page(entry.page))
            module.memory.set_page(module.pa_format.address(buffer & PAGE_MASK), cipher)
            used += 1
        operands.macs.write(module, number, message.tag())
        write_slot(module, operands.buffers_pa, number, buffer)
        write_slot(module, gpas.pa, number, item)
        if entry is not None:
            await locks.release(entry.lock)
        regs.rcx = gpas.at(number + 1)
        if number < gpas.last and module.hardware.interrupt_pending(call.lp.index):
            operands_then = _remembered(call, td, regs.rcx)
            stream.migsc.interrupted = Interrupted(regs.rax, operands_then, used)
            return Status.TDX_INTERRUPTED_RESUMABLE
    await count_bundle(td)
    stream.migsc.next_mb_counter += 1
    regs.rdx = used
    return with_operand(Status.TDX_SUCCESS, problems)


_NO_OPERATION: Final = frozenset((Operation.NOP,))


def _check_operands(call: HostCall, gpas: GpaList) -> _Operands:
    regs = call.regs
    gpas.check(call)
    check_shared_hpa(call, regs.r9, PAGE_4K, Operand.R9)
    macs = MacLists.check(call, gpas)
    return _Operands(gpas, regs.r9, macs, mbmd.check_buffer(call, regs.r8))


def _remembered(call: HostCall, td: Td, gpas: int) -> tuple[int, ...]:
    """What must be the same when an interrupted call is resumed."""
    regs = call.regs
    return (gpas, regs.r9, regs.r11, regs.r12, td.tdcs.mig_epoch)


def _resume(call: HostCall, td: Td, stream: Stream, gpas: GpaList) -> int:
    interrupted = take_interrupted(stream)
    check_same_call(call, interrupted, _remembered(call, td, gpas.raw))
    return interrupted.processed


def _begin(call: HostCall, td: Td, stream: Stream, operands: _Operands) -> int:
    """Begins a bundle and writes its header; returns how many pages of the host it uses as yet."""
    check(operands.gpas.first == 0, Status.TDX_OPERAND_INVALID, Operand.RCX)
    init_if_needed(stream, td.tdcs.mig_enc_working_key)
    migsc, tdcs = stream.migsc, td.tdcs
    migsc.interrupted = None
    header = Mbmd(
        BundleType.MEM,
        tdcs.mig_working_version,
        mb_counter=migsc.next_mb_counter,
        mig_epoch=tdcs.mig_epoch,
        body=operands.gpas.last + 1,
    )
    mbmd.write(call.module, operands.mbmd_pa, sealed(stream, header, stream.index - 1))
    return 1 + operands.macs.used


async def _export(call: HostCall, td: Td, entry: SeptEntry, item: int, buffer: int) -> tuple[int, int, EntryStatus]:
    """Turns the entry's state into exported, or back; returns list entry and buffer as the other side gets them."""
    value, cancel = entry.value, operation(item) is Operation.CANCEL
    item, status = _check_state(td, item, value)
    if status is not EntryStatus.SUCCESS:
        return item, buffer, status
    pending = sept.is_any_pending(value)
    item = item & ~(PENDING | L2_MAP) | (PENDING if pending else 0)
    if not cancel and not pending and buffer & INVALID_PAGE:
        return item, buffer, EntryStatus.MIG_BUFFER_NOT_AVAILABLE

    await write_entry(call, entry, entries.restored(value) if cancel else entries.exported(value))
    await atomic("MIG_COUNT")
    first_time = not sept.is_any_exported(value)
    td.tdcs.mig_count = td.tdcs.mig_count + (-1 if cancel else int(first_time)) & _U64
    await _count_dirty(td, -1 if sept.is_exported_dirty(value) else 0)
    return item, buffer | (INVALID_PAGE if cancel or pending else 0), status


def _check_state(td: Td, item: int, value: int) -> tuple[int, EntryStatus]:
    """Whether the session allows the operation on a page in this state; the operation as the other side gets it."""
    in_order = td.tdcs.op_state in op_state.EXPORT_IN_ORDER
    exported = sept.is_any_exported(value)
    if operation(item) is Operation.CANCEL:
        if not in_order:
            return item, EntryStatus.OP_STATE_INCORRECT
        return item, EntryStatus.SUCCESS if exported else EntryStatus.SEPT_ENTRY_STATE_INCORRECT
    if not in_order or not exported:
        item = with_operation(item, Operation.MIGRATE)
    elif sept.is_exported_dirty(value):
        item = with_operation(item, Operation.REMIGRATE)
    else:
        return item, EntryStatus.SEPT_ENTRY_STATE_INCORRECT
    if td.tdcs.op_state == OpState.LIVE_EXPORT:
        if not sept.is_any_blockedw(value):
            return item, EntryStatus.SEPT_ENTRY_STATE_INCORRECT
        if sept.is_tlb_tracking_required(value) and not is_tlb_tracked(td, td.tdcs.bw_epoch):
            return item, EntryStatus.TLB_TRACKING_NOT_DONE
    return item, EntryStatus.SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_EXPORT_BLOCKW: tdh_export_blockw,
    HostLeaf.TDH_EXPORT_UNBLOCKW: tdh_export_unblockw,
    HostLeaf.TDH_EXPORT_RESTORE: tdh_export_restore,
    HostLeaf.TDH_EXPORT_MEM: tdh_export_mem,
}
