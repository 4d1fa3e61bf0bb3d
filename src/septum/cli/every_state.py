"""``septum explore --strategy states``: every state of a scenario once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septum.arch.errors import UsageError
from septum.cli.campaign import write_counterexample, write_shrunk
from septum.cli.output import Progress

if TYPE_CHECKING:
    from septum.core.run import Outcome
    from septum.core.verdict import Verdict
    from septum.lab.recording import Recording
    from septum.lab.scenario import Scenario, Value


@dataclass(frozen=True, slots=True)
class Ways:
    """How the states are searched."""

    depth_first: bool
    liveness: bool
    without: tuple[str, ...]
    """Reductions that are switched off."""
    resume: Path | None


def every_state(
    scenario: Scenario, values: dict[str, Value], bounds: dict[str, int], ways: Ways, progress: Progress
) -> tuple[dict[str, Any], list[Outcome]]:
    """Explores the states; the runs are those of the counterexample.

    :raises UsageError: for an unknown reduction, bounds that the search cannot keep, or a checkpoint of something else.
    """
    from septum.core.explore import REDUCTIONS, Bounds, Checkpoint
    from septum.lab.recording import explore
    from septum.lab.scenario import file_stem

    unknown = [name for name in ways.without if name not in REDUCTIONS]
    if unknown:
        raise UsageError(f"--no-reduction {unknown[0]}: there is no such reduction; give {', '.join(REDUCTIONS)}")
    if ways.depth_first and {"depth", "preemptions"} & {*bounds}:
        raise UsageError("--depth-first cannot keep a bound on depth or preemptions; leave one of the two out")

    def tell(states: int, transitions: int, depth: int, frontier: int) -> None:
        progress(f"{states:,} states, {transitions:,} transitions, depth {depth:,}, {frontier:,} to go on from")

    subject = json.dumps(
        [scenario.name, dict(values), "preemptions" in bounds, ways.depth_first, ways.liveness, sorted(ways.without)]
    )
    mark = hashlib.sha256(subject.encode()).hexdigest()[:8]
    path = ways.resume or Path(f"{file_stem(scenario.name)}-{mark}.checkpoint")
    checkpoint = Checkpoint(path, subject, resume=ways.resume is not None)
    verdict = explore(
        scenario,
        values,
        Bounds(**bounds),
        progress=tell,
        checkpoint=checkpoint,
        depth_first=ways.depth_first,
        liveness=ways.liveness,
        reductions=[name for name in REDUCTIONS if scenario.reducible and name not in ways.without],
    )
    found, outcomes = _write_finding(scenario, values, verdict)
    if verdict.verdict != "interrupted":
        checkpoint.discard()
    return {
        "verdict": verdict.verdict,
        "property": verdict.property,
        "message": outcomes[-1].message or verdict.message if outcomes else verdict.message,
        "executions": verdict.runs,
        "steps": verdict.transitions,
        "states": verdict.states,
        "transitions": verdict.transitions,
        "depth": verdict.depth,
        "preemptions": verdict.preemptions,
        "unexpanded": verdict.unexpanded,
        "reductions": list(verdict.reductions),
        "liveness": verdict.liveness,
        "seconds": verdict.seconds,
        "collision_probability": verdict.collision_probability,
        "counterexample": found,
        "checkpoint": str(path) if path.exists() else None,
    }, outcomes


def _write_finding(scenario: Scenario, values: dict[str, Value], verdict: Verdict) -> tuple[str | None, list[Outcome]]:
    """Writes the counterexample of a verdict, if it has one; returns the file's name and the runs behind it."""
    from septum.lab.recording import counterexample

    if verdict.verdict != "violated":
        return None, []
    if verdict.loop:
        recording, outcomes = _lasso(scenario, values, verdict)
        return write_counterexample(recording), outcomes
    recording, outcomes = counterexample(scenario, values, verdict)
    if verdict.witnesses:  # several runs that show something together
        return write_counterexample(recording), outcomes
    return write_shrunk(recording)


def _lasso(scenario: Scenario, values: dict[str, Value], verdict: Verdict) -> tuple[Recording, list[Outcome]]:
    """The run into the loop and once round it."""
    from septum.lab.recording import Recording, digest, replay

    recording = Recording(
        scenario.name,
        dict(values),
        (*verdict.schedule, *verdict.loop),
        property=verdict.property,
        message=verdict.message,
        extra={"loop_from": len(verdict.schedule)},
    )
    outcomes = replay(recording)
    return replace(recording, digest=digest(outcomes[-1])), outcomes
