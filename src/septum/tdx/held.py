"""The locks that an interface function holds, in the order in which it took them."""

from __future__ import annotations

from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.core.steps import SOLO, ctx
from septum.core.trylocks import Mode, SanityCheckFailed, SharexHp, Taken, TryLock
from septum.tdx.outcome import Fail, ModuleHalt

_BUSY = {Taken.BUSY: Status.TDX_OPERAND_BUSY, Taken.PRIORITY: Status.TDX_OPERAND_BUSY_HOST_PRIORITY}


class HeldLocks:
    """Takes locks, and drops them in reverse order on every way out.

    A lock that is busy fails the interface function with TDX_OPERAND_BUSY and the operand id given
    (TDX_OPERAND_BUSY_HOST_PRIORITY for a guest that must give way). ``first_out`` names held locks that go before the
    others, for the functions that do not drop strictly in reverse.
    """

    __slots__ = ("_held", "first_out", "guest")

    def __init__(self, *, guest: bool = False) -> None:
        self.guest = guest
        self.first_out: tuple[TryLock, ...] = ()
        self._held: list[tuple[TryLock, Mode]] = []

    async def take(self, lock: TryLock, mode: Mode, operand: Operand | int) -> None:
        """One attempt at ``lock``.

        :raises Fail: when it is busy.
        """
        if ctx.level != SOLO or not lock.take_free(mode):
            try:
                taken = await lock.acquire(mode, guest=self.guest)
            except SanityCheckFailed as halt:
                raise ModuleHalt(str(halt)) from None
            if taken is not Taken.YES:
                raise Fail(with_operand(_BUSY[taken], operand))
        self._held.append((lock, mode))

    async def promote(self, lock: SharexHp, operand: Operand | int) -> None:
        """From shared to exclusive; on failure the shared hold is dropped with the rest.

        :raises Fail: when another holds it shared.
        """
        place = self._place(lock)
        try:
            taken = await lock.promote()
        except SanityCheckFailed as halt:
            raise ModuleHalt(str(halt)) from None
        if taken is not Taken.YES:
            raise Fail(with_operand(Status.TDX_OPERAND_BUSY, operand))
        self._held[place] = (lock, Mode.EXCLUSIVE)

    async def release(self, lock: TryLock) -> None:
        """Lets go of one lock before the others."""
        _, mode = self._held.pop(self._place(lock))
        try:
            await lock.release(mode)
        except SanityCheckFailed as halt:
            raise ModuleHalt(str(halt)) from None

    def mark(self) -> int:
        """A name for what is held now."""
        return len(self._held)

    def since(self, mark: int) -> tuple[TryLock, ...]:
        """What was taken since ``mark`` and is still held, last taken first."""
        return tuple(lock for lock, _ in reversed(self._held[mark:]))

    async def release_since(self, mark: int) -> None:
        """Lets go of what was taken since ``mark``, last taken first."""
        for lock in self.since(mark):
            await self.release(lock)

    def forget(self, lock: TryLock) -> None:
        """The lock was released by a write to the word that holds it (a Secure EPT entry), or is handed on."""
        self._held.pop(self._place(lock))

    async def drop(self, *, oldest_first: bool = False) -> None:
        """Lets go of all locks: ``first_out``, then the others, last taken first."""
        for lock in self.first_out:
            await self.release(lock)
        self.first_out = ()
        held = self._held
        solo = ctx.level == SOLO
        try:
            while held:
                lock, mode = held.pop(0 if oldest_first else -1)
                if solo:
                    lock.release_now(mode)
                else:
                    await lock.release(mode)
        except SanityCheckFailed as halt:
            raise ModuleHalt(str(halt)) from None

    def hand_over(self) -> list[tuple[TryLock, Mode]]:
        """Gives up ownership without releasing: TDH.VP.ENTER keeps locks while the guest runs."""
        held, self._held = self._held, []
        return held

    def adopt(self, held: list[tuple[TryLock, Mode]]) -> None:
        """Takes ownership of locks that :meth:`hand_over` gave up."""
        self._held += held

    def _place(self, lock: TryLock) -> int:
        return next(i for i, (held, _) in enumerate(self._held) if held is lock)
