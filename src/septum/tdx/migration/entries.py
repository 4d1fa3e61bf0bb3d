"""What migration does to the Secure EPT entries of pages.

All functions take the entry while its lock is held, and keep that bit. Source: TDX Module 1.5.01,
``tdh_export_{blockw,unblockw,restore,mem}.c``.
"""

from __future__ import annotations

from septum.arch import sept
from septum.arch.sept import SeptState


def block_writes(raw: int) -> int:
    """Blocked for writing: what may be written may not any more."""
    return (raw | sept.TDBW | sept.SVE) & ~sept.W


def unblock_writes(raw: int) -> int:
    """Unblocked: a page that was exported counts as dirty from now on."""
    return _writable(raw & ~sept.TDBW | (sept.D if raw & sept.TDEX else 0))


def restored(raw: int) -> int:
    """Neither exported nor blocked for writing, as before the session."""
    return _writable(sept.with_state(raw, SeptState.PENDING if raw & sept.TDP else SeptState.MAPPED))


def exported(raw: int) -> int:
    """Exported, and not written since. W stays as it is: it is set in a page that was exported while the TD paused."""
    state = SeptState.PENDING_EXPORTED_BLOCKEDW if raw & sept.TDP else SeptState.EXPORTED_BLOCKEDW
    return sept.with_state(raw, state)


def _writable(raw: int) -> int:
    return raw | sept.SVE | (0 if raw & sept.TDP else sept.W)
