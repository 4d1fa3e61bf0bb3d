"""."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septum.tdx.host import Handler

LEAVES: dict[int, Handler] = {}
