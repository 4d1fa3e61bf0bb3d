"""The command line as its users call it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEPTUM = Path(sys.executable).with_name("septum")


@dataclass(frozen=True)
class Answer:
    """What one call of ``septum`` left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as the one JSON object that it must be."""
        record = json.loads(self.out)
        assert isinstance(record, dict)
        return record

    def misuse(self) -> str:
        """The complaint of a misused command, after checking that it is one line and that nothing was answered."""
        assert self.status == 2, self
        assert self.out == ""
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        assert self.err.startswith("septum")
        return self.err


@dataclass(frozen=True)
class Septum:
    """Calls ``septum`` in the folder ``home``."""

    home: Path

    def __call__(self, *args: str | Path, **env: str) -> Answer:
        done = subprocess.run(
            [SEPTUM, *args],
            cwd=self.home,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)
