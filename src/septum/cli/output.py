"""How an answer is printed: as JSON, as its one essential line, or for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping

from septum.report.tables import WIDTH, Table

Block = str | Table
"""A part of an answer for people: text that is already laid out, or a table."""


def show(record: Mapping[str, object], brief: str, blocks: Iterable[Block], *, as_json: bool, quiet: bool) -> None:
    """Prints an answer on stdout.

    ``record`` is the answer as one JSON object, ``brief`` the line that remains under ``--quiet``, ``blocks`` what
    people read otherwise: through rich on a terminal, as plain ASCII into a file or pipe.
    """
    if as_json:
        print(json.dumps(record))
    elif quiet:
        print(brief)
    elif sys.stdout.isatty():
        _show_on_terminal(blocks)
    else:
        print("\n\n".join(block if isinstance(block, str) else block.plain() for block in blocks))


def _show_on_terminal(blocks: Iterable[Block]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console = Console(highlight=False, width=min(WIDTH, console.width))
    for number, block in enumerate(blocks):
        if number:
            console.print()
        if isinstance(block, str):
            # Text is laid out already: a diagram that is wrapped again cannot be read.
            console.print(block, markup=False, soft_wrap=True)
        else:
            console.print(block)
