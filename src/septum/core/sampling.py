"""Seeded choosers that find more with fewer runs than taking any enabled task at each step.

- :func:`surw` gives all interleavings nearly the same chance: it chooses a task in proportion to the steps it has yet
  to take (after "Selectively Uniform Concurrency Testing", ASPLOS 2025, with every step selected). Choosing each
  enabled task with equal chance instead makes it very unlikely that a short task acts late in a long one.
- :func:`pct` gives every task a random priority, always runs the highest, and lowers it at ``depth - 1`` random places
  (Burckhardt et al., ASPLOS 2010). A bug that needs ``depth`` ordered pairs of steps is found by one run with a chance
  of at least ``1 / (tasks * steps ** (depth - 1))``.

Both want to know how many steps each task takes: :func:`profile` counts those of one run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from septum.core.run import Chooser, Outcome

#: From a seed to a chooser.
Sampler = Callable[[int], Chooser]


def profile(outcome: Outcome) -> list[int]:
    """How many steps each task took in a run."""
    schedule = outcome.trace.schedule
    return [schedule.count(task) for task in range(len(outcome.results))]


def surw(seed: int, steps: Sequence[int]) -> Chooser:
    """A task in proportion to what it has left of ``steps``; one that takes more than expected counts as one step.

    When the counts are exact and nobody waits, each interleaving has the same chance.
    """
    rng = random.Random(seed)
    left = list(steps)

    def choose(enabled: Sequence[int], last: int) -> int:
        task = enabled[0] if len(enabled) == 1 else rng.choices(enabled, [max(left[i], 1) for i in enabled])[0]
        left[task] -= 1
        return task

    return choose


def pct(seed: int, steps: Sequence[int], *, depth: int = 3) -> Chooser:
    """The task with the highest random priority; ``depth - 1`` times, somewhere in the run, it falls to the lowest.

    A task that took more than twice all ``steps`` in a row while others could go on falls too: it may be waiting for
    them in a loop.
    """
    rng = random.Random(seed)
    ranks = list(range(len(steps)))
    rng.shuffle(ranks)
    length = max(sum(steps), 1)
    changes = set(rng.sample(range(1, length + 1), min(depth - 1, length)))
    taken = alone = 0

    def choose(enabled: Sequence[int], last: int) -> int:
        nonlocal taken, alone
        taken += 1
        task = max(enabled, key=ranks.__getitem__)
        alone = alone + 1 if task == last and len(enabled) > 1 else 0
        if taken in changes or alone > 2 * length:
            ranks[task] = min(ranks) - 1
            task, alone = max(enabled, key=ranks.__getitem__), 0
        return task

    return choose


#: The samplers by name, each from the steps of every task.
SAMPLERS: dict[str, Callable[[Sequence[int]], Sampler]] = {
    "pct": lambda steps: lambda seed: pct(seed, steps),
    "random": lambda steps: lambda seed: surw(seed, steps),
}
