"""A journal puts a world back to any earlier state, whatever was written in between."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from septum.core.cells import BriefMap, Journal, Shared, SharedMap, Tracking, World


class Record(Shared):
    """Two fields, one with a default."""

    left: int
    right: int = 7


def make() -> tuple[World, Record, SharedMap[int, int]]:
    world = Tracking.world = World()
    return world, Record("record", left=1), SharedMap("map", 0)


def state(record: Record, table: SharedMap[int, int]) -> tuple[Any, ...]:
    return record.left, record.right, dict(table)


WRITES = st.lists(
    st.tuples(st.sampled_from(["left", "right", "put", "store", "pop", "delete"]), st.integers(0, 3), st.integers(0, 2))
)


def write(record: Record, table: SharedMap[int, int], kind: str, key: int, value: int) -> None:
    if kind in ("left", "right"):
        setattr(record, kind, value)
    elif kind == "put":
        table[key] = value + 1
    elif kind == "store":
        table.store(key, value)
    elif kind == "pop":
        table.pop(key, None)
    elif key in table:
        del table[key]


@given(WRITES, WRITES)
def test_undo_goes_back_to_each_mark(first: list[tuple[str, int, int]], second: list[tuple[str, int, int]]) -> None:
    world, record, table = make()
    table[2] = 9
    journal = Journal(world)
    states, marks = [state(record, table)], [journal.mark()]
    for writes in (first, second):
        for kind, key, value in writes:
            write(record, table, kind, key, value)
        states.append(state(record, table))
        marks.append(journal.mark())
    for before, mark in zip(reversed(states), reversed(marks), strict=True):
        journal.undo(mark)
        assert state(record, table) == before


def test_objects_made_under_a_journal_go_back_to_their_first_values() -> None:
    world, _, _ = make()
    journal = Journal(world)
    mark = journal.mark()
    late = Record("late", left=3)
    late.left = late.right = 4
    journal.undo(mark)
    assert (late.left, late.right) == (3, 7)


def test_a_closed_journal_leaves_plain_objects_with_the_present_state() -> None:
    world, record, table = make()
    journal = Journal(world)
    record.left, table[1] = 5, 6
    journal.close()
    assert (type(record), type(table)) == (Record, SharedMap)
    before = journal.mark()
    record.left = 8
    assert journal.mark() == before
    assert state(record, table) == (8, 7, {1: 6})


def test_a_brief_map_goes_back_to_each_mark_as_often_as_asked() -> None:
    world, record, _ = make()
    words: BriefMap[str, int] = BriefMap("words", 0)
    words["held"] = 4
    journal = Journal(world)
    first = journal.mark()
    words["held"], words["taken"] = 8, 1
    record.left = 5
    second = journal.mark()
    words.pop("held")
    journal.undo(second)
    assert dict(words) == {"held": 8, "taken": 1}
    for _ in range(2):
        words.store("taken", 0)
        journal.undo(first)
        assert (dict(words), record.left) == ({"held": 4}, 1)
