"""Cells: plain and tracked access are the same thing, and undo puts everything back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.core.cells import Shared, SharedMap, Tracking, World, peek, poke


class Box(Shared):
    value: int = 0
    other: str = "x"


class Log:
    """A recorder that lets everything through and remembers it."""

    def __init__(self) -> None:
        self.reads: list[tuple[Any, Any]] = []
        self.writes: list[tuple[Any, Any, Any, Any]] = []

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        self.reads.append((owner, key))
        return value

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        self.writes.append((owner, key, old, new))
        return True


def fresh() -> World:
    world = Tracking.world = World()
    return world


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "store", "get", "pop", "in", "field"]), st.integers(0, 4), st.integers(0, 3))
)


def apply(box: Box, table: SharedMap[int, int], operation: str, key: int, value: int) -> Any:
    match operation:
        case "set":
            table[key] = value + 1
        case "store":
            table.store(key, value)
        case "get":
            return table[key], table.get(key, 9)
        case "pop":
            return table.pop(key, None)
        case "in":
            return key in table
        case "field":
            box.value += value
            return box.value
    return None


@given(OPERATIONS)
def test_tracked_and_plain_agree_and_undo_restores(operations: list[tuple[str, int, int]]) -> None:
    world = fresh()
    plain, tracked = (Box("a"), SharedMap[int, int]("m", 0)), (Box("b"), SharedMap[int, int]("n", 0))
    expected = [apply(*plain, operation, key, value) for operation, key, value in operations]
    log = Log()
    world.track(log)
    actual = [apply(*tracked, operation, key, value) for operation, key, value in operations]
    world.track(None)
    assert actual == expected
    assert dict(tracked[1]) == dict(plain[1])
    assert tracked[0].value == plain[0].value
    for owner, key, old, _new in reversed(log.writes):
        poke(owner, key, old)
    assert not dict(tracked[1])
    assert tracked[0].value == 0


def test_reads_and_writes_name_their_cells() -> None:
    world = fresh()
    box, table = Box("box"), SharedMap[str, int]("table", 0)
    log = Log()
    world.track(log)
    box.value = table["k"] + 1
    world.track(None)
    assert log.reads == [(table, "k")]
    assert log.writes == [(box, "value", 0, 1)]


def test_objects_made_while_tracking_are_tracked() -> None:
    world = fresh()
    log = Log()
    world.track(log)
    box = Box("late", value=3)
    assert log.writes == [], "making a record is no step of the model"
    box.value = 4
    world.track(None)
    assert log.writes == [(box, "value", 3, 4)]
    assert type(box) is Box


def test_names_are_unique() -> None:
    fresh()
    assert [Box("b").name, Box("b").name] == ["b", "b#1"]


def test_only_iterated_maps_can_be_walked() -> None:
    world = fresh()
    closed, open_ = SharedMap[int, int]("closed", 0), SharedMap[int, int]("open", 0, iterated=True)
    open_[2] = 1
    open_[1] = 5
    with pytest.raises(TypeError, match="closed"):
        closed.sorted_items()
    assert open_.sorted_items() == [(1, 5), (2, 1)]
    world.track(Log())
    with pytest.raises(TypeError, match="closed"):
        list(closed)
    assert open_.sorted_items() == [(1, 5), (2, 1)]
    world.track(None)


def test_a_value_back_at_the_default_leaves_the_map() -> None:
    fresh()
    table = SharedMap[int, int]("t", 7)
    table.store(1, 8)
    table.store(1, 7)
    assert len(table) == 0
    assert table[1] == 7
    assert peek(table, 1) == 7
