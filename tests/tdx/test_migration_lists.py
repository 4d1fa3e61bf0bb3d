"""Lists of pages that migrate: what becomes of each entry, and calls that were interrupted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState, VcpuState
from septum.arch.operands import Operand
from septum.arch.status import FATAL, Status, with_operand
from septum.core.run import solo_call
from septum.tdx.migration.gpa_list import EntryStatus, Operation
from septum.tdx.migration.mbmd import SIZE
from septum.tdx.registers import Regs
from tests.tdx.guests import lock_trace
from tests.tdx.invariants import check_locks
from tests.tdx.migration_calls import (
    BAD_OPERAND,
    CALLS,
    LIST,
    LIST_LEAVES,
    H,
    export_mem,
    import_mem,
    import_vp,
    new_vcpu,
    state_pages,
)
from tests.tdx.migration_machine import (
    BUFFERS,
    CONTENT,
    GPAS,
    INVALID,
    LAST_EPOCH,
    NEW_PAGES,
    RESUME,
    TOKEN,
    Migration,
    entry,
    status_of,
)

# -- lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [*LIST_LEAVES, H.TDH_EXPORT_MEM])
@pytest.mark.parametrize("item", [entry(0) | 1, entry(0) | 8, entry(0, Operation.NOP) | 1 << 61, entry(1 << 47)])
def test_wrong_entries(begun: Migration, leaf: HostLeaf, item: int) -> None:
    if leaf is H.TDH_EXPORT_RESTORE:
        begun.ok(H.TDH_EXPORT_ABORT, rcx=begun.source)
    nop = entry(0, Operation.NOP)
    begun.put(GPAS, nop, item, nop)
    regs = begun.call(leaf, **(LIST | {"rcx": GPAS | 2 << 55, "rdx": begun.source}))
    assert regs.rax == BAD_OPERAND["GPA_LIST_ENTRY"]
    assert regs.rcx == GPAS | 1 << 3 | 2 << 55
    statuses = [status_of(item) for item in begun.get(GPAS, 3)]
    assert statuses == [EntryStatus.SKIPPED, EntryStatus.GPA_LIST_ENTRY_INVALID, EntryStatus.SUCCESS]
    assert not dict(begun.module.locks)


def test_problems_are_counted(begun: Migration) -> None:
    begun.block_writes(0x1000)
    items = (entry(0), entry(0x1000), entry(1 << 30), entry(0x2000, Operation.CANCEL), entry(0x2000, Operation.NOP))
    regs = begun.on_list(H.TDH_EXPORT_BLOCKW, *items)
    assert regs.rax == with_operand(Status.TDX_SUCCESS, 2)
    statuses = [status_of(item) for item in begun.get(GPAS, len(items))]
    assert statuses == [
        EntryStatus.SUCCESS, EntryStatus.SEPT_ENTRY_STATE_INCORRECT, EntryStatus.SEPT_WALK_FAILED, EntryStatus.SKIPPED,
        EntryStatus.SKIPPED,
    ]  # fmt: skip
    assert begun.get(GPAS, 1) == [entry(0)]
    assert begun.of_source.tdcs.bw_epoch == begun.of_source.tdcs.td_epoch


def test_busy_entries_are_problems(begun: Migration) -> None:
    entries = begun.module.sept
    pa = next(pa for pa, value in entries.items() if value & ~0xFFF & (1 << 52) - 1 == begun.pages[0])
    entries[pa] |= 1 << 11
    regs = begun.on_list(H.TDH_EXPORT_BLOCKW, entry(0), entry(0x1000))
    assert regs.rax == with_operand(Status.TDX_SUCCESS, 1)
    assert status_of(begun.get(GPAS, 1)[0]) == EntryStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY


def test_export_without_a_buffer(begun: Migration) -> None:
    begun.block_writes(0)
    begun.put(GPAS, entry(0))
    begun.put(BUFFERS, INVALID)
    regs = begun.mem(H.TDH_EXPORT_MEM, begun.source, 1)
    assert regs.rax == with_operand(Status.TDX_SUCCESS, 1)
    assert status_of(begun.get(GPAS, 1)[0]) == EntryStatus.MIG_BUFFER_NOT_AVAILABLE
    begun.put(GPAS, entry(0))
    begun.put(BUFFERS, 1 << 51)
    assert begun.mem(H.TDH_EXPORT_MEM, begun.source, 1).rax == BAD_OPERAND["MIG_BUFF_LIST_ENTRY"]
    assert not dict(begun.module.locks)


def test_cancel_is_for_exported_pages(begun: Migration) -> None:
    cancel = entry(0, Operation.CANCEL)
    assert begun.export(cancel).rax == with_operand(Status.TDX_SUCCESS, 1)
    assert status_of(begun.get(GPAS, 1)[0]) == EntryStatus.SEPT_ENTRY_STATE_INCORRECT
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    begun.ok(H.TDH_EXPORT_TRACK, rcx=begun.source, r8=TOKEN | SIZE << 52, r10=LAST_EPOCH)
    assert begun.export(cancel).rax == with_operand(Status.TDX_SUCCESS, 1)
    assert status_of(begun.get(GPAS, 1)[0]) == EntryStatus.OP_STATE_INCORRECT


#: What spoils an import of pages: the list, its only entry; the status of the call and its operand; that of the entry.
SPOILT: list[tuple[int, Callable[[Migration], int], Status, Operand, EntryStatus]] = [
    (
        NEW_PAGES, lambda m: 8, Status.TDX_OPERAND_INVALID, Operand.NEW_PAGE_LIST_ENTRY,
        EntryStatus.NEW_PAGE_NOT_AVAILABLE,
    ),
    (
        NEW_PAGES, lambda m: m.pages[0], Status.TDX_PAGE_METADATA_INCORRECT, Operand.NEW_PAGE_LIST_ENTRY,
        EntryStatus.NEW_PAGE_NOT_AVAILABLE,
    ),
    (
        NEW_PAGES, lambda m: m.target, Status.TDX_OPERAND_BUSY, Operand.NEW_PAGE_LIST_ENTRY,
        EntryStatus.NEW_PAGE_NOT_AVAILABLE,
    ),
    (
        BUFFERS, lambda m: INVALID, Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY,
        EntryStatus.MIG_BUFFER_NOT_AVAILABLE,
    ),
    (
        BUFFERS, lambda m: 1 << 51, Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY,
        EntryStatus.MIG_BUFFER_NOT_AVAILABLE,
    ),
    (
        GPAS, lambda m: entry(0) | 8, Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY,
        EntryStatus.GPA_LIST_ENTRY_INVALID,
    ),
    (
        GPAS, lambda m: entry(1 << 30), Status.TDX_EPT_WALK_FAILED, Operand.GPA_LIST_ENTRY,
        EntryStatus.SEPT_WALK_FAILED,
    ),
    (
        GPAS, lambda m: entry(0, Operation.REMIGRATE), Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.GPA_LIST_ENTRY,
        EntryStatus.SEPT_ENTRY_STATE_INCORRECT,
    ),
    (
        GPAS, lambda m: entry(0, Operation.CANCEL), Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.GPA_LIST_ENTRY,
        EntryStatus.SEPT_ENTRY_STATE_INCORRECT,
    ),
    (
        GPAS, lambda m: entry(0, Operation.NOP), Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY,
        EntryStatus.INVALID_PAGE_MAC,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("table", "value", "status", "operand", "entry_status"), SPOILT)
def test_failures_of_an_import(
    move: Migration,
    table: int,
    value: Callable[[Migration], int],
    status: Status,
    operand: Operand,
    entry_status: EntryStatus,
) -> None:
    operands = import_mem(move)
    move.put(table, value(move))
    regs = move.call(H.TDH_IMPORT_MEM, **operands)
    assert regs.rax == with_operand(status, operand) | FATAL
    assert status_of(move.get(GPAS, 1)[0]) == entry_status
    assert move.get(NEW_PAGES, 1)[0] & INVALID
    assert move.of_target.tdcs.op_state == OpState.FAILED_IMPORT
    check_locks(move.module)


def test_skipped_entries_are_authenticated_too(begun: Migration) -> None:
    begun.export(entry(0, Operation.NOP), entry(0x1000, Operation.NOP))
    assert begun.import_(2).rax == 0
    assert [status_of(item) for item in begun.get(GPAS, 2)] == [EntryStatus.SKIPPED] * 2
    assert all(page & INVALID for page in begun.get(NEW_PAGES, 2))


def test_a_pending_page_does_not_replace_content(begun: Migration) -> None:
    begun.ok(H.TDH_MEM_PAGE_AUG, rcx=0x3000, rdx=begun.source, r8=begun.page())
    begun.block_writes(0x3000)
    begun.move_pages(0x3000)
    begun.track()
    # The guest accepts the page, which is then moved as a page with content.
    entries = begun.module.sept
    pa = next(pa for pa, value in entries.items() if value & 1 << 56 and value & 1 << 54)
    entries[pa] = entries[pa] & ~(1 << 56) | 1 << 9 | 0b101
    begun.of_source.tdcs.dirty_count += 1
    begun.move_pages(0x3000)
    assert begun.sept(begun.target, 0x3000)[1] == 4
    begun.track()
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0x3000, rdx=begun.source)
    entries[pa] = entries[pa] & ~7 | 1 << 56
    begun.block_writes(0x3000)
    assert begun.export(entry(0x3000)).rax == 0
    assert begun.import_(1).rax == with_operand(Status.TDX_IMPORT_MISMATCH, Operand.GPA_LIST_ENTRY) | FATAL


# -- interrupted calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blockw", "restore"])
def test_lists_go_on_where_they_were_interrupted(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    move.interrupt(True)
    regs = move.call(leaf, **operands)
    assert (regs.rax, regs.rcx) == (Status.TDX_INTERRUPTED_RESUMABLE, GPAS | 1 << 3 | 1 << 55)
    regs = move.call(leaf, **(operands | {"rcx": regs.rcx}))
    assert (regs.rax, regs.rcx) == (Status.TDX_SUCCESS, GPAS | 2 << 3 | 1 << 55)


def test_an_interrupted_export_of_pages(begun: Migration) -> None:
    begun.block_writes(*CONTENT)
    begun.interrupt(True)
    regs = begun.export(*map(entry, CONTENT))
    header = begun.header()
    for done in (1, 2):
        assert (regs.rax, regs.rcx) == (Status.TDX_INTERRUPTED_RESUMABLE, GPAS | done << 3 | 2 << 55)
        regs = begun.mem(H.TDH_EXPORT_MEM, begun.source, 3, first=done, r10=RESUME)
    assert (regs.rax, regs.rdx) == (0, 5)
    assert begun.header() == header
    again = begun.mem(H.TDH_EXPORT_MEM, begun.source, 3, first=2, r10=RESUME)
    assert again.rax == Status.TDX_INVALID_RESUMPTION
    begun.interrupt(False)
    assert begun.import_(3).rax == 0


def test_an_interrupted_import_of_pages(begun: Migration) -> None:
    begun.block_writes(*CONTENT)
    assert begun.export(*map(entry, CONTENT)).rax == 0
    begun.interrupt(True)
    regs = begun.import_(3)
    assert (regs.rax, regs.rcx) == (Status.TDX_INTERRUPTED_RESUMABLE, GPAS | 1 << 3 | 2 << 55)
    begun.interrupt(False)
    regs = begun.mem(H.TDH_IMPORT_MEM, begun.target, 3, first=1, r10=RESUME, r13=NEW_PAGES)
    assert regs.rax == 0
    contents = [begun.module.memory.read(page, 4).strip(b"\0") for page in begun.new_pages]
    assert contents == list(CONTENT.values())


def test_another_call_cannot_be_resumed(begun: Migration) -> None:
    begun.block_writes(*CONTENT)
    begun.interrupt(True)
    begun.export(*map(entry, CONTENT))
    regs = begun.mem(H.TDH_EXPORT_MEM, begun.source, 3, first=2, r10=RESUME)
    assert regs.rax == Status.TDX_INVALID_RESUMPTION
    begun.export(*map(entry, CONTENT))
    begun.ok(H.TDH_EXPORT_TRACK, rcx=begun.source, r8=TOKEN | SIZE << 52)
    regs = begun.mem(H.TDH_EXPORT_MEM, begun.source, 3, first=1, r10=RESUME)
    assert regs.rax == Status.TDX_INVALID_RESUMPTION


@pytest.mark.parametrize(
    ("name", "back"),
    [("export immutable", "import immutable"), ("export vp", "import vp")],
)
def test_an_interrupted_export_of_state(move: Migration, name: str, back: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    move.interrupt(True)
    regs = move.call(leaf, **operands)
    calls = 1
    while regs.rax == Status.TDX_INTERRUPTED_RESUMABLE:
        assert regs.rdx == calls
        regs = move.call(leaf, **(operands | {"r10": RESUME}))
        calls += 1
    assert (regs.rax, regs.rdx) == (0, calls)
    assert calls > 1
    move.interrupt(False)
    target = new_vcpu(move) if back == "import vp" else move.target
    assert move.call(CALLS[back][0], **({"rcx": target} | state_pages(move, calls))).rax == 0


@pytest.mark.parametrize("name", ["import immutable", "import vp"])
def test_an_interrupted_import_of_state(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move) | {"rdx": 7}
    move.interrupt(True)
    regs = move.call(leaf, **operands)
    assert (regs.rax, regs.rcx, regs.rdx) == (Status.TDX_INTERRUPTED_RESUMABLE, operands["rcx"], 7)
    if name == "import vp":
        assert move.module.vp(operands["rcx"]).tdvps.vcpu_state == VcpuState.IMPORT
    move.interrupt(False)
    assert move.call(leaf, **(operands | {"r10": RESUME})).rax == 0
    if name == "import vp":
        assert move.module.vp(operands["rcx"]).tdvps.vcpu_state == VcpuState.READY


@pytest.mark.parametrize("name", ["import immutable", "import vp"])
def test_an_import_is_resumed_as_it_was_begun(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    resumed = operands | {"r10": RESUME}
    incorrect = (Status.TDX_INVALID_RESUMPTION, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    assert move.call(leaf, **resumed).rax in incorrect
    assert move.of_target.tdcs.op_state != OpState.FAILED_IMPORT
    move.interrupt(True)
    assert move.call(leaf, **operands).rax == Status.TDX_INTERRUPTED_RESUMABLE
    other = {"r9": operands["r9"] ^ 1 << 40}
    assert move.call(leaf, **(resumed | other)).rax == Status.TDX_INVALID_RESUMPTION | FATAL
    assert move.of_target.tdcs.op_state == OpState.FAILED_IMPORT


def test_a_vcpu_is_resumed_where_it_was_begun(move: Migration) -> None:
    operands = import_vp(move)
    move.interrupt(True)
    assert move.call(H.TDH_IMPORT_STATE_VP, **operands).rax == Status.TDX_INTERRUPTED_RESUMABLE
    regs = move.call(H.TDH_IMPORT_STATE_VP, lp=1, **(operands | {"r10": RESUME}))
    assert regs.rax == Status.TDX_VCPU_ASSOCIATED | FATAL


def test_solo_and_stepped_runs_agree(move: Migration) -> None:
    """The same call, step by step under a scheduler, leaves what it leaves in one go."""
    other = Migration()
    for machine, stepped in ((move, True), (other, False)):
        regs = Regs.of({"rax": H.TDH_EXPORT_MEM, **export_mem(machine)})
        if stepped:
            lock_trace(machine.module, lambda m=machine, r=regs: m.module.seamcall(0, r))
        else:
            solo_call(machine.module.seamcall(0, regs))
    assert dict(move.module.sept) == dict(other.module.sept)
    assert dict(move.module.memory.pages) == dict(other.module.memory.pages)
