"""Where an exploration stops, and what it says when it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from septum.core.steps import Violation


@dataclass(slots=True)
class Bounds:
    """Where to stop. ``None`` is no bound.

    ``depth`` counts steps from the initial state. ``preemptions`` counts switches away from a task that could have gone
    on; switches from one that waits or has ended are free. ``states`` and ``seconds`` are looked at now and then, so
    that a little more is done.
    """

    states: int | None = None
    depth: int | None = None
    seconds: float | None = None
    preemptions: int | None = None


@dataclass(slots=True)
class Verdict:
    """What an exploration found.

    ``verdict``: ``proved`` (the whole state space of the scenario was looked at), ``bounded`` (nothing found within the
    bounds), ``violated`` (``property``, ``message`` and the ``schedule`` of a counterexample), or ``interrupted``. A
    cycle in the lock order comes from several runs: ``witnesses`` are those before the last. A violation of
    ``progress`` is a lasso: ``schedule`` leads to a state from which ``loop`` leads back to it.
    ``outcomes`` has what was observed at each end, with a schedule that leads there.

    ``depth`` is the number of steps within which everything was looked at (breadth-first), or of the longest path
    (depth-first). ``preemptions`` is the number within which everything was looked at, where they are counted.
    ``liveness`` is whether it was checked that no task takes for ever.
    ``unexpanded`` states were found and checked, but nothing that follows them was looked at. ``reductions`` are those
    that were in force.
    """

    verdict: str
    states: int = 0
    transitions: int = 0
    depth: int = 0
    seconds: float = 0.0
    runs: int = 0
    cells: int = 0
    local_states: int = 0
    property: str | None = None
    message: str = ""
    schedule: list[int] = field(default_factory=list)
    loop: list[int] = field(default_factory=list)
    witnesses: list[list[int]] = field(default_factory=list)
    outcomes: dict[Any, list[int]] = field(default_factory=dict)
    collision_probability: float = 0.0
    unexpanded: int = 0
    preemptions: int | None = None
    liveness: bool = False
    reductions: tuple[str, ...] = ()

    def violated(self, violation: Violation, schedule: list[int]) -> None:
        """Makes it ``violated``."""
        self.verdict = "violated"
        self.property = violation.property
        self.message = str(violation)
        self.schedule = schedule
