"""Tables for people: plain ASCII of at most 100 columns, or a rich renderable on a terminal.

A column of numbers is set to the right and written with thousands separators; everything else is text. A table that
is too wide wraps its widest columns, never a narrow one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDTH = 100
"""Columns that no line of a report exceeds (as long as no single word does)."""

GAP = "  "


def cell(value: object) -> str:
    """The text of one table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


@dataclass(frozen=True)
class Table:
    """Rows under named columns; with no ``columns`` at all it is a plain list of facts."""

    rows: tuple[tuple[object, ...], ...]
    columns: tuple[str, ...] = ()
    title: str = ""

    def plain(self, width: int = WIDTH) -> str:
        """The table as ASCII text of at most ``width`` columns, without a newline at the end."""
        body = [[cell(value) for value in row] for row in self.rows]
        head = [list(self.columns)] if self.columns else []
        widths = _fit([*head, *body], width)
        right = [self._numeric(place) for place in range(len(widths))]
        lines = [self.title] if self.title else []
        for row in head:
            lines += _line(row, widths, right)
            lines.append(GAP.join("-" * size for size in widths))
        for row in body:
            lines += _line(row, widths, right)
        return "\n".join(lines)

    def _numeric(self, place: int) -> bool:
        """Whether a column holds numbers, and so is set to the right."""
        values = [row[place] for row in self.rows if row[place] is not None]
        return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    def __rich__(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            box=box.SIMPLE_HEAD if self.columns else None,
            show_header=bool(self.columns),
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            pad_edge=False,
        )
        size = len(self.columns) or max((len(row) for row in self.rows), default=1)
        for place in range(size):
            table.add_column(
                Text(self.columns[place]) if self.columns else "",
                justify="right" if self._numeric(place) else "left",
                overflow="fold",
                style="dim" if place == 0 and not self.columns else "",
            )
        for row in self.rows:
            table.add_row(*(Text(cell(value)) for value in row))
        return table


def facts(values: Mapping[str, object], title: str = "") -> Table:
    """A table without a head: one named value per line."""
    # A number alone in a column of text reads better from the left, so it is made text here.
    return Table(tuple((name, cell(value)) for name, value in values.items()), title=title)


def _fit(rows: Iterable[list[str]], width: int) -> list[int]:
    """Column widths: the natural ones, the widest narrowed until the line fits."""
    widths = [max(1, *map(len, column)) for column in zip(*rows, strict=True)]
    spare = len(GAP) * (len(widths) - 1)
    while sum(widths) + spare > width and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def _line(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    """The lines that one row takes: a cell too long for its column wraps."""
    cells = [textwrap.wrap(text, size) or [""] for text, size in zip(row, widths, strict=True)]
    height = max(map(len, cells), default=1)
    lines = []
    for number in range(height):
        parts = []
        for wrapped, size, is_right in zip(cells, widths, right, strict=True):
            text = wrapped[number] if number < len(wrapped) else ""
            parts.append(text.rjust(size) if is_right else text.ljust(size))
        lines.append(GAP.join(parts).rstrip())
    return lines
