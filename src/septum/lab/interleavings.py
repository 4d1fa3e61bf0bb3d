"""Every interleaving of a few concurrent calls, against what the real module can produce.

A recorded scenario is a start state, a program of calls for each of two or three logical processors, and the complete
set of outcomes that the real TDX Module 1.5.01 produces over all interleavings at one granularity. The explorer over
the model must find exactly that set: results of all calls, and what the machine looks like afterwards, module halts
and leaked lock words included.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from septum.arch import sept
from septum.arch.exits import ExitReason
from septum.arch.leaves import HostLeaf, guest_leaf, host_leaf
from septum.arch.pages import PAGE_MASK, SIZE_NAMES, Level, level_index, level_size, page_info
from septum.arch.status import is_busy
from septum.core.explore import Explorer
from septum.core.run import solo_call
from septum.core.steps import ATOMICS, FINE, PRIMITIVES, Program, Task, step
from septum.core.trylocks import SharexHp
from septum.lab.conform import Runner
from septum.lab.playback import Machine, in_64_bit_mode
from septum.lab.vectors import json_lines
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import TDCALL_LENGTH, VmExit

LEVELS: Final = {"op": PRIMITIVES, "atomic": ATOMICS, "fine": FINE}
"""Where the recordings cut calls, and the granularity that does so here."""
IDLE_LP: Final = 3
"""The logical processor from which the machine is looked at afterwards."""
TDS: Final = {"run": 0x40000000, "build": 0x40060000, "wb": 0x40107000}
"""TDs of the start state ``prefix/all_states``: the recordings' names, and the pages of their TDRs."""
VPS: Final = {
    "run": {"vp0": 0x40007000, "vp1": 0x4000D000},
    "build": {"vp0": 0x40067000, "vp1": 0x4006D000},
    "wb": {"vp0": 0x4010E000},
}
"""Virtual processors of those TDs, and the pages of their TDVPRs."""


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
    recorded = {_text(outcome["results"], outcome["final"]) for outcome in scenario["outcomes"]}
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
    entries = {place: address for place in shape.get("sept_raw", ()) if (address := _address(module, place))}

    def observe(results: list[Any]) -> str:
        lists = [json.loads(result or "[]") for result in results]
        return _text(lists, _final(module, shape, entries))

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


# -- what the machine looks like afterwards --------------------------------------------------------------------------


def _final(module: Module, shape: Mapping[str, Any], entries: Mapping[str, int]) -> dict[str, Any]:
    """The machine in the form of the recording, which tells what to look at."""
    if module.sys.halted:
        return {"halt": True}
    final: dict[str, Any] = {"locks": _locks(module)}
    first = next(iter(shape["td"]), "run")
    found = {place: entries.get(place) or _address(module, place) for place in shape["sept_raw"]}
    final["sept_raw"] = {place: hex(module.sept[address]) for place, address in found.items() if address}
    final["td"] = {name: _td(module, TDS[name]) for name in shape["td"]}
    final["vp"] = {name: _vp(module, VPS[first][name]) for name in shape["vp"]}
    final["sept_rd"] = {place: _sept_rd(module, place) for place in shape["sept_rd"]}
    final["rdmd"] = {pa: _rdmd(module, int(pa, 16)) for pa in shape["rdmd"]}
    if "finalize" in shape:
        final["finalize"] = hex(_look(module, HostLeaf.TDH_MR_FINALIZE, rcx=TDS[first]).rax)
        final["mrtd"] = module.td(TDS[first]).tdcs.mrtd.hex()
    return final


def _look(module: Module, leaf: HostLeaf, **operands: int) -> Regs:
    regs = Regs.of({"rax": leaf, **operands})
    solo_call(module.seamcall(IDLE_LP, regs))
    return regs


def _place(place: str) -> tuple[str, int, int]:
    name, level, gpa = place.split(":")
    return name, int(level[1:]), int(gpa, 16)


def _address(module: Module, place: str) -> int | None:
    """Where a Secure EPT entry lies, also behind blocked tables; None when no table leads there."""
    name, level, gpa = _place(place)
    root = module.td(TDS[name]).tdcs.eptp
    table, at = root & PAGE_MASK, root >> 3 & 7
    while at > level:
        entry = module.sept[table + 8 * level_index(gpa, at)]
        if sept.is_free(entry) or sept.is_leaf(entry):
            return None
        table, at = entry & PAGE_MASK, at - 1
    return table + 8 * level_index(gpa, at)


def _td(module: Module, tdr: int) -> dict[str, Any]:
    td = module.td(tdr)
    return {
        "td_epoch": td.tdcs.td_epoch,
        "refcount": list(td.tdcs.refcount),
        "chldcnt": td.tdr.chldcnt,
        "num_vcpus": td.tdcs.num_vcpus,
        "num_assoc_vcpus": td.tdcs.num_assoc_vcpus,
    }


def _vp(module: Module, tdvpr: int) -> dict[str, Any]:
    tdvps = module.vp(tdvpr).tdvps
    return {"state": tdvps.vcpu_state, "assoc_lpid": tdvps.assoc_lpid, "vcpu_epoch": tdvps.vcpu_epoch}


def _sept_rd(module: Module, place: str) -> list[str]:
    name, level, gpa = _place(place)
    regs = _look(module, HostLeaf.TDH_MEM_SEPT_RD, rcx=page_info(gpa, level), rdx=TDS[name])
    return [hex(regs.rax), hex(regs.rcx), hex(regs.rdx)]


def _rdmd(module: Module, pa: int) -> list[str]:
    regs = _look(module, HostLeaf.TDH_PHYMEM_PAGE_RDMD, rcx=pa)
    return [hex(value) for value in (regs.rax, regs.rcx, regs.rdx, regs.r8, regs.r9, regs.r10)]


def _locks(module: Module) -> dict[str, list[str]]:
    """Lock words that do not fit their holders (``leak``), and those with the priority bit (``hp_set``), by kind."""
    held: Counter[Any] = Counter()
    for lp in module.lps:
        if lp.running:
            owner = module.pamt_entry(lp.running).owner
            held.update([lp.running, owner])
            held.update(lp.running & -level_size(level) & PAGE_MASK | level for level in (Level.PD, Level.PDPT))
    leak, hp_set = [], []
    for key, word in sorted(dict.items(module.locks), key=str):
        kind = f"PAMT_{SIZE_NAMES[key & 7]}" if isinstance(key, int) else "PHYS"
        if word & SharexHp.HP:
            hp_set.append(kind)
        if word & ~SharexHp.HP != held[key] * SharexHp.READER:
            leak.append(f"{kind} {word:#x}")
    return {"leak": sorted(leak), "hp_set": sorted(hp_set)}


def _kinds(locks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Recorded locks in the form of :func:`_locks`; bits in Secure EPT entries show in ``sept_raw``."""
    leak = [f"{_kind(text)} {text.partition('word=')[2].partition(' ')[0]}" for text in locks["leak"]]
    hp_set = [_kind(text) for text in locks["hp_set"] if not text.startswith("SEPT_ENTRY")]
    return {"leak": sorted(leak), "hp_set": sorted(hp_set)}


def _kind(text: str) -> str:
    return re.split(r"[\[(]", text)[0]


def _text(results: list[list[Any]], final: Mapping[str, Any]) -> str:
    """Results and final state as one text, without what is only for people."""
    calls = [[{k: v for k, v in call.items() if k not in ("status", "msg")} for call in calls] for calls in results]
    if "halt" in final:
        return json.dumps({"results": calls, "halt": True}, sort_keys=True)
    kept = {k: v for k, v in final.items() if not k.startswith("later_")}
    if "held_by_running_guest" in kept["locks"]:
        kept["locks"] = _kinds(kept["locks"])
    return json.dumps({"results": calls, "final": kept}, sort_keys=True)
