"""A line of a log: what stands before the message.

Source: the printk prefix; the line grammar of ftrace and trace-cmd: ``comm-pid [cpu] flags secs.usecs: event: text``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_DMESG: Final = re.compile(r"^(?:<\d+>)?(?:.{0,80}? kernel: )?\[\s*(\d+\.\d+)\](?:\[\s*[TC]\d+\])?\s?")
"""``[   12.345678]``, also behind what a syslog daemon writes before it, and before the caller's id."""
_FTRACE: Final = re.compile(
    r"^\s*(.{1,64})-(\d+)\s+(?:\(\s*[-\d]+\)\s+)?\[(\d+)\]\s+(?:[\w.#]{4,5}\s+)?(\d+\.\d+):\s+(\w+):\s?"
)
"""The name of a task may hold dashes and spaces, so its pid is taken from the right."""


@dataclass(frozen=True, slots=True)
class Line:
    """``text`` is the message. ``event`` is the tracepoint, or empty for a line of dmesg; ``pid`` and ``cpu`` are -1
    and ``seconds`` is None where the line does not tell."""

    number: int
    text: str
    seconds: float | None = None
    event: str = ""
    pid: int = -1
    cpu: int = -1


def take_apart(number: int, raw: str) -> Line:
    """A line as it stands in the file, number ``number`` of it."""
    if found := _DMESG.match(raw):
        return Line(number, raw[found.end() :].strip(), float(found[1]))
    if found := _FTRACE.match(raw):
        return Line(number, raw[found.end() :].strip(), float(found[4]), found[5], int(found[2]), int(found[3]))
    return Line(number, raw.strip())
