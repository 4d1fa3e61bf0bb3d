"""The TDX Module's locks: words in memory, attempts that never wait.

A lock is a *view*: the map that holds its word, and the key of the word in it. Views are cheap, hold no state and may
be made on the fly, so a machine with millions of PAMT entries has lock words only where a lock is taken. Every
primitive is one step (two or more at ``ATOMICS`` granularity, one for each atomic instruction of the real code), and
leaves in the word what the real code leaves, also when it fails.

Source: TDX Module 1.5.01, ``src/common/helpers/tdx_locks.h``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, ClassVar, Final

from septum.core.cells import SharedMap
from septum.core.steps import ATOMICS, FINE, PRIMITIVES, Step, ctx, emit, require, switch


class Mode(IntEnum):
    """How a lock is held."""

    SHARED = 1
    EXCLUSIVE = 2


class Taken(IntEnum):
    """Outcome of an attempt. ``PRIORITY``: a guest must give way to a host that found the lock busy earlier."""

    YES = 0
    BUSY = 1
    PRIORITY = 2


class SanityCheckFailed(Exception):
    """A lock word is in a state that the module holds to be impossible; the real module halts."""


ALWAYS_SHARED: Final = "always shared"


def declare_always_shared(words: SharedMap[Any, Any], keys: Iterable[Any]) -> None:
    """Says that nobody ever takes these locks exclusively.

    Such a lock is never busy, and how many have it at the moment is nothing to anybody. Where tasks are interleaved,
    taking it and letting it go are therefore no steps, and do not count in its word; whoever wants it exclusively after
    all violates the property :data:`ALWAYS_SHARED`.
    """
    words[ALWAYS_SHARED] = frozenset(keys)


def _sane(condition: bool, lock: TryLock, what: str) -> None:
    if not condition:
        raise SanityCheckFailed(f"{lock}: {what}")


class TryLock(ABC):
    """A lock word and the primitives on it.

    ``label`` is what diagrams call it. A word of 0 means that nobody holds it and nobody has asked for priority.
    """

    __slots__ = ("key", "label", "words")
    EX: ClassVar[int] = 1
    READER: ClassVar[int]
    NO_READERS: ClassVar[int]
    """Bits that keep a reader out."""
    FULL: ClassVar[int]
    """The word with as many readers as it can count."""

    def __init__(self, words: SharedMap[Any, int], key: Any, label: str = "") -> None:
        self.words = words
        self.key = key
        self.label = label

    def __repr__(self) -> str:
        return self.label or f"{type(self).__name__}({self.key})"

    def take_free(self, mode: Mode) -> bool:
        """An attempt by the shortest way: takes the lock if nobody stands in the way and nobody asked for priority.

        Else it changes nothing and returns False; :meth:`acquire` then tells what comes of it. In a solo run this is
        the whole of an attempt that succeeds.
        """
        words, key = self.words, self.key
        word = words.get(key, 0)
        if mode is Mode.EXCLUSIVE:
            if word:
                return False
            words[key] = self.EX
            return True
        if word & self.NO_READERS or word == self.FULL:
            return False
        words[key] = word + self.READER
        return True

    async def acquire(self, mode: Mode, *, guest: bool = False) -> Taken:
        """One attempt. Never waits."""
        level = ctx.level
        if not level:
            return await self._attempt(mode, guest)
        if self._is_always_shared(mode):
            emit("lock", f"+{self}", mode=mode, taken=Taken.YES)
            return Taken.YES
        await switch(Step("acquire", self))
        taken = await self._attempt(mode, guest)
        emit("lock", f"{'+' if taken is Taken.YES else '!'}{self}", mode=mode, taken=taken)
        if level >= PRIMITIVES:
            await switch(Step("acquired" if taken is Taken.YES else "found busy", self))
        return taken

    async def release(self, mode: Mode) -> None:
        """Lets go of a lock held in ``mode``."""
        if ctx.level:
            if self._is_always_shared(mode):
                emit("lock", f"-{self}", mode=mode)
                return
            await switch(Step("release", self))
        self.release_now(mode)
        if ctx.level:
            emit("lock", f"-{self}", mode=mode)
            if ctx.level >= PRIMITIVES:
                await switch(Step("released", self))

    async def promote(self) -> Taken:
        """From the only shared holder to exclusive. On failure the shared hold stays."""
        if ctx.level:
            self._is_always_shared(Mode.EXCLUSIVE)
            await switch(Step("promote", self))
        taken = await self._promote()
        if ctx.level:
            emit("lock", f"{'^' if taken is Taken.YES else '!'}{self}", mode=Mode.EXCLUSIVE, taken=taken)
            if ctx.level >= PRIMITIVES:
                await switch(Step("acquired" if taken is Taken.YES else "found busy", self))
        return taken

    def _is_always_shared(self, mode: Mode) -> bool:
        declared: Any = self.words.get(ALWAYS_SHARED)
        found = bool(declared) and self.key in declared
        require(not found or mode is Mode.SHARED, ALWAYS_SHARED, f"{self} is taken exclusively")
        return found

    async def _promote(self) -> Taken:
        raise TypeError(f"{self} knows no shared mode")

    @abstractmethod
    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        """The atomic instructions of an attempt."""

    @abstractmethod
    def release_now(self, mode: Mode) -> None:
        """The atomic instruction of a release, without a step; the whole of it in a solo run."""

    def _word(self) -> int:
        return self.words.get(self.key, 0)

    def _put(self, word: int) -> None:
        if word:
            self.words[self.key] = word
        else:
            self.words.pop(self.key, None)


async def _between_atomics(lock: TryLock) -> None:
    if ctx.level >= ATOMICS:
        await switch(Step("atomic", lock))


class Mutex(TryLock):
    """``mutex_lock_t``: one byte, 0 free, 1 taken. Knows no shared mode."""

    __slots__ = ()
    READER: ClassVar[int] = 1
    NO_READERS: ClassVar[int] = 1
    FULL: ClassVar[int] = 1

    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        return Taken.YES if self.take_free(mode) else Taken.BUSY

    def release_now(self, mode: Mode) -> None:
        _sane(self._word() == 1, self, "released a mutex that is not taken")
        self._put(0)


class Sharex(TryLock):
    """``sharex_lock_t``: bit 0 exclusive, bits 15:1 readers.

    A failed shared attempt leaves the reader count raised; the exclusive holder's release stores 0 and so heals it.
    """

    __slots__ = ()
    READER: ClassVar[int] = 2
    NO_READERS: ClassVar[int] = 1
    FULL: ClassVar[int] = 0xFFFE

    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        if self.take_free(mode):
            return Taken.YES
        if mode is Mode.SHARED:
            word = self._word()
            self._put((word + self.READER) & 0xFFFF)
            _sane(word != self.FULL, self, "reader count overflow")
        return Taken.BUSY

    def release_now(self, mode: Mode) -> None:
        word = self._word()
        if mode is Mode.EXCLUSIVE:
            self._put(0)
            _sane(bool(word & self.EX), self, "exclusive release of a lock not held exclusively")
        else:
            self._put((word - self.READER) & 0xFFFF)
            _sane(not word & self.EX and word >> 1 != 0, self, "shared release of a lock not held shared")

    async def _promote(self) -> Taken:
        word = self._word()
        if word == self.READER:
            self._put(self.EX)
        _sane(not word & self.EX and word != 0, self, "promotion of a lock not held shared")
        return Taken.YES if word >> 1 == 1 else Taken.BUSY

    async def demote(self) -> None:
        """From exclusive to the only shared holder."""
        if ctx.level:
            await switch(Step("demote", self))
        word = self._word()
        self._put(self.READER)
        _sane(bool(word & self.EX), self, "demotion of a lock not held exclusively")
        if ctx.level >= PRIMITIVES:
            await switch(Step("demoted", self))


class SharexHp(TryLock):
    """``sharex_hp_lock_t``: bit 0 exclusive, bit 1 host priority, bits 15:2 readers.

    A host that finds it busy sets the priority bit; a guest that then finds the bit gives way
    (:attr:`Taken.PRIORITY`); the next host that succeeds clears it.
    """

    __slots__ = ()
    HP: ClassVar[int] = 2
    READER: ClassVar[int] = 4
    NO_READERS: ClassVar[int] = 3
    FULL: ClassVar[int] = 0xFFFC

    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        if self.take_free(mode):
            return Taken.YES
        return await (self._exclusive(guest) if mode is Mode.EXCLUSIVE else self._shared(guest))

    async def _shared(self, guest: bool) -> Taken:
        word = self._word()
        self._put((word + self.READER) & 0xFFFF)
        if guest and word & self.HP:
            await _between_atomics(self)
            self._put((self._word() - self.READER) & 0xFFFF)
            return Taken.PRIORITY
        if word & self.EX:
            if not guest:
                await self._ask_priority()
            return Taken.BUSY
        if word & self.HP:
            await _between_atomics(self)
            self._put(self._word() & ~self.HP)
        _sane(word & self.FULL != self.FULL, self, "reader count overflow")
        return Taken.YES

    async def _exclusive(self, guest: bool) -> Taken:
        word = self._word()
        if word == self.HP:
            if guest:
                return Taken.PRIORITY
            await _between_atomics(self)
            if self._word() != self.HP:
                return Taken.BUSY
            self._put(self.EX)
            return Taken.YES
        if not guest:
            await self._ask_priority()
        return Taken.BUSY

    async def _ask_priority(self) -> None:
        await _between_atomics(self)
        self._put(self._word() | self.HP)

    def release_now(self, mode: Mode) -> None:
        words, key = self.words, self.key
        word = words.get(key, 0)
        if mode is Mode.SHARED and word == self.READER:  # nearly always: the last reader goes
            words.pop(key, None)
        elif mode is Mode.EXCLUSIVE:
            _sane(bool(word & self.EX), self, "exclusive release of a lock not held exclusively")
            self._put(word & self.HP)
        else:
            self._put((word - self.READER) & 0xFFFF)
            _sane(not word & self.EX and word >> 2 != 0, self, "shared release of a lock not held shared")

    async def _promote(self) -> Taken:
        for alone in (self.READER, self.READER | self.HP):
            word = self._word()
            _sane(not word & self.EX and word != 0, self, "promotion of a lock not held shared")
            if word == alone:
                self._put(self.EX)
                return Taken.YES
            if alone == self.READER and word != self.READER | self.HP:
                await self._ask_priority()
                return Taken.BUSY
            await _between_atomics(self)
        return Taken.BUSY


class SeptEntryLock(TryLock):
    """The lock inside a Secure EPT entry: bit 11 (``TDEL``) taken, bit 52 (``TDHP``) host priority. Always exclusive.

    The entry's value is state of its own: an interface function that ends by writing the entry releases the lock (and
    loses the priority bit) with that write, and does not call :meth:`release`.
    """

    __slots__ = ()
    TDEL: ClassVar[int] = 1 << 11
    TDHP: ClassVar[int] = 1 << 52

    def _word(self) -> int:
        return self.words[self.key]

    def _put(self, word: int) -> None:
        self.words.store(self.key, word)

    def take_free(self, mode: Mode) -> bool:
        words, key = self.words, self.key
        word = words[key]
        if word & (self.TDEL | self.TDHP):
            return False
        words[key] = word | self.TDEL
        return True

    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        word = self._word()
        if word & self.TDEL:
            if not guest:
                await _between_atomics(self)
                self._put(self._word() | self.TDHP)
            return Taken.BUSY
        self._put(word | self.TDEL)
        if guest:
            if ctx.level >= FINE:
                await switch(Step("look for host priority", self))
            # A plain read after the atomic one: a host may have asked for priority in between.
            if not self._word() & self.TDHP:
                return Taken.YES
            await _between_atomics(self)
            self._put(self._word() & ~self.TDEL)
            return Taken.PRIORITY
        await _between_atomics(self)
        self._put(self._word() & ~self.TDHP)
        return Taken.YES

    def release_now(self, mode: Mode) -> None:
        word = self._word()
        _sane(bool(word & self.TDEL), self, "release of an entry that is not locked")
        self._put(word & ~self.TDEL)
