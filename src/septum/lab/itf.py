"""Counterexamples as ITF, the trace format of TLA+ (Apalache) and Quint users.

A trace has one state before the first step and one after each. Its variables are the shared objects whose cells the run
writes, each a record or map of those cells, and ``step``: the number of the step, the task that took it, and what it
did. A violation is reported inside the last step: the last state is the one in which it was noticed.

Format: https://apalache-mc.org/docs/adr/015adr-trace.html
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final

from septum import __version__
from septum.core.cells import KEYS, SharedMap, peek
from septum.core.run import recorded, run
from septum.lab.recording import Recording
from septum.lab.scenario import find_scenario

FORMAT: Final = "https://apalache-mc.org/docs/adr/015adr-trace.html"
_STEP: Final = "step"


def itf_trace(recording: Recording) -> dict[str, Any]:
    """The run of a recording as an ITF object. Of several runs (a cycle in the lock order) it is the last."""
    scenario = find_scenario(recording.scenario)
    setting = scenario.setting(recording.parameters)
    watcher = _Watcher()
    setting.world.track(watcher)
    try:
        outcome = run(
            setting.programs,
            recorded(recording.schedule),
            level=scenario.level,
            max_steps=len(recording.schedule),
            invariants=[watcher.snapshot, *setting.invariants],
        )
        if len(watcher.states) <= outcome.steps:  # the step that failed, if one did, has not come to its end
            watcher.snapshot()
    finally:
        setting.world.track(None)
    does: list[list[str]] = [[] for _ in watcher.states]
    for event in outcome.trace.events:
        does[event.step].append(event.text)
    names = watcher.names()
    states = [
        {"#meta": {"index": index}, _STEP: {"number": _value(index), "task": task, "does": texts}} | variables
        for index, (task, texts, variables) in enumerate(
            zip(
                ["", *(setting.programs[task].task.name for task in outcome.trace.schedule)],
                does,
                watcher.variables(names),
                strict=True,
            )
        )
    ]
    return {
        "#meta": {
            "format": "ITF",
            "format-description": FORMAT,
            "source": f"septum {__version__}: {recording.scenario}",
            "status": "violation" if outcome.violation else "ok",
            "description": f"{outcome.violation}: {outcome.message}" if outcome.violation else "",
            "objects": {name: owner.name for owner, name in names.items()},
        },
        "params": [],
        "vars": [_STEP, *names.values()],
        "states": states,
    }


class _Watcher:
    """A recorder that notes which cells are written, what they held at first, and their values after each step."""

    def __init__(self) -> None:
        self.first: dict[tuple[Any, Any], Any] = {}
        self.states: list[dict[tuple[Any, Any], Any]] = []

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        return value

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        if key is not KEYS:
            self.first.setdefault((owner, key), old)
        return True

    def snapshot(self) -> None:
        self.states.append({cell: peek(*cell) for cell in self.first})

    def names(self) -> dict[Any, str]:
        """The objects written, in order of their first write, each with a name that TLA+ allows."""
        names: dict[Any, str] = {}
        for owner, _key in self.first:
            if owner not in names:
                plain = re.sub(r"\W+", "_", owner.name, flags=re.ASCII).strip("_") or "object"
                name = plain if plain[0].isalpha() else f"o_{plain}"
                while name in (_STEP, *names.values()):
                    name += "_"
                names[owner] = name
        return names

    def variables(self, names: dict[Any, str]) -> list[dict[str, Any]]:
        """The variables of each state; a cell that has not been written yet holds what it held at first."""
        return [
            {name: _object(owner, {key: now.get((o, key), self.first[o, key]) for o, key in self.first if o is owner})
             for owner, name in names.items()}
            for now in self.states
        ]  # fmt: skip


def _object(owner: Any, cells: dict[Any, Any]) -> dict[str, Any]:
    if isinstance(owner, SharedMap):
        return {"#map": [[_value(key), _value(value)] for key, value in cells.items() if value != owner.default]}
    return {field: _value(value) for field, value in cells.items()}


def _value(value: Any) -> Any:
    """A value of a cell. ``None`` and references become strings; whole numbers of any size keep it."""
    for kinds, render in _RENDERED:
        if isinstance(value, kinds):
            return render(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: _value(getattr(value, part.name)) for part in fields(value)}
    return getattr(value, "name", None) or {"#unserializable": repr(value)}


_RENDERED: Final[tuple[tuple[Any, Callable[[Any], Any]], ...]] = (
    ((bool, str), lambda value: value),
    (type(None), lambda value: "None"),
    (Enum, lambda value: value.name),
    (int, lambda value: {"#bigint": str(value)}),
    (bytes, lambda value: value.hex()),
    (tuple, lambda value: {"#tup": [_value(item) for item in value]}),
    (frozenset, lambda value: {"#set": [_value(item) for item in sorted(value, key=repr)]}),
)
