"""Start-up times: ``septum --help`` and ``import septum``, beside an empty Python. Run: python benchmarks/startup.py"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 20
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import septum": [sys.executable, "-c", "import septum"],
    "septum --help": [str(Path(sys.executable).with_name("septum")), "--help"],
    "septum status 0": [str(Path(sys.executable).with_name("septum")), "status", "0"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock time of one run of a command."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints median and worst of RUNS runs, in milliseconds, and the slowest imports of ``septum --help``."""
    print(f"{'command':<16}  {'median ms':>9}  {'worst ms':>8}")
    for name, command in COMMANDS.items():
        seconds(command)  # the first run compiles and fills the page cache
        times = [seconds(command) * 1000 for _ in range(RUNS)]
        print(f"{name:<16}  {statistics.median(times):>9.1f}  {max(times):>8.1f}")

    program = "import sys; from septum.cli.main import run; sys.exit(run(['--help']))"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line][1:]
    slowest = sorted(rows, key=lambda row: -int(row[0]))[:8]
    print("\nslowest imports of septum --help (own milliseconds):")
    for own, _, module in slowest:
        print(f"  {int(own) / 1000:6.1f}  {module.strip()}")


if __name__ == "__main__":
    main()
