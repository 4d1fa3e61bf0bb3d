"""Migration streams of a TD: the link in its TDCS and the migration stream context (MIGSC) behind it.

Source: TDX Module 1.5.01, ``migsc_t`` and ``migsc_link_t`` in ``src/common/helpers/migration.h``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.trylocks import Mutex

MAX_MIGS: Final = 512
"""Streams of a TD: one backward, the others forward."""


class Interrupted(NamedTuple):
    """What an interrupted function needs when it is called again with the same operands."""

    function: int
    """RAX, as its caller gave it."""
    operands: tuple[int, ...]
    processed: int
    """Pages, or buffers, that are done."""
    scope: int = 0
    """Which of the lists of state the function is at: those of the module come before those of the TD."""
    field_id: int = 0
    """The field to go on with."""
    error: tuple[int, int, int] = (0, 0, 0)
    """The first error in imported lists, told only once their MAC is known to be right: status, RCX, RDX."""


class Migsc(Shared):
    """A migration stream context, and the link to it in the TDCS."""

    hpa: int = 0
    """Of the link: the page that holds the context; 0 if the stream was not created."""
    initialised: bool = False
    """Of the link: whether the migration under way has used the stream."""
    key: bytes = b""
    iv_counter: int = 0
    next_mb_counter: int = 0
    expected_mb_counter: int = 0
    interrupted: Interrupted | None = None
    mbmd: Any = None
    """The ``septum.tdx.migration.mbmd.Mbmd`` of state that is on its way."""
    message: Any = None
    """Where its ``septum.tdx.migration.aes_gcm.AesGcm`` is."""


class Stream(Fixed):
    """A migration stream: its context, and the lock in its link."""

    __slots__ = ("index", "lock", "migsc")

    def __init__(self, td_pa: int, index: int, locks: SharedMap[Any, int]) -> None:
        self.index = index
        self.migsc = Migsc(f"MIGSC[{td_pa:#x}].{index}")
        self.lock = Mutex(locks, ("migsc", td_pa, index), f"MIGSC[{index}]")

    @property
    def link(self) -> int:
        """The link as the TDCS holds it: the lock, whether initialised, and the page."""
        return self.lock.words[self.lock.key] | self.migsc.initialised << 1 | self.migsc.hpa
