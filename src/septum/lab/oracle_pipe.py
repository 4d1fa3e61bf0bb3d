"""The way to an oracle that is a program: one request a line to its stdin, one answer a line from its stdout.

Whatever the program does instead (die, keep silent, say something else, say too much), it is found out and said in one
line.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, cast

from septum.arch.errors import UsageError
from septum.lab.oracle import OracleFailed, start_of

TIMEOUT: Final = 10.0
"""Seconds that an oracle has for an answer, unless told otherwise."""
MAX_LINE: Final = 1 << 28
"""Bytes of the longest answer: the content of as much memory as one event may concern, in hexadecimal."""
_CHUNK: Final = 1 << 16
_LAST_WORDS: Final = 1 << 12
"""Bytes of an oracle's stderr that are kept, to be quoted if it dies."""


class PipeOracle:
    """A command that reads one request a line from stdin, as JSON, and writes one answer a line to stdout.

    :raises UsageError: when the command cannot be started.
    """

    def __init__(self, command: str, timeout: float = TIMEOUT) -> None:
        """:param timeout: seconds until an answer must have come."""
        self._command, self._timeout = command, timeout
        try:
            # A session of its own: Ctrl-C is for us, who then end the oracle in order.
            self._process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError, IndexError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no command line"
            raise UsageError(f"--oracle {command!r} cannot be started: {reason}; give a program to run") from None
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]
        self._in, self._out, stderr = (pipe.fileno() for pipe in self._pipes)
        self._listening = [self._out, stderr]
        self._last_words = b""
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Sends one request and waits for its answer."""
        line = self._exchange(json.dumps(request).encode() + b"\n", request)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise self._failed(request, f"answered with something that is not JSON: {start_of(line)}") from None
        if isinstance(answer, dict) and isinstance(answer.get("out"), dict):
            return cast("dict[str, Any]", answer["out"])
        if isinstance(answer, dict) and "error" in answer:
            raise self._failed(request, f"gave up: {start_of(str(answer['error']).encode())}")
        raise self._failed(request, f'answered without an object "out": {start_of(line)}')

    def close(self) -> None:
        """Closes its stdin, and ends it and what it started if it does not end by itself."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _exchange(self, unsent: bytes, request: Mapping[str, Any]) -> bytes:
        """Sends a line and returns the one that comes back, whatever the oracle does meanwhile."""
        deadline = time.monotonic() + self._timeout
        received = b""
        while True:
            unsent = self._send(unsent)
            wait = deadline - time.monotonic()
            ready, _, _ = select.select(self._listening, [self._in] if unsent else [], [], max(wait, 0))
            if self._out in ready:
                chunk = os.read(self._out, _CHUNK)
                received += chunk
                if not chunk:
                    raise self._failed(request, self._how_it_ended())
                line, newline, more = received.partition(b"\n")
                if more or (newline and unsent):
                    raise self._failed(request, f"said more than the one line that was asked for: {start_of(received)}")
                if newline:
                    return line
            for pipe in ready:
                if pipe != self._out:
                    self._listen(pipe)
            if wait <= 0:
                raise self._failed(request, f"did not answer within {self._timeout:g} s; give it more with --timeout")
            if len(received) > MAX_LINE:
                raise self._failed(request, "answers with a line that does not end")

    def _send(self, unsent: bytes) -> bytes:
        """Writes as much as goes in, and returns the rest. A pipe that is closed shows when its answer is read."""
        with suppress(BlockingIOError):
            try:
                return unsent[os.write(self._in, unsent) :] if unsent else b""
            except BrokenPipeError:
                return b""
        return unsent

    def _listen(self, stderr: int) -> None:
        words = os.read(stderr, _CHUNK)
        self._last_words = (self._last_words + words)[-_LAST_WORDS:]
        if not words:
            self._listening.remove(stderr)

    def _how_it_ended(self) -> str:
        """In words, for an oracle that has closed its stdout."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its stdout"
        for pipe in self._listening[1:]:
            with suppress(BlockingIOError):
                self._listen(pipe)
        said = self._last_words.decode(errors="replace").strip().rpartition("\n")[2]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return f"{how}: {said}" if said else how

    def _failed(self, request: Mapping[str, Any], what: str) -> OracleFailed:
        about = " ".join(str(request[name]) for name in ("op", "leaf", "exit") if name in request)
        return OracleFailed(f"oracle {self._command!r}, asked for {about}, {what}")
