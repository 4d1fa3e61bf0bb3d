"""Diagrams of tests that emit no events of their own: each step tells at least what it was about to do."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator, Sequence
from typing import Any, Final

from septum.core.steps import Program, Step, emit
from septum.core.trace import Event

_STEP: Final = "step"


def narrated(program: Program) -> Program:
    """The same task, with an event for each of its steps."""
    return Program(program.task, lambda: _narrate(program.body()), daemon=program.daemon)


async def _narrate(body: Coroutine[Step, None, Any]) -> Any:
    return await _telling(body)


@types.coroutine
def _telling(body: Coroutine[Step, None, Any]) -> Generator[Step, None, Any]:
    try:
        while True:
            step = body.send(None)
            yield step
            emit(_STEP, str(step))
    except StopIteration as end:
        return end.value
    finally:
        body.close()


def without_mute_steps(events: Sequence[Event]) -> list[Event]:
    """The events without those steps that something else is told of."""
    told = {event.step for event in events if event.kind not in (_STEP, "violation", "waits")}
    return [event for event in events if event.kind != _STEP or event.step not in told]
