"""Migrating a TD: whole sessions, what becomes of pages and state, how sessions end."""

from __future__ import annotations

import pytest

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.metadata import field_table
from septum.arch.op_state import OpState, VcpuState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.pamt import MigrationEpoch, decode_bepoch
from septum.arch.status import FATAL, Status, with_operand
from septum.tdx.migration.gpa_list import EntryStatus, Operation
from septum.tdx.migration.mbmd import OUT_OF_ORDER_EPOCH, SIZE, BundleType
from septum.tdx.servtd import Binding, BindingState
from septum.tdx.state.migsc import MAX_MIGS
from tests.tdx.migration_machine import (
    BUFFER,
    BUFFERS,
    CONTENT,
    GPAS,
    INVALID,
    LAST_EPOCH,
    MBMD,
    NEW_PAGES,
    TOKEN,
    Migration,
    entry,
    status_of,
)

H = HostLeaf
MAPPED, PENDING, BLOCKEDW, EXPORTED, DIRTY, REMOVED = 4, 2, 8, 9, 11, 5
"""States of Secure EPT entries as the host sees them."""


@pytest.fixture
def moved(begun: Migration) -> Migration:
    """All pages and all state are over, but the last epoch has not begun."""
    begun.block_writes(*CONTENT)
    begun.move_pages(*CONTENT)
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    begun.move_state()
    return begun


def states(move: Migration, tdr: int) -> list[int]:
    return [move.sept(tdr, gpa)[1] for gpa in CONTENT]


# -- sessions --------------------------------------------------------------------------------------------------------


def test_streams_are_created_in_pages_of_the_td(move: Migration) -> None:
    links, num_migs = (field_table("td").named(name).id for name in ("MIGSC_LINKS", "NUM_MIGS"))
    before = move.of_source.tdr.chldcnt
    page = move.page()
    move.ok(H.TDH_MIG_STREAM_CREATE, rcx=page, rdx=move.source)
    assert move.ok(H.TDH_MNG_RD, rcx=move.source, rdx=num_migs).r8 == 4
    assert move.ok(H.TDH_MNG_RD, rcx=move.source, rdx=links + 3).r8 == page
    assert move.of_source.tdr.chldcnt == before + 1
    assert move.call(H.TDH_MIG_STREAM_CREATE, rcx=page, rdx=move.source).rax == with_operand(
        Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX
    )
    move.export_immutable()
    assert move.ok(H.TDH_MNG_RD, rcx=move.source, rdx=links + 1).r8 & 0xFFF == 0b10


def test_streams_run_out(move: Migration) -> None:
    move.of_source.tdcs.num_migs = MAX_MIGS
    regs = move.call(H.TDH_MIG_STREAM_CREATE, rcx=move.page(), rdx=move.source)
    assert regs.rax == Status.TDX_MAX_MIGS_NUM_EXCEEDED
    assert not dict(move.module.locks)


def test_a_td_migrates_while_it_runs(begun: Migration) -> None:
    source, target = begun.of_source, begun.of_target
    assert (source.tdcs.op_state, target.tdcs.op_state) == (OpState.LIVE_EXPORT, OpState.MEMORY_IMPORT)
    begun.block_writes(*CONTENT)
    assert states(begun, begun.source) == [BLOCKEDW] * 3
    begun.move_pages(*CONTENT)
    assert states(begun, begun.source) == [EXPORTED] * 3
    assert states(begun, begun.target) == [MAPPED] * 3
    first_copy = begun.new_pages

    # The guest writes to a page, so that it is exported again in the next epoch.
    begun.track()
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0x1000, rdx=begun.source)
    assert states(begun, begun.source) == [EXPORTED, DIRTY, EXPORTED]
    assert (source.tdcs.mig_count, source.tdcs.dirty_count) == (3, 1)
    begun.module.memory.write(begun.pages[0x1000], b"won")
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    regs = begun.call(H.TDH_EXPORT_TRACK, rcx=begun.source, r8=TOKEN | SIZE << 52, r10=LAST_EPOCH)
    assert regs.rax == Status.TDX_EXPORTED_DIRTY_PAGES_REMAIN
    begun.move_pages(0x1000)
    assert begun.get(GPAS, 1) == [entry(0x1000, Operation.REMIGRATE)]
    assert source.tdcs.dirty_count == 0

    begun.move_state(stream=1)
    begun.track(LAST_EPOCH)
    assert (source.tdcs.op_state, target.tdcs.op_state) == (OpState.POST_EXPORT, OpState.POST_IMPORT)
    assert target.tdcs.mig_epoch == OUT_OF_ORDER_EPOCH
    begun.ok(H.TDH_IMPORT_END, rcx=begun.target)
    assert (target.tdcs.op_state, target.tdcs.import_count) == (OpState.RUNNABLE, 1)
    contents = [begun.module.memory.read(page, 4) for page in first_copy]
    assert contents == [b"zero", b"won\0", b"two\0"]
    begun.call(H.TDH_VP_ENTER, rcx=begun.new_vcpu)
    assert begun.module.lps[0].running == begun.new_vcpu


def test_the_state_is_the_same_on_the_other_side(moved: Migration) -> None:
    here, there = moved.module.vp(moved.tdvpr), moved.module.vp(moved.new_vcpu)
    assert there.tdvps.vcpu_state == VcpuState.READY
    for part in ("gprs", "xcr0", "vcpu_index", "xfam", "last_td_exit", "ve_info"):
        assert getattr(here.tdvps, part) == getattr(there.tdvps, part)
    assert {key: here.fields[key] for key in here.fields} == {key: there.fields[key] for key in there.fields}
    own = {"VPID", "TD HKID", "EPTP", "MSR-Bitmap Address", "Time-Stamp Counter Offset"}
    exported = [row for row in field_table("td_vmcs").entries if row.mig_export and row.name not in own]
    assert len(exported) > 80
    for row in exported:
        assert here.vmcs[row.id.field_code] == there.vmcs[row.id.field_code], row.name
    one, other = moved.of_source.tdcs, moved.of_target.tdcs
    for part in ("attributes", "xfam", "max_vcpus", "gpaw", "mrtd", "rtmr", "cpuid_flags", "msr_bitmaps", "xbuff_size"):
        assert getattr(one, part) == getattr(other, part), part
    assert moved.of_target.tdr.td_uuid == moved.of_source.tdr.td_uuid


def test_the_guests_clock_goes_on(moved: Migration) -> None:
    def virtual(tdr: int) -> int:
        td = moved.module.td(tdr).tdcs
        return (moved.module.hardware.inputs.tsc * td.tsc_multiplier >> 48) + td.tsc_offset & (1 << 64) - 1

    ahead = virtual(moved.source) - virtual(moved.target)
    assert 0 < ahead < 100_000


def test_a_td_runs_before_all_its_pages_are_here(moved: Migration) -> None:
    late = moved.page()
    moved.track(LAST_EPOCH)
    moved.ok(H.TDH_IMPORT_COMMIT, rcx=moved.target)
    assert moved.of_target.tdcs.op_state == OpState.LIVE_IMPORT
    moved.ok(H.TDH_MEM_PAGE_AUG, rcx=0x5000, rdx=moved.target, r8=late)
    # What is there already is passed over, and what is missing comes.
    moved.ok(H.TDH_MEM_RANGE_BLOCK, rcx=0x1000, rdx=moved.target)
    moved.ok(H.TDH_MEM_TRACK, rcx=moved.target)
    moved.ok(H.TDH_MEM_PAGE_REMOVE, rcx=0x1000, rdx=moved.target)
    assert moved.sept(moved.target, 0x1000)[1] == REMOVED
    assert moved.export(entry(0), entry(0x2000)).rax == 0
    regs = moved.import_(2)
    assert regs.rax == with_operand(Status.TDX_SUCCESS, 2)
    assert [status_of(item) for item in moved.get(GPAS, 2)] == [EntryStatus.SEPT_ENTRY_STATE_INCORRECT] * 2
    assert [page >> 63 for page in moved.get(NEW_PAGES, 2)] == [1, 1]
    # A page that was taken away in this epoch does not come back; the TD runs on without the rest.
    assert moved.export(entry(0x1000)).rax == 0
    regs = moved.import_(1)
    assert regs.rax == with_operand(Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, Operand.GPA_LIST_ENTRY)
    assert moved.of_target.tdcs.op_state == OpState.RUNNABLE
    assert moved.of_target.tdcs.import_count == 1


def test_abort_on_both_sides(moved: Migration) -> None:
    moved.track(LAST_EPOCH)
    regs = moved.call(H.TDH_IMPORT_ABORT, rcx=moved.target, r8=TOKEN | SIZE << 52)
    assert regs.rax == Status.TDX_SUCCESS | FATAL
    assert moved.of_target.tdcs.op_state == OpState.FAILED_IMPORT
    assert moved.header(TOKEN).mb_type == BundleType.ABORT_TOKEN
    forged = moved.header(TOKEN)
    moved.put_header(forged._replace(mac=bytes(16)), TOKEN)
    assert moved.call(H.TDH_EXPORT_ABORT, rcx=moved.source, r8=TOKEN | SIZE << 52).rax == Status.TDX_INCORRECT_MBMD_MAC
    moved.put_header(forged._replace(body=1), TOKEN)
    assert moved.call(H.TDH_EXPORT_ABORT, rcx=moved.source, r8=TOKEN | SIZE << 52).rax == Status.TDX_INVALID_MBMD
    assert moved.of_source.tdcs.op_state == OpState.POST_EXPORT
    moved.put_header(forged, TOKEN)
    moved.ok(H.TDH_EXPORT_ABORT, rcx=moved.source, r8=TOKEN | SIZE << 52)
    assert moved.of_source.tdcs.op_state == OpState.RUNNABLE
    assert moved.call(H.TDH_IMPORT_ABORT, rcx=moved.target).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R8)


def test_what_an_aborted_session_leaves_must_be_cleaned_up(begun: Migration) -> None:
    begun.block_writes(*CONTENT)
    assert begun.export(*map(entry, CONTENT)).rax == 0
    begun.ok(H.TDH_EXPORT_ABORT, rcx=begun.source)
    assert begun.of_source.tdcs.op_state == OpState.RUNNABLE
    begun.exchange_keys()
    again = begun.state(H.TDH_EXPORT_STATE_IMMUTABLE, begun.source, 3)
    assert again.rax == Status.TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE
    assert begun.on_list(H.TDH_EXPORT_RESTORE, *map(entry, CONTENT)).rax == 0
    assert states(begun, begun.source) == [MAPPED] * 3
    assert begun.sept(begun.source, 0)[0] & sept.RWX == sept.RWX
    assert begun.of_source.tdcs.mig_count == 0
    begun.export_immutable()
    assert begun.of_source.tdcs.export_count == 2


def test_each_session_needs_a_new_key(begun: Migration) -> None:
    begun.ok(H.TDH_EXPORT_ABORT, rcx=begun.source)
    keys = begun.of_source.tdcs.mig_enc_key, begun.of_source.tdcs.mig_enc_working_key
    again = begun.state(H.TDH_EXPORT_STATE_IMMUTABLE, begun.source, 3)
    assert again.rax == Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET
    begun.exchange_keys()
    begun.export_immutable()
    assert begun.of_source.tdcs.mig_enc_working_key == keys[0]
    assert begun.of_source.tdcs.mig_enc_key not in keys


def test_the_key_of_a_session_is_the_other_sides(move: Migration) -> None:
    move.of_target.tdcs.mig_dec_key = (1, 2, 3, 4)
    regs = move.import_immutable(move.export_immutable())
    assert regs.rax == Status.TDX_INCORRECT_MBMD_MAC | FATAL
    assert move.of_target.tdcs.op_state == OpState.FAILED_IMPORT


def test_nothing_of_a_td_leaves_in_clear(begun: Migration) -> None:
    begun.block_writes(0)
    begun.export(entry(0))
    assert b"zero" not in begun.module.memory.page(BUFFER)


def test_a_bound_service_td_must_be_the_same(move: Migration) -> None:
    for td, attributes in ((move.of_source, 1), (move.of_target, 0)):
        td.tdcs.servtd_bindings_table = Binding(BindingState.BOUND, attributes=attributes).pack()
    pages = move.export_immutable()
    assert move.import_immutable(pages).rax == 0
    move.ok(H.TDH_EXPORT_PAUSE, rcx=move.source)
    pages = move.state(H.TDH_EXPORT_STATE_TD, move.source, 2).rdx
    regs = move.state(H.TDH_IMPORT_STATE_TD, move.target, pages)
    assert regs.rax & ~0xFFFF_FFFF == Status.TDX_METADATA_FIELD_VALUE_NOT_VALID | FATAL
    assert regs.rcx == field_table("td").named("SERVTD_BINDINGS_TABLE").id


# -- pages -----------------------------------------------------------------------------------------------------------


def test_pages_of_a_running_td_need_tracking(begun: Migration) -> None:
    assert begun.on_list(H.TDH_EXPORT_BLOCKW, entry(0)).rax == 0
    regs = begun.export(entry(0), entry(0x1000))
    assert regs.rax == with_operand(Status.TDX_SUCCESS, 2)
    assert [status_of(item) for item in begun.get(GPAS, 2)] == [
        EntryStatus.TLB_TRACKING_NOT_DONE, EntryStatus.SEPT_ENTRY_STATE_INCORRECT,
    ]  # fmt: skip
    assert [buffer >> 63 for buffer in begun.get(BUFFERS, 2)] == [1, 1]
    begun.ok(H.TDH_MEM_TRACK, rcx=begun.source)
    regs = begun.export(entry(0))
    assert (regs.rax, regs.rdx) == (0, 3)


def test_pages_of_a_paused_td_need_not_be_blocked(begun: Migration) -> None:
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    assert begun.export(entry(0)).rax == 0
    value, state = begun.sept(begun.source, 0)
    assert (state, value & sept.RWX) == (EXPORTED, sept.RWX)
    assert begun.export(entry(0)).rax == with_operand(Status.TDX_SUCCESS, 1)


def test_an_export_is_cancelled_on_both_sides(begun: Migration) -> None:
    begun.block_writes(0)
    begun.move_pages(0)
    children = begun.of_target.tdr.chldcnt
    begun.track()
    assert begun.export(entry(0, Operation.CANCEL)).rax == 0
    assert states(begun, begun.source)[0] == MAPPED
    assert begun.of_source.tdcs.mig_count == 0
    page = begun.new_pages[0]
    assert begun.import_(1).rax == 0
    assert states(begun, begun.target)[0] == REMOVED
    assert begun.of_target.tdr.chldcnt == children - 1
    assert begun.module.pamt_entry(page).page_type == 0
    # In the epoch of its removal it cannot come again, later it can.
    begun.track()
    begun.block_writes(0)
    begun.move_pages(0)
    assert states(begun, begun.target)[0] == MAPPED


def test_a_dirty_page_can_be_cancelled(begun: Migration) -> None:
    begun.block_writes(0)
    begun.export(entry(0))
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=begun.source)
    assert begun.of_source.tdcs.dirty_count == 1
    assert begun.export(entry(0, Operation.CANCEL)).rax == 0
    assert (begun.of_source.tdcs.dirty_count, begun.of_source.tdcs.mig_count) == (0, 0)


def test_unblocking_gives_back_what_blocking_took(begun: Migration) -> None:
    before = begun.sept(begun.source, 0)
    begun.block_writes(0)
    assert begun.sept(begun.source, 0)[0] == before[0] & ~sept.W
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=begun.source)
    assert begun.sept(begun.source, 0) == before
    assert begun.of_source.tdcs.dirty_count == 0


def test_pending_pages_move_without_content(begun: Migration) -> None:
    begun.ok(H.TDH_MEM_PAGE_AUG, rcx=0x3000, rdx=begun.source, r8=begun.page())
    begun.block_writes(0x3000)
    regs = begun.export(entry(0x3000))
    assert (regs.rax, regs.rdx) == (0, 2)
    assert begun.get(GPAS, 1) == [entry(0x3000, pending=True)]
    assert begun.get(BUFFERS, 1)[0] & INVALID
    assert begun.import_(1).rax == 0
    assert begun.sept(begun.target, 0x3000)[1] == PENDING
    begun.track()
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0x3000, rdx=begun.source)
    assert begun.sept(begun.source, 0x3000)[1] == 19
    begun.block_writes(0x3000)
    begun.move_pages(0x3000)
    assert begun.sept(begun.target, 0x3000)[1] == PENDING


def test_imported_pages_tell_their_epoch(begun: Migration) -> None:
    begun.track()
    begun.block_writes(0)
    begun.move_pages(0)
    epoch = decode_bepoch(begun.module.pamt_entry(begun.new_pages[0]).bepoch)
    assert epoch == MigrationEpoch(mig_epoch=1, export_count=1)
    # The same page again in the same epoch is an attack, or a mistake.
    begun.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=begun.source)
    begun.block_writes(0)
    assert begun.export(entry(0)).rax == 0
    regs = begun.import_(1)
    assert regs.rax == with_operand(Status.TDX_MIGRATED_IN_CURRENT_EPOCH, Operand.GPA_LIST_ENTRY) | FATAL
    assert status_of(begun.get(GPAS, 1)[0]) == EntryStatus.MIGRATED_IN_CURRENT_EPOCH


def test_a_page_is_imported_into_its_buffer(begun: Migration) -> None:
    begun.block_writes(0)
    begun.export(entry(0))
    page = begun.page()
    begun.module.memory.set_page(page, begun.module.memory.page(BUFFER))
    begun.put(BUFFERS, page)
    assert begun.mem(H.TDH_IMPORT_MEM, begun.target, 1).rax == 0
    assert begun.sept(begun.target, 0)[0] & ~0xFFF & (1 << 52) - 1 == page
    assert begun.module.memory.read(page, 4) == b"zero"


def test_a_second_stream_counts_for_itself(begun: Migration) -> None:
    begun.block_writes(*CONTENT)
    for stream, gpa in ((1, 0), (0, 0x1000), (1, 0x2000)):
        assert begun.export(entry(gpa), r10=stream).rax == 0
        assert begun.header().migs_index == stream
        assert begun.import_(1, r10=stream).rax == 0
    assert begun.of_source.tdcs.total_mb_count == begun.of_target.tdcs.total_mb_count == 4
    assert [begun.of_source.stream(n).migsc.next_mb_counter for n in (1, 2)] == [2, 2]


def test_a_full_list_uses_both_pages_of_macs(begun: Migration) -> None:
    begun.put(GPAS, *(entry(0, Operation.NOP) for _ in range(512)))
    low, high = MBMD + 0x8000, MBMD + 0x9000
    operands = {"rcx": GPAS | 511 << 55, "r8": MBMD | SIZE << 52, "r9": BUFFERS, "r11": low, "r12": high}
    regs = begun.ok(H.TDH_EXPORT_MEM, rdx=begun.source, **operands)
    assert (regs.rcx, regs.rdx) == (GPAS | 511 << 55, 3)
    assert any(begun.module.memory.read(high + PAGE_4K - 16, 16))
    assert begun.header().body == 512
    assert begun.call(H.TDH_IMPORT_MEM, rdx=begun.target, r13=(1 << 64) - 1, **operands).rax == 0
