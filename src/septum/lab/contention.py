"""Which call finds which lock busy: call A stops after a lock, call B runs to its end, then A goes on.

Every recorded pair names a start state, calls to make first, and for each lock that A takes what B then answered and
how A ended. The model must give the same statuses.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from septum.arch.exits import ExitReason
from septum.arch.leaves import HostLeaf, guest_leaf, host_leaf
from septum.core.steps import PRIMITIVES, SOLO, Step, ctx
from septum.lab.conform import Runner
from septum.lab.operations import OPERATIONS, entering, on
from septum.lab.playback import describe, in_64_bit_mode
from septum.lab.vectors import json_lines
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import TDCALL_LENGTH, VmExit

IN_GUEST: Final = "in_guest"
"""In place of a lock number: A is TDH.VP.ENTER and the guest runs."""
PARTS: Final = frozenset({"A", "B", "start", "before", "A_call", "B_call", "steps"})
PARTIAL_STARTS: Final = {
    "sysinit_done": "TDH.SYS.LP.INIT",
    "lps_init": "TDH.SYS.CONFIG",
    "config_done": "TDH.SYS.KEY.CONFIG",
    "ready": "TDH.SYS.TDMR.INIT",
}
"""States on the way of the ``boot`` sequence: before the first call of this leaf."""
ENTERED: Final = ("ENTERED_TD", "INTD", "TDX_SUCCESS")
"""The recordings' words for a TDH.VP.ENTER that entered the TD."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One place of a pair where the model answers differently: after which lock, and both answers."""

    pair: str
    after: str
    recorded: str
    model: str


def pairs_of(path: Path) -> Iterator[dict[str, Any]]:
    """The pairs of a file of recorded contention.

    :raises UsageError: for a file that cannot be read, or a line that is no such pair.
    """

    def check(pair: Mapping[str, Any]) -> None:
        if not pair.keys() >= PARTS:
            raise ValueError(f"it lacks {', '.join(sorted(PARTS - pair.keys()))}")

    return json_lines(path, "recorded pair of calls", check)


def compare(runner: Runner, pair: Mapping[str, Any]) -> list[Disagreement]:
    """Plays a pair at each of its locks; ``runner`` knows the start states."""
    machine = runner.machine_on_the_way(*_start(pair["start"]))
    module, journal = machine.module, machine.journal
    name = f"{pair['A']}|{pair['B']}|{pair.get('rel', '')}"
    found = []
    for step in pair["steps"]:
        mark = journal.mark()
        for call in pair["before"]:
            _finish(call_of(module, call))
        b, a = play(module, pair["A_call"], pair["B_call"], step["k"])
        journal.undo(mark)
        if b[0] != int(step["b"], 16):
            found.append(Disagreement(name, str(step["after_lock"]), f"B {step['b_name']}", f"B {b[1]}"))
        elif "a_final" in step and a != step["a_final"] and not (a == ENTERED[0] and step["a_final"] in ENTERED):
            found.append(Disagreement(name, str(step["after_lock"]), f"A {step['a_final']}", f"A {a}"))
    return found


@dataclass(frozen=True, slots=True)
class Conflict:
    """A call that finds another busy: while A holds ``lock``, B is answered ``answer``."""

    td: str
    a: str
    b: str
    lock: str
    answer: str


def conflicts(runner: Runner, td: str, a: str) -> list[Conflict]:
    """What every operation of :mod:`septum.lab.operations` on a TD finds busy while ``a`` is somewhere in it.

    One conflict for each different answer: the first lock of A that leads to it.
    """
    machine = runner.machine_at("prefix/all_states")
    module, journal = machine.module, machine.journal
    found = []
    a_call = on(0, *OPERATIONS[td][a])
    for b, operation in OPERATIONS[td].items():
        b_call = on(1, *operation)
        seen: set[str] = set()
        for number in count(1):
            mark = journal.mark()
            for call, lp in ((a_call, 0), (b_call, 1)):
                if "tdcall" in call:
                    _finish(call_of(module, entering(lp)))
            first = call_of(module, a_call)
            locks: list[str] = []
            ended = _up_to_lock(first, number, locks)
            in_guest = ended is not None and ended[1] == ENTERED[0]
            answer = _finish(call_of(module, b_call))[1] if ended is None or in_guest else ""
            if ended is None:
                _finish(first, level=PRIMITIVES)
            journal.undo(mark)
            if "BUSY" in answer and answer not in seen:
                seen.add(answer)
                found.append(Conflict(td, a, b, "the guest runs" if in_guest else locks[-1], answer))
            if ended is not None:
                break
    return found


def play(
    module: Module, a_call: Mapping[str, Any], b_call: Mapping[str, Any], stop: int | str
) -> tuple[tuple[int, str], str]:
    """A up to its lock number ``stop`` (or into the guest), B to its end, then A: B's RAX and answer, A's answer."""
    a = call_of(module, a_call)
    ended = _finish(a) if stop == IN_GUEST else _up_to_lock(a, int(stop))
    b = _finish(call_of(module, b_call))
    if ended is None:
        ended = _finish(a, level=PRIMITIVES)
    return b, ended[1]


def _up_to_lock(
    call: Coroutine[Step, None, tuple[int, str]], number: int, locks: list[str] | None = None
) -> tuple[int, str] | None:
    """Runs a call until it has taken ``number`` locks (adds them to ``locks``); its answer if it ends before."""
    level, ctx.level = ctx.level, PRIMITIVES
    try:
        while number:
            step = call.send(None)
            if step.kind == "acquired":
                number -= 1
                if locks is not None:
                    locks.append(str(step.what))
    except StopIteration as end:
        answer: tuple[int, str] = end.value
        return answer
    finally:
        ctx.level = level
    return None


def _finish(call: Coroutine[Step, None, tuple[int, str]], *, level: int = SOLO) -> tuple[int, str]:
    before, ctx.level = ctx.level, level
    try:
        while True:
            call.send(None)
    except StopIteration as end:
        answer: tuple[int, str] = end.value
        return answer
    finally:
        ctx.level = before


# -- calls, in the three forms of the recordings ---------------------------------------------------------------------


async def call_of(module: Module, call: Mapping[str, Any]) -> tuple[int, str]:
    """A recorded call: RAX as the recording has it, and the answer in its words."""
    lp = call["lp"]
    try:
        if "leaf" in call:
            return await _seamcall(module, lp, call)
        if "tsc_advance" in call:
            module.hardware.inputs.tsc += int(call["tsc_advance"], 16)
        return await _exit(module, lp, call)
    except ModuleHalt as halt:
        return -1, f"HALT: {halt}"


async def _seamcall(module: Module, lp: int, call: Mapping[str, Any]) -> tuple[int, str]:
    regs = _registers(call["in_regs"])
    regs.rax = _leaf_of(call["leaf"]) | call.get("version", 0) << 16
    await module.seamcall(lp, regs)
    return (0, "ENTERED_TD") if module.lps[lp].running else (regs.rax, describe(regs.rax))


def _leaf_of(name: str) -> HostLeaf:
    """A host leaf by its ABI name; the recordings leave out PHYMEM and MNG from some."""
    short = name.removeprefix("TDH")
    return next((leaf for leaf in HostLeaf if leaf.abi_name.endswith(short)), None) or host_leaf(name)


async def _exit(module: Module, lp: int, call: Mapping[str, Any]) -> tuple[int, str]:
    vp = module.vp(module.lps[lp].running)
    if "tdcall" in call:
        regs = _registers(call["guest_regs"])
        regs.rax = guest_leaf(call["tdcall"]) | call.get("version", 0) << 16
        exit_ = VmExit(ExitReason.TDCALL, instruction_length=TDCALL_LENGTH, gprs=regs, vmcs=in_64_bit_mode(vp))
    else:
        part = {name: int(call.get(name, "0x0"), 16) for name in ("qual", "gpa", "intr")}
        exit_ = VmExit(call["exit_reason"], part["qual"], part["gpa"], interruption=part["intr"])
    host = await module.td_exit(lp, exit_)
    if host is not None:
        return host.rax, f"td_exit:{_td_exit_name(host.rax)}"
    rax = vp.tdvps.gprs[0]
    return (rax, f"guest:{describe(rax)}") if "tdcall" in call else (0, "RESUMED_IN_TD")


def _td_exit_name(rax: int) -> str:
    reason = f"/exit_reason={rax & 0xFFFF}" if rax & 0xFFFF else ""
    return describe(rax & ~0xFFFF_FFFF) + reason


def _registers(texts: Mapping[str, str]) -> Regs:
    return Regs.of({name: int(value, 16) for name, value in texts.items()})


def _start(state: str) -> tuple[str, str | None]:
    leaf = PARTIAL_STARTS.get(state)
    return ("boot", leaf) if leaf else (state, None)
