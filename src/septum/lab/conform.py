"""Conformance: recorded vectors of the real TDX Module, run against the model.

Every event of a sequence counts: SEAMCALLs and VM exits, with all registers compared, memory that the module wrote,
values read from inside it, and what is done to the machine in between (``write``, ``set_tsc`` ...), which passes when
it can be done. After a difference a sequence goes on, so that one cause may show as several differences.

Each sequence begins in a start state: ``poweron``, or the end of a sequence of the ``boot`` and ``prefix`` files beside
the file. A machine is brought there once; after each sequence a journal takes it back.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from septum.arch.errors import UsageError
from septum.arch.platform import Platform
from septum.lab.playback import Different, Machine, describe
from septum.lab.vectors import Event, Exit, MemoryCheck, Seamcall, Sequence, StateCheck, VectorFile

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event as Event_

Progress = Callable[[str], object]
"""Called with a line that says how far the work is."""

POWER_ON: Final = "poweron"
START_FILES: Final = ("boot", "prefix")
"""How the names of the files begin whose sequences are start states for the files beside them."""


@dataclass(slots=True)
class Tally:
    """How many events there were, and how many of them passed."""

    events: int = 0
    passed: int = 0

    def add(self, events: int, passed: int) -> None:
        """Counts some more."""
        self.events += events
        self.passed += passed


@dataclass(frozen=True, slots=True)
class Difference:
    """An event that the model answered in another way.

    ``event`` is the number of the event in its sequence, from 1. ``expected`` and ``actual`` hold only what differs.
    """

    file: str
    line: int
    sequence: str
    event: int
    leaf: str
    inputs: dict[str, str]
    expected: dict[str, str]
    actual: dict[str, str]


@dataclass(slots=True)
class Report:
    """What a run over vectors found. ``notes``: start states that were not reached as recorded, and other caveats.

    ``statuses`` are the recorded answers of each interface function, in the order in which they came up.
    """

    events: int = 0
    passed: int = 0
    by_leaf: dict[str, Tally] = field(default_factory=dict)
    by_status: dict[str, Tally] = field(default_factory=dict)
    statuses: dict[str, list[str]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def count(self, leaf: str, answer: str, passed: bool) -> None:
        """Counts one event under its interface function and the status that was recorded."""
        self.events += 1
        self.passed += passed
        self.by_leaf.setdefault(leaf, Tally()).add(1, passed)
        self.by_status.setdefault(answer, Tally()).add(1, passed)
        seen = self.statuses.setdefault(leaf, [])
        if answer not in seen:
            seen.append(answer)

    def merge(self, other: Report, keep: int) -> None:
        """Adds another report, up to ``keep`` differences in all."""
        self.events += other.events
        self.passed += other.passed
        for mine, theirs in ((self.by_leaf, other.by_leaf), (self.by_status, other.by_status)):
            for name, tally in theirs.items():
                mine.setdefault(name, Tally()).add(tally.events, tally.passed)
        for leaf, answers in other.statuses.items():
            seen = self.statuses.setdefault(leaf, [])
            seen += [answer for answer in answers if answer not in seen]
        self.differences = (self.differences + other.differences)[:keep]
        self.notes += other.notes
        self.interrupted |= other.interrupted

    def record(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return asdict(self)


class Runner:
    """Runs the files of one folder; keeps one machine and the start states on the way to the present one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._starts: dict[str, tuple[VectorFile, Sequence]] | None = None
        self._machine: Machine | None = None
        self._reached: list[tuple[str, int]] = []

    def close(self) -> None:
        """Ends the machine."""
        if self._machine is not None:
            self._machine.close()

    def run(self, file: VectorFile, sequence: Sequence, report: Report, keep: int, leaf: str | None = None) -> None:
        """Plays a sequence from its start state and counts its events."""
        machine = self._enter(file, sequence)
        mark = machine.journal.mark()
        for number, event in enumerate(sequence.events, 1):
            difference = _try(machine, event)
            if leaf is not None and event.name != leaf:
                continue
            report.count(event.name, answer(event), difference is None)
            if difference is not None and len(report.differences) < keep:
                place = (str(file.path), event.line, sequence.name, number, event.name)
                report.differences.append(Difference(*place, inputs_of(event), difference.expected, difference.actual))
        machine.journal.undo(mark)

    def machine_at(self, state: str) -> Machine:
        """The machine in a named start state.

        :raises UsageError: when no sequence in the folder's start files has this name.
        """
        if state == POWER_ON:
            file, sequence = self._start(START_FILES[0])
        else:
            file, sequence = self._start(state)
        return self._enter(file, Sequence(state, state, sequence.line))

    def machine_on_the_way(self, state: str, leaf: str | None) -> Machine:
        """As :meth:`machine_at`, but, when ``leaf`` is given, just before the first call of that leaf on the way there.

        :raises UsageError: when there is no such state, or no such call on its way.
        """
        if leaf is None:
            return self.machine_at(state)
        file, sequence = self._start(state)
        first = next((number for number, event in enumerate(sequence.events) if event.name == leaf), None)
        if first is None:
            raise UsageError(f"{self.folder}: start state {state!r} is reached without {leaf}; give another folder")
        part = Sequence(f"{state} before {leaf}", sequence.start, sequence.line, sequence.events[:first])
        if self._starts is not None:
            self._starts[part.name] = (file, part)
        return self.machine_at(part.name)

    def _enter(self, file: VectorFile, sequence: Sequence) -> Machine:
        """The machine in the state from which a sequence starts."""
        if self._machine is None:
            self._machine = Machine(Platform.from_vector_header(file.header))
            self._reached = [(POWER_ON, self._machine.journal.mark())]
        self._machine.journal.resume()
        machine, reached = self._machine, self._reached
        way = self._way(file, sequence)
        common = sum(1 for _ in _while_equal(way, [name for name, _ in reached]))
        machine.journal.undo(reached[common][1] if common < len(reached) else machine.journal.mark())
        del reached[common:]
        for name in way[common:]:
            reached.append((name, machine.journal.mark()))
            failed = sum(_try(machine, event) is not None for event in self._start(name)[1].events)
            if failed:
                self.notes.append(f"start state {name} of {self.folder}: events that differ on the way to it: {failed}")
        return machine

    def _way(self, file: VectorFile, sequence: Sequence) -> list[str]:
        """The start states that lead to a sequence, from power-on."""
        way = [sequence.start]
        while way[0] != POWER_ON:
            start = self._start(way[0], (file, sequence.line))[1].start
            if start in way:
                raise file.wrong(sequence.line, f"start state {start} leads to itself")
            way.insert(0, start)
        return way

    def _start(self, name: str, asked: tuple[VectorFile, int] | None = None) -> tuple[VectorFile, Sequence]:
        if self._starts is None:
            files = sorted(p for p in self.folder.iterdir() if p.name.startswith(START_FILES) and ".jsonl" in p.name)
            self._starts = {s.name: (f, s) for f in map(VectorFile, files) for s in f.sequences()}
        if name not in self._starts:
            names = " and ".join(f"{kind}*.jsonl*" for kind in START_FILES)
            missing = f"no sequence in {names} is the start state {name!r}"
            raise (
                asked[0].wrong(asked[1], f"{missing} beside the file")
                if asked
                else UsageError(f"{self.folder}: {missing}; give the folder of vectors that belongs to the file")
            )
        return self._starts[name]


def _while_equal(left: Iterable[str], right: Iterable[str]) -> Iterator[str]:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return
        yield a


def _try(machine: Machine, event: Event) -> Different | None:
    """Plays an event; a defect of the model is a difference too, and has no other effect."""
    mark = machine.journal.mark()
    try:
        machine.play(event)
    except Different as different:
        return different
    except Exception as error:
        machine.journal.undo(mark)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Different({}, {"model": f"failed at {where}: {type(error).__name__}: {error}"})
    return None


def answer(event: Event) -> str:
    """The recorded answer in words: a status, or where the CPU went."""
    if isinstance(event, Seamcall | Exit):
        outcome = event.outcome
        return describe(outcome.gprs["rax"]) if outcome.state == "host" else outcome.state
    return event.name


def inputs_of(event: Event) -> dict[str, str]:
    """What went into an event, for people."""
    if isinstance(event, Seamcall):
        return {"lp": str(event.lp)} | {name: f"{value:#x}" for name, value in event.gprs.items()}
    if isinstance(event, Exit):
        numbers = {
            "reason": event.reason,
            "qualification": event.qualification,
            "gpa": event.gpa,
            "gla": event.gla,
            "interruption": event.interruption,
            "length": event.instruction_length,
            **event.gprs,
        }
        changed = {f"vmcs {encoding:#x}": f"{value:#x}" for encoding, value in event.vmcs.items()}
        return {"lp": str(event.lp)} | {name: f"{value:#x}" for name, value in numbers.items() if value} | changed
    if isinstance(event, MemoryCheck):
        return {"pa": f"{event.pa:#x}"}
    if isinstance(event, StateCheck):
        return {"what": event.what, "tdr": f"{event.tdr:#x}"}
    return {}


def conform(
    path: Path,
    *,
    keep: int = 20,
    limit: int | None = None,
    leaf: str | None = None,
    sequence: str | None = None,
    progress: Progress = lambda text: None,
) -> Report:
    """Runs a file of vectors against the model.

    At most ``keep`` differences are kept, ``limit`` sequences are run; ``leaf`` counts only one interface function's
    events, ``sequence`` runs only sequences whose name contains it. A KeyboardInterrupt ends the run; what was found
    until then is returned.

    :raises UsageError: when the file, or a file with start states beside it, is not a complete file of vectors.
    """
    report = Report()
    file = VectorFile(path)
    with closing(Runner(path.parent)) as runner, closing(file.sequences()) as items:
        chosen = (item for item in items if sequence is None or sequence in item.name)
        try:
            for item in islice(chosen, limit):
                runner.run(file, item, report, keep, leaf)
                progress(f"{path.name}: {report.passed:,} of {report.events:,} events agree")
        except KeyboardInterrupt:
            report.interrupted = True
            report.notes.append(f"{path}: interrupted after {report.events:,} events")
        report.notes += runner.notes
    return report


def conform_files(
    paths: list[Path], *, jobs: int = 1, keep: int = 20, progress: Progress = lambda text: None, **choice: Any
) -> Report:
    """Runs several files, up to ``jobs`` at the same time, with the options of :func:`conform`.

    :raises UsageError: as :func:`conform`.
    """
    total = Report()
    run: Callable[[Path], Report] = partial(conform, keep=keep, **choice)
    if jobs > 1 and len(paths) > 1:
        reports = _in_processes(run, paths, jobs)
    else:
        reports = (conform(path, keep=keep, progress=progress, **choice) for path in paths)
    for done, report in enumerate(reports, 1):
        total.merge(report, keep)
        progress(f"{done} of {len(paths)} files: {total.passed:,} of {total.events:,} events agree")
        if total.interrupted and jobs == 1:
            break
    return total


def _in_processes(run: Callable[[Path], Report], paths: list[Path], jobs: int) -> Iterator[Report]:
    """Reports in the order of the files. An interrupt ends the running ones early, and the others before they start."""
    import multiprocessing  # noqa: PLC0415 -- only for several files
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415

    stop = multiprocessing.Event()
    with ProcessPoolExecutor(min(jobs, len(paths)), initializer=_Worker.start, initargs=(stop,)) as pool:
        waiting = [pool.submit(_Worker.run, run, path) for path in paths]
        while waiting:
            try:
                report = waiting[0].result()
            except KeyboardInterrupt:
                stop.set()
            else:
                del waiting[0]
                yield report


class _Worker:
    """A worker process. Between jobs it is deaf to interrupts: a worker that dies takes all others along."""

    stop: ClassVar[Event_]

    @classmethod
    def start(cls, stop: Event_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cls.stop = stop

    @classmethod
    def run(cls, run: Callable[[Path], Report], path: Path) -> Report:
        if cls.stop.is_set():
            return Report(notes=[f"{path}: not run"], interrupted=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return run(path)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _main() -> int:
    """``python -m septum.lab.conform``: for people who work on the model."""
    import argparse  # noqa: PLC0415 -- only here
    import sys  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m septum.lab.conform", description="Run vectors against the model.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, help="sequences of each file to run")
    parser.add_argument("--leaf", help="count only this interface function")
    parser.add_argument("--sequence", help="run only sequences whose name contains this")
    parser.add_argument("--keep", type=int, default=10, help="differences to show")
    parser.add_argument("--jobs", type=int, default=1, help="files to run at the same time")
    options = parser.parse_args()
    try:
        report = conform_files(
            options.files,
            keep=options.keep,
            jobs=options.jobs,
            limit=options.limit,
            leaf=options.leaf,
            sequence=options.sequence,
        )
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    for difference in report.differences:
        print(f"{difference.sequence}:{difference.event} {difference.leaf} (line {difference.line})")
        for name in ("inputs", "expected", "actual"):
            print(f"  {name:9}" + ", ".join(f"{k}={v}" for k, v in getattr(difference, name).items()))
    for leaf, tally in sorted(report.by_leaf.items()):
        print(f"{leaf:28}{tally.passed:8}/{tally.events}")
    print(f"{'all':28}{report.passed:8}/{report.events}", *report.notes, sep="\n")
    return int(report.passed != report.events)


if __name__ == "__main__":
    raise SystemExit(_main())
