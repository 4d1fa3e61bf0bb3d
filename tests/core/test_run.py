"""Live runs: schedules, replay, results, and misuse."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.core.cells import Shared, Tracking, World
from septum.core.run import at_random, recorded, round_robin, run, run_solo
from septum.core.steps import SOLO, Program, Task, Violation, emit, step, wait_until
from septum.core.trace import pack_schedule, unpack_schedule


class Letters(Shared):
    text: str = ""


def spellers(words: list[str]) -> tuple[Letters, list[Program]]:
    Tracking.world = World()
    letters = Letters("letters")

    async def spell(word: str) -> int:
        for letter in word:
            await step("write", letter)
            letters.text += letter
            emit("letter", letter)
        return len(word)

    return letters, [Program(Task(f"t{i}", cpu=i), partial(spell, word)) for i, word in enumerate(words)]


def test_solo_stays_round_robin_turns() -> None:
    letters, programs = spellers(["abc", "xyz"])
    assert run_solo(programs) == [3, 3]
    assert letters.text == "abcxyz"
    letters, programs = spellers(["abc", "xyz"])
    run(programs, round_robin)
    assert letters.text == "axbycz"


@given(st.integers(0, 1 << 64))
def test_the_same_seed_is_the_same_run_and_its_schedule_replays(seed: int) -> None:
    letters, programs = spellers(["abc", "xyz", "123"])
    outcome = run(programs, at_random(seed))
    again, programs = spellers(["abc", "xyz", "123"])
    run(programs, at_random(seed))
    assert again.text == letters.text
    replayed, programs = spellers(["abc", "xyz", "123"])
    repeat = run(programs, recorded(list(outcome.trace.schedule)))
    assert replayed.text == letters.text
    assert repeat.trace.events == outcome.trace.events


def test_a_schedule_that_does_not_fit_is_misuse() -> None:
    _letters, programs = spellers(["a", "b"])
    with pytest.raises(UsageError, match="step 2 chooses task 0"):
        run(programs, recorded([0, 0]))


def test_a_bounded_run_stops() -> None:
    letters, programs = spellers(["abcdef"])
    outcome = run(programs, max_steps=2)
    assert (outcome.steps, letters.text, outcome.results) == (2, "ab", [None])


def test_solo_runs_do_not_step_but_do_wait() -> None:
    Tracking.world = World()
    letters = Letters("letters")

    async def first() -> None:
        await wait_until(lambda: letters.text == "go", "see", letters)
        letters.text += "ne"

    async def second() -> None:
        await step("nothing")
        letters.text = "go"

    programs = [Program(Task("a", cpu=0), first), Program(Task("b", cpu=1), second)]
    outcome = run(programs, level=SOLO)
    assert letters.text == "gone"
    assert outcome.steps <= 1


def test_run_solo_raises_what_went_wrong() -> None:
    Tracking.world = World()
    letters = Letters("letters")

    async def stuck() -> None:
        await wait_until(lambda: letters.text == "never", "see", letters)

    with pytest.raises(Violation, match="stuck waits to see letters"):
        run_solo([Program(Task("stuck", cpu=0), stuck)])


@given(st.lists(st.integers(0, 5), max_size=200))
def test_schedules_survive_packing(schedule: list[int]) -> None:
    assert unpack_schedule(pack_schedule(schedule), tasks=6) == schedule


@pytest.mark.parametrize("text", ["x", "1*", "*3", "-1", "9", "0*99999999999", "1*2*3", "0*1000 0*1000"])
def test_bad_schedules_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="schedule: "):
        unpack_schedule(text, tasks=2, limit=1500)


@given(st.text(max_size=60))
def test_any_text_is_a_schedule_or_refused(text: str) -> None:
    with suppress(UsageError):
        assert all(task < 3 for task in unpack_schedule(text, tasks=3, limit=1000))
