"""Random sequences of calls, made on the model and on an oracle side by side, and the shortest one that differs.

Hypothesis's stateful testing draws the calls (:mod:`septum.lab.oracle_calls`), most often where many TDs exist already.
From a sequence that differs, calls are taken away as long as the difference stays, those that made the TDs too.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, configuration, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from septum.arch.errors import UsageError
from septum.arch.pages import PAGE_4K
from septum.arch.pamt import PageType
from septum.arch.platform import Platform
from septum.lab.conform import POWER_ON, Difference, Progress, answer, inputs_of
from septum.lab.files import write_whole
from septum.lab.oracle import (
    Oracle,
    OracleFailed,
    OracleMachine,
    OracleReport,
    Request,
    Stage,
    StartStates,
    event_of,
    is_check,
    request_of,
)
from septum.lab.oracle_calls import draw_event
from septum.lab.playback import Different, Machine
from septum.lab.vectors import Event, Exit, Input, MemoryCheck, Seamcall

T = TypeVar("T")

STEPS: Final = 50
"""Calls of a random sequence, at most."""
_SETTINGS: Final = settings(
    # Hypothesis begins with the simplest sequence, which is none. Of all others that it makes in one run most are much
    # like the one before, so each run is for one. It cannot take away the calls of a start state: that is done here.
    max_examples=2,
    stateful_step_count=STEPS,
    phases=(Phase.generate,),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
    database=None,
    deadline=None,
    print_blob=False,
)


class Found(Exception):
    """A sequence has come to a difference; this is how hypothesis gets to know."""


class Kind(NamedTuple):
    """What makes two differences the same: the function, the registers, and the two statuses if those differ."""

    leaf: str
    registers: tuple[str, ...]
    expected: str
    actual: str

    @classmethod
    def of(cls, event: Event, different: Different) -> Kind:
        """The kind of one difference; wherever memory differs, it is of one kind."""
        names = {name.partition(" at ")[0] for name in {**different.expected, **different.actual}}
        return cls(
            event.name, tuple(sorted(names)), *(s.get("rax", "") for s in (different.expected, different.actual))
        )

    @property
    def parts_ways(self) -> bool:
        """Whether the two modules may be in different states from there on."""
        return not set(self.registers).isdisjoint(("rax", "state", "model"))


@dataclass(frozen=True, slots=True)
class Shortest(Difference):
    """A difference at the end of the shortest sequence of calls that was found to lead to it, in the vector ``file``.

    ``calls`` tells them in words; those that boot the module are left out.
    """

    calls: list[str]


@dataclass(slots=True)
class SearchReport(OracleReport):
    """What random sequences found. ``events`` are the calls up to each difference, not those that made it short."""

    seed: int = 0
    examples: int = 0
    """Sequences that were tried."""


def search(
    oracle: Oracle,
    starts: StartStates,
    *,
    seed: int = 0,
    examples: int = 100,
    keep: int = 20,
    folder: Path | None = None,
    progress: Progress = lambda text: None,
) -> SearchReport:
    """Tries ``examples`` random sequences from the start states.

    Up to ``keep`` differences of different kinds are made short and saved in ``folder`` (default: the current one).
    A KeyboardInterrupt or a failure of the oracle ends the search; what was found until then is returned.

    :raises UsageError: when there is no start state, or a file cannot be written.
    """
    if not starts.files:
        raise UsageError(f"{starts.folder}: no boot*.jsonl* and no prefix*.jsonl* file; give a folder that has some")
    report = SearchReport(seed=seed)
    try:
        found = _Search(oracle, starts, report, keep, folder or Path.cwd(), progress)
        with _hypothesis_elsewhere(), closing(found.near):
            found.run(seed, examples)
    except OracleFailed as failure:
        report.failure = str(failure)
    except KeyboardInterrupt:
        report.interrupted = True
        report.notes.append(f"interrupted after {report.examples:,} sequences")
    return report


class _Search:
    """The two modules side by side, and what is known about how they differ."""

    def __init__(
        self, oracle: Oracle, starts: StartStates, report: SearchReport, keep: int, folder: Path, progress: Progress
    ) -> None:
        self.report, self._keep, self._folder, self._progress = report, keep, folder, progress
        self._starts, self._header = starts, starts.files[0].header
        self.far = OracleMachine(oracle, self._header)
        self.near = Machine(Platform.from_vector_header(self._header))
        self._stage = Stage(starts, [self.near.journal, self.far], self.step)
        self._known: set[Kind] = set()
        self._target: Kind | None = None
        self._found: list[tuple[list[Request], Different]] = []
        self._reached: dict[str, bool] = {}
        self.is_over = False
        """The present sequence does not go on, because the modules are not alike any more, or have halted."""

    def run(self, seed: int, examples: int) -> None:
        """Seven tenths of the sequences begin where there are TDs, two tenths after boot, and one at power-on."""
        boot, *others = self._starts.sequences
        simple = [boot] * (examples // 5) + [POWER_ON] * (examples // 10)
        rest = range(examples - len(simple))
        plan = sorted((others or [boot])[number % len(others or [boot])] for number in rest) + simple
        try:
            for number, state in enumerate(plan):
                if len(self.report.differences) < self._keep and self._can_reach(state):
                    self.report.examples += 1
                    self._sequence(state, f"{seed}/{number}")
        finally:
            if self._found:
                self._save(*self._found[-1])

    def _can_reach(self, state: str) -> bool:
        """Whether the modules are alike in a start state, but for differences that are reported on the way."""
        while state not in self._reached and len(self.report.differences) < self._keep:
            way = [event for sequence in self._starts.way_to(state) for event in sequence.events]
            if not self.far.without.isdisjoint(request_of(event)["op"] for event in way if not is_check(event)):
                self._reached[state] = False
                self._note(f"the oracle cannot be brought into start state {state}")
                break
            try:
                self.begin(state)
            except Found:
                self._shorten()
            else:
                self._reached[state] = not self.is_over
                if self.is_over:
                    self._note(f"the modules differ in start state {state}: nothing was tried from there")
        return self._reached.get(state, False)

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _sequence(self, state: str, seed: str) -> None:
        """One random sequence."""
        search = self

        @st.composite
        def next_event(draw: st.DrawFn) -> Event | None:
            return None if search.is_over else draw_event(draw, search.near.module, search.far.without)

        class Calls(RuleBasedStateMachine):
            def __init__(self) -> None:
                super().__init__()
                search.begin(state)

            @rule(event=next_event())
            def call(self, event: Event | None) -> None:
                search.is_over |= event is None
                if event is not None:
                    search.step(event)

        try:
            run_state_machine_as_test(seeded(seed)(Calls), settings=_SETTINGS)
        except Found:
            self._shorten()
        except Flaky:
            self._note("the oracle does not always answer the same calls alike")
            self._shorten()

    def begin(self, state: str) -> None:
        """Brings both modules into a start state."""
        if self._target is None:
            done = f"{self.report.examples:,} sequences, {self.report.events:,} calls"
            self._progress(f"{done}, {len(self.report.differences)} differences")
        self.is_over = False
        self._stage.enter(state)

    def step(self, event: Event) -> None:
        """Lets both modules carry out an event.

        :raises Found: when they differ in a way that is not known yet.
        """
        if self.is_over or is_check(event) or not self._is_possible(event):
            return
        position = self.near.journal.position()
        answered = self.far.answer(event)
        different = self._play_near(answered)
        if isinstance(answered, Input):
            return
        if isinstance(answered, Seamcall | Exit) and answered.outcome.state == "module_halted":
            self.is_over = True
        elif different is None:
            different = self._memory_differs(position)
        if self._target is None:
            self.report.count(answered.name, answer(answered), different is None)
        if different is None:
            return
        kind = Kind.of(answered, different)
        if kind not in self._known and self._target in (None, kind):
            self._target = kind
            self._found.append((list(self.far.lines), different))
            raise Found
        self.is_over |= kind not in self._known or kind.parts_ways

    def _play_near(self, event: Event) -> Different | None:
        """The model's part; a defect of the model is a difference too."""
        try:
            self.near.play(event)
        except Different as different:
            return different
        except Exception as error:
            return Different({}, {"model": f"fails: {type(error).__name__}: {error}"})
        return None

    def _memory_differs(self, position: int) -> Different | None:
        """Compares the host's pages that the model's module has written since a position of the journal."""
        module, journal = self.near.module, self.near.journal
        if "mem" in self.far.without:
            return None
        for number in journal.written(module.memory.pages, position):
            pa = number * PAGE_4K
            if module.pamt_entry(pa).page_type not in (PageType.NDA, PageType.RSVD):
                continue
            check = MemoryCheck(0, "mem", pa, PAGE_4K, module.memory.read(pa, PAGE_4K), "")
            if different := self.far.look(check):
                return Different(*({f"memory at {pa:#x}, {n}": v for n, v in side.items()} for side in different.args))
            del self.far.lines[-1]
        return None

    def _is_possible(self, event: Event) -> bool:
        """Whether the CPU is there: a guest exits where one runs, and the host calls where none does."""
        runs = isinstance(event, Seamcall | Exit) and self.near.module.lps[event.lp].running != 0
        return runs == isinstance(event, Exit)

    # -- making it short -----------------------------------------------------------------------------------------------

    def _shorten(self) -> None:
        """Takes calls away from the sequence that was found as long as it comes to the same difference. Saves it."""
        lines, _ = self._found[-1]
        base, calls = self._after_boot(lines)
        fails = partial(self._differs, base)
        simplest(shortest([event_of(line) for line in calls], fails), fails)
        assert self._target is not None
        self._known.add(self._target)
        self._target = None
        self._save(*self._found[-1])

    def _after_boot(self, lines: list[Request]) -> tuple[str, list[Request]]:
        """The lines behind those that boot the module, and the state where they begin."""
        name, boot = next(iter(self._starts.sequences.items()))
        return (name, lines[len(boot.events) :]) if len(lines) > len(boot.events) else (POWER_ON, lines)

    def _differs(self, base: str, events: list[Event]) -> bool:
        """Whether events lead from a start state to the difference that is being made short; then it is noted."""
        self._progress(f"making a difference short: {len(events)} calls")
        self.begin(base)
        try:
            for event in events:
                self.step(event)
        except Found:
            return True
        return False

    def _save(self, lines: list[Request], different: Different) -> None:
        """Writes a file of vectors with what the oracle answered, and reports it."""
        self._found.clear()
        event = event_of(next(line for line in reversed(lines) if "out" in line))
        content = [
            self._header,
            {"op": "seq_begin", "id": "difference", "from": POWER_ON, "uses_td_exit": True},
            *lines,
            {"op": "seq_end", "id": "difference", "events": len(lines)},
        ]
        text = "".join(json.dumps(line) + "\n" for line in content).encode()
        name = re.sub(r"[^a-z0-9]+", "-", event.name.lower())
        path = self._folder / f"oracle-{name}-{hashlib.sha256(text).hexdigest()[:8]}.jsonl"
        write_whole(path, text)
        place = (path.name, len(lines) + 2, "difference", len(lines), event.name)
        calls = [in_words(event_of(line)) for line in self._after_boot(lines)[1]]
        found = Shortest(*place, inputs_of(event), different.expected, different.actual, calls)
        self.report.differences.append(found)


def shortest(things: list[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """The things that are left when none can go without the rest ceasing to fail: large parts are tried first."""
    size = len(things)
    while size:
        before, place = len(things), len(things)
        while place > 0:
            fewer = things[: max(place - size, 0)] + things[place:]
            if fails(fewer):
                things = fewer
            place -= size
        size = min(size, len(things)) // 2 or int(size > 1 or len(things) < before)
    return things


def simplest(events: list[Event], fails: Callable[[list[Event]], bool]) -> list[Event]:
    """The events with registers and LPs made 0 where the rest does not cease to fail."""
    for number, event in enumerate(events):
        for name in ("lp", *event.gprs) if isinstance(event, Seamcall | Exit) else ():
            others = [*events[:number], _with_zero(events[number], name), *events[number + 1 :]]
            if others != events and fails(others):
                events = others
    return events


def _with_zero(event: Event, name: str) -> Event:
    assert isinstance(event, Seamcall | Exit)
    if name == "lp":
        return replace(event, lp=0)
    return replace(event, gprs={n: v for n, v in event.gprs.items() if n != name or n == "rax"})


def in_words(event: Event) -> str:
    """An event on one line, with its answer."""
    if isinstance(event, Input):
        shown = {n: f"{len(v)} bytes" if isinstance(v, bytes) else f"{v:#x}" for n, v in event.values.items()}
    else:
        shown = {name: value for name, value in inputs_of(event).items() if name != "rax"}
    words = [event.name, *(f"{name}={value}" for name, value in shown.items())]
    return " ".join(words) + (f" -> {answer(event)}" if isinstance(event, Seamcall | Exit) else "")


@contextmanager
def _hypothesis_elsewhere() -> Iterator[None]:
    """Hypothesis leaves files where it runs; they are of no use here."""
    with tempfile.TemporaryDirectory() as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(None)
