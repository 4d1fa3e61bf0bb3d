"""TDH.EXPORT.*, TDH.IMPORT.*: who can call what when, operands, headers of bundles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState, VcpuState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.platform_msrs import BOOT_NT4, IA32_MISC_ENABLE
from septum.arch.status import FATAL, Status, with_operand
from septum.core.cells import Journal, Tracking
from septum.tdx.migration.mbmd import OUT_OF_ORDER_EPOCH, SIZE, BundleType
from tests.tdx.machines import PARAMS
from tests.tdx.migration_calls import (
    BAD_OPERAND,
    CALLS,
    LIST,
    LIST_LEAVES,
    MEM_LEAVES,
    RESERVED,
    STATE,
    H,
    export_vp,
    import_immutable,
    import_vp,
    new_vcpu,
)
from tests.tdx.migration_machine import (
    BUFFER,
    BUFFERS,
    GPAS,
    LAST_EPOCH,
    MACS,
    MBMD,
    NEW_PAGES,
    RESUME,
    STATE_PAGES,
    TOKEN,
    Migration,
)

# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_op_state(move: Migration, name: str) -> None:
    """A TD that is in no session, or in one that has failed, takes no part in it."""
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    for td in (move.of_source, move.of_target):
        td.tdcs.op_state = OpState.PAUSED_EXPORT if "IMPORT" in leaf.name else OpState.FAILED_IMPORT
    assert move.call(leaf, **operands).rax == Status.TDX_OP_STATE_INCORRECT


def test_who_can_begin_a_session(move: Migration) -> None:
    source, target = move.of_source.tdcs, move.of_target.tdcs
    plain, _ = move.finalized_td(replace(PARAMS, attributes=0))
    assert move.state(H.TDH_EXPORT_STATE_IMMUTABLE, plain, 3).rax == Status.TDX_TD_NOT_MIGRATABLE
    source.num_migs = target.num_migs = 1
    assert move.state(H.TDH_EXPORT_STATE_IMMUTABLE, move.source, 3).rax == Status.TDX_MIN_MIGS_NOT_CREATED
    assert move.import_immutable(2).rax == Status.TDX_MIN_MIGS_NOT_CREATED
    source.num_migs, target.num_migs = 3, 2
    source.export_count = 0x7FFF_FFFF
    assert move.state(H.TDH_EXPORT_STATE_IMMUTABLE, move.source, 3).rax == Status.TDX_MAX_EXPORTS_EXCEEDED
    source.export_count = 0
    move.exchange_keys()
    assert move.import_immutable(move.export_immutable()).rax == Status.TDX_NUM_MIGS_HIGHER_THAN_CREATED | FATAL


def test_a_session_needs_keys(move: Migration) -> None:
    move.of_target.tdcs.mig_dec_key_set = False
    assert move.import_immutable(move.export_immutable()).rax == Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET
    assert move.of_target.tdcs.op_state == OpState.UNINITIALIZED
    move.ok(H.TDH_EXPORT_ABORT, rcx=move.source)
    move.exchange_keys()
    move.module.hardware.inputs.entropy_exhausted = True
    assert move.import_immutable(2).rax == Status.TDX_RND_NO_ENTROPY
    assert move.state(H.TDH_EXPORT_STATE_IMMUTABLE, move.source, 3).rax == Status.TDX_RND_NO_ENTROPY


def test_an_import_looks_at_the_platform_first(move: Migration) -> None:
    move.module.hardware.msrs[0, IA32_MISC_ENABLE] = BOOT_NT4
    regs = move.call(H.TDH_IMPORT_STATE_IMMUTABLE, rcx=1, rdx=2)
    assert (regs.rax, regs.rcx, regs.rdx) == (Status.TDX_LIMIT_CPUID_MAXVAL_SET, 0, 0)


def test_vcpus_are_moved_once(move: Migration) -> None:
    operands = export_vp(move)
    move.ok(H.TDH_EXPORT_STATE_VP, **operands)
    assert move.call(H.TDH_EXPORT_STATE_VP, **operands).rax == Status.TDX_VCPU_ALREADY_EXPORTED
    few = new_vcpu(move, pages=1)
    assert move.state(H.TDH_IMPORT_STATE_VP, few, 5).rax == Status.TDX_TDCX_NUM_INCORRECT


def test_too_many_vcpus(move: Migration) -> None:
    operands = import_vp(move)
    move.of_target.tdcs.num_migrated_vcpus = 1
    assert move.call(H.TDH_IMPORT_STATE_VP, **operands).rax == Status.TDX_ALL_VCPUS_IMPORTED | FATAL


def test_too_few_vcpus(move: Migration) -> None:
    export_vp(move)
    move.ok(H.TDH_EXPORT_TRACK, rcx=move.source, r8=TOKEN | SIZE << 52, r10=LAST_EPOCH)
    regs = move.call(H.TDH_IMPORT_TRACK, rcx=move.target, r8=TOKEN | SIZE << 52)
    assert regs.rax == Status.TDX_SOME_VCPUS_NOT_MIGRATED | FATAL


def test_a_vcpu_that_is_not_new(move: Migration) -> None:
    operands = import_vp(move)
    move.module.vp(operands["rcx"]).tdvps.vcpu_state = VcpuState.READY
    assert move.call(H.TDH_IMPORT_STATE_VP, **operands).rax == Status.TDX_VCPU_STATE_INCORRECT | FATAL


def test_epochs_end(begun: Migration) -> None:
    begun.of_source.tdcs.mig_epoch = OUT_OF_ORDER_EPOCH - 1
    token = {"rcx": begun.source, "r8": TOKEN | SIZE << 52}
    assert begun.call(H.TDH_EXPORT_TRACK, **token).rax == Status.TDX_MIGRATION_EPOCH_OVERFLOW
    assert begun.call(H.TDH_EXPORT_TRACK, r10=LAST_EPOCH, **token).rax == Status.TDX_OP_STATE_INCORRECT


def test_streams_must_have_been_used(begun: Migration) -> None:
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    for td in (begun.of_source, begun.of_target):
        td.stream(1).migsc.initialised = False
    expected = Status.TDX_MIGRATION_STREAM_STATE_INCORRECT
    token = {"r8": TOKEN | SIZE << 52}
    assert begun.call(H.TDH_EXPORT_TRACK, rcx=begun.source, **token).rax == expected
    assert begun.call(H.TDH_IMPORT_TRACK, rcx=begun.target, **token).rax == expected
    assert begun.state(H.TDH_EXPORT_STATE_TD, begun.source, 2).rax == expected
    assert begun.state(H.TDH_IMPORT_STATE_TD, begun.target, 2).rax == expected
    assert begun.call(H.TDH_EXPORT_MEM, **LIST, rdx=begun.source, r10=RESUME).rax == expected


# -- operands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "operand"),
    [
        ({"rcx": GPAS | 1}, "RCX"),
        ({"rcx": GPAS | RESERVED}, "RCX"),
        ({"rcx": GPAS | 2 << 3 | 1 << 55}, "RCX"),
        ({"rcx": 1 << 51}, "RCX"),
        ({"rcx": GPAS | 1 << 3 | 1 << 55}, "RCX"),
        ({"r8": MBMD | SIZE - 1 << 52}, "R8"),
        ({"r8": MBMD + 64 | SIZE << 52}, "R8"),
        ({"r9": BUFFERS + 8}, "R9"),
        ({"r10": 2}, "R10"),
        ({"r10": 1 << 16}, "R10"),
        ({"r10": 1 << 62}, "R10"),
        ({"r11": MACS + 16}, "R11"),
        ({"rcx": GPAS | 256 << 55}, "R12"),
        ({"r13": NEW_PAGES + 8}, "R13"),
        ({"r13": NEW_PAGES + 8, "r8": 0, "r12": 1}, "R13"),
        ({"r13": NEW_PAGES + 8, "r8": 0, "r11": 1}, "R11"),
        ({"r9": 1, "r8": 0, "r11": 1}, "R9"),
        ({"r9": 1, "rcx": GPAS | 1, "r10": 2}, "R10"),
    ],
)
def test_operands_of_mem(begun: Migration, changes: dict[str, int], operand: str) -> None:
    operands = LIST | changes
    for leaf, tdr in zip(MEM_LEAVES, (begun.source, begun.target), strict=True):
        if leaf is H.TDH_EXPORT_MEM and operand == "R13":
            continue
        regs = begun.call(leaf, rdx=tdr, **operands)
        assert regs.rax == BAD_OPERAND[operand]
        assert (regs.rcx, regs.rdx) == (operands["rcx"], tdr)
    assert begun.of_target.tdcs.op_state == OpState.MEMORY_IMPORT
    assert not dict(begun.module.locks)


@pytest.mark.parametrize("leaf", LIST_LEAVES)
@pytest.mark.parametrize("rcx", [GPAS | 1, GPAS | RESERVED, GPAS | 1 << 3, 1 << 51])
def test_operands_of_lists(begun: Migration, leaf: HostLeaf, rcx: int) -> None:
    if leaf is H.TDH_EXPORT_RESTORE:
        begun.ok(H.TDH_EXPORT_ABORT, rcx=begun.source)
    regs = begun.call(leaf, rcx=rcx, rdx=begun.source)
    assert (regs.rax, regs.rcx) == (BAD_OPERAND["RCX"], rcx)


@pytest.mark.parametrize("rcx", [1, 1 << 52, 0x800])
def test_operands_of_unblockw(begun: Migration, rcx: int) -> None:
    regs = begun.call(H.TDH_EXPORT_UNBLOCKW, rcx=rcx, rdx=begun.source)
    assert (regs.rax, regs.rcx, regs.rdx) == (BAD_OPERAND["RCX"], 0, 0)


def test_unblockw_tells_the_entry_unless_it_is_busy(begun: Migration) -> None:
    shown = begun.sept(begun.source, 0)
    regs = begun.call(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=begun.source)
    assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (shown[0], shown[1] << 8)
    regs = begun.call(H.TDH_EXPORT_UNBLOCKW, rcx=1 << 30, rdx=begun.source)
    assert regs.rax == with_operand(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    entries = begun.module.sept
    pa = next(pa for pa, value in entries.items() if value & ~0xFFF & (1 << 52) - 1 == begun.pages[0])
    entries[pa] |= 1 << 11
    regs = begun.call(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=begun.source)
    assert (regs.rax, regs.rcx, regs.rdx) == (with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX), 0, 0)


@pytest.mark.parametrize(
    ("changes", "operand"),
    [
        ({"r8": 0}, "R8"),
        ({"r8": MBMD + 8 | SIZE << 52}, "R8"),
        ({"r10": 1}, "R10"),
        ({"r10": 1 << 32}, "R10"),
        ({"r8": 0, "r10": 1}, "R8"),
        ({"r9": STATE_PAGES | 1 << 55}, "R9"),
        ({"r9": STATE_PAGES | 1 | 7 << 55}, "R9"),
        ({"r9": 1 << 51 | 7 << 55}, "R9"),
        ({"r9": STATE_PAGES | 1 << 54 | 7 << 55}, "R9"),
    ],
)
def test_operands_of_immutable_export(move: Migration, changes: dict[str, int], operand: str) -> None:
    regs = move.call(H.TDH_EXPORT_STATE_IMMUTABLE, **({"rcx": move.source} | STATE | changes))
    assert (regs.rax, regs.rdx) == (BAD_OPERAND[operand], 0)
    assert move.of_source.tdcs.mig_dec_key_set


def test_pages_of_state_must_be_the_hosts(move: Migration) -> None:
    move.put(STATE_PAGES, STATE_PAGES + 8)
    regs = move.call(H.TDH_EXPORT_STATE_IMMUTABLE, **({"rcx": move.source} | STATE))
    assert regs.rax == BAD_OPERAND["MIG_BUFF_LIST_ENTRY"]
    assert move.of_source.tdcs.op_state == OpState.RUNNABLE
    move.exchange_keys()
    pages = move.export_immutable()
    move.put(STATE_PAGES, STATE_PAGES + 8)
    regs = move.call(H.TDH_IMPORT_STATE_IMMUTABLE, rcx=move.target, r8=STATE["r8"], r9=STATE_PAGES | pages - 1 << 55)
    assert regs.rax == BAD_OPERAND["PAGE"] | FATAL
    assert move.of_target.tdcs.op_state == OpState.FAILED_IMPORT


def test_mutable_state_looks_at_its_header_late(begun: Migration) -> None:
    begun.ok(H.TDH_EXPORT_PAUSE, rcx=begun.source)
    begun.put(STATE_PAGES, *(STATE_PAGES + PAGE_4K * (n + 1) for n in range(8)))
    before = begun.module.memory.page(STATE_PAGES + PAGE_4K)
    regs = begun.call(H.TDH_EXPORT_STATE_TD, rcx=begun.source, r8=0, r9=STATE["r9"])
    assert (regs.rax, regs.rdx) == (BAD_OPERAND["R8"], 0)
    assert begun.module.memory.page(STATE_PAGES + PAGE_4K) != before
    for leaf, rcx, pages in ((H.TDH_EXPORT_STATE_TD, begun.source, 1), (H.TDH_EXPORT_STATE_VP, begun.tdvpr, 4)):
        assert begun.state(leaf, rcx, pages).rax == BAD_OPERAND["R9"]
    assert begun.state(H.TDH_EXPORT_STATE_VP, begun.tdvpr, 8, r10=2).rax == BAD_OPERAND["R10"]


@pytest.mark.parametrize(
    ("name", "changes", "status"),
    [
        ("import immutable", {"r8": 0}, BAD_OPERAND["R8"] | FATAL),
        ("import immutable", {"r9": STATE_PAGES}, BAD_OPERAND["R9"] | FATAL),
        ("import immutable", {"r10": 1}, BAD_OPERAND["R10"]),
        ("import td", {"r8": 0}, BAD_OPERAND["R8"] | FATAL),
        ("import td", {"r9": STATE_PAGES | 1}, BAD_OPERAND["R9"] | FATAL),
        ("import td", {"r9": 1 << 51}, BAD_OPERAND["R9"] | FATAL),
        ("import td", {"r10": 1}, BAD_OPERAND["R10"]),
        ("import vp", {"r8": 0}, BAD_OPERAND["R8"] | FATAL),
        ("import vp", {"r9": STATE_PAGES | 2 << 55}, BAD_OPERAND["R9"] | FATAL),
        ("import vp", {"r10": 5}, BAD_OPERAND["R10"]),
        ("import track", {"r8": 0}, BAD_OPERAND["R8"]),
        ("import track", {"r10": 1}, BAD_OPERAND["R10"]),
        ("import abort", {"r8": 0}, BAD_OPERAND["R8"]),
        ("import abort", {"r10": 1 << 63}, BAD_OPERAND["R10"]),
        ("export track", {"r8": 0}, BAD_OPERAND["R8"]),
        ("export track", {"r10": 1}, BAD_OPERAND["R10"]),
        ("export abort", {"r8": 1}, BAD_OPERAND["R8"]),
        ("export abort", {"r10": 1}, BAD_OPERAND["R10"]),
        ("late export abort", {"r8": 0}, BAD_OPERAND["R8"]),
    ],
)
def test_operands_of_sessions(move: Migration, name: str, changes: dict[str, int], status: int) -> None:
    leaf, prepare, _, _ = CALLS[name]
    assert move.call(leaf, **(prepare(move) | changes)).rax == status
    assert (move.of_target.tdcs.op_state == OpState.FAILED_IMPORT) == (bool(status & FATAL) or name.startswith("late"))


# -- headers -----------------------------------------------------------------------------------------------------------


WRONG_HEADERS: tuple[dict[str, Any], ...] = (
    {"mb_type": BundleType.MUTABLE_TD_STATE + 40},
    {"mig_version": 1},
    {"migs_index": 1},
    {"size": 64},
    {"reserved": 1},
    {"mb_counter": 77},
    {"mig_epoch": 0x7777},
    {"body": 1 << 63},
)


@pytest.mark.parametrize("name", ["import immutable", "import td", "import vp", "import mem", "import track"])
def test_wrong_headers(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands, at = prepare(move), TOKEN if name == "import track" else MBMD
    genuine, before = move.header(at), move.of_target.tdcs.op_state
    journal = Journal(Tracking.world)
    for changes in WRONG_HEADERS:
        move.put_header(genuine._replace(**changes), at)
        regs = move.call(leaf, **operands)
        # A token of a later epoch than expected is not wrong in itself, but its MAC is.
        later = name == "import track" and "mig_epoch" in changes
        wrong = Status.TDX_INCORRECT_MBMD_MAC if later else Status.TDX_INVALID_MBMD
        # Pages may come again: the session goes on.
        fatal = name != "import mem"
        assert regs.rax == wrong | (FATAL if fatal else 0)
        assert move.of_target.tdcs.op_state == (OpState.FAILED_IMPORT if fatal else before)
        journal.undo(0)
    journal.close()
    assert move.call(leaf, **operands).rax == 0


def test_immutable_state_has_pages_of_the_module(move: Migration) -> None:
    operands = import_immutable(move)
    move.put_header(move.header()._replace(body=2))
    assert move.call(H.TDH_IMPORT_STATE_IMMUTABLE, **operands).rax == Status.TDX_INVALID_MBMD | FATAL


@pytest.mark.parametrize("name", ["import immutable", "import td", "import vp", "import mem"])
def test_forged_pages(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    at = BUFFER if name == "import mem" else STATE_PAGES + PAGE_4K
    move.module.memory.write(at + 100, b"forged")
    status = with_operand(Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY)
    expected = status if name == "import mem" else Status.TDX_INCORRECT_MBMD_MAC
    regs = move.call(leaf, **operands)
    assert regs.rax == expected | FATAL
    assert move.of_target.tdcs.op_state == OpState.FAILED_IMPORT
    if name != "import mem":
        assert (regs.rcx, regs.rdx) == (0, 0)


def test_replayed_bundles(begun: Migration) -> None:
    begun.block_writes(0, 0x1000)
    begun.move_pages(0)
    header = begun.header()
    assert begun.import_(1).rax == Status.TDX_INVALID_MBMD
    begun.move_pages(0x1000)
    begun.put_header(header)
    assert begun.import_(1).rax == Status.TDX_INVALID_MBMD
