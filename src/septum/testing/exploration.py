"""The decorator: a test whose tasks are run in every interleaving, or in samples of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

from septum.arch.errors import UsageError
from septum.core.cells import Journal
from septum.core.dpor import Reducer, RunBounds, RunVerdict
from septum.core.explore import Bounds, Explorer, Verdict
from septum.core.run import Chooser, Outcome, round_robin, run
from septum.core.sampling import SAMPLERS, profile
from septum.core.steps import Program, Violation
from septum.core.trace import pack_schedule, unpack_schedule
from septum.lab.shrink import following, shrink_schedule
from septum.report.sequence import sequence_diagram
from septum.testing.host import Host
from septum.testing.narration import narrated, without_mute_steps

Strategy = Literal["states", "dpor", "pct", "random"]


class Counterexample(AssertionError):
    """A property of a test does not hold in some interleaving. ``schedule`` is one, ``diagram`` shows it."""

    def __init__(self, outcome: Outcome, runs: Sequence[Sequence[int]]) -> None:
        super().__init__(f"{outcome.violation}: {outcome.message}")
        self.property = outcome.violation
        self.schedule = "; ".join(pack_schedule(list(schedule)) for schedule in runs)
        self.diagram = sequence_diagram(without_mute_steps(outcome.trace.events))


@dataclass
class Replaying:
    """The schedule that all tests are to run instead of exploring; set by the plugin's option."""

    schedule: str | None = None


replaying = Replaying()


def explore(
    *,
    strategy: Strategy = "states",
    states: int | None = None,
    executions: int | None = None,
    depth: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    complete: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test whose first parameter, ``host``, is a :class:`Host`: it declares what is explored.

    Other parameters are fixtures as usual.

    :param strategy: as of ``septum explore``: every state, every order of conflicting steps (``dpor``), or seeded runs
        (``pct``, ``random``).
    :param states: bound of ``states``; ``executions`` is one of ``dpor``, and the number of runs (100) of the samplers;
        ``depth`` and ``seconds`` are bounds of ``states`` and ``dpor``.
    :param complete: whether it is a failure when ``states`` or ``dpor`` stop at a bound with nothing found.
    """
    if strategy not in ("states", "dpor", *SAMPLERS):
        raise UsageError(f"septum.explore: there is no strategy {strategy!r}; give states, dpor, pct or random")

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        first, *others = inspect.signature(test).parameters.values()

        @functools.wraps(test)
        def explored(**fixtures: Any) -> None:
            __tracebackhide__ = True
            trial = _Trial(lambda host: test(**{first.name: host}, **fixtures))
            if replaying.schedule is not None:
                trial.replay(replaying.schedule)
            elif strategy == "states":
                trial.states(Bounds(states=states, depth=depth, seconds=seconds), complete)
            elif strategy == "dpor":
                limits = RunBounds(executions=executions, seconds=seconds)
                limits.depth = depth or limits.depth
                trial.orders(limits, complete)
            else:
                trial.samples(strategy, seed, executions or 100)

        explored.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
        return explored

    return decorate


class _Trial:
    """One test: its host, and the ways to look for a schedule that fails it."""

    def __init__(self, declare: Callable[[Host], None]) -> None:
        self.host = Host()
        declare(self.host)
        if not self.host.programs:
            raise UsageError("septum.explore: the test has no tasks; call host.spawn(...) in it")

    def states(self, bounds: Bounds, complete: bool) -> None:
        __tracebackhide__ = True
        host = self.host
        explorer = Explorer(host.world, host.programs, invariants=host.invariants, observer=self._end, level=host.level)
        self._judge(explorer.explore(bounds), complete)

    def orders(self, bounds: RunBounds, complete: bool) -> None:
        __tracebackhide__ = True
        host = self.host
        reducer = Reducer(host.world, host.programs, invariants=host.invariants, observer=self._end, level=host.level)
        self._judge(reducer.explore(bounds), complete)

    def samples(self, strategy: str, seed: int, times: int) -> None:
        __tracebackhide__ = True
        with self._stage() as attempt:
            sampler = SAMPLERS[strategy](profile(attempt(round_robin, None)))
            outcomes = (attempt(sampler(number), None, stop_at_cycle=True) for number in range(seed, seed + times))
            found = next((outcome for outcome in outcomes if outcome.violation), None)
        if found is not None:
            self._fail([list(found.trace.schedule)], found.violation)

    def replay(self, text: str) -> None:
        """Runs recorded schedules and fails if a property fails in the last one."""
        __tracebackhide__ = True
        runs = [unpack_schedule(part, tasks=len(self.host.programs)) for part in text.split(";")]
        outcome = self._along(runs, stop_at_cycle=False)
        if not outcome.violation:
            outcome = self._along(runs, stop_at_cycle=True)
        if outcome.violation:
            raise Counterexample(outcome, runs)

    def _fail(self, runs: list[list[int]], prop: str | None) -> NoReturn:
        """Fails with what the last of some runs shows, shrunk if it is the only one."""
        __tracebackhide__ = True
        stop = prop == "lock order"
        if len(runs) == 1:
            with self._stage() as attempt:
                runs = [shrink_schedule(partial(attempt, stop_at_cycle=stop), runs[0], prop)]
        raise Counterexample(self._along(runs, stop_at_cycle=stop), runs)

    def _along(self, runs: list[list[int]], *, stop_at_cycle: bool) -> Outcome:
        """The last of some runs; those before it count for what they have seen of the lock order."""
        order: dict[tuple[str, str], str] = {}
        with self._stage() as attempt:
            for schedule in runs[:-1]:
                attempt(following(schedule), len(schedule), lock_order=order)
            return attempt(
                following(runs[-1]),
                None,
                programs=[narrated(program) for program in self.host.programs],
                lock_order=order,
                stop_at_cycle=stop_at_cycle,
                keep_events=True,
            )

    def _judge(self, verdict: Verdict | RunVerdict, complete: bool) -> None:
        __tracebackhide__ = True
        if verdict.verdict == "violated":
            self._fail([*verdict.witnesses, verdict.schedule], verdict.property)
        for failure, schedule in verdict.outcomes.items():
            if failure is not None:
                self._fail([schedule], failure[0])
        if verdict.verdict == "interrupted":
            raise KeyboardInterrupt
        if verdict.verdict == "bounded" and complete:
            raise UsageError("septum.explore: a bound was reached; raise it, or say complete=False")

    def _end(self, _results: list[Any]) -> tuple[str, str] | None:
        """The first check that fails at an end, and how."""
        try:
            for check in self.host.end_checks:
                check()
        except Violation as violation:
            return violation.property, str(violation)
        return None

    @contextmanager
    def _stage(self) -> Iterator[Callable[..., Outcome]]:
        """Live runs, each of which begins where the test left its world."""
        host, journal = self.host, Journal(self.host.world)

        def attempt(
            choose: Chooser, steps: int | None, programs: Sequence[Program] = host.programs, **options: Any
        ) -> Outcome:
            mark, objects = journal.mark(), host.world.mark()
            options = {"stop_at_cycle": False, "keep_events": False} | options
            try:
                outcome = run(
                    programs, choose, level=host.level, max_steps=steps, invariants=host.invariants, **options
                )
                if outcome.ended and not outcome.violation and (failure := self._end(outcome.results)):
                    outcome.violation, outcome.message = failure
                return outcome
            finally:
                journal.undo(mark)
                host.world.forget(objects)

        try:
            yield attempt
        finally:
            journal.close()
