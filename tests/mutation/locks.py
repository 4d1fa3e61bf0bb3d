"""Breaks every lock of the model of the TDX Module, one at a time, and looks for a check that notices.

    python -m tests.mutation.locks [--sample N] [--only TEXT] [--without-footprints]

A mutant is one lock that one interface function takes on one way through it, and one thing wrong with it: it is never
taken, taken shared for exclusive or the reverse, taken after the next one, or never released. Checks, cheapest first:
the recorded lock footprint of the call, the recorded pairs of calls of which one is this function, and the recorded
sets of outcomes of all interleavings with it; for migration, of which nothing was recorded, the footprint read from
the module's source (``tests/mutation/migration.py``). Needs the recorded data (SEPTUM_SHARED). Exit status 1 with
survivors.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from septum.core.steps import SOLO, ctx
from septum.lab import contention, interleavings
from septum.lab.starts import runner_for
from tests.conftest import shared_data
from tests.mutation import migration
from tests.mutation.broken import CHILDREN, Breakage, Mutant, broken, mutants
from tests.mutation.cases import EXIT, Case, cases, recorded_pairs
from tests.mutation.footprint import recorded

SCENARIOS: Final = ("pairs", "pairs_extra", "pairs_extra2", "triples", "triples_extra", "programs", "rtmr", "servtd")
SURVIVED: Final = "nothing"

#: Mutants that are the right model, as patterns of their texts, and why.
EQUIVALENT: Final[Mapping[str, str]] = {
    r"\(PAGE\.PROMOTE on run\): SEPT_ENTRY\[\d+\] of 512, number \d+: never released": (
        "a promotion that succeeds releases none of the 512 entries: it empties their table and frees its page"
    ),
}


class Checks:
    """The recordings by interface function, and a machine to play them on."""

    def __init__(self, shared: Path, *, footprints: bool = True) -> None:
        self.shared = shared
        self.runner = runner_for()
        self.footprint = recorded(self.runner)
        self.footprints = footprints

    @cached_property
    def cases(self) -> list[Case]:
        """All calls with locks."""
        return cases(self.shared)

    @cached_property
    def _pairs(self) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for pair in recorded_pairs(self.shared):
            for leaf in {_leaf(pair["A_call"]), _leaf(pair["B_call"])}:
                found[leaf].append(pair)
        return found

    @cached_property
    def _scenarios(self) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for file in SCENARIOS:
            for scenario in interleavings.scenarios_of(self.shared / "interleavings" / f"{file}.jsonl.gz"):
                if scenario["level"] == "op":
                    for leaf in {call["leaf"] for program in scenario["programs"] for call in program["calls"]}:
                        found[leaf].append(scenario)
        return found

    def mutants(self) -> list[Mutant]:
        """All mutants of all cases."""
        return [mutant for case in self.cases for mutant in mutants(self.footprint, case)]

    @cached_property
    def _right(self) -> dict[Case, tuple[tuple[str, ...], dict[Any, int]]]:
        """The recorded lock operations, and the lock words that the right model leaves."""
        return {case: (case.operations, self.footprint(case)[1]) for case in self.cases}

    def notice(self, mutant: Mutant) -> str:
        """The first check that fails with a mutant, or :data:`SURVIVED`."""
        if mutant.case not in self._right:
            return "footprint" if migration.is_noticed(mutant) else SURVIVED
        leaf, right = mutant.case.leaf, self._right[mutant.case]
        with broken(mutant):
            if self.footprints and self._fails(lambda: self.footprint(mutant.case)[:2] == right):
                return "footprint"
            if is_equivalent(mutant):
                return SURVIVED
            if any(self._pair_differs(pair) for pair in self._pairs[leaf]):
                return "pair"
            if any(self._outcomes_differ(scenario) for scenario in self._scenarios[leaf]):
                return "interleavings"
        return SURVIVED

    def _fails(self, check: Callable[[], bool]) -> bool:
        """Whether a check fails, or the broken model cannot even get through it."""
        try:
            return not check()
        except Exception:
            ctx.level, ctx.trace, ctx.task = SOLO, None, None
            return True

    def _pair_differs(self, pair: Mapping[str, Any]) -> bool:
        journal = self.runner.machine_on_the_way(*contention._start(pair["start"])).journal
        mark = journal.mark()
        try:
            return self._fails(lambda: not contention.compare(self.runner, pair))
        finally:
            journal.undo(mark)

    def _outcomes_differ(self, scenario: Mapping[str, Any]) -> bool:
        if not self._fails(lambda: interleavings.compare(self.runner, scenario).agrees):
            return False
        # An exploration that was cut short leaves the machine anywhere.
        self.runner = runner_for()
        self.footprint = recorded(self.runner)
        return True


def _leaf(call: Mapping[str, Any]) -> str:
    """The interface function of a recorded call; the recordings leave out a word of some names."""
    if "leaf" in call:
        return contention._leaf_of(call["leaf"]).abi_name
    return str(call.get("tdcall", EXIT))


def sample(every: list[Mutant], number: int, seed: int = 1) -> list[Mutant]:
    """Some mutants, of every interface function and with every kind of breakage."""
    chooser = random.Random(seed)
    groups: dict[tuple[str, Breakage], list[Mutant]] = defaultdict(list)
    for mutant in every:
        groups[mutant.case.leaf, mutant.breakage].append(mutant)
    chosen = [chooser.choice(group) for group in groups.values()]
    rest = [mutant for mutant in every if mutant not in chosen and mutant.holder != CHILDREN]
    return chosen + chooser.sample(rest, min(len(rest), max(0, number - len(chosen))))


def is_equivalent(mutant: Mutant) -> bool:
    """Whether a mutant is in :data:`EQUIVALENT`."""
    return any(re.search(pattern, str(mutant)) for pattern in EQUIVALENT)


def try_all(checks: Checks, chosen: Iterable[Mutant]) -> Iterator[tuple[Mutant, str]]:
    """Each mutant, with what noticed it."""
    for mutant in chosen:
        yield mutant, checks.notice(mutant)


def main() -> int:
    """Prints the survivors and how the others were noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.locks", description="break every lock of the model")
    parser.add_argument("--sample", type=int, help="this many mutants (at least one of each kind for each function)")
    parser.add_argument("--only", default="", help="only mutants whose text contains this")
    parser.add_argument("--without-footprints", action="store_true", help="only what behaviour tells")
    options = parser.parse_args()
    shared = shared_data()
    if shared is None:
        print("needs the recorded data: set SEPTUM_SHARED to its folder", file=sys.stderr)
        return 2
    checks = Checks(shared, footprints=not options.without_footprints)
    further = [] if options.without_footprints else migration.all_mutants()
    chosen = [mutant for mutant in (*checks.mutants(), *further) if options.only in str(mutant)]
    if options.sample is not None:
        chosen = sample(chosen, options.sample)
    start, noticed, alive = time.perf_counter(), Counter[str](), list[str]()
    for mutant, by in try_all(checks, chosen):
        noticed[by] += 1
        if by == SURVIVED and not is_equivalent(mutant):
            alive.append(str(mutant))
    by_check = ", ".join(f"{name} {count}" for name, count in noticed.most_common() if name != SURVIVED)
    print(f"{len(chosen)} mutants in {time.perf_counter() - start:.0f} s, noticed by: {by_check}")
    print("equivalent to the right model:", noticed[SURVIVED] - len(alive))
    print("survivors:", "none" if not alive else "")
    print(*(f"  {text}" for text in alive), sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    raise SystemExit(main())
