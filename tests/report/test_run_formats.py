"""A run as diagram, Perfetto trace and page: complete, in bounds, and readable by others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from septum.core.run import at_random
from septum.core.trace import Event
from septum.lab.recording import sample
from septum.lab.scenario import find_scenario
from septum.report.holders import held_spans
from septum.report.page import run_page
from septum.report.perfetto import perfetto_trace
from septum.report.sequence import WIDTH, sequence_diagram

TEXT = st.text(min_size=1, max_size=80)
EVENTS = st.lists(
    st.builds(Event, st.integers(0, 99999), st.integers(0, 9), TEXT, st.sampled_from(["lock", "note"]), TEXT),
    max_size=12,
)


def trylock_events() -> list[Event]:
    scenario = find_scenario("trylock")
    return sample(scenario, scenario.values(["rounds=1"]), at_random(3)).trace.events


@given(EVENTS)
def test_diagrams_are_ascii_and_at_most_100_columns(events: list[Event]) -> None:
    diagram = sequence_diagram(events)
    assert diagram.isascii()
    assert all(len(line) <= WIDTH for line in diagram.splitlines())


def test_a_diagram_has_each_event_in_its_lane() -> None:
    events = [
        Event(1, 0, "a", "lock", "+lock 0"),
        Event(2, 1, "b", "lock", "!lock 0"),
        Event(2, 1, "b", "x", "gives up"),
    ]
    assert sequence_diagram(events, width=60) == (
        "       CPU 0                     CPU 1\n"
        "       a                         b\n"
        "       ------------------------  ------------------------\n"
        "    1  +lock 0\n"
        "    2                            !lock 0\n"
        "                                 gives up\n"
    )


def test_many_cpus_name_themselves() -> None:
    events = [Event(i, i, f"t{i}", "x", f"event {i}") for i in range(9)]
    assert "    8  CPU 8   event 8" in sequence_diagram(events)


def test_an_empty_run_says_so() -> None:
    assert sequence_diagram([]) == "(nothing happened)\n"


def test_spans_pair_taking_with_letting_go() -> None:
    events = trylock_events()
    spans = list(held_spans(events))
    taken = [event for event in events if event.kind == "lock" and event.text.startswith("+")]
    assert len(spans) == len(taken)
    for span in spans:
        assert span.last is not None
        assert events[span.first].task == events[span.last].task == span.task


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A reader of protobuf messages that shares no code with the writer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            assert tag & 7 == 2
            size = varint()
            yield tag >> 3, message[at : at + size]
            at += size


def test_a_perfetto_trace_has_tracks_events_and_balanced_slices() -> None:
    events = trylock_events()
    tracks: dict[int, str] = {}
    depth: dict[int, int] = {}
    names = []
    for _, packet in fields(perfetto_trace(events, "trylock")):
        assert isinstance(packet, bytes)
        content = dict(fields(packet))
        if isinstance(descriptor := content.get(60), bytes):
            track = dict(fields(descriptor))
            uuid, name = track[1], track[2]
            assert isinstance(uuid, int)
            assert isinstance(name, bytes)
            tracks[uuid] = name.decode()
            continue
        event = content[11]
        assert isinstance(event, bytes)
        parts = dict(fields(event))
        uuid = parts[11]
        assert isinstance(uuid, int)
        assert uuid in tracks, "a track is described before its events"
        depth[uuid] = depth.get(uuid, 0) + {1: 1, 2: -1, 3: 0}[int(parts[9])]
        assert depth[uuid] >= 0
        if parts[9] == 3:
            names.append(parts[23])
    assert set(depth.values()) == {0}
    assert names == [event.text.encode() for event in events]
    assert {"CPU 0", "CPU 1", "CPU 2", "lock 0", "lock 1"} <= set(tracks.values())


@given(EVENTS)
def test_any_events_make_a_trace(events: list[Event]) -> None:
    for _, packet in fields(perfetto_trace(events, "any")):
        assert isinstance(packet, bytes)
        assert packet


@given(EVENTS)
def test_a_page_is_self_contained_and_escapes(events: list[Event]) -> None:
    page = run_page(events, "<title>", "a & b")
    assert "<title>&lt;title&gt;</title>" in page
    assert not re.search(r"(src|href)=", page)
    assert page.count("<tr>") == len(events) + 1
    spans = re.search(r"const spans = (\[.*?\]);\n", page)
    assert spans is not None
    json.loads(spans.group(1))
