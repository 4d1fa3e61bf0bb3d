"""Recorded contention and interleavings as a whole: files of them, compared in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from septum.lab import contention, interleavings
from septum.lab.conform import Runner
from septum.lab.contention import Conflict
from septum.lab.operations import OPERATIONS
from septum.lab.starts import runner_for

_BATCH: Final = 16
"""Pairs or scenarios that a worker gets at a time."""

Progress = Callable[[str], None]


@dataclass(slots=True)
class Agreement:
    """How a file of recordings compares: how many pairs or scenarios, how many agree, and where the others differ.

    ``by_leaf`` counts, for each interface function, those in which it is called: all of them, and those that agree.
    """

    pairs: int = 0
    agree: int = 0
    differ: list[dict[str, Any]] = field(default_factory=list)
    by_leaf: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, leaves: Iterable[str], differences: list[dict[str, Any]]) -> None:
        """Counts one pair or scenario of calls of these functions, with what differs in it."""
        good = not differences
        self.pairs += 1
        self.agree += good
        self.differ += differences
        for leaf in leaves:
            pairs, agree = self.by_leaf.get(leaf, (0, 0))
            self.by_leaf[leaf] = pairs + 1, agree + good


def against(path: Path, *, vectors: Path | None = None, jobs: int = 1, progress: Progress | None = None) -> Agreement:
    """Compares a file of recorded contention.

    :raises UsageError: for a file that is none, or start states that are missing.
    """
    return _compare(contention.pairs_of(path), _pair, _leaves_of_pair, vectors, jobs, progress)


def every_interleaving(
    path: Path, *, vectors: Path | None = None, jobs: int = 1, progress: Progress | None = None
) -> Agreement:
    """Compares a file of recorded sets of outcomes.

    :raises UsageError: for a file that is none, or start states that are missing.
    """
    return _compare(interleavings.scenarios_of(path), _scenario, _leaves_of_scenario, vectors, jobs, progress)


def model_matrix() -> list[Conflict]:
    """Every conflict between two operations of :mod:`septum.lab.operations` on the model."""
    runner = runner_for()
    return [found for td in OPERATIONS for a in OPERATIONS[td] for found in contention.conflicts(runner, td, a)]


def _pair(runner: Runner, pair: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"pair": d.pair, "after": d.after, "recorded": d.recorded, "model": d.model}
        for d in contention.compare(runner, pair)
    ]


def _scenario(runner: Runner, scenario: dict[str, Any]) -> list[dict[str, Any]]:
    found = interleavings.compare(runner, scenario)
    if found.agrees:
        return []
    return [{"pair": found.name, "level": found.level, "missing": found.missing, "surplus": found.surplus}]


def _leaves_of_pair(pair: Mapping[str, Any]) -> set[str]:
    """Interface functions of a pair, and VM exits that are no TDCALL, as vectors name them."""
    calls = (pair["A_call"], pair["B_call"])
    return {call.get("leaf") or call.get("tdcall") or f"EXIT:{call.get('td_exit')}" for call in calls}


def _leaves_of_scenario(scenario: Mapping[str, Any]) -> set[str]:
    return {call["leaf"] for program in scenario["programs"] for call in program["calls"]}


def _compare(
    items: Iterable[dict[str, Any]],
    compare: Callable[[Runner, dict[str, Any]], list[dict[str, Any]]],
    leaves_of: Callable[[Mapping[str, Any]], set[str]],
    vectors: Path | None,
    jobs: int,
    progress: Progress | None,
) -> Agreement:
    total = Agreement()
    work = partial(_batch, compare, leaves_of, vectors)
    batches = _batches(iter(items))
    if jobs == 1:
        results: Iterable[_Results] = map(work, batches)
        _collect(results, total, progress)
    else:
        from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415 -- only for several processes

        with ProcessPoolExecutor(jobs) as pool:
            _collect(pool.map(work, list(batches)), total, progress)
    return total


_Results = list[tuple[set[str], list[dict[str, Any]]]]
"""Of each pair or scenario: its interface functions, and what differs."""


def _collect(results: Iterable[_Results], total: Agreement, progress: Progress | None) -> None:
    for batch in results:
        for leaves, differences in batch:
            total.add(leaves, differences)
        if progress:
            progress(f"{total.pairs:,} compared, {total.agree:,} agree")


def _batches(items: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(items, _BATCH)):
        yield batch


def _batch(
    compare: Callable[[Runner, dict[str, Any]], list[dict[str, Any]]],
    leaves_of: Callable[[Mapping[str, Any]], set[str]],
    vectors: Path | None,
    items: list[dict[str, Any]],
) -> _Results:
    runner = _runner(vectors)
    return [(leaves_of(item), compare(runner, item)) for item in items]


@cache
def _runner(vectors: Path | None) -> Runner:
    """One for each process."""
    return runner_for(vectors)
