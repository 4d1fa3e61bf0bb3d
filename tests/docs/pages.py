"""Reads the commands, and the output that is claimed for them, from Markdown pages.

A fenced block of the language ``console`` or ``bash`` is run when one of its commands is ``septum``. A command is a
line that begins with ``$ ``, a backslash at the end continues it, and the lines up to the next command are what it
prints. A block without ``$`` is read as a bash script whose every line is a command, and nothing is claimed about its
output.

In output, a line ``...`` stands for any lines, and ``...`` inside a line for any text. A command must succeed, unless
the command after it is ``echo $?``. The line ``<!-- not run: reason -->`` before a block exempts it. A block with a
title is a file of that name, which commands find.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

NAMED = re.compile(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
"""A fenced block that is a file, by the name in its title."""
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)")


@dataclass(frozen=True)
class Command:
    """One command of a block; ``output`` is None when the page claims nothing about what it prints."""

    line: int
    text: str
    output: tuple[str, ...] | None
    may_fail: bool = False


@dataclass(frozen=True)
class Block:
    """The commands of one fenced block; ``line`` is that of its fence."""

    line: int
    commands: tuple[Command, ...]

    def mentions(self, word: str) -> bool:
        """Whether a command of the block contains ``word``."""
        return any(word in command.text for command in self.commands)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are to be run, in order."""
    found = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    before = ""
    for number, line in lines:
        fence = FENCE.match(line)
        if fence is None:
            before = line.strip() or before
            continue
        body = []
        for place, inside in lines:
            if inside.strip() == "```":
                break
            body.append((place, inside.removeprefix(fence["indent"])))
        if fence["language"] in ("console", "bash") and not before.startswith("<!-- not run: "):
            block = Block(number, _commands(body))
            if any(re.match(r"septum\b", command.text) for command in block.commands):
                found.append(block)
        before = ""
    return found


def files(page: Path) -> dict[str, str]:
    """The files that a page shows whole, by name."""
    return dict(NAMED.findall(page.read_text(encoding="utf-8")))


def _commands(body: list[tuple[int, str]]) -> tuple[Command, ...]:
    is_session = any(line.startswith("$ ") for _, line in body)
    commands: list[Command] = []
    continued = False
    for number, line in body:
        last = commands[-1] if commands else None
        if continued and last is not None:
            commands[-1] = Command(last.line, f"{last.text}\n{line}", last.output)
        elif not is_session:
            if not line.strip() or line.startswith("#"):
                continue
            commands.append(Command(number, line, None))
        elif line.startswith("$ "):
            commands.append(Command(number, line[2:], ()))
        elif last is not None:
            commands[-1] = Command(last.line, last.text, (*(last.output or ()), line.rstrip()))
            continue
        continued = line.endswith("\\")
    return tuple(
        Command(command.line, command.text, command.output, may_fail=following is not None and "$?" in following.text)
        for command, following in zip(commands, [*commands[1:], None], strict=True)
    )


def agrees(claimed: tuple[str, ...], printed: str) -> bool:
    """Whether printed text is what the page shows, with its elisions."""
    pattern = ""
    for line in claimed:
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part) for part in line.split("...")) + r"[ \t]*\n"
    return (
        re.fullmatch(pattern + r"\n*", printed if printed.endswith("\n") or not printed else printed + "\n") is not None
    )
