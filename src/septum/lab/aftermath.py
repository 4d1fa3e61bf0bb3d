"""What the machine looks like after concurrent calls, in the form of the recorded interleavings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from septum.arch import sept
from septum.arch.exits import ExitReason
from septum.arch.leaves import HostLeaf, guest_leaf, host_leaf
from septum.arch.pages import PAGE_MASK, SIZE_NAMES, Level, level_index, level_size, page_info
from septum.core.run import solo_call
from septum.core.trylocks import SharexHp
from septum.lab.playback import describe, in_64_bit_mode
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import TDCALL_LENGTH, VmExit

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
LATER: Final = "later_"
"""How the names of one more call begin, made when all others have ended."""
_ATTRIBUTES: Final = 0x1110_0003_0000_0000
"""Metadata field id of ATTRIBUTES."""


def look_at(
    module: Module, shape: Mapping[str, Any], entries: Mapping[str, int], later: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The machine in the form of the recording, which tells what to look at."""
    if module.sys.halted:
        return {"halt": True}
    final: dict[str, Any] = {"locks": _locks(module)}
    first = next(iter(shape["td"]), "run")
    found = {place: entries.get(place) or address_of(module, place) for place in shape["sept_raw"]}
    final["sept_raw"] = {place: hex(module.sept[address]) for place, address in found.items() if address}
    final["td"] = {name: _td(module, TDS[name]) for name in shape["td"]}
    final["vp"] = {name: _vp(module, VPS[first][name]) for name in shape["vp"]}
    final["sept_rd"] = {place: _sept_rd(module, place) for place in shape["sept_rd"]}
    final["rdmd"] = {pa: _rdmd(module, int(pa, 16)) for pa in shape["rdmd"]}
    if "finalize" in shape:
        final["finalize"] = hex(_look(module, HostLeaf.TDH_MR_FINALIZE, rcx=TDS[first]).rax)
        final["mrtd"] = module.td(TDS[first]).tdcs.mrtd.hex()
    for name, call in later.items():
        final[name] = _later(module, call)
    return final


def later_calls(scenario: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The calls that are made afterwards, by their names in the recording, in its order.

    The recording names the leaf only. Its operands are those of the scenario's own call of that leaf; TDH.MNG.RD, where
    there is none, reads ATTRIBUTES of the scenario's TD.
    """
    names = {name: None for outcome in scenario["outcomes"] for name in outcome["final"] if name.startswith(LATER)}
    made = {event["leaf"]: event for event in scenario["prefix"] if "leaf" in event}
    made |= {call["leaf"]: {"lp": p["lp"], **call} for p in scenario["programs"] for call in p["calls"]}
    tdr = next(iter(call["in"]["rdx"] for call in made.values() if "rdx" in call["in"]), "0x0")
    made.setdefault("TDH.MNG.RD", {"leaf": "TDH.MNG.RD", "in": {"rcx": tdr, "rdx": hex(_ATTRIBUTES)}})
    found = {name: next((made[leaf] for leaf in made if _is_named(leaf, name)), None) for name in names}
    return {name: call for name, call in found.items() if call}


def _is_named(leaf: str, name: str) -> bool:
    """Whether a call is the one called ``later_MNG_RD``, ``later_guest_MR.REPORT`` and so on."""
    short = name.removeprefix(LATER)
    return leaf.startswith("TDG" if short.startswith("guest_") else "TDH") and leaf.endswith(
        "." + short.removeprefix("guest_").replace("_", ".")
    )


def _later(module: Module, call: Mapping[str, Any]) -> str:
    """The status of one more call."""
    gprs = {name: int(value, 16) for name, value in call["in"].items()}
    try:
        if not call["leaf"].startswith("TDG."):
            return describe(_look(module, host_leaf(call["leaf"]), **gprs).rax)
        vp = module.vp(module.lps[call["lp"]].running)
        regs = Regs.of({**gprs, "rax": guest_leaf(call["leaf"])})
        exit_ = VmExit(ExitReason.TDCALL, instruction_length=TDCALL_LENGTH, gprs=regs, vmcs=in_64_bit_mode(vp))
        host = solo_call(module.td_exit(call["lp"], exit_))
        return describe(vp.tdvps.gprs[0] if host is None else host.rax)
    except ModuleHalt:
        return "HALT"


def _look(module: Module, leaf: int, **operands: int) -> Regs:
    regs = Regs.of({"rax": leaf, **operands})
    solo_call(module.seamcall(IDLE_LP, regs))
    return regs


def _place(place: str) -> tuple[str, int, int]:
    name, level, gpa = place.split(":")
    return name, int(level[1:]), int(gpa, 16)


def address_of(module: Module, place: str) -> int | None:
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


def text_of(results: list[list[Any]], final: Mapping[str, Any], later: Mapping[str, Any]) -> str:
    """Results and final state as one text, without what is only for people and later calls that nobody can repeat."""
    calls = [[{k: v for k, v in call.items() if k not in ("status", "msg")} for call in calls] for calls in results]
    if "halt" in final:
        return json.dumps({"results": calls, "halt": True}, sort_keys=True)
    kept = {k: v for k, v in final.items() if not k.startswith(LATER)}
    answers = {name: _status(final[name]) for name in later if name in final}
    if "held_by_running_guest" in kept["locks"]:
        kept["locks"] = _kinds(kept["locks"])
    return json.dumps({"results": calls, "final": kept | answers}, sort_keys=True)


def _status(answer: str) -> str:
    """A recorded status of one more call: a name, a number, or why the module halted."""
    if answer.startswith("HALT"):
        return "HALT"
    return describe(int(answer, 16)) if answer.startswith("0x") else answer
