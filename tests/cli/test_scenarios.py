"""``septum explore``, ``run``, ``replay`` and ``list``: verdicts, exit statuses, counterexample files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calling import Answer, Septum

RACE = ("trylock", "--param", "locks=1", "--param", "vcpus=2", "--param", "rounds=1")
EXPLORE_KEYS = {
    "scenario", "kernel", "policy", "strategy", "verdict", "property", "executions", "steps", "states", "transitions",
    "seconds", "bounds", "counterexample",
}  # fmt: skip


def files(septum: Septum) -> list[Path]:
    return sorted(septum.home.iterdir())


@pytest.mark.parametrize(("rounds", "states"), [(1, 4027), (2, 84640)])
def test_the_whole_space_has_as_many_states_as_spin_finds(septum: Septum, rounds: int, states: int) -> None:
    answer = septum("explore", "trylock", "--param", f"rounds={rounds}", "--json")
    assert answer.status == 0
    record = answer.json
    assert record.keys() >= EXPLORE_KEYS
    assert (record["verdict"], record["states"], record["counterexample"]) == ("proved", states, None)
    assert record["parameters"]["rounds"] == rounds
    assert files(septum) == []


def test_a_violation_is_drawn_and_written(septum: Septum) -> None:
    answer = septum("explore", *RACE)
    assert answer.status == 1
    assert answer.err == ""
    assert answer.out.isascii()
    assert max(map(len, answer.out.splitlines())) <= 100
    (path,) = files(septum)
    assert f"septum replay {path.name}" in answer.out
    again = septum("replay", path.name)
    assert again.status == 1
    drawing = [line for line in answer.out.splitlines() if line.startswith("    ")]
    assert drawing
    assert [line for line in again.out.splitlines() if line.startswith("    ")] == drawing


def test_replay_as_json(septum: Septum) -> None:
    found = septum("explore", *RACE, "--json").json
    assert (found["verdict"], found["property"]) == ("violated", "no lost update")
    record = septum("replay", found["counterexample"], "--json").json
    assert record["same"] is True
    assert record["property"] == found["property"]
    assert record["message"] == found["message"]
    assert record["runs"][-1][0]["cpu"] == 0


def test_a_run_that_is_no_longer_the_recorded_one_is_told(septum: Septum) -> None:
    path = septum.home / septum("explore", *RACE, "--json").json["counterexample"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "digest": "0" * 64}))
    answer = septum("replay", path)
    assert answer.status == 1
    assert "not the run that was recorded" in answer.out


def test_a_cycle_in_the_lock_order_takes_two_runs_to_show(septum: Septum) -> None:
    found = septum("explore", "abba", "--param", "meet=no", "--json").json
    assert found["property"] == "lock order"
    assert len(septum("replay", found["counterexample"], "--json").json["runs"]) == 2


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [(["states=100"], "bounded"), (["depth=3"], "bounded"), (["states=1000000", "seconds=600"], "proved")],
)
def test_bounds(septum: Septum, bounds: list[str], verdict: str) -> None:
    options = [part for bound in bounds for part in ("--bound", bound)]
    record = septum("explore", "trylock", "--param", "rounds=1", *options, "--json").json
    assert record["verdict"] == verdict
    assert record["bounds"] == {name: int(number) for name, number in (bound.split("=") for bound in bounds)}


def test_sampling_claims_no_more_than_it_did(septum: Septum) -> None:
    answer = septum("explore", "trylock", "--strategy", "random", "--bound", "executions=20", "--json")
    assert answer.status == 0
    record = answer.json
    assert (record["verdict"], record["executions"], record["states"]) == ("sampled", 20, None)


def run_events(answer: Answer) -> Any:
    return answer.json["events"]


def test_a_seed_is_a_run(septum: Septum) -> None:
    first, again, other = (run_events(septum("run", "trylock", "--seed", seed, "--json")) for seed in ("7", "7", "8"))
    assert first == again
    assert first != other


def test_a_sampled_violation_can_be_replayed_and_its_seed_run_again(septum: Septum) -> None:
    answer = septum("run", *RACE, "--times", "200", "--json")
    assert answer.status == 1
    found = answer.json
    assert found["property"] == "no lost update"
    again = septum("run", *RACE, "--seed", str(found["seed"]), "--json").json
    assert again["events"] == found["events"]
    assert septum("replay", found["counterexample"], "--json").json["runs"][-1] == found["events"]


def test_run_draws_a_run(septum: Septum) -> None:
    answer = septum("run", "trylock", "--strategy", "round-robin", "--param", "rounds=1")
    assert answer.status == 0
    assert "CPU 0" in answer.out
    assert "1 run, " in answer.out


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["explore", "nope"], "trylock"),
        (["run", "nope"], "trylock"),
        (["explore", "trylock", "--param", "x=1"], "rounds="),
        (["explore", "trylock", "--param", "rounds"], "NAME=VALUE"),
        (["explore", "trylock", "--param", "rounds=many"], "not a number"),
        (["explore", "trylock", "--param", "rounds=1000"], "out of range"),
        (["explore", "trylock", "--bound", "states"], "states=N"),
        (["explore", "trylock", "--bound", "states=0"], "above 0"),
        (["explore", "trylock", "--bound", "executions=3"], "states=N"),
        (["explore", "trylock", "--strategy", "luck"], "states, dpor, pct, random"),
        (["run", "trylock", "--strategy", "states"], "random, round-robin, solo"),
        (["run", "trylock", "--times", "0"], "'--times'"),
        (["run", "trylock", "--seed", "-1"], "'--seed'"),
        (["replay", "nothing.json"], "nothing.json"),
        (["replay", ".", "--format", "paper"], "text"),
        (["list", "things"], "scenarios, platforms"),
    ],
)
def test_misuse(septum: Septum, args: list[str], complaint: str) -> None:
    assert complaint in septum(*args).misuse()


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"format": "septum-schedule/1"}', "\0", "[" * 100_000])
def test_what_is_no_schedule(septum: Septum, content: str) -> None:
    (septum.home / "file.json").write_text(content)
    assert "file.json" in septum("replay", "file.json").misuse()


@pytest.mark.parametrize(("kind", "name"), [("scenarios", "trylock"), ("platforms", "default")])
def test_list(septum: Septum, kind: str, name: str) -> None:
    names = [thing["name"] for thing in septum("list", kind, "--json").json[kind]]
    assert name in names
    assert septum("list", kind, "-q").out.splitlines() == names
    words = septum("list", kind).out
    assert words.isascii()
    assert max(map(len, words.splitlines())) <= 100


@pytest.mark.parametrize("strategy", ["dpor", "pct", "random"])
def test_every_strategy_finds_the_race_shrinks_it_and_writes_it(septum: Septum, strategy: str) -> None:
    answer = septum("explore", *RACE, "--strategy", strategy, "--json")
    assert answer.status == 1
    found = answer.json
    assert (found["verdict"], found["property"], found["states"]) == ("violated", "no lost update", None)
    again = septum("replay", found["counterexample"], "--json").json
    assert (again["same"], again["property"], again["message"]) == (True, found["property"], found["message"])
    schedule = json.loads((septum.home / found["counterexample"]).read_text())["schedule"]
    assert len(schedule.split()) == 3, "two context switches are the fewest"


def test_dpor_proves_within_its_bounds_only(septum: Septum) -> None:
    small = ("explore", "trylock", "--param", "vcpus=2", "--param", "rounds=1", "--strategy", "dpor", "--json")
    proved = septum(*small).json
    assert (proved["verdict"], proved["property"], proved["bounds"]) == ("proved", None, {"depth": 10_000})
    assert septum(*small, "--bound", "executions=10").json["verdict"] == "bounded"
    cut = septum(*small, "--bound", "depth=5").json
    assert (cut["verdict"], cut["bounds"]) == ("bounded", {"depth": 5})


def test_replay_writes_a_trace_for_tla(septum: Septum) -> None:
    found = septum("explore", *RACE, "--json").json
    record = septum("replay", found["counterexample"], "--format", "itf", "--json").json
    trace = json.loads((septum.home / record["written"]).read_text())
    assert (trace["#meta"]["format"], trace["#meta"]["status"]) == ("ITF", "violation")
    assert len(trace["states"]) == record["steps"] + 1
