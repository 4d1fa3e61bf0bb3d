"""TDH.IMPORT.MEM: pages of a TD that is imported, in order, or in any order while it may run already.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/migration_api_calls/tdh_import_mem.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch import op_state, sept
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_4K, PAGE_MASK, Level
from septum.arch.pamt import MigrationEpoch, PageType
from septum.arch.sept import SeptState, leaf_entry
from septum.arch.status import FATAL, Status, with_operand
from septum.tdx.call import (
    EXCLUSIVE,
    SHARED,
    HostCall,
    PamtLock,
    add_children,
    check_shared_hpa,
    lock_td,
    owned_entry,
    set_page_type,
    unlock_page,
)
from septum.tdx.migration import mbmd
from septum.tdx.migration.gpa_list import (
    DONE,
    INVALID_PAGE,
    PENDING,
    EntryStatus,
    GpaList,
    Operation,
    find_entry,
    gpa_of,
    is_valid,
    operation,
    read_slot,
    with_status,
    write_slot,
)
from septum.tdx.migration.mac_list import MacLists
from septum.tdx.migration.mbmd import OUT_OF_ORDER_EPOCH, BundleType
from septum.tdx.migration.streams import (
    check_forward_stream,
    check_same_call,
    count_bundle,
    init_if_needed,
    is_genuine,
    lock_forward,
    lock_new_page,
    lock_sessions,
    message,
    take_interrupted,
)
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import SeptEntry, write_entry
from septum.tdx.state.memory import PamtEntry
from septum.tdx.state.migsc import Interrupted, Stream

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.migration.aes_gcm import AesGcm
    from septum.tdx.state.td import Td


_EPOCH: Final = 0xFFFF_FFFF
"""The migration epoch in a PAMT entry's BEPOCH."""


class _Fatal(Enum):
    """Whom the failure of a list entry fails."""

    SESSION = "the import"
    IN_ORDER = "the import while pages come in order, else only the entry"


class _Bad(Exception):
    """A list entry that cannot be imported: the status of the call if that ends it, and of the entry."""

    def __init__(self, status: int, entry_status: EntryStatus, fatal: _Fatal = _Fatal.SESSION) -> None:
        super().__init__(status, entry_status, fatal)
        self.status = status
        self.entry_status = entry_status
        self.fatal = fatal


def _bad(status: Status, operand: Operand, entry_status: EntryStatus, fatal: _Fatal = _Fatal.SESSION) -> _Bad:
    return _Bad(with_operand(status, operand), entry_status, fatal)


class _Lists(NamedTuple):
    """Where the host has what, once that is checked."""

    gpas: GpaList
    buffers_pa: int
    macs: MacLists
    new_pages_pa: int | None
    """None: pages are imported into the buffers that they come in."""
    mbmd_pa: int


class _Item(NamedTuple):
    """An entry of all lists, and the message that the page is."""

    gpa: int
    buffer: int
    new_page: int
    mac: bytes
    message: AesGcm


async def tdh_import_mem(call: HostCall) -> int:
    """TDH.IMPORT.MEM: imports the pages of a migration bundle, or takes imported ones away again.

    RCX: GPA list; it returns the entry to go on with. RDX: TDR. R8: the MBMD. R9: list of buffers with pages. R10:
    stream, and whether to resume. R11, R12: lists of MACs. R13: list of pages to import into, or all ones. What the
    bundle must hold is unverified. So is the import of a pending page into its own buffer, where the source invalidates
    the cache lines of a page that it has not mapped.
    """
    module, regs, locks = call.module, call.regs, call.locks
    gpas = GpaList.decode(regs.rcx)
    td = await lock_td(call, regs.rdx)
    await lock_sessions(call, td, SHARED)
    wanted = check_forward_stream(call, td)
    stream = await lock_forward(call, td, wanted.stream)
    locks.first_out = (stream.lock, td.mig_lock)
    await locks.take(td.secure_ept_lock, SHARED, Operand.SEPT_TREE)
    lists = _check_operands(call, gpas)
    if wanted.command:
        check_same_call(call, take_interrupted(stream), _remembered(call, td, gpas.raw))
    else:
        _begin(call, td, stream, lists)

    problems = 0
    for number in range(gpas.first, gpas.last + 1):
        regs.rcx = gpas.at(number)
        status = await _import_listed(call, td, stream, lists, number)
        problems += status not in DONE
        regs.rcx = gpas.at(number + 1)
        if number < gpas.last and module.hardware.interrupt_pending(call.lp.index):
            stream.migsc.interrupted = Interrupted(regs.rax, _remembered(call, td, regs.rcx), 0)
            return Status.TDX_INTERRUPTED_RESUMABLE
    await count_bundle(td)
    return with_operand(Status.TDX_SUCCESS, problems)


def _check_operands(call: HostCall, gpas: GpaList) -> _Lists:
    regs = call.regs
    gpas.check(call)
    check_shared_hpa(call, regs.r9, PAGE_4K, Operand.R9)
    macs = MacLists.check(call, gpas)
    new_pages = None if regs.r13 == NULL_PA else regs.r13
    if new_pages is not None:
        check_shared_hpa(call, new_pages, PAGE_4K, Operand.R13)
    return _Lists(gpas, regs.r9, macs, new_pages, mbmd.check_buffer(call, regs.r8))


def _remembered(call: HostCall, td: Td, gpas: int) -> tuple[int, ...]:
    """What must be the same when an interrupted call is resumed."""
    regs = call.regs
    return (gpas, regs.r9, regs.r11, regs.r12, regs.r13, td.tdcs.mig_epoch)


def _begin(call: HostCall, td: Td, stream: Stream, lists: _Lists) -> None:
    """Checks the bundle's header; it is the next one of the stream, or, out of order, of the last epoch.

    :raises Fail: OPERAND_INVALID with RCX, INVALID_MBMD, INCORRECT_MBMD_MAC; the session goes on.
    """
    migsc, tdcs = stream.migsc, td.tdcs
    check(lists.gpas.first == 0, Status.TDX_OPERAND_INVALID, Operand.RCX)
    init_if_needed(stream, tdcs.mig_dec_working_key)
    migsc.interrupted = None
    header, migs_index = mbmd.read(call.module, lists.mbmd_pa), stream.index - 1
    fits = header.fits(BundleType.MEM, tdcs.mig_working_version, migs_index)
    fits = fits and header.mig_epoch == tdcs.mig_epoch and header.body == lists.gpas.last + 1
    if tdcs.op_state in op_state.IMPORT_IN_ORDER:
        fits = fits and header.mb_counter == migsc.expected_mb_counter
    else:
        fits = fits and header.mig_epoch == OUT_OF_ORDER_EPOCH
    check(fits, Status.TDX_INVALID_MBMD)
    migsc.iv_counter = header.iv_counter
    check(is_genuine(stream, header, migs_index), Status.TDX_INCORRECT_MBMD_MAC)
    migsc.expected_mb_counter += 1


async def _import_listed(call: HostCall, td: Td, stream: Stream, lists: _Lists, number: int) -> EntryStatus:
    """Imports what one entry of the lists names, and tells there what became of it.

    :raises Fail: when the session ends with it.
    """
    module, migsc, mark = call.module, stream.migsc, call.locks.mark()
    item = read_slot(module, lists.gpas.pa, number)
    buffer = read_slot(module, lists.buffers_pa, number)
    new_page = INVALID_PAGE if lists.new_pages_pa is None else read_slot(module, lists.new_pages_pa, number)
    migsc.iv_counter += 1
    page = message(stream, migsc.iv_counter, stream.index - 1).with_aad(item.to_bytes(8, "little"))
    status = EntryStatus.SUCCESS
    try:
        if operation(item) is Operation.NOP:
            status = _check_nop(item, page, lists.macs.read(module, number))
        else:
            await _import(call, td, _Item(item, buffer, new_page, lists.macs.read(module, number), page))
    except _Bad as bad:
        status = bad.entry_status
        await call.locks.release_since(mark)
        ends = bad.fatal is _Fatal.SESSION or td.tdcs.op_state in op_state.IMPORT_IN_ORDER
        if ends:
            write_slot(module, lists.gpas.pa, number, with_status(item, status))
            if lists.new_pages_pa is not None:
                write_slot(module, lists.new_pages_pa, number, new_page | INVALID_PAGE)
            raise _end_session(td, bad.status) from None
    if status is not EntryStatus.SUCCESS:
        item, new_page = with_status(item, status), new_page | INVALID_PAGE
    if lists.new_pages_pa is not None:
        write_slot(module, lists.new_pages_pa, number, new_page)
    write_slot(module, lists.gpas.pa, number, item)
    return status


def _end_session(td: Td, status: int) -> Fail:
    """``abort_import_session``: a TD that may run already runs on; any other can only be torn down."""
    if td.tdcs.op_state == OpState.LIVE_IMPORT:
        td.tdcs.op_state = OpState.RUNNABLE
        return Fail(status)
    td.tdcs.op_state = OpState.FAILED_IMPORT
    return Fail(status | FATAL)


def _check_mac(page: AesGcm, mac: bytes) -> None:
    if page.tag() != mac:
        raise _bad(Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY, EntryStatus.INVALID_PAGE_MAC)


def _check_nop(item: int, page: AesGcm, mac: bytes) -> EntryStatus:
    _check_mac(page, mac)
    if not is_valid(item):
        raise _bad(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY, EntryStatus.GPA_LIST_ENTRY_INVALID)
    return EntryStatus.SKIPPED


_WALK_ERRORS: Final = {
    EntryStatus.SEPT_WALK_FAILED: Status.TDX_EPT_WALK_FAILED,
    EntryStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY: Status.TDX_OPERAND_BUSY,
    EntryStatus.SEPT_ENTRY_STATE_INCORRECT: Status.TDX_EPT_ENTRY_STATE_INCORRECT,
}


async def _import(call: HostCall, td: Td, item: _Item) -> None:
    """One page: finds its entry, and does what the list asks for. All locks are let go of, unless it fails.

    :raises _Bad: when it cannot.
    """
    gpa, wanted = gpa_of(td, item.gpa), operation(item.gpa)
    if gpa is None:
        raise _bad(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY, EntryStatus.GPA_LIST_ENTRY_INVALID)
    entry, status = await find_entry(call, td, gpa)
    if entry is None or status is not EntryStatus.SUCCESS:
        raise _bad(_WALK_ERRORS[status], Operand.GPA_LIST_ENTRY, status, _Fatal.IN_ORDER)
    if td.tdcs.op_state not in op_state.IMPORT_IN_ORDER and wanted is not Operation.MIGRATE:
        raise _Bad(Status.TDX_OP_STATE_INCORRECT, EntryStatus.OP_STATE_INCORRECT)
    content = wanted is not Operation.CANCEL and not item.gpa & PENDING
    if content and not _is_buffer(call, item.buffer):
        raise _no_buffer()
    await _OPERATIONS[wanted](call, td, entry, item)


def _is_buffer(call: HostCall, buffer: int) -> bool:
    return not buffer & INVALID_PAGE and call.module.is_shared_hpa(buffer & PAGE_MASK, PAGE_4K)


def _no_buffer() -> _Bad:
    return _bad(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY, EntryStatus.MIG_BUFFER_NOT_AVAILABLE)


def _wrong_state(fatal: _Fatal = _Fatal.SESSION) -> _Bad:
    status = EntryStatus.SEPT_ENTRY_STATE_INCORRECT
    return _bad(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.GPA_LIST_ENTRY, status, fatal)


def _decrypt(call: HostCall, item: _Item, page_pa: int) -> None:
    """The page's content comes into the TD, then the MAC is checked; a pending page has no content.

    :raises _Bad: INVALID_PAGE_MAC; the content is there nevertheless.
    """
    memory, page = call.module.memory, item.message
    if not item.gpa & PENDING:
        page, plain = page.decrypt(memory.page(call.module.pa_format.address(item.buffer & PAGE_MASK)))
        memory.set_page(page_pa, plain)
    _check_mac(page, item.mac)


async def _migrate(call: HostCall, td: Td, entry: SeptEntry, item: _Item) -> None:
    """The first import of a page, or the first after it was taken away in an earlier epoch."""
    module, tdcs = call.module, td.tdcs
    if sept.is_mapped_or_pending(entry.value):
        raise _wrong_state(_Fatal.IN_ORDER)
    if _removed_in(entry.value) >= tdcs.mig_epoch:
        operand, status = Operand.GPA_LIST_ENTRY, EntryStatus.DISALLOWED_IMPORT_OVER_REMOVED
        raise _bad(Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, operand, status)
    try:
        page = await lock_new_page(call, _new_page(call, item), Operand.NEW_PAGE_LIST_ENTRY)
    except Fail as fail:
        raise _Bad(fail.status, EntryStatus.NEW_PAGE_NOT_AVAILABLE, _Fatal.IN_ORDER) from None
    _decrypt(call, item, page.pa)

    await add_children(td, 1)
    epoch = MigrationEpoch(tdcs.mig_epoch, tdcs.export_count).encode()
    module.pamt[page.key] = PamtEntry(PageType.REG, td.pa, epoch)
    await unlock_page(call, page)
    # A running TD meets the entry blocked first, and then as it is to be.
    pending = item.gpa & PENDING
    state, rights = (SeptState.PENDING_BLOCKED, 0) if pending else (SeptState.BLOCKED, sept.RWX)
    blocked = leaf_entry(page.pa, state, rights, locked=True)
    await write_entry(call, entry, blocked)
    await write_entry(call, entry, sept.unblocked(blocked) & ~sept.TDEL)


def _removed_in(value: int) -> int:
    """The migration epoch in which a page was taken away, or -1."""
    removed = value & sept.STATE_MASK == SeptState.REMOVED and value & sept.MIG_EPOCH_VALID
    return value >> sept.MIG_EPOCH_SHIFT & _EPOCH if removed else -1


def _new_page(call: HostCall, item: _Item) -> int:
    """The page to import into: one of its own, or the buffer.

    :raises _Bad: OPERAND_INVALID with MIG_BUFF_LIST_ENTRY or NEW_PAGE_LIST_ENTRY.
    """
    if item.new_page & INVALID_PAGE:
        if item.buffer & INVALID_PAGE:
            raise _no_buffer()
        return call.module.pa_format.with_hkid(item.buffer, 0)
    if item.new_page & (PAGE_4K - 1 | call.module.reserved_in_private_pa):
        operand = Operand.NEW_PAGE_LIST_ENTRY
        raise _bad(Status.TDX_OPERAND_INVALID, operand, EntryStatus.NEW_PAGE_NOT_AVAILABLE)
    return item.new_page


def _check_epoch(td: Td, bepoch: int) -> None:
    """Whether the page was imported in an earlier epoch."""
    if bepoch & _EPOCH >= td.tdcs.mig_epoch:
        operand, status = Operand.GPA_LIST_ENTRY, EntryStatus.MIGRATED_IN_CURRENT_EPOCH
        raise _bad(Status.TDX_MIGRATED_IN_CURRENT_EPOCH, operand, status)


async def _remigrate(call: HostCall, td: Td, entry: SeptEntry, item: _Item) -> None:
    """A newer version of a page."""
    if not sept.is_mapped_or_pending(entry.value):
        raise _wrong_state()
    key, owned = owned_entry(call, entry.page, Level.PT)
    _check_epoch(td, owned.bepoch)
    pending = item.gpa & PENDING
    if pending and not sept.is_pending(entry.value):
        operand, status = Operand.GPA_LIST_ENTRY, EntryStatus.SEPT_ENTRY_STATE_INCORRECT
        raise _bad(Status.TDX_IMPORT_MISMATCH, operand, status)
    _decrypt(call, item, entry.page)
    epoch = owned.bepoch & ~_EPOCH | td.tdcs.mig_epoch
    call.module.pamt[key] = owned._replace(bepoch=epoch)
    state, rights = (SeptState.PENDING, 0) if pending else (SeptState.MAPPED, sept.RWX)
    await write_entry(call, entry, leaf_entry(entry.page, state, rights))


async def _cancel(call: HostCall, td: Td, entry: SeptEntry, item: _Item) -> None:
    """Takes an imported page away; nothing older than this epoch may come in its place."""
    if not sept.is_mapped_or_pending(entry.value):
        raise _wrong_state()
    _check_mac(item.message, item.mac)
    key, _ = owned_entry(call, entry.page, Level.PT)
    lock = PamtLock(call.module.locks, key)
    try:
        await call.locks.take(lock, EXCLUSIVE, Operand.GPA_LIST_ENTRY)
    except Fail as fail:
        raise _Bad(fail.status, EntryStatus.TD_PAGE_BUSY_HOST_PRIORITY) from None
    _check_epoch(td, call.module.pamt_entry(key).bepoch)
    await write_entry(call, entry, sept.removed_entry(td.tdcs.mig_epoch))
    await add_children(td, -1)
    set_page_type(call, key, PageType.NDA)
    await call.locks.release(lock)


_OPERATIONS: Final = {
    Operation.MIGRATE: _migrate,
    Operation.REMIGRATE: _remigrate,
    Operation.CANCEL: _cancel,
}

LEAVES: dict[int, Handler] = {HostLeaf.TDH_IMPORT_MEM: tdh_import_mem}
