"""Locks of the TDH.MEM and TDG.MEM.PAGE functions: which, in what order, and what happens when one is busy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from septum.arch import sept
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import Level, page_info
from septum.arch.status import Status, with_operand
from septum.core.cells import Tracking
from septum.core.explore import Explorer
from septum.core.run import solo_call
from septum.core.steps import PRIMITIVES, Program, Task
from septum.core.trylocks import Mode
from septum.tdx.call import PamtLock
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.secure_ept import EntryLock
from septum.tdx.vm_exit import VmExit
from tests.tdx.guests import lock_trace
from tests.tdx.machines import PARAMS, SOURCE
from tests.tdx.mem_machine import DEBUG, LARGE, SMALL, MemMachine

G, H = GuestLeaf, HostLeaf
NAMES = {"TDCS.op_state_lock": "OP_STATE", "TDCS.secure_ept_lock": "SEPT_TREE", "TDCS.epoch_lock": "TD_EPOCH"}
MODES = {"SH": "SHARED", "EX": "EXCLUSIVE", "SH->EX": "EXCLUSIVE"}
LOCAL = "STACK/OTHER"
"""In the recordings: a lock bit in the module's own copy of an entry, not in the entry."""


def footprint(shared: Path, op: str) -> dict[str, Any]:
    """What the real module did to locks in an operation that succeeded."""
    footprints: list[dict[str, Any]] = json.loads((shared / "contention" / "lock_footprints.json").read_text())
    return next(f for f in footprints if f["op"] == op and f["status"].endswith("TDX_SUCCESS"))


def kind(name: str) -> str:
    """The model's name for a lock of the recordings, without which one it is."""
    short = re.split(r"\.L\d|\[|\(", name)[0]
    return NAMES.get(short, short)


def recorded(shared: Path, op: str) -> list[tuple[str, str]]:
    """Every acquisition, promotion and release in order."""
    steps = [
        (step["op"].replace("P", "^"), kind(step["lock"]), step["mode"]) for step in footprint(shared, op)["trace"]
    ]
    return [(what + name, MODES[mode]) for what, name, mode in steps if name != LOCAL]


def traced(machine: MemMachine, regs: Regs, *, guest: bool = False) -> list[tuple[str, str]]:
    """The same for the model."""
    module = machine.module
    body = (lambda: module.td_exit(0, VmExit.tdcall(regs))) if guest else (lambda: module.seamcall(1, regs))
    steps = lock_trace(module, body)
    if not guest:
        assert not regs.rax, f"{regs}"
    return [(text.split("[")[0], mode) for text, mode in steps]


def blocked(machine: MemMachine, gpa: int, level: Level) -> None:
    machine.aug(gpa, level)
    machine.block(gpa, level)


def split(machine: MemMachine) -> None:
    blocked(machine, LARGE, Level.PD)
    machine.do(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.page())
    machine.block(LARGE, Level.PD)


def table(machine: MemMachine) -> None:
    machine.do(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=machine.page())
    machine.block(LARGE, Level.PD)


Prepare = Callable[[MemMachine], object]


def nothing(_: MemMachine) -> None:
    """There is nothing to prepare."""


HOST: dict[str, tuple[HostLeaf, int, Level, Prepare]] = {
    "PAGE.AUG/4K": (H.TDH_MEM_PAGE_AUG, SMALL, Level.PT, nothing),
    "PAGE.AUG/2M": (H.TDH_MEM_PAGE_AUG, LARGE, Level.PD, nothing),
    "RANGE.BLOCK/4K": (H.TDH_MEM_RANGE_BLOCK, SMALL, Level.PT, lambda m: m.aug(SMALL)),
    "RANGE.BLOCK/2M": (H.TDH_MEM_RANGE_BLOCK, LARGE, Level.PD, lambda m: m.aug(LARGE, Level.PD)),
    "RANGE.BLOCK/SEPT-L1": (H.TDH_MEM_RANGE_BLOCK, 0, Level.PD, nothing),
    "RANGE.UNBLOCK/4K": (H.TDH_MEM_RANGE_UNBLOCK, SMALL, Level.PT, lambda m: blocked(m, SMALL, Level.PT)),
    "RANGE.UNBLOCK/2M": (H.TDH_MEM_RANGE_UNBLOCK, LARGE, Level.PD, lambda m: blocked(m, LARGE, Level.PD)),
    "PAGE.REMOVE/4K": (H.TDH_MEM_PAGE_REMOVE, SMALL, Level.PT, lambda m: blocked(m, SMALL, Level.PT)),
    "PAGE.REMOVE/2M": (H.TDH_MEM_PAGE_REMOVE, LARGE, Level.PD, lambda m: blocked(m, LARGE, Level.PD)),
    "PAGE.RELOCATE": (H.TDH_MEM_PAGE_RELOCATE, SMALL, Level.PT, lambda m: blocked(m, SMALL, Level.PT)),
    "PAGE.DEMOTE": (H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, lambda m: blocked(m, LARGE, Level.PD)),
    "PAGE.PROMOTE": (H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD, split),
    "SEPT.REMOVE": (H.TDH_MEM_SEPT_REMOVE, LARGE, Level.PD, table),
    "SEPT.ADD": (H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, nothing),
    "SEPT.RD/4K": (H.TDH_MEM_SEPT_RD, SMALL, Level.PT, nothing),
    "SEPT.RD/L1": (H.TDH_MEM_SEPT_RD, 0, Level.PD, nothing),
    "MEM.RD": (H.TDH_MEM_RD, 0, Level.PT, nothing),
    "MEM.WR": (H.TDH_MEM_WR, 0, Level.PT, nothing),
}


def prepared(op: str) -> tuple[MemMachine, Regs]:
    """A machine, and the registers of an operation that will succeed on it."""
    leaf, gpa, level, prepare = HOST[op]
    machine = MemMachine(replace(PARAMS, attributes=DEBUG), final=False)
    machine.add_page(machine.tdr, 0)
    machine.finalize()
    prepare(machine)
    page = machine.huge_page() if op.endswith("AUG/2M") else machine.page()
    return machine, Regs(leaf, page_info(gpa, level), machine.tdr, page)


@pytest.mark.parametrize("op", [op for op in HOST if op != "PAGE.PROMOTE"])
def test_locks_of_host_calls(shared: Path, op: str) -> None:
    machine, regs = prepared(op)
    assert traced(machine, regs) == recorded(shared, op)


def test_locks_of_promote(shared: Path) -> None:
    """The recording numbers its 520 acquisitions and has those at both ends."""
    machine, regs = prepared("PAGE.PROMOTE")
    taken = [(text[1:], mode) for text, mode in traced(machine, regs) if text[0] == "+"]
    real = footprint(shared, "PAGE.PROMOTE")
    assert len(taken) == real["n_acquired"]
    for step in real["acquired"]:
        assert taken[step["k"] - 1] == (kind(step["lock"]), MODES[step["mode"]])


def test_locks_of_track_and_add(shared: Path) -> None:
    machine = MemMachine(final=False)
    regs = Regs(H.TDH_MEM_PAGE_ADD, SMALL, machine.tdr, machine.page(), SOURCE)
    assert traced(machine, regs) == recorded(shared, "PAGE.ADD")
    assert traced(machine, Regs(H.TDH_MEM_TRACK, machine.tdr)) == recorded(shared, "MEM.TRACK")


@pytest.mark.parametrize(
    ("op", "leaf", "gpa", "level"),
    [
        ("TDG:PAGE.ACCEPT/4K", G.TDG_MEM_PAGE_ACCEPT, SMALL, Level.PT),
        ("TDG:PAGE.ACCEPT/2M", G.TDG_MEM_PAGE_ACCEPT, LARGE, Level.PD),
        ("TDG:PAGE.ATTR.RD", G.TDG_MEM_PAGE_ATTR_RD, SMALL, Level.PT),
    ],
)
def test_locks_of_guest_calls(shared: Path, op: str, leaf: GuestLeaf, gpa: int, level: Level) -> None:
    machine = MemMachine()
    machine.aug(gpa, level)
    machine.run()
    assert traced(machine, Regs(leaf, page_info(gpa, level)), guest=True) == recorded(shared, op)


# -- busy --------------------------------------------------------------------------------------------------------------


def entry_lock(machine: MemMachine, gpa: int) -> EntryLock:
    value = machine.module.sept
    pa = next(pa for pa, entry in value.items() if entry & sept.HPA_MASK == machine.entry(gpa)[0] & sept.HPA_MASK)
    return EntryLock(value, pa)


@pytest.mark.parametrize("op", [op for op in HOST if "ADD" not in op])
def test_every_busy_lock_fails_the_call_and_leaves_no_other(op: str) -> None:
    machine, regs = prepared(op)
    module, td = machine.module, machine.of_td
    for lock, operand in [
        (PamtLock(module.locks, machine.tdr), Operand.RDX),
        (td.op_state_lock, Operand.OP_STATE),
        (td.secure_ept_lock, Operand.SEPT_TREE),
    ]:
        before = dict(module.locks), dict(module.sept)
        assert lock.take_free(Mode.EXCLUSIVE)
        answer = solo_call(module.seamcall(1, Regs(regs.rax, regs.rcx, regs.rdx, regs.r8)))
        assert answer.rax == with_operand(Status.TDX_OPERAND_BUSY, operand)
        lock.release_now(Mode.EXCLUSIVE)
        module.locks.pop(lock.key, None)  # the host priority that the failed attempt asked for
        assert (dict(module.locks), dict(module.sept)) == before
    assert not solo_call(module.seamcall(1, regs)).rax


def test_a_busy_entry_is_told_with_what_the_walk_saw() -> None:
    machine = MemMachine()
    machine.aug(SMALL)
    lock = entry_lock(machine, SMALL)
    shown = machine.entry(SMALL)
    assert lock.take_free(Mode.EXCLUSIVE)
    for leaf in (H.TDH_MEM_PAGE_AUG, H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_SEPT_RD, H.TDH_MEM_PAGE_REMOVE):
        regs = machine.mem(leaf, SMALL, r8=machine.page())
        assert regs.rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
        assert (regs.rcx, regs.rdx) == (shown[0], shown[1] << 8)


def test_a_guest_gives_way_to_a_host_that_found_the_entry_busy() -> None:
    machine = MemMachine()
    machine.aug(SMALL)
    machine.run()
    lock = entry_lock(machine, SMALL)
    assert lock.take_free(Mode.EXCLUSIVE)
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    machine.mem(H.TDH_MEM_SEPT_RD, SMALL)
    lock.release_now(Mode.EXCLUSIVE)
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    machine.do(H.TDH_MEM_SEPT_RD, SMALL)
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL).rax == 0


# -- every interleaving of two calls -----------------------------------------------------------------------------------


def outcomes(machine: MemMachine, *calls: Regs) -> set[tuple[int | str, ...]]:
    """Completion statuses of SEAMCALLs made at the same time, for every interleaving; HALT where the module halts."""
    module = machine.module

    def program(lp: int, regs: Regs) -> Program:
        async def body() -> int | str:
            mine = Regs(regs.rax, regs.rcx, regs.rdx, regs.r8)
            try:
                return int((await module.seamcall(lp, mine)).rax)
            except ModuleHalt:
                return "HALT"

        return Program(Task(f"LP{lp}", cpu=lp), body)

    programs = [program(lp, regs) for lp, regs in enumerate(calls)]
    explorer = Explorer(
        Tracking.world, programs, observer=tuple, stop=lambda: bool(module.sys.halted), level=PRIMITIVES
    )
    verdict = explorer.explore()
    assert verdict.verdict == "proved"
    return set(verdict.outcomes)


def test_a_removal_between_the_two_writes_of_aug_halts_the_module() -> None:
    """AUG unlocks the entry before it marks the page as used; a finding about 1.5.01."""
    machine = MemMachine(final=False)
    aug = Regs(H.TDH_MEM_PAGE_AUG, SMALL, machine.tdr, machine.page())
    remove = Regs(H.TDH_MEM_PAGE_REMOVE, SMALL, machine.tdr)
    seen = outcomes(machine, aug, remove)
    assert any("HALT" in ends for ends in seen)
    assert (0, 0) in seen


def test_two_augs_of_one_page_never_both_succeed() -> None:
    machine = MemMachine()
    page = machine.page()
    calls = [Regs(H.TDH_MEM_PAGE_AUG, gpa, machine.tdr, page) for gpa in (SMALL, SMALL + 0x1000)]
    busy = with_operand(Status.TDX_OPERAND_BUSY, Operand.R8)
    used = with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)
    assert outcomes(machine, *calls) == {(0, busy), (busy, 0), (0, used), (used, 0)}
