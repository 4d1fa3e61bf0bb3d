"""Checkpoints: an exploration that was interrupted, or killed, goes on where its last checkpoint was.

What the file holds does not depend on the process that wrote it. Shared objects are names, cells are a name and a key,
local states are what their task read on the way there; steps are learnt anew. It is complete or not there: it is
written beside, and renamed once it is on disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from septum.arch.errors import UsageError
from septum.core.automata import Automata
from septum.core.cells import Fixed, Shared, SharedMap, cells_of, peek
from septum.core.search import Link, Search, State
from septum.core.steps import Violation, ctx

_FORMAT: Final = b"septum-checkpoint/1\n"
_DIGEST: Final = 32
_FUNCTION: Final = "*function*"
_MODEL: Final = ("septum.kvm.", "septum.tdx.", "septum.guest.")
"""Where functions that cells hold are from."""


class Checkpoint:
    """Where, how often (``interval``, seconds) and of what an exploration leaves checkpoints.

    Writing takes at most a tenth of the time: where it takes long, it is done less often.

    ``subject`` says what is explored: a checkpoint of anything else is refused. With ``resume`` the exploration begins
    with what the file holds.
    """

    def __init__(self, path: Path, subject: str, *, interval: float = 10.0, resume: bool = False) -> None:
        self.path = path
        self.subject = subject
        self.interval = interval
        self.resume = resume
        self._next = time.monotonic() + interval

    def due(self) -> bool:
        """Whether the last one is so long ago that another is to be written."""
        return time.monotonic() >= self._next

    def write(self, automata: Automata, search: Search, parts: Sequence[Any]) -> None:
        """Writes what is known now. ``parts`` are further objects whose ``SAVED`` attributes belong to it.

        :raises UsageError: when the file cannot be written, or a value cannot be told in a stable way.
        """
        begin = time.monotonic()
        links: dict[int, int] = {}
        rows: list[tuple[int, int, int]] = []
        content = {
            "subject": self.subject,
            "automata": automata_state(automata),
            "todo": [_flat(state, links, rows) for state in search.todo],
            "following": None
            if search.following is search.todo
            else [_flat(state, links, rows) for state in search.following],
            "links": rows,
            "visited": search.visited if search.exact else array("Q", search.visited).tobytes(),
            "outcomes": search.verdict.outcomes,
            "order": (ctx.lock_order, ctx.cycles),
            "parts": [_attributes(part) for part in (search, *parts)],
        }
        stream = io.BytesIO()
        automata.vectors.load(automata.vectors.initial)
        _Pickler(stream, automata).dump(content)
        payload = stream.getvalue()
        scratch = self.path.with_name(self.path.name + ".part")
        try:
            with scratch.open("wb") as file:
                file.write(_FORMAT + hashlib.sha256(payload).digest() + payload)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); give a path that can") from None
        now = time.monotonic()
        self._next = now + max(self.interval, 10 * (now - begin))

    def read(self, automata: Automata, search: Search, parts: Sequence[Any]) -> None:
        """Puts back what :meth:`write` wrote; the arguments are fresh ones of the same exploration.

        :raises UsageError: for a file that cannot be read, is damaged, or is of another exploration.
        """
        content = self._content(automata)
        if content["subject"] != self.subject:
            raise UsageError(
                f"{self.path}: is a checkpoint of: {content['subject']}; give the same scenario, parameters and options"
            )
        try:
            restore_automata(automata, content["automata"])
        except Violation as violation:
            raise UsageError(f"{self.path}: does not fit this version of the scenario ({violation})") from None
        links: list[Link] = []
        for parent, task, depth in content["links"]:
            links.append((links[parent] if parent >= 0 else None, task, depth))
        search.todo[:] = [_deep(state, links) for state in content["todo"]]
        if content["following"] is not None:
            search.following[:] = [_deep(state, links) for state in content["following"]]
        if search.exact:
            search.visited = content["visited"]
        else:
            names = array("Q")
            names.frombytes(content["visited"])
            search.visited = set(names)
        search.verdict.outcomes.update(content["outcomes"])
        ctx.lock_order, ctx.cycles = content["order"]
        for part, attributes in zip((search, *parts), content["parts"], strict=True):
            for name, value in attributes.items():
                if isinstance(value, dict):
                    getattr(part, name).update(value)
                else:
                    setattr(part, name, value)

    def discard(self) -> None:
        """Takes the file away: the exploration has come to its end."""
        self.path.unlink(missing_ok=True)

    def _content(self, automata: Automata) -> dict[str, Any]:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; give a checkpoint that septum wrote") from None
        payload = data[len(_FORMAT) + _DIGEST :]
        if data[: -len(payload) or None] != _FORMAT + hashlib.sha256(payload).digest():
            raise UsageError(f"{self.path}: not a checkpoint, or damaged; start the exploration anew")
        try:
            content: dict[str, Any] = _Unpickler(io.BytesIO(payload), automata).load()
        except (pickle.UnpicklingError, KeyError, AttributeError) as error:
            raise UsageError(f"{self.path}: does not fit this version of septum ({error})") from None
        return content


def automata_state(automata: Automata) -> dict[str, Any]:
    """What has been learnt that states depend on: local states, cells, numbers."""
    vectors = automata.vectors
    return {
        "locals": [(at.task, at.parent.number if at.parent else -1, at.log) for at in automata.locals],
        "cells": list(vectors.cells),
        "initial": vectors.initial,
        "numbers": vectors.tables(),
        "generator": vectors.numbers.generator.getstate(),
        "runs": automata.runs,
    }


def restore_automata(automata: Automata, saved: dict[str, Any]) -> None:
    """Puts fresh automata, started, where others were.

    :raises Violation: when tasks do not do again what they did.
    """
    for task, parent, log in saved["locals"][len(automata.locals) :]:
        automata.restore_local(task, automata.locals[parent], log)
    automata.vectors.restore(saved["cells"], saved["initial"], saved["numbers"], [at.key for at in automata.locals])
    automata.vectors.numbers.generator.setstate(saved["generator"])
    automata.runs = saved["runs"]
    automata.forget_steps()


def _attributes(part: Any) -> dict[str, Any]:
    values = {name: getattr(part, name) for name in part.SAVED}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def _flat(state: State | None, links: dict[int, int], rows: list[tuple[int, int, int]]) -> Any:
    """A state with the number of its link in ``rows``. (Chains of links are too deep to be pickled as they are.)"""
    if state is None:
        return None
    name, vector, link = state
    chain = []
    at = link
    while at is not None and id(at) not in links:
        chain.append(at)
        at = at[0]
    number = -1 if at is None else links[id(at)]
    for step in reversed(chain):
        rows.append((number, step[1], step[2]))
        number = links[id(step)] = len(rows) - 1
    return name, vector, number


def _deep(state: Any, links: Sequence[Link]) -> State | None:
    if state is None:
        return None
    name, vector, link = state
    return name, vector, links[link] if link >= 0 else None


def _fixed(automata: Automata) -> dict[tuple[str, Any], Any]:
    """What never changes though cells hold it, objects and functions, by the name and key of a cell that does so at
    first."""
    found: dict[tuple[str, Any], Any] = {}
    for owner in automata.world.objects:
        keys = dict.keys(owner) if isinstance(owner, SharedMap) else cells_of(type(owner))
        for key in keys:
            value = peek(owner, key)
            if isinstance(value, (Fixed, FunctionType)):
                found[owner.name, key] = value
    return found


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, automata: Automata) -> None:
        super().__init__(stream, protocol=5)
        self._cells = {id(value): cell for cell, value in _fixed(automata).items()}

    def persistent_id(self, value: Any) -> object:
        if isinstance(value, (Shared, SharedMap)):
            return value.name
        if isinstance(value, (Fixed, FunctionType)):
            if id(value) in self._cells:
                return self._cells[id(value)]
            if isinstance(value, FunctionType) and value.__module__.startswith(_MODEL):
                return _FUNCTION, value.__module__, value.__qualname__
            raise UsageError(f"a cell holds {value!r}, which no checkpoint can tell; explore without one")
        return None


class _Unpickler(pickle.Unpickler):
    """Makes nothing but plain values, enum members and dataclasses of modules that are loaded anyway.

    Functions are those of model code, which can do nothing to the world outside.
    """

    def __init__(self, stream: io.BytesIO, automata: Automata) -> None:
        super().__init__(stream)
        self._objects = {obj.name: obj for obj in automata.world.objects}
        self._cells = _fixed(automata)

    def persistent_load(self, name: Any) -> Any:
        if not isinstance(name, tuple):
            return self._objects[name]
        if name[0] != _FUNCTION:
            return self._cells[name]
        _, module, function = name
        found = getattr(sys.modules.get(module), function, None)
        if module.startswith(_MODEL) and isinstance(found, FunctionType):
            return found
        raise pickle.UnpicklingError(f"no value can be {module}.{function}")

    def find_class(self, module: str, name: str) -> Any:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and (issubclass(found, Enum) or is_dataclass(found)):
            return found
        raise pickle.UnpicklingError(f"no value can be a {module}.{name}")
