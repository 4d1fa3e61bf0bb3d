"""ITF: what a reader of the format relies on, and that the states are those of the run."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from septum.core.cells import Shared, Tracking, World
from septum.core.run import at_random, recorded, run
from septum.core.steps import Task
from septum.lab.itf import _value, itf_trace
from septum.lab.recording import Recording, record, sample
from septum.lab.scenario import find_scenario

EXPRESSIONS = {"#bigint", "#tup", "#set", "#map", "#unserializable"}


def recording(name: str, params: list[str], seed: int) -> Recording:
    scenario = find_scenario(name)
    values = scenario.values(params)
    return record(scenario, values, sample(scenario, values, at_random(seed)))


def check_value(value: Any) -> None:
    """Every value has one of the forms of the format; whole numbers are written as bigints."""
    assert not isinstance(value, (int, float)) or isinstance(value, bool)
    if isinstance(value, list):
        for item in value:
            check_value(item)
    elif isinstance(value, dict):
        special = {key for key in value if key.startswith("#")}
        assert special <= EXPRESSIONS
        assert not special or len(value) == 1
        if "#bigint" in value:
            assert re.fullmatch(r"-?\d+", value["#bigint"])
            return
        for item in value.values():
            check_value(item)
    else:
        assert isinstance(value, (str, bool))


@pytest.mark.parametrize(
    ("name", "params"),
    [("trylock", ["rounds=1"]), ("trylock", ["locks=0", "vcpus=2"]), ("abba", []), ("abba", ["meet=no"]),
     ("sleep-in-atomic", [])],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_a_trace_is_well_formed(name: str, params: list[str], seed: int) -> None:
    found = recording(name, params, seed)
    trace = json.loads(json.dumps(itf_trace(found)))
    assert trace["#meta"]["format"] == "ITF"
    assert len(trace["states"]) == len(found.schedule) + 1
    assert all(re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) for name in trace["vars"])
    assert len(set(trace["vars"])) == len(trace["vars"])
    for index, state in enumerate(trace["states"]):
        assert state.keys() == {"#meta", *trace["vars"]}
        assert state["#meta"] == {"index": index}
        check_value({name: state[name] for name in trace["vars"]})
    assert (trace["#meta"]["status"] == "violation") == (found.property is not None)
    assert found.message in trace["#meta"]["description"]


def test_the_states_are_those_of_the_run() -> None:
    """Against a run without recorder that is stopped after each step."""
    found = recording("trylock", ["rounds=1", "vcpus=2"], 5)
    trace = itf_trace(found)
    scenario = find_scenario("trylock")
    for steps, state in enumerate(trace["states"]):
        setting = scenario.setting(found.parameters)
        outcome = run(setting.programs, recorded(found.schedule), level=scenario.level, max_steps=steps)
        objects = {o.name: o for o in setting.world.objects}
        assert state["counter"] == {"value": {"#bigint": str(objects["counter"].value)}}
        words = {int(k["#bigint"]): int(v["#bigint"]) for k, v in state["words"]["#map"]}
        assert words == dict(objects["words"])
        for vcpu in ("vcpu0", "vcpu1"):
            for field, value in state[vcpu].items():
                assert value == {"#bigint": str(getattr(objects[vcpu], field))}
        assert state["step"]["task"] == ("" if not steps else f"vcpu{outcome.trace.schedule[-1]} thread")
        assert state["step"]["does"] == [e.text for e in outcome.trace.events if e.step == steps]


def test_a_failed_step_is_the_last_state() -> None:
    found = next(r for r in (recording("trylock", ["locks=0", "vcpus=2"], seed) for seed in range(50)) if r.property)
    last = itf_trace(found)["states"][-1]
    assert last["step"]["does"][-1].startswith("** no lost update")


class Odd(Shared):
    holder: Any = None


def test_values_of_every_kind() -> None:
    Tracking.world = World()
    odd = Odd("mmu_lock[1]")
    assert _value(odd) == "mmu_lock[1]"
    assert _value(Task("t", cpu=0)) == "t"
    assert _value((1, (True, None), "x")) == {"#tup": [{"#bigint": "1"}, {"#tup": [True, "None"]}, "x"]}
    assert _value(frozenset({2, 1})) == {"#set": [{"#bigint": "1"}, {"#bigint": "2"}]}
    assert _value(b"\x01\xff") == "01ff"
    assert _value(1 << 70) == {"#bigint": str(1 << 70)}
    assert _value(1.5) == {"#unserializable": "1.5"}


def test_names_that_tla_does_not_allow_are_changed_and_listed() -> None:
    trace = itf_trace(recording("abba", [], 1))
    assert "kvm_lock" in trace["vars"]
    assert trace["#meta"]["objects"]["kvm_lock"] == "kvm->lock"


def test_the_same_recording_is_the_same_trace() -> None:
    assert itf_trace(recording("abba", [], 1)) == itf_trace(recording("abba", [], 1))
