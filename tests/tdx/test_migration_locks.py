"""Locks of TDH.EXPORT.*, TDH.IMPORT.* and TDH.MIG.STREAM.CREATE: which, in what order, and when one is busy."""

from __future__ import annotations

import pytest

from septum.arch.operands import Operand
from septum.arch.status import FATAL, Status, with_operand
from septum.core.cells import Tracking
from septum.core.explore import Explorer
from septum.core.steps import PRIMITIVES, Program, Task
from septum.core.trylocks import Mode, TryLock
from septum.tdx.call import PamtLock
from septum.tdx.migration.mbmd import SIZE
from septum.tdx.registers import Regs
from tests.tdx.guests import lock_trace
from tests.tdx.migration_calls import CALLS, H
from tests.tdx.migration_machine import GPAS, TOKEN, Migration, entry


def _names(steps: list[tuple[str, str]], sign: str) -> list[str]:
    return [text[1:].split("[")[0] for text, _ in steps if text[0] == sign]


@pytest.mark.parametrize("name", CALLS)
def test_locks(move: Migration, name: str) -> None:
    leaf, prepare, taken, released = CALLS[name]
    regs = Regs.of({"rax": leaf, **prepare(move)})
    steps = lock_trace(move.module, lambda: move.module.seamcall(0, regs))
    assert regs.rax & ~FATAL == Status.TDX_SUCCESS
    modes = {"SHARED": "SH", "EXCLUSIVE": "EX"}
    assert ", ".join(f"{t[1:].split('[')[0]} {modes[mode]}" for t, mode in steps if t[0] == "+") == taken
    last_first = [lock.split()[0] for lock in reversed(taken.split(", "))]
    assert _names(steps, "-") == (released.split(", ") if released else last_first)
    assert not dict(move.module.locks)


def busy_locks(move: Migration, taken: str, regs: Regs) -> list[tuple[TryLock, Operand]]:
    """Locks of a call that another LP may hold, and the operand that the call blames."""
    td = move.of_source
    found: list[tuple[TryLock, Operand]] = []
    if "OP_STATE" in taken:
        found.append((td.op_state_lock, Operand.OP_STATE))
    if "MIG " in taken:
        found.append((td.mig_lock, Operand.MIG))
    if "SEPT_TREE" in taken:
        found.append((td.secure_ept_lock, Operand.SEPT_TREE))
    return found


@pytest.mark.parametrize("name", [name for name, row in CALLS.items() if "import" not in name and "MIGSC" in row[2]])
def test_busy_locks(move: Migration, name: str) -> None:
    leaf, prepare, taken, _ = CALLS[name]
    operands = prepare(move)
    stream = move.of_source.stream(0 if name == "late export abort" else 1)
    locks = [*busy_locks(move, taken, Regs()), (stream.lock, Operand.MIGSC)]
    for lock, operand in locks:
        assert lock.take_free(Mode.EXCLUSIVE)
        regs = move.call(leaf, **operands)
        assert regs.rax == with_operand(Status.TDX_OPERAND_BUSY, operand)
        lock.words.pop(lock.key)
        if operand is Operand.OP_STATE:
            assert not dict(move.module.locks)
    move.module.locks.clear()
    assert move.call(leaf, **operands).rax == Status.TDX_SUCCESS


@pytest.mark.parametrize("name", ["import immutable", "import td", "import vp", "import track", "import abort"])
def test_a_busy_stream_does_not_fail_an_import(move: Migration, name: str) -> None:
    leaf, prepare, _, _ = CALLS[name]
    operands = prepare(move)
    before = move.of_target.tdcs.op_state
    lock = move.of_target.stream(0 if name == "import abort" else 1).lock
    assert lock.take_free(Mode.EXCLUSIVE)
    assert move.call(leaf, **operands).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.MIGSC)
    assert move.of_target.tdcs.op_state == before
    lock.release_now(Mode.EXCLUSIVE)
    assert move.call(leaf, **operands).rax & ~FATAL == Status.TDX_SUCCESS


def test_a_busy_page_is_let_go_of_first(move: Migration) -> None:
    page = move.page()
    lock = PamtLock(move.module.locks, page)
    assert lock.take_free(Mode.EXCLUSIVE)
    regs = Regs.of({"rax": H.TDH_MIG_STREAM_CREATE, "rcx": page, "rdx": move.source})
    steps = lock_trace(move.module, lambda: move.module.seamcall(0, regs))
    assert regs.rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    released = "PAMT_2M, PAMT_1G, OP_STATE, PAMT_4K, PAMT_2M, PAMT_1G, MIG"
    assert ", ".join(_names(steps, "-")) == released


# -- every interleaving of two calls -----------------------------------------------------------------------------------


def outcomes(move: Migration, *calls: dict[str, int]) -> set[tuple[int, ...]]:
    """Completion statuses of SEAMCALLs made at the same time, for every interleaving."""
    module = move.module

    def program(lp: int, registers: dict[str, int]) -> Program:
        async def body() -> int:
            return int((await module.seamcall(lp, Regs.of(registers))).rax)

        return Program(Task(f"LP{lp}", cpu=lp), body)

    programs = [program(lp, registers) for lp, registers in enumerate(calls)]
    verdict = Explorer(Tracking.world, programs, observer=tuple, level=PRIMITIVES).explore()
    assert verdict.verdict == "proved"
    return set(verdict.outcomes)


BUSY = {operand: with_operand(Status.TDX_OPERAND_BUSY, operand) for operand in Operand}


def test_no_epoch_ends_while_a_bundle_is_made(move: Migration) -> None:
    operands = CALLS["export mem"][1](move)
    track = {"rax": H.TDH_EXPORT_TRACK, "rcx": move.source, "r8": TOKEN | SIZE << 52}
    seen = outcomes(move, {"rax": H.TDH_EXPORT_MEM, **operands}, track)
    assert seen == {(0, 0), (0, BUSY[Operand.OP_STATE]), (BUSY[Operand.OP_STATE], 0)}


def test_two_bundles_on_one_stream(move: Migration) -> None:
    operands = {"rax": H.TDH_EXPORT_MEM, **CALLS["export mem"][1](move)}
    unclean = with_operand(Status.TDX_SUCCESS, 1)
    busy = BUSY[Operand.MIGSC]
    assert outcomes(move, operands, operands) == {(0, unclean), (unclean, 0), (0, busy), (busy, 0)}
    other = operands | {"r10": 1}
    seen = outcomes(move, operands, other)
    assert busy not in {status for ends in seen for status in ends}
    assert (0, 0) not in seen


def test_blocking_and_unblocking_one_page(move: Migration) -> None:
    CALLS["blockw"][1](move)
    move.put(GPAS, entry(0))
    block = {"rax": H.TDH_EXPORT_BLOCKW, "rcx": GPAS, "rdx": move.source}
    unblock = {"rax": H.TDH_EXPORT_UNBLOCKW, "rcx": 0, "rdx": move.source}
    wrong = with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    busy = BUSY[Operand.RCX]
    problem = with_operand(Status.TDX_SUCCESS, 1)
    assert outcomes(move, block, unblock) == {(0, 0), (0, wrong), (0, busy), (problem, wrong)}
