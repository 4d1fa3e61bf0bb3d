"""``septum conform``: recorded vectors of the real TDX Module, or a module of the user's own, against the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from septum.arch.errors import UsageError
from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet, Seed, count
from septum.cli.output import Block, Progress, show

if TYPE_CHECKING:
    from septum.lab.conform import Difference, Report
    from septum.lab.oracle import Oracle, OracleReport

SHOWN = 5
"""Differences that people see; JSON has as many as ``--keep`` says."""


def conform(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Vectors: .jsonl, .jsonl.gz or .jsonl.xz.",
            default_factory=list,
            show_default=False,
        ),
    ],
    keep: Annotated[int, typer.Option("--keep", min=0, metavar="N", help="How many differences to keep.")] = 20,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, metavar="N", help="Files run at the same time.", show_default="one per CPU")
    ] = os.cpu_count() or 1,
    oracle: Annotated[
        str, typer.Option("--oracle", metavar="COMMAND", help="A program that answers for another module.")
    ] = "",
    examples: Annotated[
        int, typer.Option("--examples", min=1, metavar="N", help="Random sequences to compare the oracle with.")
    ] = 100,
    seed: Seed = 0,
    starts: Annotated[
        Path | None,
        typer.Option(
            "--starts",
            metavar="FOLDER",
            help="Boot and prefix files of the states where they start.",
            show_default="those of the recordings",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, metavar="SECONDS", help="Time that the oracle has for an answer.")
    ] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run recorded vectors against the model of the TDX Module.

    Events passed of all, per interface function and per status, and the first differences with the registers expected
    and found. Start states come from the boot and prefix files beside each FILE. Exit status 1 unless all agree.

    With --oracle the FILEs are run against another module instead of the model. Without FILEs it is compared with the
    model, by random sequences of calls; the shortest that differ are written into the current folder, as vectors.
    """
    progress = Progress(quiet=quiet)
    if oracle:
        from septum.lab.oracle_pipe import PipeOracle

        other = PipeOracle(oracle, timeout)
        try:
            if files:
                report, where, heads = _recorded(other, files, keep, progress)
            else:
                report, where, heads = _random(other, starts, seed, examples, keep, progress)
        finally:
            other.close()
            progress.clear()
        if report.events or not report.failure:
            _show(report, where, heads, as_json=as_json, quiet=quiet)
        if report.failure:
            raise UsageError(report.failure)
        return _status(report)
    if not files:
        raise UsageError("missing argument FILE...: name files of vectors, or give --oracle COMMAND")
    from septum.lab.conform import conform_files

    found = conform_files(files, keep=keep, jobs=jobs, progress=progress)
    progress.clear()
    _show(found, "", ("expected", "the model"), as_json=as_json, quiet=quiet)
    return _status(found)


Compared = tuple["OracleReport", str, tuple[str, str]]
"""A report, where its events are from, and what expects and what is compared with it."""


def _recorded(oracle: Oracle, files: list[Path], keep: int, progress: Progress) -> Compared:
    from septum.lab.oracle import conform_oracle

    return conform_oracle(files, oracle, keep=keep, progress=progress), "", ("recorded", "the oracle")


def _random(oracle: Oracle, starts: Path | None, seed: int, examples: int, keep: int, progress: Progress) -> Compared:
    from septum.lab.oracle import StartStates
    from septum.lab.starts import PACKAGED

    try:
        from septum.lab.oracle_sequences import search
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise UsageError("random sequences need hypothesis: pip install 'septum[oracle]', or name FILEs") from None
    states = StartStates(starts or PACKAGED)
    report = search(oracle, states, seed=seed, examples=examples, keep=keep, progress=progress)
    return report, f" in {count(report.examples, 'random sequence')}", ("the oracle", "the model")


def _status(report: Report) -> int:
    return GOOD if report.passed == report.events and not report.interrupted else BAD


def _show(report: Report, where: str, heads: tuple[str, str], *, as_json: bool, quiet: bool) -> None:
    """Prints a report; ``heads`` are those of the two columns of a difference."""
    from septum.report.tables import Table

    passed = f"{report.passed:,} of {report.events:,} events agree{where}"
    leaves = tuple((name, tally.events, tally.passed) for name, tally in sorted(report.by_leaf.items()))
    missed = tuple(
        (name, tally.events, tally.passed)
        for name, tally in sorted(report.by_status.items())
        if tally.passed < tally.events
    )
    blocks: list[Block] = [Table(leaves, ("interface function", "events", "passed"))]
    if missed:
        blocks.append(Table(missed, ("status that is missed", "events", "passed")))
    for difference in report.differences[:SHOWN]:
        blocks += _difference(difference, heads)
    show(report.record(), passed, [*blocks, *report.notes, passed], as_json=as_json, quiet=quiet)


def _difference(difference: Difference, heads: tuple[str, str]) -> list[Block]:
    """A difference: the calls that lead to it, where those are known, and the registers."""
    from septum.report.tables import Table

    names = {**difference.expected, **difference.actual}
    rows = tuple((name, difference.expected.get(name), difference.actual.get(name)) for name in names)
    inputs = " ".join(f"{name}={value}" for name, value in difference.inputs.items())
    place = f"{difference.file}:{difference.line} {difference.sequence} event {difference.event}"
    table = Table(rows, ("", *heads), f"{place}\n{difference.leaf} {inputs}")
    calls: list[str] = getattr(difference, "calls", [])
    if not calls:
        return [table]
    numbered = [f"{number:4}  {call}" for number, call in enumerate(calls, 1)]
    return ["\n".join([f"{count(len(calls), 'event')} to a difference", *numbered]), table]
