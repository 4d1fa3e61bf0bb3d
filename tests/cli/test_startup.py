"""What starting up loads: nothing that the command at hand does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def loaded_by(program: str) -> set[str]:
    """The modules that a program has loaded at its end."""
    report = "; import json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_septum_loads_nothing_else() -> None:
    ours = {name for name in loaded_by("import septum") if name.startswith("septum")}
    assert ours == {"septum"}
    assert not {"typer", "rich", "asyncio", "hypothesis"} & loaded_by("import septum")


@pytest.mark.parametrize("args", [["--help"], ["explore", "--help"], ["--version"], ["--no-such-option"]])
def test_help_loads_no_room_but_the_command_line(args: list[str]) -> None:
    loaded = loaded_by(f"from septum.cli.main import run; run({args})")
    rooms = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("septum.")}
    assert rooms <= {"septum.cli", "septum.arch", "septum.report"}
    assert {name for name in loaded if name.startswith("septum.arch")} <= {"septum.arch", "septum.arch.errors"}
    assert not {"rich", "asyncio", "concurrent.futures"} & loaded
