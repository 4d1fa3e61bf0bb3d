"""Random sequences against an oracle: an equal module agrees; a defect of ``wrong_oracle.py`` is found, made short."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.arch.leaves import HostLeaf, registers
from septum.lab import oracle_calls
from septum.lab.conform import conform
from septum.lab.oracle import OracleFailed, StartStates, conform_oracle, event_of
from septum.lab.oracle_pipe import PipeOracle
from septum.lab.oracle_sequences import SearchReport, Shortest, search, shortest, simplest
from septum.lab.starts import PACKAGED
from septum.lab.vectors import Seamcall

WRONG = f"{sys.executable} {Path(__file__).with_name('wrong_oracle.py')}"
KEYS = ["TDH.MNG.CREATE", "TDH.MNG.KEY.CONFIG", "TDH.MNG.KEY.CONFIG"]
TD = [*KEYS, *["TDH.MNG.ADDCX"] * 6, "write", "TDH.MNG.INIT"]
"""What it takes to have a TD that is being built."""
VCPU = ["TDH.VP.CREATE", *["TDH.VP.ADDCX"] * 5, "TDH.VP.INIT"]


def look(defect: str, folder: Path, **options: Any) -> SearchReport:
    """Searches with an oracle that has a defect."""
    with closing(PipeOracle(f"{WRONG} {defect}", timeout=60)) as oracle:
        return search(oracle, StartStates(PACKAGED), folder=folder, **options)


def first(report: SearchReport) -> Shortest:
    """The first difference that was found."""
    found = report.differences[0]
    assert isinstance(found, Shortest)
    return found


def names(calls: list[str]) -> list[str]:
    """What each of some calls is."""
    return [call.split()[0] for call in calls]


@pytest.mark.parametrize("seed", [0, 1])
def test_an_equal_module_agrees(tmp_path: Path, seed: int) -> None:
    report = look("", tmp_path, seed=seed, examples=30)
    assert (report.failure, report.notes, report.differences) == ("", [], [])
    assert report.examples == 30
    assert report.passed == report.events > 1800
    assert len(report.by_leaf) > 50
    assert len(report.by_status) > 40
    assert list(tmp_path.iterdir()) == []


def test_another_operand_in_a_busy_status(tmp_path: Path) -> None:
    report = look("operand", tmp_path, examples=2000, keep=1)
    found = first(report)
    assert found.leaf == "TDH.MEM.PAGE.AUG"
    assert found.expected == {"rax": "0x8000020000000093 TDX_OPERAND_BUSY(SEPT_ENTRY)"}
    assert found.actual == {"rax": "0x8000020000000008 TDX_OPERAND_BUSY(R8)"}
    assert found.inputs["r8"] == found.inputs["rdx"]
    *before, last = names(found.calls)
    assert [name for name in before if name != "TDH.MEM.SEPT.ADD"] == TD
    tables = 3 - (int(found.inputs.get("rcx", "0"), 16) & 7)
    assert len(before) == len(TD) + tables
    assert (
        found.calls[-1]
        == (f"{last} lp=0 " + " ".join(f"{n}={found.inputs[n]}" for n in ("rcx", "rdx", "r8") if n in found.inputs))
        + " -> TDX_OPERAND_BUSY(SEPT_ENTRY)"
    )


def test_a_track_that_forgets_the_epoch(tmp_path: Path) -> None:
    """Who finds it needs a block, a track, and a call that asks for the track; the TD must be able to run."""
    found = first(look("epoch", tmp_path, examples=50, keep=1))
    assert "TDX_TLB_TRACKING_NOT_DONE" in found.expected["rax"]
    assert "TDX_SUCCESS" in found.actual["rax"]
    count = Counter(names(found.calls))
    count -= Counter(TD)
    count -= Counter(VCPU)
    assert count.pop("TDH.MEM.SEPT.ADD") <= 3
    assert count == Counter(["TDH.MR.FINALIZE", "TDH.MEM.PAGE.AUG", "TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", found.leaf])


def test_a_register_that_is_not_preserved(tmp_path: Path) -> None:
    report = look("register", tmp_path, examples=20)
    found = first(report)
    assert len(report.differences) == 1
    assert (found.leaf, found.expected, found.actual) == ("TDH.VP.FLUSH", {"r11": "0x1"}, {"r11": "0x0"})
    assert Counter(names(found.calls)) == Counter([*TD, *VCPU, "TDH.VP.FLUSH"])


def test_memory_that_the_module_writes(tmp_path: Path) -> None:
    report = look("memory", tmp_path, examples=200, keep=3)
    found = first(report)
    assert len(report.differences) == 1, "it is of one kind, wherever the memory is"
    assert names(found.calls) == ["TDH.SYS.INFO", "mem"]
    place = f"memory at {int(found.inputs['rcx'], 16):#x}, bytes from 0x7"
    (expected,), (actual,) = found.expected.items(), found.actual.items()
    assert (expected[0], actual[0]) == (place, place)
    assert int(expected[1][:2], 16) ^ int(actual[1][:2], 16) == 1
    (path,) = tmp_path.iterdir()
    again = conform(path)
    assert (again.events - again.passed, [d.leaf for d in again.differences]) == (1, ["mem"])


def test_a_difference_before_anything_can_be_tried(tmp_path: Path) -> None:
    found = first(look("early", tmp_path, examples=5))
    assert names(found.calls) == ["TDH.SYS.INIT", "TDH.SYS.LP.INIT"]


def test_the_file_shows_the_difference_again(tmp_path: Path) -> None:
    report = look("register", tmp_path, examples=5)
    found = first(report)
    (path,) = tmp_path.iterdir()
    assert path.name == found.file
    again = conform(path)
    assert (again.events - again.passed, again.notes) == (1, [])
    (same,) = again.differences
    assert (same.line, same.event, same.leaf) == (found.line, found.event, found.leaf)
    assert (same.expected, same.actual, same.inputs) == (found.expected, found.actual, found.inputs)
    with closing(PipeOracle(f"{WRONG} register", timeout=60)) as oracle:
        assert conform_oracle([path], oracle).differences == [], "it says what this oracle answered"
    assert json.loads(json.dumps(report.record()))["differences"][0]["calls"] == found.calls


def test_a_known_difference_does_not_hide_others(tmp_path: Path) -> None:
    """Only a register differs, so that the modules stay alike and the sequences go on."""
    report = look("register", tmp_path, examples=20)
    tally = report.by_leaf["TDH.VP.FLUSH"]
    assert 1 < tally.events - tally.passed < tally.events
    assert report.events - report.passed == tally.events - tally.passed
    assert report.examples == 20


def test_the_seed_decides(tmp_path: Path) -> None:
    first, same, other = (look("", tmp_path, seed=seed, examples=6).by_leaf for seed in (5, 5, 6))
    assert first == same != other


def test_without_marks_the_same_is_found(tmp_path: Path) -> None:
    """The oracle is reset and asked everything again, which takes longer."""
    found = first(look("no marks", tmp_path, examples=2, keep=1))
    assert Counter(names(found.calls)) == Counter([*TD, *VCPU, "TDH.VP.FLUSH"])


def test_an_oracle_that_has_no_guest(tmp_path: Path) -> None:
    """It complains about any request that it has ruled out."""
    report = look("host only", tmp_path, examples=20)
    assert (report.failure, report.passed) == ("", report.events)
    assert report.notes == ["the oracle cannot be brought into start state prefix/all_states"]
    assert "TDH.VP.ENTER" not in report.by_leaf
    assert report.examples == 6, "those from boot and from power-on"


def test_what_was_found_is_kept_when_the_oracle_dies(tmp_path: Path) -> None:
    report = look("register, then death", tmp_path, examples=200)
    assert "asked for seamcall TDH.EXPORT.PAUSE, ended with exit status 3: cannot go on" in report.failure
    assert [found.leaf for found in report.differences] == ["TDH.VP.FLUSH"]
    assert len(list(tmp_path.iterdir())) == 1
    assert report.events > report.passed > 0


def test_an_oracle_that_answers_by_chance(tmp_path: Path) -> None:
    report = look("moody", tmp_path, examples=100, keep=1)
    assert report.differences[0].leaf == "TDH.SYS.INFO"
    assert report.failure == ""


class Impatient:
    """Somebody who presses Ctrl-C after some requests."""

    def __init__(self, oracle: PipeOracle, requests: int, error: type[BaseException]) -> None:
        self.oracle, self.requests, self.error = oracle, requests, error

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self.requests -= 1
        if not self.requests:
            raise self.error("it is enough")
        return self.oracle.ask(request)

    def close(self) -> None:
        self.oracle.close()


@pytest.mark.parametrize(
    ("requests", "error"),
    [
        (1, OracleFailed),
        (300, KeyboardInterrupt),
        (1150, OracleFailed),
        (1150, KeyboardInterrupt),
        (1500, OracleFailed),
    ],
)
def test_an_interrupted_search_keeps_what_was_found(tmp_path: Path, requests: int, error: type[BaseException]) -> None:
    """At the start, in the boot, while the first difference is made short, and later."""
    with closing(Impatient(PipeOracle(f"{WRONG} register", timeout=60), requests, error)) as oracle:
        report = search(oracle, StartStates(PACKAGED), folder=tmp_path, examples=50)
    assert report.interrupted == (error is KeyboardInterrupt)
    assert bool(report.failure) == (error is OracleFailed)
    assert len(report.differences) == len(list(tmp_path.iterdir())) == (1 if requests > 1000 else 0)
    assert report.events <= requests


def test_a_folder_without_start_states(tmp_path: Path) -> None:
    with closing(PipeOracle(WRONG)) as oracle, pytest.raises(UsageError, match="no boot"):
        search(oracle, StartStates(tmp_path))


# -- pieces -----------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 200), max_size=12), st.integers(0, 200))
def test_the_shortest_is_what_is_needed(needed: set[int], length: int) -> None:
    things = list(range(length))
    needed = needed & set(things)
    assert shortest(things, lambda tried: needed <= set(tried)) == sorted(needed)


@given(st.lists(st.integers(0, 5), max_size=30))
def test_nothing_can_go_from_the_shortest(things: list[int]) -> None:
    """Also where it depends on the others whether a thing is needed."""

    def fails(tried: list[int]) -> bool:
        return sum(tried) % 7 == sum(things) % 7

    left = shortest(things, fails)
    assert fails(left)
    assert not any(fails(left[:n] + left[n + 1 :]) for n in range(len(left)))


def test_registers_that_do_not_matter_become_zero() -> None:
    line = {"op": "seamcall", "lp": 3, "leaf": "TDH.MNG.RD", "in": {"rax": "0xb", "rcx": "0x5", "rdx": "0x6"}}
    event = event_of({**line, "out": {"rax": "0x0"}})
    (left,) = simplest([event], lambda events: isinstance(events[0], Seamcall) and events[0].gprs.get("rdx") == 6)
    assert isinstance(left, Seamcall)
    assert (left.lp, left.gprs) == (0, {"rax": 0xB, "rdx": 6})


def test_operands_are_known_by_what_the_registers_are_for() -> None:
    """A meaning that no function has (any more) would never be drawn."""
    meanings = {meaning for leaf in HostLeaf for meaning in registers(leaf).inputs.values()}
    assert oracle_calls.OF_MEANING.keys() <= meanings
