"""Live runs: one task takes a step, then the scheduler chooses the next.

A scheduler is a *chooser*: a function from the tasks that can go on, and the one that went last, to the next one.
:func:`solo` is the chooser that stays with a task until it has to wait; at granularity ``SOLO`` it makes model code
run as plain calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from septum.arch.errors import UsageError
from septum.core.steps import CALLS, SOLO, Program, Step, Violation, ctx, emit, require
from septum.core.trace import Trace

T = TypeVar("T")

ENDS = "every run ends"
"""The property of runs that must come to their end within a number of steps."""

#: From the indices of the tasks that can go on (ascending) and the last one chosen (-1 at first) to the next one.
Chooser = Callable[[Sequence[int], int], int]


def solo(enabled: Sequence[int], last: int) -> int:
    """Stays with the last task while it can go on; then the lowest."""
    return last if last in enabled else enabled[0]


def round_robin(enabled: Sequence[int], last: int) -> int:
    """Each task in turn."""
    return next((task for task in enabled if task > last), enabled[0])


def at_random(seed: int) -> Chooser:
    """Each enabled task with equal chance, from a seeded generator."""
    rng = random.Random(seed)
    return lambda enabled, last: enabled[0] if len(enabled) == 1 else rng.choice(enabled)


def recorded(schedule: Sequence[int]) -> Chooser:
    """A recorded schedule again; after its end, :func:`solo`.

    :raises UsageError: (from the chooser) when the schedule chooses a task that cannot go on.
    """
    steps = iter(enumerate(schedule, 1))

    def choose(enabled: Sequence[int], last: int) -> int:
        place, task = next(steps, (0, -1))
        if task < 0:
            return solo(enabled, last)
        if task not in enabled:
            raise UsageError(
                f"schedule: step {place} chooses task {task}, which cannot go on there (it can be {list(enabled)});"
                " the schedule was recorded with another version, scenario or parameters"
            )
        return task

    return choose


@dataclass(slots=True)
class Outcome:
    """How a live run ended.

    ``violation`` is the property that failed and ``message`` what happened, if anything failed. ``results`` has what
    each task's coroutine returned, in task order (``None`` for one that did not finish). ``ended``: nobody can go on.
    """

    trace: Trace
    steps: int = 0
    violation: str | None = None
    message: str = ""
    results: list[Any] = field(default_factory=list)
    ended: bool = False


def run(
    programs: Sequence[Program],
    choose: Chooser = solo,
    *,
    level: int = CALLS,
    max_steps: int | None = None,
    keep_events: bool = True,
    invariants: Sequence[Callable[[], None]] = (),
    lock_order: dict[tuple[str, str], str] | None = None,
    stop_at_cycle: bool = True,
    must_end: bool = False,
) -> Outcome:
    """Runs tasks to their end, to a violation, to a deadlock, or for ``max_steps`` steps.

    With ``must_end``, a run that does not end within ``max_steps`` violates :data:`ENDS`.

    A deadlock (somebody has not finished and nobody can go on) is reported as a violation of ``no deadlock`` that
    names who waits for what. ``lock_order`` is what earlier runs have seen of it, and is added to;
    a cycle in it ends the run unless ``stop_at_cycle`` is false.
    """
    outcome = Outcome(Trace(keep_events=keep_events), results=[None] * len(programs))
    before = ctx.level, ctx.task, ctx.trace, ctx.cycles
    ctx.lock_order, ctx.cycles = {} if lock_order is None else lock_order, None if stop_at_cycle else []
    ctx.level = level
    ctx.trace = outcome.trace if keep_events and level != SOLO else None
    try:
        _run(programs, choose, max_steps, outcome, invariants)
        require(outcome.ended or not must_end, ENDS, _unended(programs, outcome))
    except Violation as violation:
        outcome.violation, outcome.message = violation.property, str(violation)
        emit("violation", f"** {violation.property}: {violation}")
    finally:
        ctx.level, ctx.task, ctx.trace, ctx.cycles = before
    return outcome


def _unended(programs: Sequence[Program], outcome: Outcome) -> str:
    names = [
        program.task.name
        for program, result in zip(programs, outcome.results, strict=True)
        if result is None and not program.daemon
    ]
    return f"{' and '.join(names)} did not end within {outcome.steps:,} steps (does it ever? explore --liveness)"


def run_solo(programs: Sequence[Program]) -> list[Any]:
    """Runs tasks one after the other as plain calls and returns their results.

    :raises Violation: when a property fails or nobody can go on.
    """
    outcome = run(programs, solo, level=SOLO, keep_events=False)
    if outcome.violation:
        raise Violation(outcome.violation, outcome.message)
    return outcome.results


def solo_call(call: Coroutine[Step, None, T]) -> T:
    """Runs one coroutine that never waits, without a task, and returns its result: the cheapest way to call model code.

    :raises RuntimeError: when it waits, because nobody is there to end that.
    """
    try:
        step = call.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    call.close()
    raise RuntimeError(f"a call outside a scheduler cannot wait: {step}")


def _run(
    programs: Sequence[Program],
    choose: Chooser,
    max_steps: int | None,
    outcome: Outcome,
    invariants: Sequence[Callable[[], None]],
) -> None:
    bodies: list[Coroutine[Step, None, Any] | None] = [program.body() for program in programs]
    pending: list[Step | None] = [None] * len(programs)
    schedule = outcome.trace.schedule
    last = -1
    try:
        for i in range(len(programs)):
            _advance(i, programs, bodies, pending, outcome)
        for invariant in invariants:
            invariant()
        while True:
            enabled = [i for i, body in enumerate(bodies) if body is not None and _ready(pending[i])]
            if not enabled:
                outcome.ended = True
                _check_all_done(programs, bodies, pending)
                break
            if outcome.steps == max_steps:
                break
            last = choose(enabled, last)
            schedule.append(last)
            outcome.steps += 1
            _advance(last, programs, bodies, pending, outcome)
            for invariant in invariants:
                invariant()
    finally:
        for body in bodies:
            if body is not None:
                body.close()


def _advance(
    i: int,
    programs: Sequence[Program],
    bodies: list[Coroutine[Step, None, Any] | None],
    pending: list[Step | None],
    outcome: Outcome,
) -> None:
    """Lets task ``i`` go on to its next step. (The first time: to its first step, before anyone may act.)"""
    body = bodies[i]
    assert body is not None
    ctx.task = programs[i].task
    try:
        pending[i] = body.send(None)
    except StopIteration as end:
        bodies[i] = None
        outcome.results[i] = end.value


def _ready(step: Step | None) -> bool:
    return step is None or step.guard is None or step.guard()


def _check_all_done(
    programs: Sequence[Program], bodies: Sequence[Coroutine[Step, None, Any] | None], pending: Sequence[Step | None]
) -> None:
    stuck = [i for i, body in enumerate(bodies) if body is not None and not programs[i].daemon]
    if stuck:
        for i in stuck:
            ctx.task = programs[i].task
            emit("waits", f"waits to {pending[i]}")
        raise Violation("no deadlock", deadlock_message([(programs[i].task.name, pending[i]) for i in stuck]))


def deadlock_message(stuck: Sequence[tuple[str, Step | None]]) -> str:
    """Who waits for what, in words."""
    return "nobody can go on: " + "; ".join(f"{name} waits to {step}" for name, step in stuck)
