"""The plugin in a pytest of its own: a failure shows the diagram and a command, and the command shows it again."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

TEST = """
import septum
from septum.core.cells import Shared
from septum.core.steps import emit, step

class Counter(Shared):
    value: int = 0

@septum.explore()
def test_counting(host):
    counter = Counter("counter")
    async def add():
        await step("read", counter)
        seen = counter.value
        emit("read", f"reads {seen}")
        await step("write", counter)
        counter.value = seen + 1
        emit("write", f"writes {seen + 1}")
    host.spawn(add)
    host.spawn(add)
    host.at_end(lambda: counter.value == 2, "both are counted")
"""


def pytest_in(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_failure_shows_the_run_and_the_command_that_shows_it_again(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    first = pytest_in(tmp_path)
    assert first.returncode == 1
    assert "both are counted does not hold" in first.stdout
    assert re.search(r"^ +1 +reads 0", first.stdout, re.MULTILINE)
    assert "fail_along" not in first.stdout, "no code of the library in the traceback"
    _, *command = shlex.split(first.stdout.partition("to run it again: ")[2].splitlines()[0])
    again = pytest_in(tmp_path, *command)
    assert again.returncode == 1
    shown = [
        output.stdout.partition("septum: the run that fails")[2].partition("short test")[0] for output in (first, again)
    ]
    assert shown[0]
    assert shown[0] == shown[1]


def test_the_schedule_of_a_mended_test_passes(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    assert pytest_in(tmp_path, "--septum-schedule=0*2 1*2").returncode == 0


def test_other_tests_do_not_load_the_explorer(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import sys\n\ndef test_it():\n    assert 'septum.core' not in sys.modules\n")
    assert pytest_in(tmp_path).returncode == 0
