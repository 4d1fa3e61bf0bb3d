"""The ways to look for a violation of a scenario other than every state once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from septum.arch.errors import UsageError
from septum.core.dpor import Reducer, RunBounds, RunVerdict
from septum.core.run import at_random, round_robin, solo
from septum.core.sampling import SAMPLERS, Sampler, profile
from septum.lab.scenario import Scenario, Value
from septum.lab.stage import Stage


def last_first(enabled: Sequence[int], last: int) -> int:
    """Stays with a task while it can go on; then the highest."""
    return last if last in enabled else enabled[-1]


#: Those that choose without a seed.
_FIXED: Final = {"round-robin": round_robin, "solo": solo}
_PROFILED: Final = 10_000
"""Most steps of a run that counts how many each task takes."""


def sampler(scenario: Scenario, values: Mapping[str, Value], strategy: str) -> Sampler:
    """From a seed to a chooser, for ``pct``, ``random``, ``round-robin`` or ``solo``.

    How many steps a task takes often depends on who comes first, so there are several runs that count them, and each
    seed takes the counts of one. For ``random``, one seed in so many does without and chooses among all with equal
    chance.

    :raises UsageError: when there is no such strategy.
    """
    if strategy in _FIXED:
        return lambda seed: _FIXED[strategy]
    if strategy not in SAMPLERS:
        raise UsageError(f"there is no strategy {strategy!r}: give one of {', '.join([*SAMPLERS, *_FIXED])}")
    stage = Stage(scenario, values)
    outcomes = [stage.run(choose, max_steps=_PROFILED, keep_events=False) for choose in (round_robin, solo, last_first)]
    ended = [outcome for outcome in outcomes if outcome.ended]
    samplers = [SAMPLERS[strategy](profile(outcome)) for outcome in ended or outcomes]
    if strategy == "random":
        samplers.append(at_random)
    return lambda seed: samplers[seed % len(samplers)](seed)


def reduce(
    scenario: Scenario,
    values: Mapping[str, Value],
    bounds: RunBounds | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> RunVerdict:
    """Dynamic partial-order reduction of a scenario: see :mod:`septum.core.dpor`."""
    setting = scenario.setting(values)
    reducer = Reducer(setting.world, setting.programs, invariants=setting.invariants, level=scenario.level)
    return reducer.explore(bounds, progress)
