"""Operations for the contention matrix: calls that the TDs of ``prefix/all_states`` are ready for.

TD ``run`` can be entered and has pages in every state; TD ``build`` is not finalized yet. Each operation is a call by
the first of two logical processors; :func:`on` turns it into the same call by another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

RUN, BUILD = 0x40000000, 0x40060000
VCPUS: Final = (0x40007000, 0x4000D000)
"""TDVPRs of the two VCPUs of TD ``run`` that are associated with LP 0 and LP 1."""
FREE_PAGE: Final = 0x40028000
"""A 4 KiB page that belongs to nobody; so do the ones after it."""
_OP_STATE_FIELD: Final = 0x1110000300000000
_HP_TIMEOUT_FIELD: Final = 0x9110000300000011
_VCPU_FIELD: Final = 0x1010000300000000

#: By TD, and by name: leaf and registers. Names are the leaf's without its first word, and what it acts on.
OPERATIONS: Final[Mapping[str, Mapping[str, tuple[str, Mapping[str, int]]]]] = {
    "run": {
        "PAGE.AUG/4K": ("TDH.MEM.PAGE.AUG", {"rcx": 0x3000, "rdx": RUN, "r8": FREE_PAGE}),
        "PAGE.AUG/2M": ("TDH.MEM.PAGE.AUG", {"rcx": 0x40800001, "rdx": RUN, "r8": 0x51000000}),
        "PAGE.REMOVE/4K": ("TDH.MEM.PAGE.REMOVE", {"rcx": 0x1000, "rdx": RUN}),
        "PAGE.REMOVE/2M": ("TDH.MEM.PAGE.REMOVE", {"rcx": 0x40200001, "rdx": RUN}),
        "PAGE.RELOCATE": ("TDH.MEM.PAGE.RELOCATE", {"rcx": 0x1000, "rdx": RUN, "r8": FREE_PAGE}),
        "PAGE.DEMOTE": ("TDH.MEM.PAGE.DEMOTE", {"rcx": 0x40200001, "rdx": RUN, "r8": FREE_PAGE}),
        "SEPT.ADD": ("TDH.MEM.SEPT.ADD", {"rcx": 0x40800001, "rdx": RUN, "r8": FREE_PAGE}),
        "SEPT.RD": ("TDH.MEM.SEPT.RD", {"rcx": 0x0, "rdx": RUN}),
        "SEPT.REMOVE": ("TDH.MEM.SEPT.REMOVE", {"rcx": 0x40600001, "rdx": RUN}),
        "RANGE.BLOCK/4K": ("TDH.MEM.RANGE.BLOCK", {"rcx": 0x0, "rdx": RUN}),
        "RANGE.BLOCK/2M": ("TDH.MEM.RANGE.BLOCK", {"rcx": 0x40000001, "rdx": RUN}),
        "RANGE.UNBLOCK": ("TDH.MEM.RANGE.UNBLOCK", {"rcx": 0x1000, "rdx": RUN}),
        "TRACK": ("TDH.MEM.TRACK", {"rcx": RUN}),
        "MEM.RD": ("TDH.MEM.RD", {"rcx": 0x0, "rdx": RUN}),
        "MNG.RD": ("TDH.MNG.RD", {"rcx": RUN, "rdx": _OP_STATE_FIELD}),
        "MNG.WR": ("TDH.MNG.WR", {"rcx": RUN, "rdx": _HP_TIMEOUT_FIELD, "r8": 2_000_000, "r9": (1 << 64) - 1}),
        "MNG.VPFLUSHDONE": ("TDH.MNG.VPFLUSHDONE", {"rcx": RUN}),
        "MNG.KEY.FREEID": ("TDH.MNG.KEY.FREEID", {"rcx": RUN}),
        "VP.ENTER": ("TDH.VP.ENTER", {"rcx": VCPUS[0]}),
        "VP.FLUSH": ("TDH.VP.FLUSH", {"rcx": VCPUS[0]}),
        "VP.RD": ("TDH.VP.RD", {"rcx": VCPUS[0], "rdx": _VCPU_FIELD}),
        "PHYMEM.PAGE.RDMD/TDR": ("TDH.PHYMEM.PAGE.RDMD", {"rcx": RUN}),
        "PHYMEM.PAGE.RDMD/page": ("TDH.PHYMEM.PAGE.RDMD", {"rcx": 0x4001F000}),
        "PHYMEM.CACHE.WB": ("TDH.PHYMEM.CACHE.WB", {"rcx": 0x0}),
        "guest ACCEPT/4K": ("TDG.MEM.PAGE.ACCEPT", {"rcx": 0x2000}),
        "guest ATTR.RD": ("TDG.MEM.PAGE.ATTR.RD", {"rcx": 0x0}),
        "guest RTMR.EXTEND": ("TDG.MR.RTMR.EXTEND", {"rcx": 0x0, "rdx": 0x2}),
    },
    "build": {
        "PAGE.ADD": ("TDH.MEM.PAGE.ADD", {"rcx": 0x3000, "rdx": BUILD, "r8": 0x40081000, "r9": 0x1020000}),
        "SEPT.ADD": ("TDH.MEM.SEPT.ADD", {"rcx": 0x400001, "rdx": BUILD, "r8": 0x40081000}),
        "MR.EXTEND": ("TDH.MR.EXTEND", {"rcx": 0x0, "rdx": BUILD}),
        "MR.FINALIZE": ("TDH.MR.FINALIZE", {"rcx": BUILD}),
        "VP.CREATE": ("TDH.VP.CREATE", {"rcx": 0x40083000, "rdx": BUILD}),
        "VP.ADDCX": ("TDH.VP.ADDCX", {"rcx": 0x40085000, "rdx": 0x4007A000}),
        "VP.INIT": ("TDH.VP.INIT", {"rcx": 0x4007B000, "rdx": 0x7}),
        "VP.FLUSH": ("TDH.VP.FLUSH", {"rcx": 0x40067000}),
        "MNG.RD": ("TDH.MNG.RD", {"rcx": BUILD, "rdx": _OP_STATE_FIELD}),
        "TRACK": ("TDH.MEM.TRACK", {"rcx": BUILD}),
        "SERVTD.PREBIND": ("TDH.SERVTD.PREBIND", {"rcx": BUILD, "rdx": 0x1060000}),
    },
}


def on(lp: int, leaf: str, operands: Mapping[str, int]) -> dict[str, Any]:
    """The call by logical processor ``lp``, in the form of the recordings. A VCPU is entered where it belongs."""
    if leaf == "TDH.VP.ENTER":
        operands = {"rcx": VCPUS[lp]}
    registers = {name: hex(value) for name, value in operands.items()}
    if leaf.startswith("TDG."):
        return {"tdcall": leaf, "lp": lp, "guest_regs": registers}
    return {"leaf": leaf, "lp": lp, "in_regs": registers}


def entering(lp: int) -> dict[str, Any]:
    """The guest call that must come before a TDCALL: TDH.VP.ENTER of the VCPU that belongs to ``lp``."""
    return on(lp, "TDH.VP.ENTER", {"rcx": VCPUS[lp]})
