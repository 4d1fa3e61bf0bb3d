"""``septum ingest``: logs of a real TDX host, counted and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from septum.cli.main import GOOD
from septum.cli.options import Json, Quiet, count
from septum.cli.output import Block, Progress, fill, show

SHOWN = 20
"""Findings that people see; JSON has all."""


def ingest(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Logs as dmesg, ftrace or bpftrace print them; .gz and .xz too."),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Read logs of a real TDX host.

    Counts SEAMCALL errors by interface function and status, decodes them, finds faults that go on and on at one
    GPA or RIP, and says what is suspicious and who could have held a lock that was busy.
    """
    from septum.lab.ingest.report import ingest as read
    from septum.report.tables import Table, facts

    progress = Progress(quiet=quiet)
    log = read(files, progress=progress)
    progress.clear()
    brief = f"{count(log.events, 'event')} in {count(log.lines, 'line')}, {count(len(log.findings), 'finding')}"
    blocks: list[Block] = []
    if log.host:
        words = {name.replace("_", " "): value for name, value in log.host.items() if name != "cmrs"}
        blocks.append(facts(words, "the host"))
    if log.by_leaf:
        rows = [(leaf, f"{code:#018x}", _name(code), times) for (leaf, code), times in log.by_pair.most_common()]
        blocks.append(Table(tuple(rows), ("function", "status", "", "times")))
    if log.faults:
        blocks.append(facts({name.replace("_", " "): value for name, value in log.faults.items()}, "faults"))
    blocks += [fill(f"{found['where']}: {found['text']}") for found in log.findings[:SHOWN]]
    if len(log.findings) > SHOWN:
        blocks.append(f"... and {len(log.findings) - SHOWN:,} more findings: --json has all")
    show(log.record(), brief, [*blocks, brief], as_json=as_json, quiet=quiet)
    return GOOD


def _name(code: int) -> str:
    from septum.arch.status import decode

    told = decode(code)
    return f"{told.name}({told.operand})" if told.operand else told.name
