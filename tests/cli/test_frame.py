"""What holds for every command: help, misuse, exit statuses, one JSON object, no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from septum import __version__
from septum.cli import app, main
from septum.cli.app import COMMANDS
from tests.cli.calling import SEPTUM, Septum


def test_help_names_every_command(septum: Septum) -> None:
    answer = septum("--help")
    assert answer.status == 0
    assert answer.err == ""
    assert set(re.findall(r"^  ([a-z]+)  ", answer.out, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_plain_ascii_of_bounded_width(septum: Septum, name: str) -> None:
    answer = septum(name, "--help")
    assert answer.status == 0
    assert answer.out.startswith(f"Usage: septum {name} ")
    assert "--json" in answer.out
    assert answer.out.isascii()
    assert max(map(len, answer.out.splitlines())) <= 100


def test_version(septum: Septum) -> None:
    assert septum("--version").out == f"septum {__version__}\n"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "septum: missing command (see septum --help)"),
        (["bot"], "septum: no such command 'bot'"),
        (["--foo"], "septum: no such option: --foo (see septum --help)"),
        (["status"], "septum status: missing argument 'CODE' (see septum status --help)"),
        (["status", "1", "--foo"], "septum status: no such option: --foo (see septum status --help)"),
        (["status", "1", "2"], "septum status: got unexpected extra argument"),
        (["status", "1", "--json=3"], "septum status: option '--json' does not take a value"),
        (["status", "a\nb\x1b[31m"], r"septum status: 'a\nb\x1b[31m' is no TDX completion status"),
    ],
)
def test_misuse_is_one_line_that_says_what_to_mend(septum: Septum, args: list[str], complaint: str) -> None:
    assert septum(*args).misuse().startswith(complaint)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_option_in_one_line(septum: Septum, name: str) -> None:
    assert f"see septum {name} --help" in septum(name, "--no-such-option").misuse()


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([SEPTUM, "--help"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (main.PIPE_CLOSED, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([SEPTUM, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == main.OUTPUT_FAILED
    assert done.stderr == f"septum: cannot write the answer: {os.strerror(errno.ENOSPC)}\n"


def test_closed_output_is_no_traceback() -> None:
    done = subprocess.run(f"exec '{SEPTUM}' status 0 >&-", shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """Makes ``septum status`` fail in a way that nobody foresaw."""

    def status() -> int:
        raise KeyError("two\nlines")

    monkeypatch.setitem(app.COMMANDS, "status", status)
    return KeyError


def test_an_unforeseen_exception_is_one_line(
    broken: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SEPTUM_DEBUG", raising=False)
    assert main.run(["status"]) == main.INTERNAL
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("septum status: internal error: KeyError: ")
    assert captured.err.count("\n") == 1
    assert "SEPTUM_DEBUG=1" in captured.err


def test_a_debugger_gets_the_traceback(broken: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPTUM_DEBUG", "1")
    with pytest.raises(broken):
        main.run(["status"])


@pytest.mark.parametrize(
    ("error", "status", "complaint"),
    [
        (KeyboardInterrupt(), main.INTERRUPTED, "septum status: interrupted\n"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x.fd"),
            main.MISUSED,
            "septum status: x.fd: No such file or directory (mend the path)\n",
        ),
    ],
)
def test_ways_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    complaint: str,
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setitem(app.COMMANDS, "status", fail)
    assert main.run(["status"]) == status
    assert capsys.readouterr().err == complaint
