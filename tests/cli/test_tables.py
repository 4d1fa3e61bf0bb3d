"""Tables for people: their layout, their width, and the same content on a terminal."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from septum.report.tables import WIDTH, Table, cell, facts

LEAVES = Table((("TDH.MEM.PAGE.AUG", 12345, None), ("TDH.MNG.CREATE", 1, True)), ("leaf", "calls", "busy"), "Calls")


def test_layout() -> None:
    assert LEAVES.plain() == (
        "Calls\n"
        "leaf               calls  busy\n"
        "----------------  ------  ----\n"
        "TDH.MEM.PAGE.AUG  12,345  -\n"
        "TDH.MNG.CREATE         1  yes"
    )


def test_facts_have_no_head() -> None:
    assert facts({"name": "x", "calls": 7}, "Title").plain() == "Title\nname   x\ncalls  7"


def test_an_empty_table_is_its_head() -> None:
    assert Table((), ("a", "bc")).plain() == "a  bc\n-  --"


def test_a_wide_table_wraps_its_widest_column() -> None:
    lines = Table((("name", "word " * 40),), ("key", "text")).plain(40).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[2].startswith("name  word")
    assert "".join(lines).count("word") == 40


def test_numbers() -> None:
    assert [cell(value) for value in (1234567, 0.123456, 12345.6, None, True, "x")] == [
        "1,234,567",
        "0.123",
        "12,346",
        "-",
        "yes",
        "x",
    ]


words = st.text("abc 0123456789-", max_size=150)


@given(st.integers(1, 4).flatmap(lambda size: st.lists(st.tuples(*[words] * size), max_size=5)))
def test_no_line_is_wider_than_asked_and_nothing_is_lost(rows: list[tuple[str, ...]]) -> None:
    text = Table(tuple(rows)).plain()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert sorted(text.replace(" ", "").replace("\n", "")) == sorted(
        "".join("".join(row) for row in rows).replace(" ", "")
    )


def test_a_terminal_sees_the_same_cells() -> None:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(LEAVES)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(part in text for part in ("Calls", "TDH.MEM.PAGE.AUG", "12,345", "busy", "yes"))


def test_markup_in_a_cell_is_text() -> None:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(Table((("[red]x[/red]",),)))
    assert isinstance(console.file, io.StringIO)
    assert "[red]x[/red]" in console.file.getvalue()
