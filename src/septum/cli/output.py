"""How an answer is printed: as JSON, as its one essential line, or for people."""

from __future__ import annotations

import json
import sys
import textwrap
import time
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


def fill(text: str) -> str:
    """A sentence, broken into lines of at most ``WIDTH`` columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


class Progress:
    """One line on stderr about work that takes long, rewritten in place; nothing unless stderr is a terminal."""

    INTERVAL = 0.2
    """Seconds between two updates."""

    def __init__(self, *, quiet: bool) -> None:
        self._active = not quiet and sys.stderr.isatty()
        self._next = time.monotonic() + self.INTERVAL
        self._width = 0

    def __call__(self, text: str) -> None:
        """Shows ``text``, unless something was shown a moment ago."""
        if self._active and time.monotonic() >= self._next:
            self._write(text)
            self._next = time.monotonic() + self.INTERVAL

    def clear(self) -> None:
        """Takes the line away, so that the answer stands alone."""
        if self._width:
            self._write("")
            print("\r", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(text)
