"""Counts of a log's events, what they say of the host, and what is suspicious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from errno import ENOSPC
from functools import cache
from pathlib import Path
from typing import Any, Final

from septum.arch import leaves, status
from septum.arch.errors import UsageError
from septum.arch.exits import exit_reason_name
from septum.arch.metadata.field_id import Context
from septum.arch.metadata.order import locate
from septum.lab.ingest import formats
from septum.lab.ingest.faults import SUSPECTS, Faults
from septum.lab.ingest.formats import REGISTERS, SEAMCALL, TD_EXIT
from septum.lab.ingest.lines import Line, take_apart
from septum.lab.vectors import open_text

KEPT: Final = 1000
"""Errors that are kept one by one; all are counted."""
STORM: Final = 3
"""The same error of one function so often is a storm."""
_KIB_IN_PAGE: Final = 4
Progress = Callable[[str], object]


@dataclass(slots=True)
class Log:
    """What was found in logs. ``events`` are lines that were understood; a line of a bpftrace map counts once.

    ``by_leaf`` and ``by_status`` count SEAMCALL errors and TD exits; ``errors`` has the first of them in detail,
    ``host`` what the kernel said of the machine.
    """

    events: int = 0
    lines: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_leaf: Counter[str] = field(default_factory=Counter)
    by_status: Counter[str] = field(default_factory=Counter)
    errors: list[dict[str, Any]] = field(default_factory=list)
    host: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    by_pair: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Errors by interface function and 64-bit status."""

    def record(self) -> dict[str, Any]:
        """The log as one JSON object."""
        counts = {name: dict(getattr(self, name)) for name in ("by_kind", "by_leaf", "by_status", "host", "faults")}
        return {"events": self.events, "lines": self.lines, **counts, "errors": self.errors, "findings": self.findings}

    def find(self, kind: str, text: str, where: str, **details: object) -> None:
        """Notes something suspicious; ``where`` is a file and a line of it."""
        self.findings.append({"kind": kind, "text": text, "where": where, **details})


def ingest(paths: Iterable[Path], *, progress: Progress = lambda text: None) -> Log:
    """Reads logs, compressed ones too, a line at a time.

    :raises UsageError: for a file that cannot be read, or in which no line is one that Septum knows.
    """
    log = Log()
    for path in paths:
        _Reader(log, path, progress).read()
    _judge_errors(log)
    return log


class _Reader:
    """One file on its way into a log."""

    def __init__(self, log: Log, path: Path, progress: Progress) -> None:
        self.log, self.path, self.progress = log, path, progress
        self.faults = Faults()

    def read(self) -> None:
        before = self.log.events
        for line in self._lines():
            self.log.lines += 1
            self.log.events += self._see(line)
            if not self.log.lines % 50_000:
                self.progress(f"{self.path.name}: {self.log.lines:,} lines, {self.log.events:,} events")
        if self.log.events == before:
            raise UsageError(
                f"{self.path}: no line of it is one that a TDX host writes; give output of dmesg, ftrace or bpftrace"
            )
        self.faults.close()
        self._judge_faults()

    def _lines(self) -> Iterator[Line]:
        number = 0
        try:
            with open_text(self.path) as file:
                if hasattr(file, "reconfigure"):
                    file.reconfigure(errors="replace")
                for raw in file:
                    number += 1
                    yield take_apart(number, raw)
        except FileNotFoundError:
            raise UsageError(f"{self.path}: there is no such file") from None
        except IsADirectoryError:
            raise UsageError(f"{self.path}: this is a folder; name the files in it") from None
        except (OSError, EOFError) as error:
            raise UsageError(
                f"{self.path}: line {number + 1}: cannot be read, the file may have been cut off ({error})"
            ) from None

    def _see(self, line: Line) -> bool:
        """Takes one line; whether it was understood."""
        if line.event.startswith("kvm_") and self.faults.see(line):
            self.log.by_kind[line.event] += 1
            return True
        recognised = formats.recognise(line.text)
        if recognised is None:
            return False
        kind, found = recognised
        self.log.by_kind[kind] += 1
        if kind in (SEAMCALL, TD_EXIT):
            self._error(line, kind, found)
        elif kind == REGISTERS:
            self._more(line)
        elif kind == "poison":
            self._poison(line, found)
        elif handler := _HOST_FACTS.get(kind):
            handler(self.log.host, found)
        if kind in _REMARKS:
            told = {name: _IN_REMARKS.get(name, "{}").format(text) for name, text in found.items()}
            self.log.find(kind, _REMARKS[kind].format_map(_Blank(told)), self._where(line))
        return True

    def _error(self, line: Line, kind: str, found: Mapping[str, str]) -> None:
        leaf, code = formats.leaf_of(found) if kind == SEAMCALL else 0, formats.status_of(found)
        name, number = _leaf(leaf)
        times = int(found.get("count", "1"))
        told = status.decode(code)
        log = self.log
        log.by_leaf[name] += times
        log.by_status[told.name] += times
        log.by_pair[name, code] += times
        if kind == TD_EXIT and "hkid_hex" in found:
            hkid, base = int(found["hkid_hex"], 16), int(found["hkid_pa"], 16)
            log.host["hkid"] = hkid
            if hkid and base:
                log.host["hkid_shift"] = (base // hkid).bit_length() - 1
        if len(log.errors) < KEPT:
            log.errors.append(
                {
                    "where": self._where(line), "seconds": line.seconds, "leaf": number, "leaf_name": name,
                    "status": f"{code:#018x}", "name": told.name, "operand": told.operand, "detail": told.details,
                    "meaning": told.detail_text, "recoverable": told.recoverable, "times": times,
                }
            )  # fmt: skip
            self._more(line)

    def _more(self, line: Line) -> None:
        """Registers of the last error, in its own line or the next ones; what an id in RDX names."""
        if not self.log.errors:
            return
        error = self.log.errors[-1]
        registers = error.setdefault("registers", {})
        registers |= formats.registers_in(line.text)
        if error["leaf_name"] in _READS_METADATA and "rdx" in registers:
            context = _READS_METADATA[error["leaf_name"]]
            element = locate(context, int(registers["rdx"], 16))
            if element is not None:
                error["field"] = element.field.name

    def _poison(self, line: Line, found: Mapping[str, str]) -> None:
        """A machine check: which physical page, and which page of the guest it backs, if the trace tells."""
        host = self.log.host
        if "pa" not in found:
            return
        pa = int(found["pa"], 16)
        if "hkid" in host and "hkid_shift" in host:
            pa &= ~(host["hkid"] << host["hkid_shift"])
        poisoned = {"hpa": hex(pa & -4096)}
        if (gfn := self.faults.backs.get(pa >> 12)) is not None:
            poisoned["gfn"] = hex(gfn)
        host["poisoned"] = poisoned

    def _judge_faults(self) -> None:
        faults = self.faults
        if not faults.events:
            return
        for name in ("faults", "retries", "zaps", "conversions", "entry_errors"):
            self.log.faults[name] = self.log.faults.get(name, 0) + getattr(faults, name)
        for vcpu, what, run in faults.storms:
            self.log.find(
                "fault-storm",
                f"{vcpu} faults {run.count} times in a row at {what} {run.value:#x}: "
                f"from the {SUSPECTS}th on the TDX Module suspects a zero-step attack, and TDH.VP.ENTER takes the "
                "S-EPT tree lock exclusively",
                f"{self.path}:{run.line}", vcpu=vcpu, at=what, value=hex(run.value), count=run.count,
            )  # fmt: skip
        for gpa, vcpus in faults.shared_gpas():
            self.log.find(
                "shared-storm",
                f"{', '.join(vcpus)} all fault again and again on GPA {gpa:#x}: they may keep each other busy",
                str(self.path), gpa=hex(gpa), vcpus=vcpus,
            )  # fmt: skip
        retries, vcpu, gfn, line = faults.worst_retries
        if retries >= SUSPECTS:
            self.log.find(
                "local-retries",
                f"{vcpu} asked {retries} times more for the mapping of gfn {gfn:#x} before it went on: something kept "
                "the entry frozen, or the S-EPT busy",
                f"{self.path}:{line}", vcpu=vcpu, gfn=hex(gfn), retries=retries,
            )  # fmt: skip
        if faults.entry_errors:
            self.log.find(
                "entry-errors",
                f"TDH.VP.ENTER returned without a VM exit {_times(faults.entry_errors)} of {faults.exits.total()}: "
                "TDX_OPERAND_BUSY there is normal beside TDH.MEM.TRACK, or under suspicion of zero-stepping",
                str(self.path), count=faults.entry_errors,
            )  # fmt: skip

    def _where(self, line: Line) -> str:
        return f"{self.path}:{line.number}"


class _Blank(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


_IN_REMARKS: Final = {"why": ": {}", "errno": ", errno {}"}
"""How parts of a message that may be absent stand in a remark."""
_READS_METADATA: Final = {"TDH.SYS.RD": Context.SYS, "TDH.MNG.RD": Context.TD, "TDH.MNG.WR": Context.TD}
"""Functions with a metadata field id in RDX."""
#: What some messages mean, for those who do not know the code that prints them.
_REMARKS: Final[Mapping[str, str]] = {
    "not-in-vmx": "CPU {cpu} was not in VMX operation: the module can be called only after KVM has enabled it there",
    "internal-error": "KVM gave up on a vCPU: KVM_EXIT_INTERNAL_ERROR, suberror {suberror}",
    "not-accepted": "the guest used GPA 0x{gpa} before it accepted it, on vCPU {vcpu}; KVM ends the VM",
    "hkid-leaked": "{leaf} failed and HKID {hkid} is lost until the next boot",
    "kvm-warning": "KVM warned at {place}: a SEAMCALL failed where KVM holds that it cannot",
    "poison": "a machine check hit memory that a TD may own: private memory was touched with another KeyID",
    "init-failed": "TDX was not initialised{why}{errno}",
}


def _module(host: dict[str, Any], found: Mapping[str, str]) -> None:
    if "major" in found:
        host["module"] = f"{found['major']}.{found['minor']} b{found['build']}"
    if "version" in found:
        host["module"] = found["version"]
    if "build" in found:
        host["build"] = int(found["build"])
    if "date" in found:
        host["build_date"] = int(found["date"])
    if "date_hex" in found:
        host["build_date"] = int(found["date_hex"], 16)
    if "features0" in found:
        host["features0"] = int(found["features0"], 16)


def _pamt(host: dict[str, Any], found: Mapping[str, str]) -> None:
    if "pages" in found:
        host["pamt_pages"] = int(found["pages"])
    host["pamt_kb"] = int(found["kb"]) if "kb" in found else int(found["pages"]) * _KIB_IN_PAGE


_EXHAUSTED: Final = "reserved areas exhausted"
"""``tdmr_add_rsvd_area`` says so when it returns -ENOSPC."""


def _failed(host: dict[str, Any], found: Mapping[str, str]) -> None:
    if "errno" in found:
        host["errno"] = int(found["errno"])
    if "why" in found:
        host.setdefault("error", found["why"])
        if found["why"].endswith(_EXHAUSTED):
            host.setdefault("errno", -ENOSPC)


_HOST_FACTS: Final[Mapping[str, Callable[[dict[str, Any], Mapping[str, str]], None]]] = {
    "keyids": lambda host, found: host.update(keyids=[int(found["first"]), int(found["end"])]),
    "module": _module,
    "pamt": _pamt,
    "cmr": lambda host, found: host.setdefault("cmrs", []).append([f"0x{found['base']}", f"0x{found['end']}"]),
    "initialized": lambda host, found: host.update(initialized=True),
    "init-failed": _failed,
    "kvm-warning": lambda host, found: host.update(warnings=host.get("warnings", 0) + 1),
}


def _leaf(leaf: int | str) -> tuple[str, int | None]:
    """A leaf's name in the ABI, and its number."""
    if isinstance(leaf, int):
        return leaves.leaf_name(leaf), leaf
    try:
        known = leaves.host_leaf(leaf)
    except UsageError:
        return leaf, None
    return known.abi_name, known.value


def _judge_errors(log: Log) -> None:
    """What the counts say, when all files are read."""
    for (leaf, code), count in log.by_pair.most_common():
        told = status.decode(code)
        brief = f"{told.name}({told.operand})" if told.operand else told.name
        where = next((e["where"] for e in log.errors if (e["leaf_name"], int(e["status"], 16)) == (leaf, code)), "")
        details = {"leaf": leaf, "status": f"{code:#018x}", "count": count}
        if status.is_busy(code):
            log.find("busy", _busy(leaf, brief, count), where, **details)
        elif told.fatal:
            reason = f", {exit_reason_name(code & 0xFFFF)}" if code & 0xFFFF else ""
            text = f"{leaf} returned {brief} {_times(count)}: the TD is dead{reason}"
            log.find("td-fatal", text, where, **details)
        elif count >= STORM:
            text = f"{leaf} failed {_times(count)} with {brief}: whoever calls goes on although it cannot succeed"
            log.find("error-storm", text, where, **details)
        else:
            more = f": {told.detail_text}" if told.detail_text and not told.operand else ""
            log.find(
                "error", f"{leaf} failed with {brief}{more}", where, leaf=leaf, status=f"{code:#018x}", count=count
            )


@cache
def _holders() -> Mapping[tuple[str, str], set[str]]:
    """By the model's contention matrix: operations that can hold what another is told is busy."""
    from septum.lab.matrix import model_matrix  # noqa: PLC0415 - takes a second, and most logs have no BUSY

    found: dict[tuple[str, str], set[str]] = {}
    for conflict in model_matrix():
        found.setdefault((conflict.b.partition("/")[0], conflict.answer), set()).add(conflict.a.partition("/")[0])
    return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _busy(leaf: str, brief: str, count: int) -> str:
    """Who could have held the lock."""
    holders = _holders().get((leaf.removeprefix("TDH.").removeprefix("MEM."), brief))
    if not holders:
        return f"{leaf} was busy {_times(count)} with {brief}: no pair of calls in the model gives that"
    return f"{leaf} was busy {_times(count)} with {brief}: in the model {', '.join(sorted(holders))} can hold that lock"
