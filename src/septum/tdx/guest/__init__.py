"""Guest-side interface functions (TDCALL leaves), one file per family.

Each file ends with ``LEAVES``, from leaf number to function; :mod:`septum.tdx.guest.call` tells what a function may do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from septum.tdx.guest import l2, mem, metadata, mr, servtd, vp

if TYPE_CHECKING:
    from septum.tdx.guest.call import GuestCall

GuestHandler = Callable[["GuestCall"], Awaitable[int]]

HANDLERS: dict[int, GuestHandler] = {}
for family in (vp, mr, mem, metadata, servtd, l2):
    HANDLERS |= family.LEAVES
