"""``septum conform``: recorded vectors of the real TDX Module, run against the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import Block, Progress, show

if TYPE_CHECKING:
    from septum.lab.conform import Difference, Report
    from septum.report.tables import Table

SHOWN = 5
"""Differences that people see; JSON has as many as ``--keep`` says."""


def conform(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Vectors: .jsonl, .jsonl.gz or .jsonl.xz.")],
    keep: Annotated[int, typer.Option("--keep", min=0, metavar="N", help="How many differences to keep.")] = 20,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, metavar="N", help="Files run at the same time.", show_default="one per CPU")
    ] = os.cpu_count() or 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run recorded vectors against the model of the TDX Module.

    Events passed of all, per interface function and per status, and the first differences with the registers expected
    and found. Start states come from the boot and prefix files beside each FILE. Exit status 1 unless all agree.
    """
    from septum.lab.conform import conform_files

    progress = Progress(quiet=quiet)
    report = conform_files(files, keep=keep, jobs=jobs, progress=progress)
    progress.clear()
    passed = f"{report.passed:,} of {report.events:,} events agree"
    show(report.record(), passed, _blocks(report, passed), as_json=as_json, quiet=quiet)
    return GOOD if report.passed == report.events and not report.interrupted else BAD


def _blocks(report: Report, passed: str) -> list[Block]:
    from septum.report.tables import Table

    leaves = tuple((name, tally.events, tally.passed) for name, tally in sorted(report.by_leaf.items()))
    missed = tuple(
        (name, tally.events, tally.passed)
        for name, tally in sorted(report.by_status.items())
        if tally.passed < tally.events
    )
    blocks: list[Block] = [Table(leaves, ("interface function", "events", "passed"))]
    if missed:
        blocks.append(Table(missed, ("status that the model misses", "events", "passed")))
    blocks += map(_difference, report.differences[:SHOWN])
    blocks += report.notes
    return [*blocks, passed]


def _difference(difference: Difference) -> Table:
    from septum.report.tables import Table

    names = {**difference.expected, **difference.actual}
    rows = tuple((name, difference.expected.get(name), difference.actual.get(name)) for name in names)
    inputs = " ".join(f"{name}={value}" for name, value in difference.inputs.items())
    place = f"{difference.file}:{difference.line} {difference.sequence} event {difference.event}"
    return Table(rows, ("", "expected", "the model"), f"{place}\n{difference.leaf} {inputs}")
