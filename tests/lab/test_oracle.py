"""Oracles: what is asked, what is made of the answers, going back, recorded vectors; and programs that misbehave."""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.lab.oracle import (
    OracleFailed,
    OracleMachine,
    Request,
    StartStates,
    compare_outcomes,
    conform_oracle,
    event_of,
    request_of,
)
from septum.lab.oracle_pipe import PipeOracle
from septum.lab.playback import Different
from septum.lab.vectors import Outcome
from tests.lab.vector_files import HEADER, INIT, LP_INIT, NOT_PENDING, call, sequence, write

MODEL = f"{sys.executable} -m septum.lab.oracle_model"

# -- requests ---------------------------------------------------------------------------------------------------------

LINES: list[dict[str, Any]] = [
    {"op": "seamcall", "lp": 2, "leaf": "TDH.MNG.RD", "version": 1, "in": {"rax": "0x1000b", "rdx": "0x5"}},
    {
        "op": "td_exit",
        "lp": 0,
        "exit": "TDG.VP.INFO",
        "exit_reason": 77,
        "in": {"ilen": "0x4"},
        "guest_gprs_set": {"rax": "0x1"},
        "guest_vmcs_set": {"0x2806": "0xd01"},
        "set64": False,
    },
    {
        "op": "td_exit",
        "lp": 3,
        "exit": "EPT_VIOLATION",
        "exit_reason": 48,
        "in": {"qual": "0x1", "gpa": "0x3000", "gla": "0x7000", "intr": "0x80000020", "ilen": "0x2"},
        "guest_gprs_set": {},
        "guest_vmcs_set": {},
    },
    {"op": "write", "pa": "0x1000", "hex": "0102"},
    {"op": "guest_write", "pa": "0x40000000", "hex": "ff"},
    {"op": "fill", "pa": "0x1000", "len": 4096, "byte": 3},
    {"op": "mem", "pa": "0x1000", "len": 2},
    {"op": "oracle", "what": "MRTD", "tdr": "0x40000000"},
    {"op": "set_tsc", "tsc": "0xffffffffffffffff", "step_per_rdtsc": 1000},
    {"op": "set_msr", "lp": -1, "msr": "0x9a", "value": "0x1"},
    {"op": "set_entropy", "ok": 0},
    {"op": "set_pconfig_error", "value": "0x5"},
    {"op": "guest_rip_advance", "lp": 0, "delta": 3},
]
OUT = {"rax": "0x0"}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['op']} {line.get('exit', '')}")
def test_a_request_is_the_line_of_a_recording_without_its_answer(line: dict[str, Any]) -> None:
    answer = {"out": OUT} if line["op"] in ("seamcall", "td_exit") else {}
    assert request_of(event_of({**line, **answer})) == line


def test_requests_are_lines_of_the_recordings(shared: Path) -> None:
    """But for details that are 0, which a request leaves out."""
    lines = 0
    for path in sorted((shared / "vectors").glob("*/*.jsonl.gz")):
        with gzip.open(path, "rt") as file:
            for text in islice(file, 1, 4000):
                line = json.loads(text)
                if line["op"] not in ("seamcall", "td_exit", "write"):
                    continue
                request = request_of(event_of(line))
                asked = {name: line[name] for name in line if name in request}
                if "leaf" in asked:  # (of unknown functions a number, with no version)
                    asked |= {"leaf": str(asked["leaf"]), "version": request["version"]}
                if line["op"] == "td_exit":
                    names = asked["in"] = {name: value for name, value in line["in"].items() if int(value, 16)}
                    assert names.keys() == request["in"].keys()
                    asked.setdefault("guest_gprs_set", {})
                    asked.setdefault("guest_vmcs_set", {})
                    asked.update({"exit": request["exit"]} | ({"set64": True} if request.get("set64") else {}))
                assert asked == request, line
                lines += 1
    assert lines > 10_000


# -- comparing --------------------------------------------------------------------------------------------------------

HOST = Outcome("host", {"rax": 0, "rcx": 5}, {}, {})
GUEST = Outcome("in_td", {"rax": 1}, {"rip": 7, "inject": {"vector": 13}}, {})


@pytest.mark.parametrize(
    ("expected", "actual", "before", "names"),
    [
        (HOST, HOST, {}, None),
        (HOST, Outcome("host", {"rax": 0, "rcx": 5, "r8": 0}, {}, {}), {}, None),
        (HOST, Outcome("host", {"rax": 0, "rcx": 5}, {}, {}), {"r9": 4}, None),
        (HOST, Outcome("host", {"rax": 0, "rcx": 5, "r9": 0}, {}, {}), {"r9": 4}, {"r9"}),
        (HOST, Outcome("host", {"rax": 0}, {}, {}), {"rcx": 6}, {"rcx"}),
        (HOST, Outcome("host", {"rax": 1 << 63, "rcx": 5}, {}, {}), {}, {"rax"}),
        (HOST, GUEST, {}, {"state", "rax"}),
        (HOST, Outcome("module_halted", {}, {}, {}), {}, {"state", "rax"}),
        (GUEST, GUEST, {}, None),
        (GUEST, Outcome("in_td", {"rax": 1}, {}, {}), {}, None),
        (GUEST, Outcome("in_td", {"rax": 2}, {}, {}), {}, {"rax"}),
        (GUEST, Outcome("in_td", {"rax": 1}, {"rip": 7, "inject": {"vector": 14}}, {}), {}, {"vector"}),
        (GUEST, Outcome("in_td", {"rax": 1}, {"rip": 8, "inject": {"vector": 13}}, {}), {}, {"rip"}),
        (GUEST, Outcome("in_td", {"rax": 1}, GUEST.vmcs, {"valid": 1}), {}, {"valid"}),
    ],
)
def test_comparing_answers(
    expected: Outcome, actual: Outcome, before: Mapping[str, int], names: set[str] | None
) -> None:
    if names is None:
        compare_outcomes(expected, actual, before)
        return
    with pytest.raises(Different) as caught:
        compare_outcomes(expected, actual, before)
    assert {*caught.value.expected, *caught.value.actual} == names


# -- going back -------------------------------------------------------------------------------------------------------


class Memory:
    """An oracle that is a list of what was written since reset."""

    def __init__(self, able: dict[str, Any]) -> None:
        self.able = able
        self.written: list[str] = []
        self.marks: list[int] = []

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        match request["op"]:
            case "reset":
                self.written, self.marks = [], []
                return self.able
            case "mark":
                self.marks.append(len(self.written))
            case "undo":
                del self.marks[request["mark"] + 1 :]
                del self.written[self.marks[-1] :]
            case "write":
                self.written.append(request["hex"])
        return {}


@pytest.mark.parametrize("marks", [True, False])
@given(st.lists(st.one_of(st.just("mark"), st.integers(0, 9), st.just("write")), max_size=40))
def test_going_back_leads_to_the_same_state(marks: bool, steps: list[str | int]) -> None:
    """Whether the oracle goes back by itself, or is reset and asked everything again."""
    oracle = Memory({"marks": True} if marks else {})
    machine = OracleMachine(oracle, HEADER)
    written: list[str] = []
    places = [machine.mark()]
    for number, step in enumerate(steps):
        if step == "mark":
            places.append(machine.mark())
        elif step == "write":
            written.append(f"{number:02x}")
            machine.answer(event_of({"op": "write", "pa": "0x0", "hex": written[-1]}))
            assert oracle.written == written
        else:
            place = places[int(step) % len(places)]
            del places[places.index(place) + 1 :], written[place:]
            machine.undo(place)
    assert [line["hex"] for line in machine.lines] == written


# -- recorded vectors -------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Iterator[PipeOracle]:
    """The model's module behind a pipe."""
    with closing(PipeOracle(MODEL, timeout=60)) as oracle:
        yield oracle


def test_recorded_vectors_through_a_pipe(model: PipeOracle, tmp_path: Path) -> None:
    write(tmp_path / "boot.jsonl", sequence("boot", "poweron", call(INIT)))
    wrong = call(LP_INIT, 1, name="TDH.SYS.LP.INIT", rbx=7)
    wrong["out"]["r9"] = "0x2"
    wrote = {"op": "write", "pa": "0x1ff0", "hex": "0102" * 16}
    seen = {"op": "mem", "pa": "0x1ff0", "len": 32, "hex": "0102" * 16}
    inside = {"op": "oracle", "what": "MRTD", "tdr": "0x0", "sha256": "00"}
    sequences = [
        sequence("good", "poweron", call(INIT), call(INIT, NOT_PENDING)),
        sequence("bad", "boot", wrong, call(INIT, NOT_PENDING)),
        sequence("again", "boot", wrote, seen, inside),
    ]
    report = conform_oracle([write(tmp_path / "file.jsonl", *sequences)], model)
    assert (report.events, report.passed, report.notes, report.failure) == (6, 5, [], "")
    (difference,) = report.differences
    assert (difference.sequence, difference.event, difference.inputs["rbx"]) == ("bad", 1, "0x7")
    assert difference.expected == {"rax": "0x1 TDX_SUCCESS (exit reason 1 INTERRUPT)", "r9": "0x2"}
    assert difference.actual == {"rax": "0x0 TDX_SUCCESS", "r9": "0x0"}


def test_the_recordings_through_a_pipe(model: PipeOracle, shared: Path) -> None:
    names = ["dev/poweron", "dev/prefix", "guest/prefix"]
    report = conform_oracle([shared / "vectors" / f"{name}.jsonl.gz" for name in names], model)
    assert report.passed == report.events > 1500
    assert report.notes == []


def test_what_an_oracle_cannot_do_is_left_out_and_said(tmp_path: Path) -> None:
    oracle = Memory({"without": ["set_msr", "mem"]})
    pending = {"op": "set_msr", "lp": 0, "msr": "0x9a", "value": "0x1"}
    seen = {"op": "mem", "pa": "0x0", "len": 1, "hex": "00"}
    wrote = {"op": "write", "pa": "0x0", "hex": "01"}
    path = write(
        tmp_path / "file.jsonl", sequence("a", "poweron", pending, wrote), sequence("b", "poweron", wrote, seen)
    )
    report = conform_oracle([path], oracle)
    assert (report.events, report.notes) == (1, [f"{path}: sequences that the oracle cannot do: 1"])
    assert oracle.written == ["01"]


@pytest.mark.parametrize(
    "out",
    [{}, {"rax": "zz"}, {"rax": "0x1" + "0" * 16}, {"state": "lost"}, {"state": "in_td"}, {"rax": None}],
)
def test_answers_that_are_none(tmp_path: Path, out: dict[str, Any]) -> None:
    class Wrong(Memory):
        def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
            super().ask(request)
            return out if request["op"] == "seamcall" else {}

    report = conform_oracle([write(tmp_path / "file.jsonl", sequence("a", "poweron", call(INIT)))], Wrong({}))
    assert "the oracle's answer to seamcall has a bad or missing value" in report.failure
    assert report.events == 0


# -- start states -----------------------------------------------------------------------------------------------------


def test_the_way_to_a_start_state(tmp_path: Path) -> None:
    write(tmp_path / "boot.jsonl", sequence("boot", "poweron", call(INIT)))
    write(tmp_path / "prefix.jsonl", sequence("a", "boot", call(INIT)), sequence("x", "y"), sequence("y", "x"))
    states = StartStates(tmp_path)
    assert [sequence.name for sequence in states.way_to("a")] == ["boot", "a"]
    assert states.way_to("poweron") == []
    for name, complaint in (("x", "leads to itself"), ("b", "is not among the sequences")):
        with pytest.raises(UsageError, match=complaint):
            states.way_to(name)


# -- programs that misbehave ------------------------------------------------------------------------------------------

LOOP = "import sys, time, os\nfor line in sys.stdin:\n    "
GOOD = "print('{\"out\": {}}', flush=True)\n"
PROGRAMS = {
    "dies at once": ("", "ended with exit status 0"),
    "dies with a word": ("raise SystemExit('no such module')", "exit status 1: no such module"),
    "dies with a traceback": ("1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    "dies at the second request": (f"{LOOP}if 'seamcall' in line: os._exit(7)\n    {GOOD}", "exit status 7"),
    "closes its stdout": ("import os, time; os.close(1); time.sleep(60)", "closed its stdout"),
    "keeps silent": (f"{LOOP}time.sleep(60)", "did not answer within 0.5 s"),
    "does not even read": ("import time; time.sleep(60)", "did not answer within 0.5 s"),
    "stops in the middle": (f"{LOOP}print('{{', end='', flush=True)", "did not answer within 0.5 s"),
    "talks": (f"{LOOP}print('hello', flush=True)", "something that is not JSON: 'hello'"),
    "talks first": (f"print('ready')\n{LOOP}{GOOD}", "'ready"),
    "says more": (f"{LOOP}print('{{\"out\": {{}}}}\\nthere', flush=True)", "more than the one line"),
    "says something else": (f"{LOOP}print('[1]', flush=True)", "without an object \"out\": '[1]'"),
    "answers with nothing": (f"{LOOP}print('{{}}', flush=True)", "without an object \"out\": '{}'"),
    "gives up": (f'{LOOP}print(\'{{"error": "no\\\\nmemory"}}\', flush=True)', "gave up: 'no\\nmemory'"),
    "says what is no text": (f"{LOOP}os.write(1, bytes([255, 10]))", "not JSON"),
    "complains endlessly": ("import sys\nwhile True: sys.stderr.write('x' * 65536)", "did not answer within 0.5 s"),
    "nests deeply": (f"{LOOP}print('[' * 100000, flush=True)", "not JSON"),
}


@pytest.mark.parametrize(("program", "complaint"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_that_misbehave(tmp_path: Path, program: str, complaint: str) -> None:
    """Each is found out soon, told in one line, and gone afterwards."""
    script = tmp_path / "oracle.py"
    script.write_text(program)
    start = time.monotonic()
    timeout = 0.5 if "0.5" in complaint else 30
    requests: list[Request] = [{"op": "reset", "header": HEADER}, {"op": "seamcall", "leaf": "TDH.SYS.INIT"}]
    oracle = PipeOracle(f"{sys.executable} {script}", timeout)
    with closing(oracle), pytest.raises(OracleFailed) as caught:
        [oracle.ask(request) for request in requests]
    assert oracle._process.returncode is not None
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("oracle '")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_large_requests_and_answers(tmp_path: Path) -> None:
    """Larger than any pipe holds, and while the program complains a lot."""
    script = tmp_path / "oracle.py"
    script.write_text(
        f"{LOOP}sys.stderr.write('x' * 200000); print(line.replace('in', 'out', 1), end='', flush=True)\n"
    )
    request: Request = {"op": "write", "in": {"hex": "ab" * 1_000_000}}
    with closing(PipeOracle(f"{sys.executable} {script}", 60)) as oracle:
        assert [oracle.ask(request) for _ in range(2)] == [request["in"]] * 2


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "oracle.sh"
    script.write_text(f"sleep 1000 & echo $! >{tmp_path}/child; while read line; do echo '{{\"out\": {{}}}}'; done\n")
    with closing(PipeOracle(f"sh {script}", 30)) as oracle:
        assert oracle.ask({"op": "reset"}) == {}
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [("/none", "No such file"), ("'", "no command line"), ("/", "Permission denied"), (" ", "no command line")],
)
def test_commands_that_cannot_be_started(command: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        PipeOracle(command)
