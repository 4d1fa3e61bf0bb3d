"""."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler

LEAVES: dict[int, GuestHandler] = {}
