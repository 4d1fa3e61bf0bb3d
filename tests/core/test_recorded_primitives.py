"""Every interleaving of the module's lock primitives, against what the real primitives can do.

The recordings hold, for each program of two or three contexts on one lock word, the complete set of outcomes that the
real ``tdx_locks.h`` code produces when it is cut between atomic instructions. The explorer over the model's locks must
find exactly that set.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from septum.core.cells import SharedMap, Tracking, World
from septum.core.explore import Explorer
from septum.core.steps import FINE, Program, Step, Task, switch
from septum.core.trylocks import Mode, Mutex, SeptEntryLock, Sharex, SharexHp, Taken, TryLock

KINDS: dict[str, type[TryLock]] = {"hp": SharexHp, "sharex": Sharex, "mutex": Mutex, "sept": SeptEntryLock}


def recordings(shared: Path | None) -> Iterator[dict[str, Any]]:
    assert shared is not None
    with gzip.open(shared / "interleavings" / "lock_primitives.jsonl.gz", "rt") as lines:
        yield from map(json.loads, lines)


async def context(lock: TryLock, operations: list[str]) -> tuple[Any, ...]:
    """One program: what each operation resulted in, and in which mode the lock is held at the end."""
    held: Mode | None = None
    results: list[Any] = []
    for operation in operations:
        name, _, caller = operation.partition("(")
        guest = caller == "guest)"
        result = None
        if name == "release":
            if held is not None:
                await lock.release(held)
                held = None
        elif name == "sept_release_by_entry_write":
            if held is not None:
                await switch(Step("write", lock))
                lock.words.store(lock.key, 0)
                held = None
        elif name.endswith("_promote"):
            if held is not None:
                result = await lock.promote()
                held = Mode.EXCLUSIVE if result is Taken.YES else held
        elif name.endswith("_demote"):
            if held is Mode.EXCLUSIVE:
                assert isinstance(lock, Sharex)
                await lock.demote()
                held = Mode.SHARED
        else:
            mode = Mode.SHARED if name.endswith("_sh") else Mode.EXCLUSIVE
            result = await lock.acquire(mode, guest=guest)
            held = mode if result is Taken.YES else None
        results.append(result)
    return (*results, held)


SUCCESS = {"hp": "0x0", "sept": "0x0", "sharex": "0x1", "mutex": "0x1"}
FAILURE = {"0x0": Taken.BUSY, "0x8000020000000000": Taken.BUSY, "0x8000020400000000": Taken.PRIORITY}


def outcomes_of(recording: dict[str, Any], kind: str) -> set[Any]:
    """The recorded outcomes in the form of :func:`context`'s: results only of what was attempted."""
    outcomes = set()
    for outcome in recording["outcomes"]:
        final = outcome["final"]
        ends = []
        for i, operations in enumerate(recording["programs"]):
            results: list[Any] = []
            holds = False
            for operation, text in zip(operations, final["res"][i], strict=True):
                name = operation.partition("(")[0]
                result = None
                if "release" in name:
                    holds = False
                elif not name.endswith("_demote") and (holds or not name.endswith("_promote")):
                    # A host that must give way is told plain BUSY, as is every guest: the caller converts.
                    result = Taken.YES if text == SUCCESS[kind] else FAILURE[text]
                    holds = holds or result is Taken.YES
                results.append(result)
            held = Mode.EXCLUSIVE if final["ex"][i] else Mode.SHARED if final["sh"][i] else None
            ends.append((*results, held))
        outcomes.add((int(final["word"], 16), tuple(ends)))
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_primitives_do_what_the_real_ones_do(shared: Path, kind: str) -> None:
    checked = 0
    for recording in recordings(shared):
        if recording["name"].split(":")[1] != kind:
            continue
        world = Tracking.world = World()
        words: SharedMap[int, int] = SharedMap("words", 0)
        lock = KINDS[kind](words, 0, "lock")
        # Recordings that name bit 52 as the initial word started from 0: in their own witnesses the first
        # bts leaves 0x800 (docs/fidelity.md).
        words.store(0, int(recording["initial_word"], 16) & 0xFFFFFFFF)
        programs = [
            Program(Task(f"ctx{i}", cpu=i), partial(context, lock, operations))
            for i, operations in enumerate(recording["programs"])
        ]

        def observe(results: list[Any], words: SharedMap[int, int] = words) -> Any:
            return words.get(0, 0), tuple(results)

        verdict = Explorer(world, programs, observer=observe, level=FINE).explore()
        assert verdict.verdict == "proved", (recording["name"], verdict.message)
        assert set(verdict.outcomes) == outcomes_of(recording, kind), recording["name"]
        checked += 1
    assert checked >= {"hp": 40, "sharex": 15, "sept": 20, "mutex": 1}[kind]
