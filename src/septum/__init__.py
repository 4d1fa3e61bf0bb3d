"""Septum: a TDX host you can take apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from septum.testing import explore as explore

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``septum.explore`` for tests; imported when it is asked for, because everything else does without."""
    if name == "explore":
        from septum.testing import explore  # noqa: PLC0415

        return explore
    raise AttributeError(f"module 'septum' has no attribute {name!r}")
