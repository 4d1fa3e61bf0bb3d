"""Vectors run against the model: what counts, what differs, where sequences start, and what is no file of vectors."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.arch.leaves import HostLeaf
from septum.lab.conform import conform, conform_files
from septum.tdx.host import HANDLERS
from tests.lab.vector_files import (
    HEADER,
    INIT,
    LP_INIT,
    LP_SHUTDOWN,
    NOT_PENDING,
    call,
    sequence,
    text,
    write,
)

GOOD = sequence("good", "poweron", call(INIT), call(INIT, NOT_PENDING))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.xz", lzma.compress)],
)
def test_every_form_of_a_file(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(pack(text(GOOD, GOOD).encode()))
    report = conform(path)
    assert (report.events, report.passed) == (4, 4)
    assert report.record()["by_leaf"] == {"TDH.SYS.INIT": {"events": 4, "passed": 4}}
    assert {name: tally.events for name, tally in report.by_status.items()} == {
        "TDX_SUCCESS": 2,
        "TDX_SYS_INIT_NOT_PENDING": 2,
    }


def test_a_difference_says_what_and_where_and_the_sequence_goes_on(tmp_path: Path) -> None:
    wrong = call(INIT, 0x8000_0200_0000_0001, rcx=1)
    report = conform(write(tmp_path / "file.jsonl", GOOD, sequence("bad", "poweron", wrong, call(INIT))))
    assert (report.events, report.passed) == (4, 3)
    (difference,) = report.differences
    assert (difference.line, difference.sequence, difference.event) == (7, "bad", 1)
    assert difference.inputs == {"lp": "0", "rax": "0x21", "rcx": "0x1"}
    assert difference.expected == {"rax": "0x8000020000000001 TDX_OPERAND_BUSY(RCX)", "rcx": "0x1"}
    assert difference.actual == {"rax": "0xc000010000000001 TDX_OPERAND_INVALID(RCX)", "rcx": "0x0"}


def test_every_register_is_compared(tmp_path: Path) -> None:
    """TDH.SYS.INIT zeroes R8; a recording in which it keeps its value differs."""
    report = conform(write(tmp_path / "file.jsonl", sequence("r8", "poweron", call(INIT, r8=5))))
    assert report.differences[0].expected == {"r8": "0x5"}


def test_only_some_sequences_and_leaves_count(tmp_path: Path) -> None:
    other = sequence("other", "poweron", call(LP_SHUTDOWN, name="TDH.SYS.LP.SHUTDOWN"), call(INIT))
    path = write(tmp_path / "file.jsonl", GOOD, other)
    assert conform(path, limit=1).events == 2
    assert conform(path, sequence="oth").by_leaf.keys() == {"TDH.SYS.LP.SHUTDOWN", "TDH.SYS.INIT"}
    assert conform(path, leaf="TDH.SYS.LP.SHUTDOWN").events == 1


def test_kept_differences_are_limited_but_all_are_counted(tmp_path: Path) -> None:
    bad = sequence("bad", "poweron", *[call(INIT, 1)] * 5)
    path = write(tmp_path / "file.jsonl", bad)
    report = conform(path, keep=2)
    assert (report.events - report.passed, len(report.differences)) == (5, 2)
    assert len(conform_files([path, path], keep=3).differences) == 3


def test_several_files_at_the_same_time(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", GOOD) for i in range(3)]
    assert conform_files(paths, jobs=2).record() == conform_files(paths).record()


def test_an_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        assert "2 of 2 events" in text
        raise KeyboardInterrupt

    report = conform(write(tmp_path / "file.jsonl", GOOD, GOOD), progress=interrupt)
    assert (report.events, report.passed, report.interrupted) == (2, 2, True)
    assert "interrupted after 2 events" in report.notes[0]


def test_start_states_come_from_the_files_beside(tmp_path: Path) -> None:
    write(tmp_path / "boot.jsonl", sequence("boot", "poweron", call(INIT)))
    lp_init = call(LP_INIT, name="TDH.SYS.LP.INIT")
    write(tmp_path / "prefix_lp.jsonl", sequence("prefix/lp", "boot", lp_init))
    done = call(LP_INIT, 0xC000_0503_0000_0000, name="TDH.SYS.LP.INIT")
    starts = ["prefix/lp", "poweron", "boot", "boot", "prefix/lp"]
    first = {"poweron": call(INIT), "boot": lp_init, "prefix/lp": done}
    path = write(tmp_path / "file.jsonl", *(sequence(f"{i}", s, first[s]) for i, s in enumerate(starts)))
    report = conform(path)
    assert (report.events, report.passed, report.notes) == (5, 5, [])


def test_a_start_state_that_is_not_reached_as_recorded_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "boot.jsonl", sequence("boot", "poweron", call(INIT, 1)))
    report = conform(write(tmp_path / "file.jsonl", sequence("it", "boot", call(INIT, NOT_PENDING))))
    assert report.passed == 1
    assert "differ on the way to it: 1" in report.notes[0]


def test_leaves_that_are_not_modelled_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(HANDLERS, HostLeaf.TDH_EXPORT_ABORT)
    export = call(64, 1, name="TDH.EXPORT.ABORT")
    (difference,) = conform(write(tmp_path / "file.jsonl", sequence("it", "poweron", export))).differences
    assert difference.leaf == "TDH.EXPORT.ABORT"
    assert "not modelled" in difference.actual["model"]


def test_memory_is_compared(tmp_path: Path) -> None:
    wrote = {"op": "write", "pa": "0x1ff0", "hex": "0102" * 16}
    checks = [
        {"op": "mem", "pa": "0x1ff0", "len": 32, "hex": "0102" * 16, "sha256": ""},
        {"op": "mem", "pa": "0x2000", "len": 16, "hex": "0102" * 7 + "0103"},
    ]
    report = conform(write(tmp_path / "file.jsonl", sequence("it", "poweron", wrote, *checks)))
    assert (report.events, report.passed) == (3, 2)
    assert report.by_leaf["write"].passed == 1
    assert report.differences[0].expected == {"bytes from 0xf": "03"}


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"this is a folder; name the files in it, .*/\*\.jsonl\*"):
        conform(tmp_path)


# -- files that are no vectors ---------------------------------------------------------------------------------------

EVENT = call(INIT)
BROKEN = {
    "no header": json.dumps(GOOD[0]) + "\n",
    "no event": text(sequence("it", "poweron", {"op": "boil"})),
    "cut off": text(GOOD)[:-60],
    "no end": text(GOOD[:-1]),
    "wrong count": text([*GOOD[:-1], {"op": "seq_end", "events": 3}]),
    "two begins": text([GOOD[0], *GOOD]),
    "event outside": text([EVENT]),
    "no registers": text(sequence("it", "poweron", {**EVENT, "in": None})),
    "bad number": text(sequence("it", "poweron", {**EVENT, "in": {"rax": "0xg"}})),
    "too large": text(sequence("it", "poweron", {**EVENT, "in": {"rax": "0x1" + "0" * 16}})),
    "no outcome": text(sequence("it", "poweron", {**EVENT, "out": {}})),
    "no LP": text(sequence("it", "poweron", {**EVENT, "lp": 1})),
    "no such start": text(sequence("it", "prefix/none", EVENT)),
    "incomplete header": json.dumps({**HEADER, "cmrs": None}) + "\n" + "".join(map(json.dumps, GOOD)),
    "not an object": "[]\n",
    "not JSON": "{\n",
    "empty": "",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_complete_file_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        conform(path)
    assert "\n" not in str(caught.value)
    assert "file.jsonl" in str(caught.value)


def test_start_states_that_need_each_other(tmp_path: Path) -> None:
    write(tmp_path / "prefix.jsonl", sequence("a", "b", EVENT), sequence("b", "a", EVENT))
    with pytest.raises(UsageError, match="leads to itself"):
        conform(write(tmp_path / "file.jsonl", sequence("it", "a", EVENT)))


@pytest.mark.parametrize("name", ["none.jsonl", "file.jsonl.zst", "cut.jsonl.gz", "."])
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text(GOOD).encode())[:-20])
    with pytest.raises(UsageError):
        conform(tmp_path / name)


@settings(max_examples=200)
@given(st.data())
def test_no_change_of_a_file_breaks_anything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(text(GOOD, sequence("w", "poweron", {"op": "write", "pa": "0x0", "hex": "00"})).encode())
    start = data.draw(st.integers(len(json.dumps(HEADER)), len(content) - 1))
    content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("changed") / "file.jsonl"
    path.write_bytes(content)
    with suppress(UsageError):
        report = conform(path)
        assert report.passed <= report.events


# -- the recordings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev/boot", "dev/poweron", "dev/prefix", "guest/prefix", "guest/prefix_tlb"])
def test_recordings_that_agree_as_a_whole(shared: Path, name: str) -> None:
    report = conform(shared / "vectors" / f"{name}.jsonl.gz")
    assert report.differences == []
    assert report.events > 50


def test_thousands_of_calls_from_one_prefix(shared: Path) -> None:
    """Each of these sequences is one call; all start from the same state."""
    report = conform(shared / "vectors" / "dev" / "errors.jsonl.gz", limit=2000)
    tallies: dict[str, Any] = report.record()["by_leaf"]
    assert report.events >= 2000
    assert all(tally["events"] == tally["passed"] for tally in tallies.values()), report.differences
