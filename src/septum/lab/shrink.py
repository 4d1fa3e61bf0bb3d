"""Shrinking a schedule that violates a property: fewest context switches, then fewest steps, the same property.

A schedule is seen as turns: a task, and how many steps it takes in a row. Every change that may help is tried in a
fixed order, and kept if the run still violates the property and is smaller than the best one so far. That ends when no
single change makes it smaller still. A change may ask for what is not possible in the run that it makes: a turn of a
task that cannot go on is left out, and after the end of the schedule the last task goes on. So every attempt is a run,
and what counts is the schedule that it really took, up to the violation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

from septum.core.run import Chooser, Outcome, solo
from septum.lab.recording import Recording, record
from septum.lab.scenario import find_scenario
from septum.lab.stage import Stage

#: Runs along a chooser for so many steps at most; the outcome's trace has the schedule that was taken.
Attempt = Callable[[Chooser, int], Outcome]
_Turns = list[tuple[int, int]]
_SHORT = 16
"""A turn is cut to every length below this, to half of its own, and by one step."""

STEPS = 2_000_000
"""Steps of all attempts after which shrinking ends with what it has."""


def switches(schedule: Sequence[int]) -> int:
    """How often another task goes on than the one before."""
    return sum(a != b for a, b in pairwise(schedule))


def shrink_schedule(attempt: Attempt, schedule: Sequence[int], prop: str | None, *, budget: int = STEPS) -> list[int]:
    """The smallest schedule found that violates ``prop``; ``schedule`` itself if it cannot be made to."""
    best: list[int] | None = None
    tried: set[tuple[int, ...]] = set()

    def improves(turns: _Turns) -> bool:
        nonlocal best, budget
        wanted = tuple(task for task, count in turns for _ in range(count))
        if wanted in tried or budget < 0:
            return False
        tried.add(wanted)
        outcome = attempt(following(wanted), len(wanted))
        taken = list(outcome.trace.schedule)
        budget -= len(taken)
        if outcome.violation != prop or (best is not None and _size(taken) >= _size(best)):
            return False
        best = taken
        return True

    improves(_turns(schedule))
    while best is not None and any(improves(turns) for turns in _changes(_turns(best))):
        pass
    return list(schedule) if best is None else best


def shrink(recording: Recording, *, budget: int = STEPS) -> Recording:
    """A recording of a smaller run that violates the same property; of the same run if it cannot be made to.

    Where it takes several runs (a cycle in the lock order), each is shrunk while the others stay, and one that
    is not needed is left out.
    """
    scenario = find_scenario(recording.scenario)
    stage = Stage(scenario, recording.parameters)
    runs = [list(run) for run in (*recording.witnesses, recording.schedule)]

    def outcomes(place: int, choose: Chooser, steps: int) -> list[Outcome]:
        """All runs with another one at ``place``. Also ends where that is given as no run at all."""
        order: dict[tuple[str, str], str] = {}
        return [
            stage.run(
                choose if i == place else following(run),
                max_steps=steps if i == place else len(run),
                lock_order=order,
                stop_at_cycle=recording.property in (None, "lock order"),
                keep_events=i == len(runs) - 1,
            )
            for i, run in enumerate(runs)
        ]

    for place in range(len(runs)):

        def attempt(choose: Chooser, steps: int, place: int = place) -> Outcome:
            *_, last = found = outcomes(place, choose, steps)
            changed = found[place]
            return Outcome(changed.trace, changed.steps, last.violation, last.message)

        runs[place] = shrink_schedule(attempt, runs[place], recording.property, budget=budget)
    last = outcomes(-1, solo, 0)[-1]
    if last.violation != recording.property:
        return recording
    return record(scenario, recording.parameters, last, [run for run in runs[:-1] if run])


def following(schedule: Sequence[int]) -> Chooser:
    """A schedule as far as it is possible: it leaves out who cannot go on, and at its end the last task goes on."""
    steps = iter(schedule)
    return lambda enabled, last: next((task for task in steps if task in enabled), solo(enabled, last))


def _size(schedule: Sequence[int]) -> tuple[int, int, list[int]]:
    return switches(schedule), len(schedule), list(schedule)


def _turns(schedule: Sequence[int]) -> _Turns:
    return [(task, len(list(group))) for task, group in groupby(schedule)]


def _changes(turns: _Turns) -> Iterator[_Turns]:
    """What could make a schedule smaller, the most promising first."""
    tasks, steps = sorted({task for task, _ in turns}), sum(count for _, count in turns)
    for place in range(len(turns) + 1):  # after so many turns, one task to the end
        for task in tasks:
            yield [*turns[:place], (task, steps)]
    for place in range(len(turns)):  # without a turn
        yield turns[:place] + turns[place + 1 :]
    for place in range(len(turns)):  # a turn moved to the next or the last one of its task
        task, count = turns[place]
        rest = turns[:place] + turns[place + 1 :]
        for other, (owner, length) in enumerate(rest):
            if owner == task:
                yield [*rest[:other], (task, length + count), *rest[other + 1 :]]
    for place in range(1, len(turns)):  # two neighbours the other way round
        yield [*turns[: place - 1], turns[place], turns[place - 1], *turns[place + 1 :]]
    for place, (task, count) in enumerate(turns):  # a turn cut short or in two
        for fewer in sorted({*range(1, min(count, _SHORT)), count // 2, count - 1} - {0, count}):
            yield [*turns[:place], (task, fewer), *turns[place + 1 :]]
            yield [*turns[:place], (task, fewer), *turns[place + 1 :], (task, count - fewer)]
