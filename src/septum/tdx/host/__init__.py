"""Host-side interface functions (SEAMCALL leaves), one file per family.

Each file ends with ``LEAVES``, from leaf number to function. A function gets the call in progress, returns its
completion status (or fails with one), and leaves its outputs in ``call.regs``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from septum.tdx.host import (
    mem_page,
    mem_range,
    mem_rdwr,
    mem_resize,
    mem_sept,
    metadata,
    migration_export,
    migration_export_mem,
    migration_export_state,
    migration_import,
    migration_import_mem,
    migration_import_state,
    migration_stream,
    mng,
    mr,
    phymem,
    servtd,
    sys,
    vp,
)

if TYPE_CHECKING:
    from septum.tdx.call import HostCall

Handler = Callable[["HostCall"], Awaitable[int]]

HANDLERS: dict[int, Handler] = {}
for family in (
    sys, mng, vp, mem_sept, mem_page, mem_resize, mem_range, mem_rdwr, mr, phymem, metadata, servtd, migration_stream,
    migration_export, migration_export_mem, migration_export_state, migration_import, migration_import_mem,
    migration_import_state,
):  # fmt: skip
    HANDLERS |= family.LEAVES
