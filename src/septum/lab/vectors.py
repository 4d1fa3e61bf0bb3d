"""Reading recorded vectors: files of JSON lines that say what the real TDX Module did.

A file holds a header (the machine), then independent sequences of events, each with the name of the state that it
starts from. Events are checked and converted here, so that whoever runs them need not doubt them.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Final

from septum.arch.errors import UsageError
from septum.arch.exits import ExitReason, exit_reason_name
from septum.tdx.registers import GPR_NAMES

MAX_SIZE: Final = 1 << 26
"""Bytes that one event may concern."""


@dataclass(frozen=True, slots=True)
class Event:
    """What every event has: the line it stands in and the name it counts under."""

    line: int
    name: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the real module answered.

    ``state``: where the CPU was afterwards: ``host`` (with ``gprs``), ``in_td`` (``gprs`` are the guest's), or
    ``module_halted``. ``vmcs`` and ``ve_info`` tell what the guest will find.
    """

    state: str
    gprs: Mapping[str, int]
    vmcs: Mapping[str, Any]
    ve_info: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Seamcall(Event):
    """A SEAMCALL on an LP. Registers that are not in ``gprs`` are 0."""

    lp: int
    gprs: Mapping[str, int]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Exit(Event):
    """A VM exit of the guest on an LP.

    ``gprs`` and ``vmcs`` are what the guest has changed before it; ``long_mode``: the guest is put into 64-bit mode.
    """

    lp: int
    reason: int
    qualification: int
    gpa: int
    gla: int
    interruption: int
    instruction_length: int
    gprs: Mapping[str, int]
    vmcs: Mapping[int, int]
    long_mode: bool
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class MemoryCheck(Event):
    """What memory holds: ``size`` bytes from ``pa``, as content or as SHA-256."""

    pa: int
    size: int
    content: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class StateCheck(Event):
    """What the module keeps to itself: a field of a TD, or the VMCS of the VCPU on an LP."""

    what: str
    tdr: int
    lp: int
    content: bytes
    sha256: str
    vmcs: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Input(Event):
    """Something that happens to the machine and has no answer: ``name`` says what, ``values`` with what."""

    values: Mapping[str, Any]


@dataclass(slots=True)
class Sequence:
    """Events that start from a named state."""

    name: str
    start: str
    line: int
    events: list[Event] = field(default_factory=list)


class VectorFile:
    """A file of recorded vectors: ``header`` at once, ``sequences()`` one by one.

    :raises UsageError: (from anything here) for what is not a complete file of vectors, naming file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(self._read()) as lines:
            self.header = self._parse(1, next(lines, ""))
        if self.header.get("op") != "header":
            raise self.wrong(1, "a file of recorded vectors begins with a header line")
        self._lps = range(len(self.header.get("lp_package", ())))

    def wrong(self, line: int, what: str) -> UsageError:
        """The error that names this file and a line of it."""
        return UsageError(f"{self.path}: line {line}: {what}")

    def sequences(self) -> Generator[Sequence, None, None]:
        """All sequences, in the order of the file."""
        current: Sequence | None = None
        line = 1
        with closing(self._read()) as lines:
            next(lines)
            for line, text in enumerate(lines, 2):
                raw = self._parse(line, text)
                op = raw.get("op")
                if op == "seq_begin" and current is None:
                    current = Sequence(str(raw.get("id")), str(raw.get("from")), line)
                elif op == "seq_end" and current is not None:
                    if raw.get("events") != len(current.events):
                        raise self.wrong(
                            line, f"the sequence has {len(current.events)} events, not {raw.get('events')}"
                        )
                    yield current
                    current = None
                elif current is None or op == "seq_begin":
                    raise self.wrong(line, f"{op!r} stands outside a sequence, or the one before has no seq_end")
                else:
                    current.events.append(self._event(line, raw))
        if current is not None:
            raise self.wrong(line, f"the file ends within sequence {current.name}: it has been cut off")

    def _read(self) -> Generator[str, None, None]:
        line = 0
        try:
            with open_text(self.path) as file:
                for text in file:
                    line += 1
                    yield text
        except UsageError:
            raise
        except FileNotFoundError:
            raise UsageError(f"{self.path}: there is no such file") from None
        except IsADirectoryError:
            raise UsageError(f"{self.path}: this is a folder; name the files in it, {self.path}/*.jsonl*") from None
        except Exception as error:  # each compression has its own kinds of error
            raise self.wrong(line + 1, f"cannot be read, the file may have been cut off or damaged ({error})") from None

    def _parse(self, line: int, text: str) -> dict[str, Any]:
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise self.wrong(line, "this is not JSON; the file may have been cut off or damaged") from None
        if not isinstance(raw, dict):
            raise self.wrong(line, "this is not a JSON object")
        return raw

    def _event(self, line: int, raw: dict[str, Any]) -> Event:
        convert = CONVERTERS.get(str(raw.get("op")))
        if convert is None:
            raise self.wrong(line, f"there is no event {raw.get('op')!r}")
        try:
            if "lp" in raw and raw["lp"] not in self._lps and (raw["op"], raw["lp"]) != ("set_msr", -1):
                raise self.wrong(line, f"the machine in the header has no LP {raw['lp']!r}")
            return convert(line, raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.wrong(line, f"this {raw['op']} event lacks something or has a bad value ({error!r})") from None


def open_text(path: Path) -> IO[str]:
    """A text file, decompressed by its suffix.

    :raises UsageError: for a compression that Septum does not read.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        return _open_zstd(path)
    return path.open(encoding="utf-8")


def json_lines(path: Path, what: str, check: Callable[[Mapping[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    :param what: a line is, for messages.
    :param check: raises ValueError, with the reason, for an object that is no such thing.
    :raises UsageError: for a file that cannot be read, or a line that is no such object.
    """
    number = 0
    try:
        with open_text(path) as lines:
            for line in lines:
                number += 1
                recorded = json.loads(line)
                check(recorded)
                yield recorded
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: this is a folder; name a file in it") from None
    except (ValueError, AttributeError, OSError, EOFError, RecursionError, lzma.LZMAError) as error:
        raise UsageError(f"{path}: line {number}: no {what} ({error})") from None


def _open_zstd(path: Path) -> IO[str]:
    try:
        zstd = import_module("compression.zstd")
    except ImportError:
        raise UsageError(f"{path}: only Python 3.14 and later reads .zst; decompress it first (zstd -d)") from None
    file: IO[str] = zstd.open(path, "rt", encoding="utf-8")
    return file


def _gprs(raw: Mapping[str, str]) -> dict[str, int]:
    gprs = {name: int(value, 16) for name, value in raw.items() if name in _GPRS}
    if gprs and not 0 <= min(gprs.values()) <= max(gprs.values()) < 1 << 64:
        raise ValueError("a register does not fit in 64 bits")
    return gprs


_GPRS = frozenset(GPR_NAMES)


def _number(raw: str | int) -> int:
    return int(raw, 16) if isinstance(raw, str) else raw


def _size(raw: str | int) -> int:
    size = _number(raw)
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{size} bytes")
    return size


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _fields(value) if isinstance(value, dict) else _number(value) for name, value in raw.items()}


def _encodings(raw: Mapping[str, str]) -> dict[int, int]:
    return {int(encoding, 16): int(value, 16) for encoding, value in raw.items()}


def _outcome(raw: Mapping[str, Any]) -> Outcome:
    state = raw.get("state", "host")
    if state == "in_td":
        return Outcome(state, _gprs(raw["guest_gprs"]), _fields(raw.get("vmcs", {})), _fields(raw.get("ve_info", {})))
    if state == "module_halted":
        return Outcome(state, {}, {}, {})
    gprs = _gprs(raw)
    if state not in ("host", "returned_to_host") or "rax" not in gprs:
        raise ValueError(f"outcome {state!r}")
    return Outcome("host", gprs, {}, {})


def _seamcall(line: int, raw: Mapping[str, Any]) -> Event:
    return Seamcall(line, str(raw["leaf"]), int(raw["lp"]), _gprs(raw["in"]), _outcome(raw["out"]))


def _exit(line: int, raw: Mapping[str, Any]) -> Event:
    reason = int(raw["exit_reason"])
    inputs = {name: int(value, 16) for name, value in raw["in"].items()}
    is_tdcall = reason == ExitReason.TDCALL
    return Exit(
        line,
        str(raw["exit"]) if is_tdcall else f"EXIT:{exit_reason_name(reason)}",
        int(raw["lp"]),
        reason,
        inputs.get("qual", 0),
        inputs.get("gpa", 0),
        inputs.get("gla", 0),
        inputs.get("intr", 0),
        inputs.get("ilen", 0),
        _gprs(raw.get("guest_gprs_set", {})),
        _encodings(raw.get("guest_vmcs_set", {})),
        is_tdcall and raw.get("set64", True) is True,
        _outcome(raw["out"]),
    )


def _memory_check(line: int, raw: Mapping[str, Any]) -> Event:
    content = bytes.fromhex(raw.get("hex", raw.get("value", "")))
    return MemoryCheck(line, raw["op"], int(raw["pa"], 16), _size(raw["len"]), content, str(raw.get("sha256", "")))


def _oracle(line: int, raw: Mapping[str, Any]) -> Event:
    if "pa" in raw and "tdr" not in raw:
        return _memory_check(line, raw)
    return StateCheck(
        line,
        raw["op"],
        str(raw["what"]).split(" ", 1)[0],
        int(raw["tdr"], 16),
        int(raw.get("lp", -1)),
        bytes.fromhex(raw.get("value", "")),
        str(raw.get("sha256", "")),
        _encodings(raw.get("values", {})),
    )


def _write(line: int, raw: Mapping[str, Any]) -> Event:
    return Input(line, raw["op"], {"pa": int(raw["pa"], 16), "data": bytes.fromhex(raw["hex"])})


def _fill(line: int, raw: Mapping[str, Any]) -> Event:
    size, byte = _size(raw["len"]), _number(raw["byte"])
    return Input(line, raw["op"], {"pa": int(raw["pa"], 16), "data": bytes([byte]) * size})


def _plain(*names: str) -> Callable[[int, Mapping[str, Any]], Event]:
    def convert(line: int, raw: Mapping[str, Any]) -> Event:
        return Input(line, raw["op"], {name: _number(raw[name]) for name in names})

    return convert


CONVERTERS: Final[dict[str, Callable[[int, Mapping[str, Any]], Event]]] = {
    "seamcall": _seamcall,
    "td_exit": _exit,
    "mem": _memory_check,
    "oracle": _oracle,
    "write": _write,
    "fill": _fill,
    "guest_write": _write,
    "set_tsc": _plain("tsc", "step_per_rdtsc"),
    "set_msr": _plain("lp", "msr", "value"),
    "set_pconfig_error": _plain("value"),
    "set_entropy": _plain("ok"),
    "guest_rip_advance": _plain("lp", "delta"),
}
