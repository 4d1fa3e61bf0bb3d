"""Many seeded runs of a scenario, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from septum.core.run import Chooser, Outcome
from septum.core.steps import Program
from septum.lab.recording import sample
from septum.lab.scenario import Scenario, Value
from septum.lab.stage import Stage

MAX_STEPS: Final = 20_000
"""A run that has not ended after so many steps is taken for one that never ends."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How runs ended: the property that was violated and how, or what each thread returned, by its name."""

    violation: str | None
    message: str
    results: tuple[tuple[str, Any], ...]


@dataclass(slots=True)
class Tally:
    """How many runs ended alike, and the seed of the first of them."""

    runs: int
    first_seed: int


@dataclass(slots=True)
class Sampled:
    """What a number of seeded runs found.

    ``shown`` is the first run that violates a property, or else the last one, with its events; ``seed`` is its seed.
    ``steps`` are those of all runs, ``shortest`` and ``longest`` those of one. ``seamcalls`` counts the SEAMCALLs of
    all runs by leaf and status, where the scenario has a host.
    """

    verdict: str = "sampled"
    executions: int = 0
    steps: int = 0
    shortest: int = 0
    longest: int = 0
    seconds: float = 0.0
    seed: int = 0
    endings: dict[Ending, Tally] = field(default_factory=dict)
    seamcalls: dict[str, dict[str, int]] = field(default_factory=dict)
    shown: Outcome | None = None

    @property
    def violations(self) -> dict[Ending, Tally]:
        """The endings that violate a property."""
        return {ending: tally for ending, tally in self.endings.items() if ending.violation}


def sample_runs(
    scenario: Scenario,
    values: Mapping[str, Value],
    chooser: Callable[[int], Chooser],
    *,
    times: int,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    stop: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Sampled:
    """Runs a scenario ``times`` times, the first with ``seed``, each other with the next one; Ctrl-C ends it early.

    :param stop: whether the first violation is the end.
    """
    found = Sampled(seed=seed)
    stage = Stage(scenario, values)
    host = stage.setting.host
    before = host.counts if host else {}
    start = time.perf_counter()
    try:
        for number in range(seed, seed + times):
            outcome = stage.run(chooser(number), keep_events=False, max_steps=max_steps, must_end=True)
            _count(found, number, outcome, _ending(outcome, stage.setting.programs))
            if outcome.violation and stop:
                break
            progress(f"{found.executions:,} of {times:,} runs, {found.steps:,} steps")
    except KeyboardInterrupt:
        found.verdict = "violated" if found.violations else "interrupted"
    found.seconds = time.perf_counter() - start
    if host:
        found.seamcalls = _more(host.counts, before)
    if found.executions:
        found.shown = sample(scenario, values, chooser(found.seed), max_steps=max_steps, must_end=True)
    return found


def _ending(outcome: Outcome, programs: Sequence[Program]) -> Ending:
    results = (
        ()
        if outcome.violation
        else tuple(
            (program.task.name, result)
            for program, result in zip(programs, outcome.results, strict=True)
            if not program.daemon
        )
    )
    return Ending(outcome.violation, outcome.message, results)


def _count(found: Sampled, seed: int, outcome: Outcome, ending: Ending) -> None:
    found.executions += 1
    found.steps += outcome.steps
    found.shortest = min(found.shortest or outcome.steps, outcome.steps)
    found.longest = max(found.longest, outcome.steps)
    if found.verdict != "violated":
        found.seed = seed
    if outcome.violation:
        found.verdict = "violated"
    tally = found.endings.setdefault(ending, Tally(0, seed))
    tally.runs += 1


def _more(after: Mapping[str, Mapping[str, int]], before: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Counts that grew, and by how much."""
    return {
        leaf: grown
        for leaf, statuses in after.items()
        if (
            grown := {
                status: number - before.get(leaf, {}).get(status, 0)
                for status, number in statuses.items()
                if number > before.get(leaf, {}).get(status, 0)
            }
        )
    }
