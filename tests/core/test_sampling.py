"""Samplers: uniform where that can be computed, PCT's promise, and never a violation that is not one."""

from __future__ import annotations

from collections import Counter
from functools import partial
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.core.cells import Shared, Tracking, World
from septum.core.run import at_random, recorded, round_robin, run
from septum.core.sampling import SAMPLERS, Sampler, pct, profile, surw
from septum.core.steps import Program, Task, step
from tests.core.programs import WAITS, Machine, Texts, brute_force, programs_of
from tests.core.test_dpor import texts_of


class Word(Shared):
    value: int = 0


def straight(*lengths: int) -> list[Program]:
    """Tasks that take so many steps and share nothing."""
    Tracking.world = World()

    async def body(length: int) -> None:
        for place in range(length):
            await step("go", place)

    return [Program(Task(f"t{i}", cpu=i), partial(body, length)) for i, length in enumerate(lengths)]


@settings(max_examples=600)
@given(
    texts_of("load", "store", "add", "set", "skip_if", *WAITS), st.sampled_from([*SAMPLERS]), st.integers(0, 1 << 32)
)
def test_what_a_sampler_finds_is_there_and_replays(texts: Texts, strategy: str, seed: int) -> None:
    _states, ends, deadlock = brute_force(texts)
    steps = profile(run(programs_of(Machine.fresh(), texts), round_robin, keep_events=False))
    machine = Machine.fresh()
    outcome = run(programs_of(machine, texts), SAMPLERS[strategy](steps)(seed))
    if outcome.violation:
        assert deadlock
        assert outcome.violation == "no deadlock"
    else:
        assert (machine.values(), tuple(outcome.results)) in ends
    again = run(programs_of(Machine.fresh(), texts), recorded(outcome.trace.schedule))
    assert (again.trace.events, again.violation, again.message) == (
        outcome.trace.events, outcome.violation, outcome.message
    )  # fmt: skip


@pytest.mark.parametrize("strategy", [*SAMPLERS])
def test_a_seed_is_a_schedule(strategy: str) -> None:
    sampler = SAMPLERS[strategy]([20, 20, 20])
    schedules = [run(straight(20, 20, 20), sampler(seed)).trace.schedule for seed in (1, 1, 2)]
    assert schedules[0] == schedules[1] != schedules[2]


def test_a_profile_counts_the_steps_of_each_task() -> None:
    assert profile(run(straight(3, 0, 5), at_random(4))) == [3, 0, 5]


def test_surw_gives_each_interleaving_the_same_chance() -> None:
    """2 steps and 5: 21 interleavings. Chi-square with 20 degrees of freedom exceeds 56.4 once in 40,000 times."""
    runs = 4200
    found = Counter(tuple(run(straight(2, 5), surw(seed, [2, 5])).trace.schedule) for seed in range(runs))
    assert len(found) == comb(7, 2)
    expected = runs / comb(7, 2)
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 56.4


def places(sampler: Sampler, runs: int, *lengths: int) -> Counter[int]:
    """How often the only step of the last task comes at each place."""
    last = len(lengths) - 1
    return Counter(list(run(straight(*lengths), sampler(seed)).trace.schedule).index(last) for seed in range(runs))


def test_surw_lets_a_short_task_act_late() -> None:
    found = places(SAMPLERS["random"]([20, 1]), 800, 20, 1)
    assert min(found[place] for place in range(21)) > 12
    assert places(at_random, 800, 20, 1)[19] == 0, "what choosing by the number of tasks would do"


@pytest.mark.parametrize("lengths", [(20, 1), (10, 10, 1)])
def test_pct_keeps_its_promise(lengths: tuple[int, ...]) -> None:
    """The last task between two steps of another: two ordered pairs, so a chance of 1 / (tasks * steps)."""
    runs, promised = 3000, 1 / (len(lengths) * sum(lengths))
    found = places(lambda seed: pct(seed, lengths, depth=2), runs, *lengths)
    assert min(found[place] for place in range(sum(lengths))) > runs * promised * 0.6


def test_pct_has_the_first_choice_and_no_others_without_changes() -> None:
    """With depth 1 each task runs to its end: 3 tasks have 6 orders, all of which come up."""
    found = Counter(tuple(run(straight(4, 4, 4), pct(seed, [4, 4, 4], depth=1)).trace.schedule) for seed in range(120))
    assert len(found) == 6


def test_pct_does_not_let_a_spinning_task_run_for_ever() -> None:
    Tracking.world = World()
    word = Word("word")

    async def spin() -> None:
        while not word.value:
            await step("spin", word)

    async def let_go() -> None:
        await step("let go", word)
        word.value = 1

    programs = [Program(Task("spin", cpu=0), spin), Program(Task("let go", cpu=1), let_go)]
    for seed in range(20):
        word.value = 0
        assert run(programs, pct(seed, [1, 1]), max_steps=100).steps < 20


@pytest.mark.parametrize("strategy", [*SAMPLERS])
@pytest.mark.parametrize("steps", [[0, 0], [1, 0], [10_000, 10_000]])
def test_a_wrong_profile_is_no_error(strategy: str, steps: list[int]) -> None:
    outcome = run(straight(5, 7), SAMPLERS[strategy](steps)(3))
    assert (outcome.steps, outcome.violation) == (12, None)
