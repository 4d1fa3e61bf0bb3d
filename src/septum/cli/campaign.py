"""What ``septum explore``, ``run`` and ``replay`` share: sampling, verdicts, counterexample files, diagrams."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from septum.cli.main import BAD, GOOD, INTERRUPTED
from septum.cli.output import Progress

if TYPE_CHECKING:
    from septum.core.run import Chooser, Outcome
    from septum.lab.recording import Recording
    from septum.lab.scenario import Scenario, Value

STATUS = {"proved": GOOD, "bounded": GOOD, "sampled": GOOD, "violated": BAD, "interrupted": INTERRUPTED}
"""The exit status of each verdict."""


@dataclass(slots=True)
class Sampled:
    """What a number of seeded runs found; ``shown`` is the run that violates a property, or else the last."""

    verdict: str = "sampled"
    executions: int = 0
    steps: int = 0
    seconds: float = 0.0
    seed: int = 0
    shown: Outcome | None = None


def sample_runs(
    scenario: Scenario,
    values: Mapping[str, Value],
    chooser: Callable[[int], Chooser],
    *,
    times: int,
    seed: int,
    progress: Progress,
) -> Sampled:
    """Runs a scenario ``times`` times, the first with ``seed``, each other with the next one, up to a violation."""
    from septum.lab.recording import sample
    from septum.lab.stage import Stage

    found = Sampled(seed=seed)
    stage = Stage(scenario, values)
    start = time.perf_counter()
    try:
        for number in range(seed, seed + times):
            outcome = stage.run(chooser(number), keep_events=False)
            found.executions += 1
            found.steps += outcome.steps
            found.seed = number
            if outcome.violation:
                found.verdict = "violated"
                break
            progress(f"{found.executions:,} of {times:,} runs, {found.steps:,} steps")
    except KeyboardInterrupt:
        found.verdict = "interrupted"
    found.seconds = time.perf_counter() - start
    if found.executions:
        found.shown = sample(scenario, values, chooser(found.seed))
    return found


def write_counterexample(recording: Recording) -> str:
    """Writes a schedule file into the current folder and returns its name."""
    from septum.lab.recording import save

    return save(recording).name


def write_shrunk(recording: Recording) -> tuple[str, list[Outcome]]:
    """Writes a counterexample, and then a shrunk one in its place; returns the file's name and the runs behind it."""
    from pathlib import Path

    from septum.lab.recording import replay
    from septum.lab.shrink import shrink

    found = write_counterexample(recording)
    try:
        recording = shrink(recording)
    except KeyboardInterrupt:
        return found, replay(recording)
    path = write_counterexample(recording)
    if path != found:
        Path(found).unlink()
    return path, replay(recording)


def events_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The events of a run, for JSON."""
    return [asdict(event) for event in outcome.trace.events]


def diagrams(outcomes: Sequence[Outcome]) -> list[str]:
    """Each run as a sequence diagram."""
    from septum.report.sequence import sequence_diagram

    return [sequence_diagram(outcome.trace.events).rstrip("\n") for outcome in outcomes]


def title(scenario: Scenario, values: Mapping[str, Value]) -> str:
    """The scenario and its parameters on one line."""
    return " ".join([scenario.name, *(f"{name}={value}" for name, value in values.items())])
