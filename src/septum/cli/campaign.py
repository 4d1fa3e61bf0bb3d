"""What ``septum explore``, ``run`` and ``replay`` share: sampling, verdicts, counterexample files, diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from septum.cli.main import BAD, GOOD, INTERRUPTED

if TYPE_CHECKING:
    from septum.core.run import Outcome
    from septum.lab.recording import Recording
    from septum.lab.scenario import Scenario, Value

STATUS = {"proved": GOOD, "bounded": GOOD, "sampled": GOOD, "violated": BAD, "interrupted": INTERRUPTED}
"""The exit status of each verdict."""


UNENDED = 200
"""How many events are drawn of a run that did not end."""


def write_counterexample(recording: Recording) -> str:
    """Writes a schedule file into the current folder and returns its name."""
    from septum.lab.recording import save

    return save(recording).name


def write_shrunk(recording: Recording) -> tuple[str, list[Outcome]]:
    """Writes a counterexample, and then a shrunk one in its place; returns the file's name and the runs behind it."""
    from pathlib import Path

    from septum.core.run import ENDS
    from septum.lab.recording import replay
    from septum.lab.shrink import shrink

    found = write_counterexample(recording)
    if recording.property == ENDS:  # a shorter schedule would only say less
        return found, replay(recording)
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
    """Each run as a sequence diagram; of one that did not end, the beginning."""
    from septum.core.run import ENDS
    from septum.report.sequence import sequence_diagram

    return [
        sequence_diagram(outcome.trace.events[: UNENDED if outcome.violation == ENDS else None]).rstrip("\n")
        for outcome in outcomes
    ]


def title(scenario: Scenario, values: Mapping[str, Value]) -> str:
    """The scenario and its parameters on one line."""
    return " ".join([scenario.name, *(f"{name}={value}" for name, value in values.items())])
