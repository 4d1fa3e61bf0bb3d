"""Calls whose locks are broken: what each does, where it starts, and the locks that the real module takes and drops.

Most come from the recordings: ``contention/lock_footprints.json`` has every lock operation of a call, and the recorded
pairs have its registers. The few paths with locks that nobody recorded that way are in :data:`FURTHER`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from septum.lab import contention

PAIRS: Final = ("pairs", "same-object", "init-and-lifecycle")
EXIT: Final = "TD exit"
"""In place of a leaf: what happens on the way out of a TD, whatever the reason."""
_KINDS: Final = {
    "TDCS.op_state_lock": "OP_STATE",
    "TDCS.secure_ept_lock": "SEPT_TREE",
    "TDCS.epoch_lock": "TD_EPOCH",
    "TDCS.rtmr_lock": "RTMR",
    "TDCS.servtd_bindings_lock": "SERVTD_BINDINGS",
    "GLOBAL.global_lock": "SYS",
    "GLOBAL.kot.lock": "KOT",
    "GLOBAL.tdmr_table": "TDMR",
    "GLOBAL.wbt_entries": "WBCACHE",
}
_MODES: Final = {"SH": "SH", "EX": "EX", "SH->EX": "EX"}
_ENTER: Final = {"leaf": "TDH.VP.ENTER", "lp": 1, "in_regs": {"rcx": "0x4000d000"}}
_BIND: Final = {"leaf": "TDH.SERVTD.BIND", "lp": 0, "in_regs": {"rcx": "0x40060000", "rdx": "0x40000000"}}
_BLOCKED: Final = (
    {"leaf": "TDH.MEM.RANGE.BLOCK", "lp": 0, "in_regs": {"rcx": "0x1", "rdx": "0x40000000"}},
    {"leaf": "TDH.MEM.TRACK", "lp": 0, "in_regs": {"rcx": "0x40000000"}},
)


def _faults(gpa: str) -> tuple[Mapping[str, Any], ...]:
    """A guest that exits again and again for the same instruction and address: it may be stepped through."""
    fault = {"td_exit": "EPT_VIOLATION", "exit_reason": 48, "lp": 1, "gpa": gpa, "qual": "0x182"}
    return (_ENTER, fault | {"tsc_advance": "0x100000"}) * 7


_TDR: Final = "+PAMT_1G/SH +PAMT_2M/SH +PAMT_4K[TDR]/SH"
_VP: Final = "+PAMT_1G/SH +PAMT_2M/SH +PAMT_4K[TDVPR]/SH +PAMT_4K[TDR]/SH +OP_STATE/SH"
_SERVICE: Final = {
    "rcx": "0xde4431fa7c86db06", "rdx": "0x9110000300000011", "r8": "0x200000", "r9": "0xffffffffffffffff",
    "r10": "0x12b3a6dd261f6e99", "r11": "0x998d8fb100ca15d5", "r12": "0x9eac75d45474c891", "r13": "0x12fc33f229b7b950",
}  # fmt: skip
_TARGET: Final = (
    f"{_TDR} +OP_STATE/SH +SERVTD_BINDINGS/SH +RTMR/SH -RTMR/SH"
    " -SERVTD_BINDINGS/SH -OP_STATE/SH -PAMT_4K[TDR]/SH -PAMT_2M/SH -PAMT_1G/SH"
)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A call, the calls before it, and the lock operations that are right for it.

    ``operations`` are ``+`` (taken), ``^`` (promoted) and ``-`` (released), a lock's kind, and the mode; where the
    recording has no releases (``releases``), those of the model don't count.
    """

    name: str
    leaf: str
    start: str
    before: tuple[Mapping[str, Any], ...]
    call: Mapping[str, Any]
    operations: tuple[str, ...]
    releases: bool = True


#: Name, start, calls before, call, lock operations; read from the module's source (the functions of the same name).
FURTHER: Final[tuple[tuple[str, str, tuple[Mapping[str, Any], ...], Mapping[str, Any], str], ...]] = (
    ("SYS.INIT", "poweron", (), {"leaf": "TDH.SYS.INIT", "lp": 0, "in_regs": {}}, "+SYS/EX -SYS/EX"),
    ("SYS.LP.INIT", "sysinit_done", (), {"leaf": "TDH.SYS.LP.INIT", "lp": 0, "in_regs": {}}, "+SYS/SH -SYS/SH"),
    (
        "SYS.CONFIG",
        "lps_init",
        (),
        {"leaf": "TDH.SYS.CONFIG", "lp": 0, "in_regs": {"rcx": "0x1000000", "rdx": "0x2", "r8": "0x20"}},
        "+SYS/EX -SYS/EX",
    ),
    ("SYS.KEY.CONFIG", "config_done", (), {"leaf": "TDH.SYS.KEY.CONFIG", "lp": 0, "in_regs": {}}, "+SYS/EX -SYS/EX"),
    (
        "SYS.TDMR.INIT",
        "ready",
        (),
        {"leaf": "TDH.SYS.TDMR.INIT", "lp": 0, "in_regs": {"rcx": "0x40000000"}},
        "+TDMR/EX -TDMR/EX",
    ),
    (
        "SERVTD.BIND",
        "prefix/all_states",
        (),
        _BIND,
        f"{_TDR} +OP_STATE/SH {_TDR} +OP_STATE/SH +SERVTD_BINDINGS/EX +RTMR/SH -RTMR/SH -SERVTD_BINDINGS/EX"
        " -OP_STATE/SH -PAMT_4K[TDR]/SH -PAMT_2M/SH -PAMT_1G/SH -OP_STATE/SH -PAMT_4K[TDR]/SH -PAMT_2M/SH -PAMT_1G/SH",
    ),
    (
        "TDG.SERVTD.RD",
        "prefix/all_states",
        (_BIND, _ENTER),
        {"tdcall": "TDG.SERVTD.RD", "lp": 1, "guest_regs": _SERVICE},
        _TARGET,
    ),
    (
        "TDG.SERVTD.WR",
        "prefix/all_states",
        (_BIND, _ENTER),
        {"tdcall": "TDG.SERVTD.WR", "lp": 1, "guest_regs": _SERVICE},
        _TARGET,
    ),
    (
        "VP.ENTER after many faults",
        "prefix/all_states",
        _faults("0x0"),
        _ENTER,
        f"{_VP} +TD_EPOCH/SH -TD_EPOCH/SH +SEPT_TREE/EX -OP_STATE/SH -SEPT_TREE/EX",
    ),
    (
        "VP.ENTER refused after many faults",
        "prefix/all_states",
        _faults("0x3000"),
        _ENTER,
        f"{_VP} +TD_EPOCH/SH -TD_EPOCH/SH +SEPT_TREE/EX -SEPT_TREE/EX -OP_STATE/SH"
        " -PAMT_4K[TDR]/SH -PAMT_4K[TDVPR]/SH -PAMT_2M/SH -PAMT_1G/SH",
    ),
    (
        "PAGE.PROMOTE of pages that cannot be merged",
        "prefix/all_states",
        _BLOCKED,
        {"leaf": "TDH.MEM.PAGE.PROMOTE", "lp": 0, "in_regs": {"rcx": "0x1", "rdx": "0x40000000"}},
        f"{_TDR} +OP_STATE/SH +SEPT_TREE/SH +SEPT_ENTRY[0]/EX +PAMT_4K[SEPT_PAGE]/EX +SEPT_ENTRY[0]/EX"
        " -SEPT_ENTRY[0]/EX -PAMT_4K[SEPT_PAGE]/EX -SEPT_ENTRY[0]/EX -SEPT_TREE/SH -OP_STATE/SH -PAMT_4K[TDR]/SH"
        " -PAMT_2M/SH -PAMT_1G/SH",
    ),
)


def recorded_pairs(shared: Path) -> Iterator[dict[str, Any]]:
    """All recorded pairs of calls."""
    for file in PAIRS:
        yield from contention.pairs_of(shared / "contention" / f"{file}.jsonl.gz")


def cases(shared: Path) -> list[Case]:
    """Every recorded call that takes or drops locks, once for each way through its interface function."""
    calls: dict[tuple[str, str], tuple[str, tuple[Any, ...], Any]] = {}
    for pair in recorded_pairs(shared):
        calls[pair["A"], pair["A_td"]] = (pair["start"], tuple(pair["before"]), pair["A_call"])
    for pair in recorded_pairs(shared):
        calls.setdefault((pair["B"], pair["B_td"]), (pair["start"], tuple(pair["before"]), pair["B_call"]))
    found: dict[tuple[str, tuple[str, ...]], Case] = {}
    for footprint in json.loads((shared / "contention" / "lock_footprints.json").read_text()):
        start, before, call = calls[footprint["op"], footprint["td"]]
        operations = tuple(_operations(footprint))
        leaf = footprint["leaf"] if footprint["leaf"].startswith("TD") else EXIT
        if leaf.startswith("TDG") and any(text[1:].startswith("PAMT") for text in operations):
            leaf = EXIT
        if operations:
            name = f"{footprint['op']} on {footprint['td']}"
            case = Case(name, leaf, start, before, call, operations, bool(footprint["trace"]))
            found.setdefault((leaf, operations), case)
    for name, start, before, call, text in FURTHER:
        leaf = call.get("leaf") or call["tdcall"]
        found[leaf, (name,)] = Case(name, leaf, start, before, call, tuple(text.split()))
    return list(found.values())


def _operations(footprint: Mapping[str, Any]) -> Iterator[str]:
    signs = {"+": "+", "-": "-", "P": "^"}
    for entry in footprint["trace"]:
        if entry["kind"] != "sept_local":  # a copy of an entry, not the entry
            yield f"{signs[entry['op']]}{_kind(entry['lock'])}/{_MODES[entry['mode']]}"
    if not footprint["trace"]:
        yield from _acquisitions(footprint)


def _acquisitions(footprint: Mapping[str, Any]) -> Iterator[str]:
    """TDH.MEM.PAGE.PROMOTE, of whose 512 entries only the first are written out in the recording."""
    taken = [f"+{_kind(entry['lock'])}/{_MODES[entry['mode']]}" for entry in footprint["acquired"]]
    left_out = footprint["n_acquired"] - len(taken)
    written = next((i for i, text in reversed(list(enumerate(taken))) if text.startswith("+SEPT_ENTRY")), 0)
    yield from taken[: written + 1]
    first = int(re.search(r"\d+", taken[written])[0]) + 1 if left_out else 0  # type: ignore[index]
    yield from (f"+SEPT_ENTRY[{index}]/EX" for index in range(first, first + left_out))
    yield from taken[written + 1 :]


def _kind(label: str) -> str:
    """What a recorded lock is called here: PAMT entries by size and page type, Secure EPT entries by index."""
    name, _, inside = label.partition("[")
    if name == "PAMT_4K":
        page = re.match("TDR|TDVPR|TDVPX|TDCX|SEPT_PAGE|REG|FREE_PAGE", inside)
        assert page is not None, label
        return f"PAMT_4K[{page[0].replace('TDVPX', 'TDCX')}]"  # which is the page type of both
    if name.startswith("SEPT_ENTRY"):
        gpa = int(inside.removeprefix("gpa=").partition(",")[0], 16)
        return f"SEPT_ENTRY[{gpa >> 12 + 9 * int(name[-1]) & 511}]"
    return _KINDS.get(name.partition("(")[0], name)
