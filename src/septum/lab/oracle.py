"""Comparing with somebody else's TDX Module, call by call.

An *oracle* is whatever can answer for the real module: a build of it in a harness, or hardware behind a driver. It gets
requests, which are the events of recorded vectors without their answers, and gives the answers. docs/concepts/oracle.md
tells people how to write one; :mod:`septum.lab.oracle_pipe` is the way to one that is a program of its own, and
:mod:`septum.lab.oracle_model` is one whose module is Septum's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from septum.arch.errors import UsageError
from septum.arch.exits import ExitReason
from septum.arch.leaves import VERSION_MASK, VERSION_SHIFT
from septum.lab.conform import POWER_ON, START_FILES, Difference, Progress, Report, answer, inputs_of
from septum.lab.playback import Different, check_bytes, compare, show
from septum.lab.vectors import (
    CONVERTERS,
    Event,
    Exit,
    Input,
    MemoryCheck,
    Outcome,
    Seamcall,
    Sequence,
    StateCheck,
    VectorFile,
)

Request = dict[str, Any]
"""One request, and one line of a pipe: the fields of an event of recorded vectors, all but its answer."""


class OracleFailed(BaseException):
    """The oracle died, kept silent for too long, or said something that is no answer: one line.

    Not an ``Exception``, because nobody between the oracle and the report may take it for an answer of the module.
    """


class Oracle(Protocol):
    """Somebody who answers for the real module."""

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carries out one request and returns what a recording has in ``out`` (nothing, where there is no answer).

        :raises OracleFailed: when it cannot.
        """


def start_of(line: bytes) -> str:
    """What an oracle said, in one line that is not too long."""
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


# -- events and requests ---------------------------------------------------------------------------------------------


def _hex(values: Mapping[Any, int]) -> dict[str, str]:
    return {name if isinstance(name, str) else f"{name:#x}": f"{value:#x}" for name, value in values.items()}


def request_of(event: Event) -> Request:
    """What to ask for, so that this event happens: the event as recorded, without its answer."""
    match event:
        case Seamcall():
            version = event.gprs.get("rax", 0) >> VERSION_SHIFT & VERSION_MASK
            call = {"lp": event.lp, "leaf": event.name, "version": version, "in": _hex(event.gprs)}
            return {"op": "seamcall", **call}
        case Exit():
            details = {
                "qual": event.qualification,
                "gpa": event.gpa,
                "gla": event.gla,
                "intr": event.interruption,
                "ilen": event.instruction_length,
            }
            return {
                "op": "td_exit",
                "lp": event.lp,
                "exit": event.name.removeprefix("EXIT:"),
                "exit_reason": event.reason,
                "in": _hex({name: value for name, value in details.items() if value}),
                "guest_gprs_set": _hex(event.gprs),
                "guest_vmcs_set": _hex(event.vmcs),
                **({"set64": event.long_mode} if event.reason == ExitReason.TDCALL else {}),
            }
        case MemoryCheck():
            return {"op": "mem", "pa": f"{event.pa:#x}", "len": event.size}
        case StateCheck():
            vmcs = {"lp": event.lp, "fields": [f"{encoding:#x}" for encoding in event.vmcs]} if event.vmcs else {}
            return {"op": "oracle", "what": event.what, "tdr": f"{event.tdr:#x}", **vmcs}
        case Input(name="fill"):
            data = event.values["data"]
            return {"op": "fill", "pa": f"{event.values['pa']:#x}", "len": len(data), "byte": data[0] if data else 0}
        case Input(name="write" | "guest_write"):
            return {"op": event.name, "pa": f"{event.values['pa']:#x}", "hex": event.values["data"].hex()}
        case Input():
            wide = {name: f"{value:#x}" for name, value in event.values.items() if name in ("tsc", "msr", "value")}
            return {"op": event.name, **event.values, **wide}
    raise TypeError(f"{event!r} is no event that can be asked for")


def is_check(event: Event) -> bool:
    """Whether an event only looks at something, and changes nothing."""
    return isinstance(event, MemoryCheck | StateCheck)


def event_of(line: Mapping[str, Any], number: int = 0) -> Event:
    """The event that a line of a recording tells. What is wrong with the line shows as one of Python's own errors."""
    return CONVERTERS[line["op"]](number, line)


def compare_outcomes(expected: Outcome, actual: Outcome, before: Mapping[str, int]) -> None:
    """Compares two answers to one call. ``before``: registers of the host that keep their value unless mentioned.

    What the guest will find beside its registers is compared when both answers tell.

    :raises Different: unless they are equal.
    """
    if expected.state != actual.state:
        sides = [
            {"state": side.state, **({"rax": show("rax", side.gprs["rax"])} if side.state == "host" else {})}
            for side in (expected, actual)
        ]
        raise Different(*sides)
    if expected.state == "host":
        compare({**before, **expected.gprs}, {**before, **actual.gprs})
        return
    compare(expected.gprs, actual.gprs, as_status=False)
    if expected.vmcs and actual.vmcs:
        for part in ("inject", "state"):
            compare(expected.vmcs.get(part, {}), actual.vmcs.get(part, {}), as_status=False)
        sides = [{n: v for n, v in side.vmcs.items() if not isinstance(v, dict)} for side in (expected, actual)]
        compare(*sides, as_status=False)
        compare(expected.ve_info, actual.ve_info, as_status=False)


# -- an oracle in the place of the model ------------------------------------------------------------------------------


class OracleMachine:
    """An oracle as a machine that plays events and can be put back to an earlier state.

    If the oracle cannot go back by itself it is reset, and gets all requests again.
    """

    def __init__(self, oracle: Oracle, header: Mapping[str, Any]) -> None:
        """:param header: the header of recorded vectors, which tells the machine."""
        self._oracle, self._header = oracle, header
        self.lines: list[Request] = []
        """What was asked since power-on, with the answers to calls: the lines of a recording."""
        self._marks: list[int] = []
        self._is_behind = False
        self.without: frozenset[str] = frozenset()
        """Requests that the oracle cannot carry out."""
        self._reset()

    def mark(self) -> int:
        """A name for the present state."""
        if self._can_mark and not self._is_behind and self._marks[-1:] != [len(self.lines)]:
            self._oracle.ask({"op": "mark"})
            self._marks.append(len(self.lines))
        return len(self.lines)

    def undo(self, mark: int) -> None:
        """Goes back to a marked state, as soon as anything is asked there."""
        self._is_behind |= mark < len(self.lines)
        del self.lines[mark:]

    def answer(self, event: Event) -> Event:
        """Lets the oracle carry out an event; the event with its answer."""
        request = request_of(event)
        out = self._ask(request)
        if not isinstance(event, Seamcall | Exit):
            return event
        line = self.lines[-1] = {**request, "out": out}
        try:
            return event_of(line, event.line)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _bad_answer(request, out, error) from None

    def look(self, check: MemoryCheck) -> Different | None:
        """Compares memory with what the model has there; the line that is kept has what the oracle has there."""
        request = request_of(check)
        out = self._ask(request)
        self.lines[-1] = {**request, "hex": str(out.get("hex", ""))}
        try:
            self._check(check, request, out)
        except Different as different:
            return Different(different.actual, different.expected)
        return None

    def play(self, event: Event) -> Different | None:
        """Carries out an event and compares the answer with the recorded one."""
        try:
            if isinstance(event, Seamcall | Exit):
                answered = cast("Seamcall | Exit", self.answer(event))
                before = event.gprs if isinstance(event, Seamcall) else {}
                compare_outcomes(event.outcome, answered.outcome, before)
            else:
                request = request_of(event)
                self._check(event, request, self._ask(request))
        except Different as different:
            return different
        return None

    def _check(self, event: Event, request: Request, out: Mapping[str, Any]) -> None:
        """Compares what is in memory, or in the module, with the recorded content."""
        try:
            if isinstance(event, MemoryCheck):
                check_bytes(bytes.fromhex(out["hex"]), event.content, event.sha256)
            elif isinstance(event, StateCheck) and event.vmcs:
                fields = _hex(event.vmcs)
                compare(fields, {field: f"{int(out['values'][field], 16):#x}" for field in fields})
            elif isinstance(event, StateCheck):
                check_bytes(bytes.fromhex(out["value"]), event.content, event.sha256)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _bad_answer(request, out, error) from None

    def _ask(self, request: Request) -> Mapping[str, Any]:
        if self._is_behind:
            self._go_back()
        self.lines.append(request)
        return self._oracle.ask(request)

    def _reset(self) -> None:
        able = self._oracle.ask({"op": "reset", "header": self._header})
        self._can_mark = able.get("marks") is True
        self.without = frozenset(map(str, able.get("without") or ()))

    def _go_back(self) -> None:
        self._is_behind = False
        while self._marks and self._marks[-1] > len(self.lines):
            del self._marks[-1]
        if self._marks:
            self._oracle.ask({"op": "undo", "mark": len(self._marks) - 1})
        else:
            self._reset()
        for line in self.lines[self._marks[-1] if self._marks else 0 :]:
            if line["op"] in ("mem", "oracle"):
                continue
            self._oracle.ask({name: value for name, value in line.items() if name != "out"})


def _bad_answer(request: Request, out: Mapping[str, Any], error: Exception) -> OracleFailed:
    said = start_of(json.dumps(dict(out)).encode())
    return OracleFailed(f"the oracle's answer to {request['op']} has a bad or missing value ({error!r}): {said}")


# -- where sequences start ---------------------------------------------------------------------------------------------


class StartStates:
    """The states that a folder's boot and prefix files lead to, by name.

    :raises UsageError: (from anything here) when there is no such state, or a file is no complete file of vectors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> list[VectorFile]:
        """The boot and prefix files."""
        paths = sorted(p for p in self.folder.iterdir() if p.name.startswith(START_FILES) and ".jsonl" in p.name)
        return [VectorFile(path) for path in paths]

    @cached_property
    def sequences(self) -> dict[str, Sequence]:
        """The sequences in them, each named for the state that it leads to."""
        return {sequence.name: sequence for file in self.files for sequence in file.sequences()}

    def way_to(self, state: str) -> list[Sequence]:
        """The sequences that lead from power-on to a state."""
        way: dict[str, Sequence] = {}
        while state != POWER_ON:
            if state in way or state not in self.sequences:
                what = "leads to itself" if state in way else "is not among the sequences of its boot and prefix files"
                raise UsageError(f"{self.folder}: start state {state!r} {what}; give a folder where it is reached")
            way[state] = self.sequences[state]
            state = way[state].start
        return list(reversed(way.values()))


class Undoable(Protocol):
    """A machine that can be put back."""

    def mark(self) -> int:
        """A name for the present state."""

    def undo(self, mark: int) -> None:
        """Goes back to a marked state."""


class Stage:
    """Machines that go together from one start state to the next; what the ways have in common is not played again."""

    def __init__(
        self, starts: StartStates, machines: Many[Undoable], play: Callable[[Event], Different | None]
    ) -> None:
        """:param play: lets all machines carry out an event; what differs, if anything."""
        self._starts, self._machines, self._play = starts, machines, play
        self._reached = [(POWER_ON, self._mark())]

    def enter(self, state: str) -> int:
        """Brings the machines, which are new or have been here before, into a start state; how many events differed."""
        way = self._starts.way_to(state)
        names = [POWER_ON, *(sequence.name for sequence in way)]
        while len(self._reached) > len(names) or self._reached[-1][0] != names[len(self._reached) - 1]:
            del self._reached[-1]
        for machine, mark in zip(self._machines, self._reached[-1][1], strict=True):
            machine.undo(mark)
        differences = 0
        for sequence in way[len(self._reached) - 1 :]:
            differences += sum(self._play(event) is not None for event in sequence.events)
            self._reached.append((sequence.name, self._mark()))
        return differences

    def _mark(self) -> list[int]:
        return [machine.mark() for machine in self._machines]


# -- recorded vectors --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class OracleReport(Report):
    """What was found until the oracle failed, if it did: ``failure`` says how."""

    failure: str = ""


def conform_oracle(
    paths: Iterable[Path], oracle: Oracle, *, keep: int = 20, progress: Progress = lambda text: None
) -> OracleReport:
    """Sends recorded vectors to an oracle, and compares its answers with the recorded ones.

    At most ``keep`` differences are kept. A KeyboardInterrupt or a failure of the oracle ends the run; what was found
    until then is returned.

    :raises UsageError: when a file, or a file with start states beside it, is not a complete file of vectors.
    """
    report = OracleReport()
    try:
        for path in paths:
            _run_file(VectorFile(path), oracle, report, keep, progress)
    except OracleFailed as failure:
        report.failure = str(failure)
    except KeyboardInterrupt:
        report.interrupted = True
        report.notes.append(f"interrupted after {report.events:,} events")
    return report


def _run_file(file: VectorFile, oracle: Oracle, report: OracleReport, keep: int, progress: Progress) -> None:
    machine = OracleMachine(oracle, file.header)
    stage = Stage(StartStates(file.path.parent), [machine], machine.play)
    skipped = 0
    with closing(file.sequences()) as sequences:
        for sequence in sequences:
            unable = [event for event in sequence.events if request_of(event)["op"] in machine.without]
            if not all(map(is_check, unable)):
                skipped += 1
                continue
            if failed := stage.enter(sequence.start):
                report.notes.append(f"events that differ on the way to start state {sequence.start}: {failed}")
            for number, event in enumerate(sequence.events, 1):
                if event in unable:
                    continue
                different = machine.play(event)
                report.count(event.name, answer(event), different is None)
                if different is not None and len(report.differences) < keep:
                    place = (str(file.path), event.line, sequence.name, number, event.name)
                    found = Difference(*place, inputs_of(event), different.expected, different.actual)
                    report.differences.append(found)
            progress(f"{file.path.name}: {report.passed:,} of {report.events:,} events agree")
    if skipped:
        report.notes.append(f"{file.path}: sequences that the oracle cannot do: {skipped:,}")
