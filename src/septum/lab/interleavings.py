"""Every interleaving of a few concurrent calls, against what the real module can produce.

A recorded scenario is a start state, a program of calls for each of two or three logical processors, and the complete
set of outcomes that the real TDX Module 1.5.01 produces over all interleavings at one granularity. The explorer over
the model must find exactly that set: results of all calls, and what the machine looks like afterwards, module halts
and leaked lock words included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from septum.arch.exits import ExitReason
from septum.arch.leaves import guest_leaf, host_leaf
from septum.arch.status import is_busy
from septum.core.explore import Explorer
from septum.core.run import solo_call
from septum.core.steps import ATOMICS, FINE, PRIMITIVES, Program, Task, step
from septum.lab.aftermath import address_of, later_calls, look_at, text_of
from septum.lab.conform import Runner
from septum.lab.playback import Machine, in_64_bit_mode
from septum.lab.vectors import json_lines
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import TDCALL_LENGTH, VmExit

LEVELS: Final = {"op": PRIMITIVES, "atomic": ATOMICS, "fine": FINE}
"""Where the recordings cut calls, and the granularity that does so here."""


@dataclass(slots=True)
class Comparison:
    """One scenario: outcomes that only the recording has, and outcomes that only the model has, as JSON texts."""

    name: str
    level: str
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    states: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the two sets are equal."""
        return not (self.missing or self.surplus)


def scenarios_of(path: Path) -> Iterator[dict[str, Any]]:
    """The scenarios of a file of recorded interleavings of calls.

    :raises UsageError: for a file that cannot be read, or a line that is no such scenario.
    """

    def check(scenario: Mapping[str, Any]) -> None:
        if not {"name", "level", "initial_state", "prefix", "programs", "outcomes"} <= scenario.keys():
            raise ValueError("it lacks name, level, initial_state, prefix, programs or outcomes")
        if scenario["level"] not in LEVELS:
            raise ValueError(f"its level is none of {', '.join(LEVELS)}")

    return json_lines(path, "recorded scenario of concurrent calls", check)


def compare(runner: Runner, scenario: Mapping[str, Any]) -> Comparison:
    """Explores one scenario; ``runner`` knows the start states."""
    machine = runner.machine_at(scenario["initial_state"])
    mark = machine.journal.mark()
    for event in scenario["prefix"]:
        _apply(machine.module, event)
    outcomes, states = explore(machine, scenario)
    machine.journal.resume()
    machine.journal.undo(mark)
    later = later_calls(scenario)
    recorded = {text_of(outcome["results"], outcome["final"], later) for outcome in scenario["outcomes"]}
    found = {text: json.loads(text) for text in outcomes}
    wanted = {text: json.loads(text) for text in recorded}
    return Comparison(
        scenario["name"],
        scenario["level"],
        [text for text, want in wanted.items() if not any(_matches(want, have) for have in found.values())],
        [text for text, have in found.items() if not any(_matches(want, have) for want in wanted.values())],
        states,
    )


def _matches(recorded: Any, actual: Any) -> bool:
    """Whether ``actual`` has all that was recorded; the recordings leave out entries that no walk arrives at."""
    if isinstance(recorded, dict) and isinstance(actual, dict):
        return all(name in actual and _matches(value, actual[name]) for name, value in recorded.items())
    return bool(recorded == actual)


def explore(machine: Machine, scenario: Mapping[str, Any]) -> tuple[set[str], int]:
    """All outcomes of a scenario's programs over the model, as JSON texts, and how many states there are."""
    module = machine.module
    programs = [
        Program(Task(f"LP{program['lp']}", cpu=program["lp"]), partial(_calls, module, program))
        for program in scenario["programs"]
    ]
    shape: dict[str, Any] = {}
    for outcome in scenario["outcomes"]:
        for part, value in outcome["final"].items():
            shape[part] = {**shape.get(part, {}), **value} if isinstance(value, dict) else value
    entries = {place: address for place in shape.get("sept_raw", ()) if (address := address_of(module, place))}

    later = later_calls(scenario)

    def observe(results: list[Any]) -> str:
        lists = [json.loads(result or "[]") for result in results]
        return text_of(lists, look_at(module, shape, entries, later), later)

    explorer = Explorer(
        machine.journal.world,
        programs,
        observer=observe,
        stop=lambda: bool(module.sys.halted),
        level=LEVELS[scenario["level"]],
    )
    verdict = explorer.explore()
    if verdict.verdict != "proved":
        raise RuntimeError(f"{scenario['name']}: {verdict.property}: {verdict.message}")
    return set(verdict.outcomes), verdict.states


async def _calls(module: Module, program: Mapping[str, Any]) -> str:
    """One logical processor's program; returns the results as a JSON text, so that equal results are equal ends."""
    results: list[dict[str, Any]] = []
    lp = program["lp"]
    busy = True
    for call in program["calls"]:
        guest = call["leaf"].startswith("TDG.")
        if (call.get("only_if_previous_busy") and not busy) or (guest and not module.lps[lp].running):
            results.append({"skipped": True})
            continue
        await step("call", call["leaf"])
        leaf = guest_leaf(call["leaf"]) if guest else host_leaf(call["leaf"])
        regs = Regs.of({name: int(value, 16) for name, value in call["in"].items()})
        regs.rax = leaf | call["version"] << 16
        results.append(await (_tdcall(module, lp, regs) if guest else _seamcall(module, lp, regs)))
        busy = is_busy(int(results[-1].get("rax", "0x0"), 16))
    return json.dumps(results)


async def _seamcall(module: Module, lp: int, regs: Regs) -> dict[str, Any]:
    try:
        await module.seamcall(lp, regs)
    except ModuleHalt:
        return {"state": "HALT"}
    if module.lps[lp].running:
        return {"rax": "0x0"}
    return {name: hex(getattr(regs, name)) for name in ("rax", "rcx", "rdx", "r8")}


async def _tdcall(module: Module, lp: int, gprs: Regs) -> dict[str, Any]:
    vp = module.vp(module.lps[lp].running)
    try:
        exit_ = VmExit(ExitReason.TDCALL, instruction_length=TDCALL_LENGTH, gprs=gprs, vmcs=in_64_bit_mode(vp))
        host = await module.td_exit(lp, exit_)
    except ModuleHalt:
        return {"state": "HALT"}
    return {"rax": hex(vp.tdvps.gprs[0] if host is None else host.rax)}


def _apply(module: Module, event: Mapping[str, Any]) -> None:
    """An event of the prefix."""
    gprs = {name: int(value, 16) for name, value in event.get("in", {}).items()}
    if event["op"] == "seamcall":
        regs = Regs.of(gprs)
        regs.rax = host_leaf(event["leaf"])
        solo_call(module.seamcall(event["lp"], regs))
    else:
        solo_call(module.td_exit(event["lp"], VmExit(event["exit_reason"], gprs.get("qual", 0), gprs.get("gpa", 0))))
