"""Each TDH.EXPORT, TDH.IMPORT and TDH.MIG call, ready to succeed, and the locks that it takes."""

from __future__ import annotations

from collections.abc import Callable

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.status import FATAL, Status, with_operand
from septum.tdx.migration.gpa_list import Operation
from septum.tdx.migration.mbmd import SIZE
from tests.tdx.machines import VCPU_PAGES
from tests.tdx.migration_machine import (
    BUFFER,
    BUFFERS,
    GPAS,
    LAST_EPOCH,
    MACS,
    MBMD,
    NEW_PAGES,
    NO_LIST,
    STATE_PAGES,
    TOKEN,
    Migration,
    entry,
)

H = HostLeaf
BAD_OPERAND = {operand.name: with_operand(Status.TDX_OPERAND_INVALID, operand) for operand in Operand}
RESERVED = 1 << 52
"""A bit that no list operand may have."""
LIST = {"rcx": GPAS, "r8": MBMD | SIZE << 52, "r9": BUFFERS, "r11": MACS, "r12": NO_LIST, "r13": NO_LIST}
STATE = {"r8": MBMD | SIZE << 52, "r9": STATE_PAGES | 7 << 55}
MEM_LEAVES = (H.TDH_EXPORT_MEM, H.TDH_IMPORT_MEM)
LIST_LEAVES = (H.TDH_EXPORT_BLOCKW, H.TDH_EXPORT_RESTORE)
Prepare = Callable[[Migration], dict[str, int]]


def new_vcpu(move: Migration, *, pages: int = VCPU_PAGES) -> int:
    """A VCPU of the destination that can be imported."""
    tdvpr = move.page()
    move.ok(H.TDH_VP_CREATE, rcx=tdvpr, rdx=move.target)
    for _ in range(pages):
        move.ok(H.TDH_VP_ADDCX, rcx=move.page(), rdx=tdvpr)
    return tdvpr


def state_pages(move: Migration, count: int) -> dict[str, int]:
    move.put(STATE_PAGES, *(STATE_PAGES + PAGE_4K * (number + 1) for number in range(count)))
    return {"r8": MBMD | SIZE << 52, "r9": STATE_PAGES | count - 1 << 55}


def stream_create(move: Migration) -> dict[str, int]:
    return {"rcx": move.page(), "rdx": move.source}


def export_immutable(move: Migration) -> dict[str, int]:
    return {"rcx": move.source, **state_pages(move, 3)}


def import_immutable(move: Migration) -> dict[str, int]:
    return {"rcx": move.target, **state_pages(move, move.export_immutable())}


def gpas(move: Migration) -> dict[str, int]:
    move.begin()
    move.put(GPAS, entry(0), entry(0x1000))
    return {"rcx": GPAS | 1 << 55, "rdx": move.source}


def exported_gpas(move: Migration) -> dict[str, int]:
    operands = gpas(move)
    move.block_writes(0, 0x1000)
    move.export(entry(0), entry(0x1000))
    move.ok(H.TDH_EXPORT_ABORT, rcx=move.source)
    return operands


def unblockw(move: Migration) -> dict[str, int]:
    move.begin()
    move.block_writes(0)
    return {"rcx": 0, "rdx": move.source}


def export_mem(move: Migration) -> dict[str, int]:
    move.begin()
    move.block_writes(0)
    move.put(GPAS, entry(0))
    move.put(BUFFERS, BUFFER)
    return LIST | {"rdx": move.source}


def import_mem(move: Migration) -> dict[str, int]:
    operands = export_mem(move) | {"rdx": move.target, "r13": NEW_PAGES}
    assert move.export(entry(0)).rax == 0
    move.put(NEW_PAGES, move.page())
    return operands


def import_mem_cancel(move: Migration) -> dict[str, int]:
    operands = import_mem(move)
    assert move.import_(1).rax == 0
    move.track()
    assert move.export(entry(0, Operation.CANCEL)).rax == 0
    return operands


def import_mem_again(move: Migration) -> dict[str, int]:
    operands = import_mem(move)
    assert move.import_(1).rax == 0
    move.track()
    move.ok(H.TDH_EXPORT_UNBLOCKW, rcx=0, rdx=move.source)
    move.block_writes(0)
    assert move.export(entry(0)).rax == 0
    return operands


def session(move: Migration) -> dict[str, int]:
    move.begin()
    return {"rcx": move.source}


def export_track(move: Migration) -> dict[str, int]:
    return session(move) | {"r8": TOKEN | SIZE << 52}


def import_track(move: Migration) -> dict[str, int]:
    move.ok(H.TDH_EXPORT_TRACK, **export_track(move))
    return {"rcx": move.target, "r8": TOKEN | SIZE << 52}


def paused(move: Migration) -> None:
    move.ok(H.TDH_EXPORT_PAUSE, **session(move))


def export_td(move: Migration) -> dict[str, int]:
    paused(move)
    return {"rcx": move.source, **state_pages(move, 2)}


def import_td(move: Migration) -> dict[str, int]:
    pages = move.ok(H.TDH_EXPORT_STATE_TD, **export_td(move)).rdx
    return {"rcx": move.target, **state_pages(move, pages)}


def export_vp(move: Migration) -> dict[str, int]:
    assert move.call(H.TDH_IMPORT_STATE_TD, **import_td(move)).rax == 0
    return {"rcx": move.tdvpr, **state_pages(move, 8)}


def import_vp(move: Migration) -> dict[str, int]:
    pages = move.ok(H.TDH_EXPORT_STATE_VP, **export_vp(move)).rdx
    return {"rcx": new_vcpu(move), **state_pages(move, pages)}


def export_abort_late(move: Migration) -> dict[str, int]:
    paused(move)
    move.ok(H.TDH_EXPORT_TRACK, rcx=move.source, r8=TOKEN | SIZE << 52, r10=LAST_EPOCH)
    regs = move.call(H.TDH_IMPORT_ABORT, rcx=move.target, r8=TOKEN | SIZE << 52)
    assert regs.rax == Status.TDX_SUCCESS | FATAL
    return {"rcx": move.source, "r8": TOKEN | SIZE << 52}


def import_abort(move: Migration) -> dict[str, int]:
    return session(move) | {"rcx": move.target, "r8": TOKEN | SIZE << 52}


def import_end(move: Migration) -> dict[str, int]:
    move.call(H.TDH_IMPORT_STATE_VP, **import_vp(move))
    move.track(LAST_EPOCH)
    return {"rcx": move.target}


TDR_SH = "PAMT_1G SH, PAMT_2M SH, PAMT_4K SH"
TDR_EX = "PAMT_1G SH, PAMT_2M SH, PAMT_4K EX"
ENTRY = "SEPT_ENTRY EX"
#: How to make each call succeed, the locks that it takes, and how it lets go of them (None: last taken first).
CALLS: dict[str, tuple[HostLeaf, Prepare, str, str | None]] = {
    "stream create": (
        H.TDH_MIG_STREAM_CREATE, stream_create, f"{TDR_SH}, OP_STATE EX, MIG EX, {TDR_EX}",
        "OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G, MIG, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "export immutable": (
        H.TDH_EXPORT_STATE_IMMUTABLE, export_immutable, f"{TDR_SH}, OP_STATE EX, MIG EX, MIGSC EX", None,
    ),
    "export td": (H.TDH_EXPORT_STATE_TD, export_td, f"{TDR_SH}, OP_STATE EX, MIGSC EX", None),
    "export vp": (H.TDH_EXPORT_STATE_VP, export_vp, f"{TDR_EX}, PAMT_4K SH, OP_STATE SH, MIGSC EX", None),
    "import immutable": (H.TDH_IMPORT_STATE_IMMUTABLE, import_immutable, f"{TDR_EX}, MIGSC EX", None),
    "import td": (H.TDH_IMPORT_STATE_TD, import_td, f"{TDR_EX}, MIGSC EX", None),
    "import vp": (
        H.TDH_IMPORT_STATE_VP, import_vp, f"{TDR_EX}, PAMT_4K SH, OP_STATE SH, MIGSC EX",
        "MIGSC, PAMT_4K, PAMT_4K, PAMT_2M, PAMT_1G, OP_STATE",
    ),
    "blockw": (
        H.TDH_EXPORT_BLOCKW, gpas, f"{TDR_SH}, OP_STATE SH, SEPT_TREE SH, {ENTRY}, {ENTRY}",
        "SEPT_ENTRY, SEPT_ENTRY, SEPT_TREE, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "restore": (
        H.TDH_EXPORT_RESTORE, exported_gpas, f"{TDR_SH}, OP_STATE SH, SEPT_TREE SH, {ENTRY}, {ENTRY}",
        "SEPT_ENTRY, SEPT_ENTRY, SEPT_TREE, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "unblockw": (H.TDH_EXPORT_UNBLOCKW, unblockw, f"{TDR_SH}, OP_STATE SH, SEPT_TREE SH, {ENTRY}", None),
    "export mem": (
        H.TDH_EXPORT_MEM, export_mem, f"{TDR_SH}, OP_STATE SH, MIG SH, MIGSC EX, SEPT_TREE SH, {ENTRY}",
        "SEPT_ENTRY, MIGSC, SEPT_TREE, MIG, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "import mem": (
        H.TDH_IMPORT_MEM, import_mem, f"{TDR_SH}, OP_STATE SH, MIG SH, MIGSC EX, SEPT_TREE SH, {ENTRY}, {TDR_EX}",
        "PAMT_4K, PAMT_2M, PAMT_1G, MIGSC, MIG, SEPT_TREE, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "import mem again": (
        H.TDH_IMPORT_MEM, import_mem_again, f"{TDR_SH}, OP_STATE SH, MIG SH, MIGSC EX, SEPT_TREE SH, {ENTRY}",
        "MIGSC, MIG, SEPT_TREE, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "import mem cancel": (
        H.TDH_IMPORT_MEM, import_mem_cancel,
        f"{TDR_SH}, OP_STATE SH, MIG SH, MIGSC EX, SEPT_TREE SH, {ENTRY}, PAMT_4K EX",
        "PAMT_4K, MIGSC, MIG, SEPT_TREE, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G",
    ),
    "pause": (H.TDH_EXPORT_PAUSE, session, TDR_EX, None),
    "export track": (H.TDH_EXPORT_TRACK, export_track, f"{TDR_SH}, OP_STATE EX, MIG EX, MIGSC EX", None),
    "import track": (H.TDH_IMPORT_TRACK, import_track, f"{TDR_EX}, MIGSC EX", None),
    "export abort": (H.TDH_EXPORT_ABORT, session, f"{TDR_SH}, OP_STATE EX, MIG EX", None),
    "late export abort": (
        H.TDH_EXPORT_ABORT, export_abort_late, f"{TDR_SH}, OP_STATE EX, MIG EX, MIGSC EX", None,
    ),
    "import abort": (H.TDH_IMPORT_ABORT, import_abort, f"{TDR_EX}, MIGSC EX", None),
    "commit": (H.TDH_IMPORT_COMMIT, import_end, TDR_EX, None),
    "end": (H.TDH_IMPORT_END, import_end, TDR_EX, None),
}  # fmt: skip
