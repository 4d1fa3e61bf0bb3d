"""Locks that are broken at one place: the k-th that an interface function takes is not taken, taken in the wrong mode,
taken after the next one, or never released."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import patch

from septum.arch.leaves import guest_leaf, host_leaf
from septum.arch.operands import Operand
from septum.arch.sept import TDEL
from septum.core.trylocks import Mode, Sharex, SharexHp, TryLock
from septum.tdx import leave
from septum.tdx.call import HostCall
from septum.tdx.guest.call import GuestCall
from septum.tdx.held import HeldLocks
from septum.tdx.host import mem_resize
from tests.mutation.cases import EXIT, Case
from tests.mutation.footprint import Footprint

CALL, CHILDREN = "call", "children"
"""Who holds a lock: the call, or the list of 512 entries that TDH.MEM.PAGE.PROMOTE keeps aside."""


class Breakage(Enum):
    """What is wrong with a lock."""

    SKIPPED = "never taken"
    MODE = "shared for exclusive or the reverse"
    SWAPPED = "taken after the next one"
    KEPT = "never released"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken lock: number ``index`` (from 0) that ``holder`` takes in ``case``; ``lock`` names it for people."""

    case: Case
    holder: str
    index: int
    lock: str
    breakage: Breakage

    def __str__(self) -> str:
        lock = f"{self.lock} of 512" if self.holder == CHILDREN else self.lock
        return f"{self.case.leaf} ({self.case.name}): {lock}, number {self.index + 1}: {self.breakage.value}"


@dataclass(frozen=True, slots=True)
class Acquisition:
    """A lock that a call takes, or promotes, and the line of the model that does so."""

    holder: str
    index: int
    lock: TryLock
    promotion: bool
    site: tuple[str, int]


class BrokenLocks(HeldLocks):
    """Held locks of which one is broken."""

    __slots__ = ("breakage", "index", "kept", "skipped", "taken", "waiting")

    def __init__(self, mutant: Mutant, *, guest: bool = False) -> None:
        super().__init__(guest=guest)
        self.index, self.breakage = mutant.index, mutant.breakage
        self.taken = 0
        self.kept: TryLock | None = None
        self.skipped: TryLock | None = None
        self.waiting: tuple[TryLock, Mode, Operand | int] | None = None

    async def take(self, lock: TryLock, mode: Mode, operand: Operand | int) -> None:
        """Takes a lock, unless it is the broken one."""
        number, broken = self._number()
        if broken and self.breakage is Breakage.SKIPPED:
            self.skipped = lock
            return
        if broken and self.breakage is Breakage.SWAPPED:
            self.waiting = (lock, mode, operand)
            return
        if broken and self.breakage is Breakage.MODE:
            mode = Mode.EXCLUSIVE if mode is Mode.SHARED else Mode.SHARED
        await super().take(lock, mode, operand)
        if broken and self.breakage is Breakage.KEPT:
            self.kept = lock
        if self.waiting and number == self.index + 1:
            late, self.waiting = self.waiting, None
            await super().take(*late)

    async def promote(self, lock: SharexHp, operand: Operand | int) -> None:
        """Promotes a lock, unless that is what is broken."""
        _, broken = self._number()
        if not broken and lock is not self.skipped:
            await super().promote(lock, operand)

    def _number(self) -> tuple[int, bool]:
        self.taken += 1
        return self.taken - 1, self.taken - 1 == self.index

    async def release(self, lock: TryLock) -> None:
        """Releases a lock, if it was taken and is to be released at all."""
        if self._never_held(lock):
            return
        if lock is self.kept:
            self._held.pop(self._place(lock))
        else:
            await super().release(lock)

    def forget(self, lock: TryLock) -> None:
        """A write released a lock; a broken one is locked all the same."""
        if self._never_held(lock):
            return
        super().forget(lock)
        if lock is self.kept:
            lock.words.store(lock.key, lock.words[lock.key] | TDEL)

    def _never_held(self, lock: TryLock) -> bool:
        if lock is self.skipped:
            return True
        if self.waiting and lock is self.waiting[0]:
            self.waiting = None
            return True
        return False

    async def drop(self, *, oldest_first: bool = False) -> None:
        """Drops all but the broken one."""
        self.first_out = tuple(lock for lock in self.first_out if lock is not self.kept)
        self._held = [held for held in self._held if held[0] is not self.kept]
        await super().drop(oldest_first=oldest_first)


class BrokenExit(HeldLocks):
    """What a TD exit lets go of, with one lock that it does not, or not in the right mode or order."""

    __slots__ = ("breakage", "index")

    def __init__(self, mutant: Mutant) -> None:
        super().__init__()
        self.index, self.breakage = mutant.index, mutant.breakage

    def adopt(self, held: list[tuple[TryLock, Mode]]) -> None:
        """Takes over what TDH.VP.ENTER left locked."""
        i = self.index
        if self.breakage is Breakage.KEPT:
            held = held[:i] + held[i + 1 :]
        elif self.breakage is Breakage.MODE:
            held = [*held[:i], (held[i][0], Mode.EXCLUSIVE), *held[i + 1 :]]
        else:
            held = [*held[:i], held[i + 1], held[i], *held[i + 2 :]]
        super().adopt(held)


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The model with one lock broken in one interface function."""
    with ExitStack() as stack:
        leaf = mutant.case.leaf
        if leaf == EXIT:
            stack.enter_context(patch.object(leave, "HeldLocks", lambda: BrokenExit(mutant)))
        elif mutant.holder == CHILDREN:
            stack.enter_context(patch.object(mem_resize, "HeldLocks", lambda: BrokenLocks(mutant)))
        else:
            guest = leaf.startswith("TDG")
            kind: type[Any] = GuestCall if guest else HostCall
            number = guest_leaf(leaf) if guest else host_leaf(leaf)
            right = kind.__init__

            def init(self: Any, *arguments: Any) -> None:
                right(self, *arguments)
                if self.leaf == number:
                    self.locks = BrokenLocks(mutant, guest=guest)

            stack.enter_context(patch.object(kind, "__init__", init))
        yield


def acquisitions(footprint: Footprint, case: Case) -> list[Acquisition]:
    """Every lock that a call takes on the right model, by holder. A TD exit takes none, but drops four."""
    found: list[Acquisition] = []
    holders: dict[HeldLocks, int] = {}
    leaves: list[HeldLocks] = []
    take, promote = HeldLocks.take, HeldLocks.promote

    def note(self: HeldLocks, lock: TryLock, promotion: bool) -> None:
        frame = sys._getframe(2)
        site = Path(frame.f_code.co_filename).name, frame.f_lineno
        if self not in holders:
            holders[self] = 0
            leaves.append(self)
        found.append(Acquisition(CALL if self is leaves[0] else CHILDREN, holders[self], lock, promotion, site))
        holders[self] += 1

    async def noted_take(self: HeldLocks, lock: TryLock, mode: Mode, operand: Operand | int) -> None:
        note(self, lock, False)
        await take(self, lock, mode, operand)

    async def noted_promote(self: HeldLocks, lock: SharexHp, operand: Operand | int) -> None:
        note(self, lock, True)
        await promote(self, lock, operand)

    def only_the_call() -> None:
        found.clear()
        holders.clear()
        leaves.clear()

    with patch.object(HeldLocks, "take", noted_take), patch.object(HeldLocks, "promote", noted_promote):
        footprint(case, before=only_the_call)
    return found


def mutants(footprint: Footprint, case: Case) -> list[Mutant]:
    """Every way to break one lock of a call."""
    if case.leaf == EXIT:
        # They go last in, first out.
        locks = [text[1:].partition("/")[0] for text in reversed(case.operations)]
        ways = (Breakage.KEPT, Breakage.MODE, Breakage.SWAPPED)
        return [
            Mutant(case, CALL, i, lock, way)
            for i, lock in enumerate(locks)
            for way in ways
            if way is not Breakage.SWAPPED or i + 1 < len(locks)
        ]
    taken = acquisitions(footprint, case)
    _, afterwards, _ = footprint(case)
    names = [text[1:].partition("/")[0] for text in case.operations if text[0] != "-"]
    found = []
    for acquisition, name in zip(taken, names, strict=True):
        after = next((a for a in taken if (a.holder, a.index) == (acquisition.holder, acquisition.index + 1)), None)
        ways_here = [Breakage.SKIPPED]
        if not acquisition.promotion:
            if isinstance(acquisition.lock, Sharex | SharexHp):
                ways_here.append(Breakage.MODE)
            if after is not None and not after.promotion:
                ways_here.append(Breakage.SWAPPED)
            handed_to_the_guest = acquisition.lock.key in afterwards and case.leaf == "TDH.VP.ENTER"
            if not handed_to_the_guest:
                ways_here.append(Breakage.KEPT)
        found += [Mutant(case, acquisition.holder, acquisition.index, name, way) for way in ways_here]
    return found
