"""``septum replay``: a recorded schedule, shown again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from septum.arch.errors import UsageError
from septum.cli.campaign import diagrams, events_of, title
from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import show

FORMATS = ("text",)
"""How a schedule can be shown."""


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule that septum explore or run wrote.")],
    form: Annotated[str, typer.Option("--format", metavar="|".join(FORMATS), help="How to show it.")] = "text",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show a recorded run again, step for step.

    Exit status 1 when the run violates a property, or is no longer the run that was recorded.
    """
    from septum.lab.recording import digest, load
    from septum.lab.recording import replay as run_again
    from septum.lab.scenario import find_scenario

    if form not in FORMATS:
        raise UsageError(f"there is no format {form!r}: give {' or '.join(FORMATS)}")
    recording = load(file)
    outcomes = run_again(recording)
    last = outcomes[-1]
    same = digest(last) == recording.digest
    record = {
        "scenario": recording.scenario,
        "parameters": dict(recording.parameters),
        "property": last.violation,
        "message": last.message,
        "steps": last.steps,
        "same": same,
        "recorded_with": recording.version,
        "runs": [events_of(outcome) for outcome in outcomes],
    }
    blocks = [title(find_scenario(recording.scenario), recording.parameters), *diagrams(outcomes)]
    verdict = f"violated: {last.violation}" if last.violation else "no property is violated"
    if not same:
        verdict += f"\nthis is not the run that was recorded: the file is from Septum {recording.version}"
    show(record, verdict, [*blocks, verdict], as_json=as_json, quiet=quiet)
    return GOOD if same and not last.violation else BAD
