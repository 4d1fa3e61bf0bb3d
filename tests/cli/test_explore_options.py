"""Options of ``septum explore`` about how states are searched, and going on after an interrupt."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.calling import SEPTUM, Septum

SMALL = ("trylock", "--param", "rounds=1")


@pytest.mark.parametrize(
    "options",
    [
        ("--no-reduction", "footprint"),
        ("--no-reduction", "footprint", "--no-reduction", "lock-free", "--no-reduction", "symmetry"),
        ("--depth-first",),
        ("--liveness",),
    ],
)
def test_every_way_of_searching_finds_the_same(septum: Septum, options: tuple[str, ...]) -> None:
    record = septum("explore", *SMALL, *options, "--json").json
    assert (record["verdict"], record["states"]) == ("proved", 4027)
    assert record["liveness"] == ("--liveness" in options)
    assert not {*record["reductions"]} & {*options}


def test_a_bound_on_preemptions(septum: Septum) -> None:
    record = septum("explore", *SMALL, "--param", "locks=0", "--bound", "preemptions=0", "--json").json
    assert (record["verdict"], record["preemptions"]) == ("bounded", 0)
    assert record["unexpanded"] > 0
    answer = septum("explore", *SMALL, "--param", "locks=0", "--bound", "preemptions=1", "--json")
    assert (answer.status, answer.json["property"]) == (1, "no lost update")


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        (("--no-reduction", "magic"), "lock-free, footprint, symmetry"),
        (("--depth-first", "--bound", "depth=3"), "leave one of the two out"),
        (("--strategy", "random", "--liveness"), "for --strategy states"),
        (("--resume", "no-such-file"), "no-such-file: No such file"),
    ],
)
def test_misuse(septum: Septum, options: tuple[str, ...], mend: str) -> None:
    assert mend in septum("explore", *SMALL, *options).misuse()


def test_an_interrupted_exploration_goes_on(tmp_path: Path) -> None:
    command = [str(SEPTUM), "explore", "trylock", "--param", "rounds=3", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    output, _complaint = process.communicate()
    assert process.returncode == 130
    record = json.loads(output)
    assert record["verdict"] == "interrupted"
    assert 0 < record["states"] < 612_724
    command += ["--resume", record["checkpoint"]]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    whole = json.loads(again.stdout)
    assert (whole["verdict"], whole["states"], whole["transitions"]) == ("proved", 612_724, 1_695_723)
    assert list(tmp_path.iterdir()) == []
