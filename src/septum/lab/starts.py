"""Where recorded contention and interleavings start: the folder of vectors that lead to their start states."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from septum.lab.conform import Runner

PACKAGED: Final = Path(__file__).parent / "data" / "start_states"
"""The start states that come with Septum: ``boot`` and ``prefix/all_states`` of the recordings."""


def runner_for(vectors: Path | None = None) -> Runner:
    """A runner that knows the start states of a folder of vectors; without one, those that come with Septum."""
    return Runner(vectors or PACKAGED)
