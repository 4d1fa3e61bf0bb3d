"""An oracle that is wrong on purpose: the model's module with the one defect that the command line names.

python wrong_oracle.py [DEFECT]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.lab.oracle_model import ModelOracle, serve

BUSY = Status.TDX_OPERAND_BUSY
CODE = 0xFFFF_FFFF_0000_0000


class WrongOracle(ModelOracle):
    """Answers every request as the model does, but for one defect."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect = defect
        self.resets = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        out = super().ask(request)
        if request["op"] == "reset":
            self.resets += 1
            if self.defect == "no marks":
                return {}
            if self.defect == "host only":
                return {"marks": True, "without": ["td_exit", "set_tsc", "set_msr", "oracle"]}
        if self.defect == "host only" and request["op"] in ("td_exit", "set_tsc", "set_msr", "oracle"):
            raise AssertionError(f"{request['op']} was ruled out")
        return out

    def seamcall(self, request: Mapping[str, Any]) -> dict[str, Any]:
        leaf = int(request["in"]["rax"], 16) & 0xFFFF
        td = self.machine.module.td(int(request["in"].get("rcx", "0"), 16))
        epoch = td.tdcs.td_epoch
        out = super().seamcall(request)
        rax = int(out.get("rax", "0"), 16)
        match self.defect:
            case "operand" if leaf == HostLeaf.TDH_MEM_PAGE_AUG and rax & CODE == BUSY:
                out["rax"] = f"{BUSY | Operand.SEPT_ENTRY:#x}"
            case "epoch" if leaf == HostLeaf.TDH_MEM_TRACK and rax == 0:
                td.tdcs.td_epoch = epoch
            case "register" | "no marks" if leaf == HostLeaf.TDH_VP_FLUSH and rax == 0:
                out["r11"] = "0x1"
            case "early" if leaf == HostLeaf.TDH_SYS_LP_INIT and rax == 0:
                out["rax"] = "0x1"
            case "register, then death" if leaf == HostLeaf.TDH_VP_FLUSH and rax == 0:
                out["r11"] = "0x1"
            case "register, then death" if leaf == HostLeaf.TDH_EXPORT_PAUSE:
                print("cannot go on", file=sys.stderr, flush=True)
                os._exit(3)
            case "memory" if leaf == HostLeaf.TDH_SYS_INFO and rax == 0:
                memory, pa = self.machine.module.memory, int(request["in"]["rcx"], 16)
                memory.write(pa + 7, bytes([memory.read(pa + 7, 1)[0] ^ 1]))
            case "moody" if leaf == HostLeaf.TDH_SYS_INFO:
                out["r12"] = hex(os.urandom(1)[0] + 1)
        return out


if __name__ == "__main__":
    serve(WrongOracle(" ".join(sys.argv[1:])))
