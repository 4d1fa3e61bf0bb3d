"""How many recorded events a second `septum conform` compares on one core, reading the file included.

    python benchmarks/conform.py [FILE...] [--repeat N] [--profile]

Without files it takes one file of each folder of the recorded vectors (SEPTUM_SHARED, or ../shared). The start of
Python and the imports don't count; reading, checking and converting the events does. The best run counts.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from septum.lab.conform import conform, conform_files

TARGET = 15_000
FILES = ("vectors/dev/random_00.jsonl.gz", "vectors/guest/guest_tdcall.jsonl.gz")


def events_per_second(path: Path) -> tuple[int, int, float]:
    """Events, how many agree, and how many a second, by the CPU time of this process."""
    start = time.process_time()
    report = conform(path)
    return report.events, report.passed, report.events / (time.process_time() - start)


def main() -> int:
    """Prints a line for each file; exit status 1 when one misses the target, 2 without files."""
    parser = argparse.ArgumentParser(description="speed of septum conform")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=3, help="the best run counts")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    shared = Path(os.environ.get("SEPTUM_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    files = options.files or [shared / name for name in FILES]
    if missing := [path for path in files if not path.is_file()]:
        print(f"{missing[0]}: there is no such file; set SEPTUM_SHARED or name files of vectors", file=sys.stderr)
        return 2
    if options.profile:
        import cProfile  # noqa: PLC0415

        cProfile.runctx("conform_files(files)", {"conform_files": conform_files, "files": files}, {}, sort="tottime")
        return 0
    slow = False
    for path in files:
        runs = [events_per_second(path) for _ in range(options.repeat)]
        events, passed, rate = max(runs, key=lambda run: run[2])
        print(f"{path.name}: {events:,} events, {passed:,} agree, {rate:,.0f} a second (target {TARGET:,})")
        slow |= rate < TARGET
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
