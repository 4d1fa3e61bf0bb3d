"""Small files of vectors for tests: the header of a machine with one LP, and sequences of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADER: dict[str, Any] = {
    "op": "header",
    "source": "a test",
    "cmrs": [["0x40000000", "0x40000000"]],
    "tdmrs": [],
    "lp_package": [0],
    "x2apic_ids": [0],
    "max_pa": 52,
    "keyid_bits": 6,
    "num_mktme_keyids": 31,
    "num_tdx_keyids": 32,
    "global_private_hkid": 32,
    "seamrr": ["0x200000000", "0x8000000"],
    "smrr": ["0x3f800000", "0x800000"],
    "tsc_hz": 2000000000,
    "wbinvd_blocks": 16,
}
INIT, LP_INIT, LP_SHUTDOWN = 0x21, 0x23, 0x2C
NOT_PENDING = 0xC000_0500_0000_0000


def call(leaf: int, rax: int = 0, *, name: str = "TDH.SYS.INIT", **registers: int) -> dict[str, Any]:
    """A SEAMCALL that left ``rax`` and changed no other register."""
    given = {"rax": hex(leaf), **{register: hex(value) for register, value in registers.items()}}
    return {"op": "seamcall", "lp": 0, "leaf": name, "version": 0, "in": given, "out": {"rax": hex(rax)}}


def sequence(name: str, start: str, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a sequence."""
    begin = {"op": "seq_begin", "id": name, "from": start, "uses_td_exit": False}
    return [begin, *events, {"op": "seq_end", "id": name, "events": len(events)}]


def text(*sequences: list[dict[str, Any]]) -> str:
    """The text of a file."""
    lines = [HEADER, *(line for part in sequences for line in part)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def write(path: Path, *sequences: list[dict[str, Any]]) -> Path:
    """A file with these sequences."""
    path.write_text(text(*sequences), encoding="utf-8")
    return path
