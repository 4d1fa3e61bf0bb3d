"""``septum contention``: which call finds which lock busy, on the model and against recordings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from septum.arch.errors import UsageError
from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import Block, Progress, show

if TYPE_CHECKING:
    from septum.lab.matrix import Agreement

SHOWN = 10
"""Differences that people see; JSON has all."""
Recordings = Annotated[
    Path | None, typer.Option("--against", metavar="FILE", help="Compare with recorded pairs of calls.")
]
Outcomes = Annotated[
    Path | None,
    typer.Option("--interleavings", metavar="FILE", help="Compare with recorded outcomes of all interleavings."),
]


def contention(
    against: Recordings = None,
    interleavings: Outcomes = None,
    vectors: Annotated[
        Path | None,
        typer.Option("--vectors", metavar="FOLDER", help="Start states, if not those that come with Septum."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, metavar="N", help="Processes at the same time.", show_default="one per CPU")
    ] = os.cpu_count() or 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Show the lock-contention matrix of the modelled TDX Module, or compare it with the real one's.

    Without options: for every pair of operations, which lock of the first the second finds busy, and what it is told.
    With --against, every recorded pair is replayed at every lock; with --interleavings, every interleaving of every
    recorded scenario is explored and the sets of outcomes compared. Exit status 1 unless all agree.
    """
    from septum.lab.matrix import against as compare_pairs
    from septum.lab.matrix import every_interleaving

    if against and interleavings:
        raise UsageError("give --against or --interleavings, not both")
    if vectors is not None and not vectors.is_dir():
        raise UsageError(f"{vectors}: there is no such folder; give one with boot and prefix vectors")
    if not (against or interleavings):
        return _matrix(as_json=as_json, quiet=quiet)
    progress = Progress(quiet=quiet)
    if against:
        found = compare_pairs(against, vectors=vectors, jobs=jobs, progress=progress)
    else:
        assert interleavings is not None
        found = every_interleaving(interleavings, vectors=vectors, jobs=jobs, progress=progress)
    progress.clear()
    record = {"pairs": found.pairs, "agree": found.agree, "differ": found.differ}
    verdict = f"{found.agree:,} of {found.pairs:,} {'pairs' if against else 'scenarios'} agree"
    show(record, verdict, [*_differences(found), verdict], as_json=as_json, quiet=quiet)
    return GOOD if found.agree == found.pairs else BAD


def _differences(found: Agreement) -> list[Block]:
    return ["\n".join(f"{name}: {value}" for name, value in d.items()) for d in found.differ[:SHOWN]]


def _matrix(*, as_json: bool, quiet: bool) -> int:
    from septum.lab.matrix import model_matrix
    from septum.lab.operations import OPERATIONS
    from septum.report.tables import Table

    conflicts = model_matrix()
    pairs = sum(len(operations) ** 2 for operations in OPERATIONS.values())
    busy = len({(c.td, c.a, c.b) for c in conflicts})
    record: dict[str, Any] = {
        "pairs": pairs,
        "agree": pairs,
        "differ": [],
        "conflicts": [{"td": c.td, "a": c.a, "b": c.b, "lock": c.lock, "answer": c.answer} for c in conflicts],
    }
    summary = f"{busy:,} of {pairs:,} ordered pairs of operations can meet at a lock"
    blocks: list[Block] = [
        Table(
            tuple((c.a, c.lock, c.b, c.answer.removeprefix("TDX_")) for c in conflicts if c.td == td),
            ("while this call", "holds", "this one", "is told"),
            f"TD {td}",
        )
        for td in OPERATIONS
    ]
    show(record, summary, [*blocks, summary], as_json=as_json, quiet=quiet)
    return GOOD
