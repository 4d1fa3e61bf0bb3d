"""The ways to look for a violation of a scenario other than every state once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from septum.arch.errors import UsageError
from septum.core.dpor import Reducer, RunBounds, RunVerdict
from septum.core.run import round_robin, solo
from septum.core.sampling import SAMPLERS, Sampler, profile
from septum.lab.recording import sample
from septum.lab.scenario import Scenario, Value

#: Those that choose without a seed.
_FIXED: Final = {"round-robin": round_robin, "solo": solo}
_PROFILED: Final = 100_000
"""Steps of the run that counts how many each task takes."""


def sampler(scenario: Scenario, values: Mapping[str, Value], strategy: str) -> Sampler:
    """From a seed to a chooser, for ``pct``, ``random`` (uniform), ``round-robin`` or ``solo``.

    :raises UsageError: when there is no such strategy.
    """
    if strategy in _FIXED:
        return lambda seed: _FIXED[strategy]
    if strategy not in SAMPLERS:
        raise UsageError(f"there is no strategy {strategy!r}: give one of {', '.join([*SAMPLERS, *_FIXED])}")
    return SAMPLERS[strategy](profile(sample(scenario, values, round_robin, max_steps=_PROFILED, keep_events=False)))


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
