"""Schedule files: a run that anyone can look at again, and the ways to make one.

A schedule file is a small JSON object that holds everything a run depends on: the scenario, its parameters, and the
order in which its tasks took steps. Replaying it gives the same events, byte for byte; ``digest`` says so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from septum import __version__
from septum.arch.errors import UsageError
from septum.core.dpor import RunVerdict
from septum.core.explore import Bounds, Explorer, Verdict
from septum.core.run import ENDS, Chooser, Outcome, recorded, run
from septum.core.trace import pack_schedule, unpack_schedule
from septum.lab.files import write_whole
from septum.lab.scenario import Scenario, Value, file_stem, find_scenario

FORMAT: Final = "septum-schedule/1"
_LARGEST_FILE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Recording:
    """A run of a scenario. ``property`` is what it violates, if anything.

    ``witnesses`` are runs to look at before: a cycle in the lock order takes more than one.
    """

    scenario: str
    parameters: Mapping[str, Value]
    schedule: tuple[int, ...]
    witnesses: tuple[tuple[int, ...], ...] = ()
    property: str | None = None
    message: str = ""
    version: str = __version__
    digest: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "format": FORMAT,
            "septum": self.version,
            "scenario": self.scenario,
            "parameters": dict(self.parameters),
            "property": self.property,
            "message": self.message,
            "schedule": pack_schedule(list(self.schedule)),
            "witnesses": [pack_schedule(list(witness)) for witness in self.witnesses],
            "digest": self.digest,
        } | dict(self.extra)


def sample(scenario: Scenario, values: Mapping[str, Value], choose: Chooser, **options: Any) -> Outcome:
    """One live run of a scenario in a fresh world; ``options`` are those of :func:`septum.core.run.run`."""
    setting = scenario.setting(values)
    return run(setting.programs, choose, level=scenario.level, invariants=setting.invariants, **options)


def explore(scenario: Scenario, values: Mapping[str, Value], bounds: Bounds, **options: Any) -> Verdict:
    """Every state of a scenario; ``options`` are those of :class:`Explorer` and of its ``explore``."""
    setting = scenario.setting(values)
    further = {name: options.pop(name) for name in ("progress", "checkpoint") if name in options}
    explorer = Explorer(setting.world, setting.programs, invariants=setting.invariants, level=scenario.level, **options)
    return explorer.explore(bounds, **further)


def record(
    scenario: Scenario, values: Mapping[str, Value], outcome: Outcome, witnesses: Sequence[Sequence[int]] = ()
) -> Recording:
    """What a live run did, ready to be written."""
    return Recording(
        scenario.name,
        dict(values),
        tuple(outcome.trace.schedule),
        tuple(map(tuple, witnesses)),
        outcome.violation,
        outcome.message,
        digest=digest(outcome),
    )


def digest(outcome: Outcome) -> str:
    """SHA-256 over the events of a run: equal digests, equal runs."""
    lines = (f"{e.step} {e.cpu} {e.task} {e.kind} {e.text}" for e in outcome.trace.events)
    return hashlib.sha256("\n".join([*lines, f"{outcome.violation}: {outcome.message}"]).encode()).hexdigest()


def save(recording: Recording, folder: Path | None = None) -> Path:
    """Writes a recording under a name made of scenario, property and schedule; returns the path.

    The file is complete or not there: it is written beside and renamed.
    """
    what = re.sub(r"[^a-z0-9]+", "-", (recording.property or "run").lower()).strip("-")
    text = json.dumps(recording.to_json(), indent=1) + "\n"
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = (folder or Path.cwd()) / f"{file_stem(recording.scenario)}-{what}-{mark}.json"
    write_whole(path, text.encode())
    return path


def load(path: Path) -> Recording:
    """Reads a schedule file.

    :raises UsageError: for a file that cannot be read, is no schedule file, or lacks or garbles a field.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"{path}: larger than a schedule file can be; give a file that septum wrote")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; give a file that septum wrote") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error}); give a file that septum wrote") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path}: not a schedule file: field format is not {FORMAT!r}; give a file that septum wrote")
    fields = {"scenario": str, "parameters": dict, "schedule": str, "septum": str, "message": str, "digest": str}
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise UsageError(f"{path}: field {name} is missing or not a {kind.__name__}; record the run again")
    scenario = find_scenario(content["scenario"])
    values = scenario.values(f"{name}={value}" for name, value in content["parameters"].items())
    tasks = len(scenario.setting(values).programs)
    witnesses = content.get("witnesses", [])
    if not isinstance(witnesses, list) or not all(isinstance(witness, str) for witness in witnesses):
        raise UsageError(f"{path}: field witnesses is not a list of schedules; record the run again")
    try:
        schedule, *others = (tuple(unpack_schedule(text, tasks=tasks)) for text in (content["schedule"], *witnesses))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    prop = content.get("property")
    return Recording(
        scenario.name,
        values,
        schedule,
        tuple(others),
        prop if isinstance(prop, str) else None,
        content["message"],
        content["septum"],
        content["digest"],
    )


def replay(recording: Recording) -> list[Outcome]:
    """Runs a recording again: its witnesses, if any, and last the run itself; not a step more than was recorded."""
    scenario = find_scenario(recording.scenario)
    order: dict[tuple[str, str], str] = {}
    return [
        sample(
            scenario,
            recording.parameters,
            recorded(schedule),
            max_steps=len(schedule),
            lock_order=order,
            stop_at_cycle=recording.property in (None, "lock order"),
            must_end=recording.property == ENDS,
        )
        for schedule in (*recording.witnesses, recording.schedule)
    ]


def counterexample(
    scenario: Scenario, values: Mapping[str, Value], verdict: Verdict | RunVerdict
) -> tuple[Recording, list[Outcome]]:
    """The runs behind a ``violated`` verdict, run live along their schedules."""
    witnesses = tuple(map(tuple, verdict.witnesses))
    found = Recording(scenario.name, dict(values), tuple(verdict.schedule), witnesses, verdict.property)
    outcomes = replay(found)
    return record(scenario, values, outcomes[-1], witnesses), outcomes
