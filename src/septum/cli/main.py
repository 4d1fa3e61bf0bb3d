"""The entry point of ``septum``: every way out of a command becomes an exit status and at most one line on stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

GOOD = 0
"""The answer is good."""
BAD = 1
"""The answer is bad: a property is violated, a vector differs, a TD could not be built."""
MISUSED = 2
"""The command was misused; one line on stderr says what to mend."""
INTERNAL = 70
"""Septum itself went wrong (``EX_SOFTWARE`` of sysexits.h)."""
OUTPUT_FAILED = 74
"""The answer could not be written (``EX_IOERR`` of sysexits.h)."""
INTERRUPTED = 130
"""Ctrl-C: what a shell reports for SIGINT."""
PIPE_CLOSED = 141
"""The reader of stdout went away: what a shell reports for SIGPIPE."""


def run(argv: Sequence[str] | None = None) -> int:
    """Runs ``septum`` with ``argv`` (default: the process's arguments) and returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        status = _answer(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # Typer turns a closed pipe into SystemExit; nothing else of it does that outside standalone mode.
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        if error.filename is None:
            _discard_output()
            return _complain(args, f"cannot write the answer: {error.strerror or error}", OUTPUT_FAILED)
        return _complain(args, f"{error.filename}: {error.strerror} (mend the path)", MISUSED)
    except Exception as error:
        if os.environ.get("SEPTUM_DEBUG"):
            raise
        text = f"internal error: {type(error).__name__}: {error}; please report; SEPTUM_DEBUG=1 shows the traceback"
        return _complain(args, text, INTERNAL)
    if status == INTERRUPTED:
        _complain(args, "interrupted", status)
    return status


def _answer(args: list[str]) -> int:
    """Runs the command that ``args`` name; misuse is reported here, everything else is left to the caller."""
    import typer

    from septum.arch.errors import UsageError
    from septum.cli.app import command

    try:
        # Outside standalone mode a command's return value comes back, and so does the status of --help and of Ctrl-C.
        status = command().main(args, prog_name="septum", standalone_mode=False)
        return GOOD if status is None else int(status)
    except UsageError as error:
        return _complain(args, str(error), MISUSED)
    except typer.TyperException as error:
        text = error.format_message().rstrip(".")
        return _complain(args, f"{text[:1].lower()}{text[1:]} (see {_name(args)} --help)", MISUSED)


def _name(args: list[str]) -> str:
    """The command that ``args`` call, as users know it."""
    from septum.cli.app import COMMANDS

    return f"septum {args[0]}" if args and args[0] in COMMANDS else "septum"


def _complain(args: list[str], text: str, status: int) -> int:
    """Prints one line on stderr, led by the name of the command, and returns ``status``."""
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    print(f"{_name(args)}: {line}", file=sys.stderr)
    return status


def _prepare_streams() -> None:
    """Makes sure that printing works, whatever the process was started with."""
    # A stream that the parent process closed is None; what replaces it stays open as long as the process.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A file name that the terminal's encoding lacks is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Points stdout at nothing, so that the interpreter's flush at exit does not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
