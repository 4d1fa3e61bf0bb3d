"""Checkpoints: an exploration that was stopped anywhere and resumed says what one says that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.core.explore import REDUCTIONS, Bounds, Checkpoint, Explorer, Verdict
from septum.core.search import Search
from septum.lab.recording import explore as lab_explore
from septum.lab.scenario import find_scenario
from tests.core.programs import Machine, Texts, programs_of, texts

KINDS: list[tuple[dict[str, Any], Bounds]] = [
    ({}, Bounds()),
    ({"exact": True}, Bounds()),
    ({"depth_first": True}, Bounds()),
    ({"reductions": REDUCTIONS}, Bounds()),
    ({"liveness": True}, Bounds()),
    ({}, Bounds(preemptions=2)),
    ({}, Bounds(depth=5)),
]


def explore(programs: Texts, kind: int, checkpoint: Checkpoint | None = None) -> Verdict:
    machine = Machine.fresh()
    options, bounds = KINDS[kind]

    def observe(results: list[Any]) -> Any:
        return machine.values(), tuple(results)

    explorer = Explorer(machine.world, programs_of(machine, programs), observer=observe, **options)
    return explorer.explore(bounds, checkpoint=checkpoint)


def figures(verdict: Verdict) -> Any:
    return verdict.verdict, verdict.property, verdict.states, verdict.transitions, verdict.depth, set(verdict.outcomes)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_resumed_says_the_same(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("septum.core.search.CHUNK", 3)
    monkeypatch.setattr("septum.core.preemption.CHUNK", 3)
    expand = Search.expand if not KINDS[kind][1].preemptions else None

    @settings(max_examples=40, deadline=None)
    @given(texts(), st.integers(1, 8))
    def check(programs: Texts, chunks: int) -> None:
        left = [chunks]

        def expand_some(search: Search) -> None:
            if not left[0]:
                left[0] = -1
                raise KeyboardInterrupt
            left[0] -= 1
            whole(search)

        cls = Search if expand else _preemption_search()
        whole = cls.expand
        path = tmp_path / "checkpoint"
        plain = explore(programs, kind)
        setattr(cls, "expand", expand_some)  # noqa: B010 -- a method is replaced on purpose
        try:
            stopped = explore(programs, kind, Checkpoint(path, "test"))
        finally:
            setattr(cls, "expand", whole)  # noqa: B010
        if stopped.verdict == "interrupted":
            if path.exists():
                resumed = explore(programs, kind, Checkpoint(path, "test", resume=True))
                assert figures(resumed) == figures(plain)
                path.unlink()
        else:
            assert figures(stopped) == figures(plain)

    check()


def _preemption_search() -> type[Search]:
    from septum.core.preemption import PreemptionSearch  # noqa: PLC0415 -- only one kind needs it

    return PreemptionSearch


PROGRAM = """
import sys
from pathlib import Path
from septum.core.explore import Bounds, Checkpoint, Explorer
from septum.lab.scenario import find_scenario
scenario = find_scenario("trylock")
setting = scenario.setting(scenario.values(["rounds=2"]))
checkpoint = Checkpoint(Path(sys.argv[1]), "trylock", interval=0.05, resume=sys.argv[2] == "resume")
verdict = Explorer(setting.world, setting.programs, level=scenario.level).explore(Bounds(), checkpoint=checkpoint)
print(verdict.verdict, verdict.states, verdict.transitions, verdict.depth)
"""


def test_killed_and_resumed_counts_the_same(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path), "begin"], stdout=subprocess.PIPE, text=True)
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert not output, "killed before it was done"
    again = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), "resume"], capture_output=True, text=True, check=True
    )
    assert again.stdout.split() == ["proved", "84640", "225801", "49"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data, lambda data: b""])
def test_bad_files_are_one_line(tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: Texts = ((("set", 0, 1),), (("set", 1, 1),))
    path = tmp_path / "checkpoint"

    def stop(search: Search) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Search, "expand", stop)
        assert explore(programs, 0, Checkpoint(path, "one thing")).verdict == "interrupted"
    with pytest.raises(UsageError, match="one thing"):
        explore(programs, 0, Checkpoint(path, "another", resume=True))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match="damaged"):
        explore(programs, 0, Checkpoint(path, "one thing", resume=True))
    with pytest.raises(UsageError, match="No such file"):
        explore(programs, 0, Checkpoint(tmp_path / "none", "one thing", resume=True))


HOST = """
import sys
from pathlib import Path
from septum.core.explore import REDUCTIONS, Bounds, Checkpoint
from septum.core.search import Search
from septum.lab.recording import explore as lab_explore
from septum.lab.scenario import find_scenario
from septum.lab.recording import explore
from septum.lab.scenario import find_scenario

begun = sys.argv[2] == "begin"
scenario = find_scenario("fault-vs-punch-hole")
checkpoint = Checkpoint(Path(sys.argv[1]), "a host", interval=0 if begun else 10, resume=not begun)
expand, calls = Search.expand, [0]

def some(search):
    calls[0] += 1
    if begun and calls[0] == 4:
        raise KeyboardInterrupt
    expand(search)

Search.expand = some
verdict = explore(scenario, scenario.values(), Bounds(), checkpoint=checkpoint, reductions=REDUCTIONS)
print(verdict.verdict, verdict.states, verdict.transitions)
"""


def test_a_host_with_its_objects_and_functions_goes_on_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def output(how: str) -> list[str]:
        command = [sys.executable, "-c", HOST, str(path), how]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert output("begin")[0] == "interrupted"
    scenario = find_scenario("fault-vs-punch-hole")
    whole = lab_explore(scenario, scenario.values(), Bounds(), reductions=REDUCTIONS)
    assert output("resume") == [whole.verdict, str(whole.states), str(whole.transitions)]
