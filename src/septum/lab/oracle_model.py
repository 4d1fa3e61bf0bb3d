"""An oracle whose TDX Module is Septum's own: ``python -m septum.lab.oracle_model``.

It is an example of an oracle for those who write one, and compares two versions of Septum with each other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, Final

from septum.arch.exits import ExitReason
from septum.arch.platform import Platform
from septum.core.run import solo_call
from septum.lab.oracle import Oracle, event_of
from septum.lab.playback import Machine, in_64_bit_mode
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import GPR_NAMES, Regs
from septum.tdx.vm_exit import VmExit

_DETAILS: Final = {
    "qual": "qualification",
    "gpa": "gpa",
    "gla": "gla",
    "intr": "interruption",
    "ilen": "instruction_length",
}
"""What requests call the details of a VM exit, and what the model calls them."""


class ModelOracle:
    """Answers with the model's module, but does not show what is inside it. It needs a process of its own."""

    machine: Machine

    def __init__(self) -> None:
        self._marks: list[int] = []

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carries out one request."""
        match request["op"]:
            case "reset":
                self.machine = Machine(Platform.from_vector_header(request["header"]))
                self._marks = []
                return {"marks": True, "without": ["oracle"]}
            case "mark":
                self._marks.append(self.machine.journal.mark())
            case "undo":
                del self._marks[request["mark"] + 1 :]
                self.machine.journal.undo(self._marks[-1])
            case "seamcall" | "td_exit" as op:
                try:
                    return self.seamcall(request) if op == "seamcall" else self.td_exit(request)
                except ModuleHalt:
                    return {"state": "module_halted"}
            case "mem":
                return {"hex": self.machine.module.memory.read(int(request["pa"], 16), request["len"]).hex()}
            case _:
                self.machine.play(event_of(request))
        return {}

    def seamcall(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A SEAMCALL: registers that changed, or the guest's if it was entered."""
        before = _numbers(request["in"])
        regs = solo_call(self.machine.module.seamcall(request["lp"], Regs.of(before)))
        if guest := self._guest(request["lp"]):
            return guest
        changed = {name: value for name, value in regs.values().items() if value != before.get(name, 0)}
        return _hex({"rax": regs.rax, **changed})

    def td_exit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A VM exit: all registers of the host, or of the guest if it goes on."""
        module, lp = self.machine.module, request["lp"]
        vp = module.vp(module.lps[lp].running)
        gprs = dict(zip(GPR_NAMES, vp.tdvps.gprs, strict=True)) | _numbers(request.get("guest_gprs_set", {}))
        is_tdcall = request["exit_reason"] == ExitReason.TDCALL
        forced = in_64_bit_mode(vp) if is_tdcall and request.get("set64", True) else {}
        given = {int(field, 16): int(value, 16) for field, value in request.get("guest_vmcs_set", {}).items()}
        details: dict[str, Any] = {_DETAILS[name]: value for name, value in _numbers(request["in"]).items()}
        exit_ = VmExit(request["exit_reason"], **details, gprs=Regs.of(gprs), vmcs=forced | given)
        regs = solo_call(module.td_exit(lp, exit_))
        if regs is None:
            return self._guest(lp)
        return {"state": "returned_to_host", **_hex(regs.values())}

    def _guest(self, lp: int) -> dict[str, Any]:
        """What is answered when a guest runs on an LP."""
        module = self.machine.module
        running = module.lps[lp].running
        if not running:
            return {}
        gprs = module.vp(running).tdvps.gprs
        return {"state": "in_td", "guest_gprs": _hex(dict(zip(GPR_NAMES, gprs, strict=True)))}


def _numbers(values: Mapping[str, str]) -> dict[str, int]:
    return {name: int(value, 16) for name, value in values.items()}


def _hex(values: Mapping[str, int]) -> dict[str, str]:
    return {name: f"{value:#x}" for name, value in values.items()}


def serve(oracle: Oracle) -> None:
    """Answers the requests of stdin on stdout until there are no more; what fails is said, and ends the service."""
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"out": dict(oracle.ask(json.loads(line)))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(ModelOracle())
