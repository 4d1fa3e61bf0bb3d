"""Random calls while TDs migrate: a status each time, and everything stays consistent."""

from __future__ import annotations

import random

import pytest

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.pages import PAGE_4K, Level
from septum.core.cells import Journal, SharedMap, Tracking
from septum.tdx.migration.gpa_list import Operation
from septum.tdx.migration.mbmd import SIZE
from septum.tdx.secure_ept import walk_sept
from tests.tdx.invariants import check_all
from tests.tdx.migration_machine import (
    BUFFER,
    BUFFERS,
    GPAS,
    LAST_EPOCH,
    MACS,
    MBMD,
    NEW_PAGES,
    NO_LIST,
    RESUME,
    STATE_PAGES,
    TOKEN,
    Migration,
    entry,
)

H = HostLeaf
LEAVES = [leaf for leaf in HostLeaf if leaf.name.split("_")[1] in ("EXPORT", "IMPORT", "MIG")]
MEMORY = [
    H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_RANGE_UNBLOCK, H.TDH_MEM_TRACK, H.TDH_MEM_PAGE_REMOVE, H.TDH_MEM_PAGE_AUG,
    H.TDH_MEM_PAGE_RELOCATE,
]  # fmt: skip
RUNS, CALLS_OF_A_RUN = 12, 60
GUEST_PAGES = range(0, 0x6000, PAGE_4K)


class Dice:
    """Calls that make sense, most of them, and what must hold after each."""

    def __init__(self, move: Migration, seed: int) -> None:
        self.move = move
        self.random = random.Random(seed)
        self.vcpus = [move.tdvpr, *(self._vcpu() for _ in range(2))]

    def _vcpu(self) -> int:
        """A VCPU of the destination, as far as it can be created without a session."""
        page = self.move.page()
        self.move.module.pamt[page] = self.move.module.pamt[self.move.tdvpr]._replace(owner=self.move.target)
        self.move.of_target.tdr.chldcnt += 1
        self.move.module.new_vp(page).tdvps.num_tdvps_pages = 6
        return page

    def one(self) -> None:
        """A call."""
        dice, move = self.random, self.move
        move.interrupt(dice.random() < 0.2)
        if dice.random() < 0.2:
            move.exchange_keys()
        leaf = dice.choice(LEAVES if dice.random() < 0.7 else MEMORY)
        tdr = move.target if "IMPORT" in leaf.name or (leaf in MEMORY and dice.random() < 0.5) else move.source
        if dice.random() < 0.05:
            tdr = dice.choice((move.source, move.target, move.tdvpr, 0))
        if "MEM" in leaf.name or "BLOCKW" in leaf.name or leaf in (H.TDH_EXPORT_RESTORE, H.TDH_MIG_STREAM_CREATE):
            registers = self._memory(leaf, tdr)
        else:
            registers = self._state(leaf, tdr)
        if dice.random() < 0.1:
            registers[dice.choice(list(registers))] = dice.choice((0, 1, 1 << 63, NO_LIST, dice.getrandbits(64)))
        status = move.call(leaf, **registers).rax
        assert 0 <= status < 1 << 64

    def _memory(self, leaf: HostLeaf, tdr: int) -> dict[str, int]:
        dice, move = self.random, self.move
        gpa = dice.choice(GUEST_PAGES)
        if leaf is H.TDH_MIG_STREAM_CREATE:
            return {"rcx": move.page(), "rdx": tdr}
        if leaf in MEMORY or leaf is H.TDH_EXPORT_UNBLOCKW:
            return {"rcx": tdr if leaf is H.TDH_MEM_TRACK else gpa, "rdx": tdr, "r8": move.page()}
        count = dice.randint(1, 3)
        if leaf is not H.TDH_IMPORT_MEM or dice.random() < 0.2:
            move.put(GPAS, *(self._entry() for _ in range(count)))
            move.put(BUFFERS, *(BUFFER + PAGE_4K * number for number in range(count)))
        move.put(NEW_PAGES, *(move.page() for _ in range(count)))
        return {
            "rcx": GPAS | dice.choice((0, 0, 8)) | count - 1 << 55, "rdx": tdr, "r8": MBMD | SIZE << 52, "r9": BUFFERS,
            "r10": dice.choice((0, 0, 1, RESUME)), "r11": MACS, "r12": NO_LIST, "r13": NEW_PAGES,
        }  # fmt: skip

    def _entry(self) -> int:
        dice = self.random
        operation = dice.choice((Operation.MIGRATE, Operation.MIGRATE, Operation.CANCEL, Operation.NOP))
        return entry(dice.choice(GUEST_PAGES), operation)

    def _state(self, leaf: HostLeaf, tdr: int) -> dict[str, int]:
        dice = self.random
        pages = dice.choice((2, 3, 5, 8))
        self.move.put(STATE_PAGES, *(STATE_PAGES + PAGE_4K * (number + 1) for number in range(pages)))
        token = "TRACK" in leaf.name or "ABORT" in leaf.name
        return {
            "rcx": dice.choice(self.vcpus) if "STATE_VP" in leaf.name else tdr,
            "r8": (TOKEN if token else MBMD) | SIZE << 52 if dice.random() < 0.8 else 0,
            "r9": STATE_PAGES | pages - 1 << 55,
            "r10": dice.choice((0, 0, 0, 1, RESUME, LAST_EPOCH)),
        }

    def check(self) -> None:
        """Counts of exported and of dirty pages, and all that holds without migration."""
        move = self.move
        for td in (move.of_source, move.of_target):
            if not td.tdcs.eptp:
                continue
            values = [walk_sept(move.module, td, gpa, Level.PT) for gpa in GUEST_PAGES]
            leaves = [found.value for found in values if found.level == Level.PT]
            assert td.tdcs.mig_count == sum(map(sept.is_any_exported, leaves))
            if td.tdcs.op_state in (OpState.LIVE_EXPORT, OpState.PAUSED_EXPORT, OpState.POST_EXPORT):
                assert td.tdcs.dirty_count == sum(map(sept.is_exported_dirty, leaves))
        assert not any(value & (sept.TDEL | sept.TDHP) for value in dict.values(move.module.sept))


@pytest.mark.parametrize("sides", ["before", "live", "paused"])
def test_random_calls(sides: str) -> None:
    move = Migration()
    dice = Dice(move, sum(sides.encode()))
    if sides != "before":
        move.begin()
        move.block_writes(0x1000)
        move.move_pages(0x1000)
    if sides == "paused":
        move.ok(H.TDH_EXPORT_PAUSE, rcx=move.source)
    journal = Journal(Tracking.world)
    seen: set[int] = set()
    for _ in range(RUNS):
        for _ in range(CALLS_OF_A_RUN):
            dice.one()
            dice.check()
            seen.add(move.of_source.tdcs.op_state)
        journal.undo(0)
    journal.close()
    assert len(seen) > 1
    check_all(move.module)
    assert isinstance(move.module.locks, SharedMap)
