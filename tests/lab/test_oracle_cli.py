"""``septum conform --oracle``: its answers, its exit status, and misuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calling import Septum
from tests.lab.vector_files import INIT, call, sequence, write

MODEL = f"{sys.executable} -m septum.lab.oracle_model"
WRONG = f"{sys.executable} {Path(__file__).with_name('wrong_oracle.py')}"


@pytest.fixture
def septum(tmp_path: Path) -> Septum:
    """Calls ``septum`` in an empty folder."""
    return Septum(tmp_path)


def test_random_sequences_that_agree(septum: Septum) -> None:
    answer = septum("conform", "--oracle", MODEL, "--examples", "10", "--seed", "3", "--json")
    record = answer.json
    assert (answer.status, answer.err) == (0, "")
    assert record["events"] == record["passed"] == sum(tally["events"] for tally in record["by_leaf"].values()) > 1000
    assert (record["differences"], record["seed"], record["examples"], record["failure"]) == ([], 3, 10, "")
    brief = septum("conform", "--oracle", MODEL, "--examples", "1", "-q").out
    assert brief.endswith(" events agree in 1 random sequence\n")


def test_a_difference_and_its_file(septum: Septum) -> None:
    answer = septum("conform", "--oracle", f"{WRONG} register", "--examples", "5")
    assert (answer.status, answer.err) == (1, "")
    assert "19 events to a difference\n   1  TDH.MNG.CREATE lp=0" in answer.out
    assert "  10  write pa=0x1010000 data=1024 bytes" in answer.out
    assert "  19  TDH.VP.FLUSH lp=0 rcx=" in answer.out
    assert "the oracle  the model" in answer.out
    (file,) = (path.name for path in septum.home.iterdir())
    assert file in answer.out
    again = septum("conform", file, "--json")
    assert again.status == 1
    assert again.json["events"] - again.json["passed"] == 1


def test_recorded_vectors(septum: Septum) -> None:
    path = write(septum.home / "file.jsonl", sequence("it", "poweron", call(INIT), call(INIT, 1)))
    answer = septum("conform", "--oracle", MODEL, path)
    assert answer.status == 1
    assert "recorded" in answer.out
    assert "the oracle" in answer.out
    assert "1 of 2 events agree\n" in answer.out


@pytest.mark.parametrize("form", ["--json", "-q"])
def test_an_oracle_that_dies_leaves_what_was_found(septum: Septum, form: str) -> None:
    answer = septum("conform", "--oracle", f"{WRONG} register, then death", "--examples", "200", form)
    assert answer.status == 2
    assert answer.err.startswith("septum conform: oracle '")
    assert "asked for seamcall TDH.EXPORT.PAUSE, ended with exit status 3: cannot go on\n" in answer.err
    assert answer.err.count("\n") == 1
    assert len(list(septum.home.iterdir())) == 1
    if form == "--json":
        assert answer.json["differences"][0]["leaf"] == "TDH.VP.FLUSH"
        assert answer.json["failure"] in answer.err
    else:
        assert " events agree in " in answer.out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--oracle", "/none"], "cannot be started"),
        (["--oracle", "true"], "asked for reset, ended with exit status 0"),
        (["--oracle", "sleep 60", "--timeout", "0.2"], "did not answer within 0.2 s"),
        (["--oracle", MODEL, "none.jsonl"], "none.jsonl"),
        (["--oracle", MODEL, "--starts", "."], "no boot"),
        (["--oracle", MODEL, "--starts", "none"], "none"),
        (["--oracle", MODEL, "--examples", "0"], "--examples"),
        ([], "missing argument"),
    ],
)
def test_misuse(septum: Septum, args: list[str], complaint: str) -> None:
    assert complaint in septum("conform", *args).misuse()


def test_without_hypothesis_recorded_vectors_still_run(septum: Septum) -> None:
    path = write(septum.home / "file.jsonl", sequence("it", "poweron", call(INIT)))
    script = "import sys; sys.modules['hypothesis'] = None; from septum.cli.main import run; sys.exit(run())"
    statuses = []
    for files in ([], [str(path)]):
        command = [sys.executable, "-c", script, "conform", "--json", "--oracle", MODEL, *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=septum.home, env=os.environ, check=False)
        statuses.append(done.returncode)
        if files:
            assert json.loads(done.stdout)["passed"] == 1
        else:
            assert "pip install 'septum[oracle]'" in done.stderr
            assert done.stderr.count("\n") == 1
    assert statuses == [2, 0]
