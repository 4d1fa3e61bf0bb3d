"""``septum replay``: a recorded schedule, shown again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from septum.arch.errors import UsageError
from septum.cli.campaign import diagrams, events_of, title
from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import show

if TYPE_CHECKING:
    from septum.core.trace import Event
    from septum.lab.recording import Recording

FORMATS = {"text": "", "perfetto": ".pftrace", "html": ".html", "itf": ".itf.json"}
"""How a run can be shown; the others than text are files, beside the current folder's other files."""


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule that septum explore or run wrote.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            help="A diagram, or a file for ui.perfetto.dev, a browser, or TLA+ and Quint tools.",
        ),
    ] = "text",
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show a recorded run again, step for step.

    The file for another format than text is written into the current folder, under the name of FILE.
    Exit status 1 when the run violates a property, or is no longer the run that was recorded.
    """
    from septum.lab.files import write_whole
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
    name = title(find_scenario(recording.scenario), recording.parameters)
    verdict = f"violated: {last.violation}" if last.violation else "no property is violated"
    if not same:
        verdict += f"\nthis is not the run that was recorded: the file is from Septum {recording.version}"
    if form == "text":
        drawn = diagrams(outcomes)
    else:
        path = Path(file.name).with_suffix(FORMATS[form])
        write_whole(path, _rendered(form, recording, last.trace.events, name, verdict))
        record["written"] = str(path)
        drawn = [f"written: {path}"]
    show(record, verdict, [name, *drawn, verdict], as_json=as_json, quiet=quiet)
    return GOOD if same and not last.violation else BAD


def _rendered(form: str, recording: Recording, events: Sequence[Event], name: str, verdict: str) -> bytes:
    if form == "itf":
        import json

        from septum.lab.itf import itf_trace

        return json.dumps(itf_trace(recording), indent=1).encode()
    if form == "html":
        from septum.report.page import run_page

        return run_page(events, name, verdict).encode()
    from septum.report.perfetto import perfetto_trace

    return perfetto_trace(events, name)
