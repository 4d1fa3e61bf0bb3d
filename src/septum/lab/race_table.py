"""The table of races: each scenario on each kernel, explored and run at random. It is ``docs/concepts/race-table.md``.

    python -m septum.lab.race_table [--times N] [--seconds N] [SCENARIO...] > docs/concepts/race-table.md

With all runs and bounds it takes ten minutes for each kernel, on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from septum.core.explore import REDUCTIONS, Bounds
from septum.kvm.kernel import kernels
from septum.lab.recording import explore
from septum.lab.sampled import sample_runs
from septum.lab.scenario import Scenario, find_scenario, scenarios_of
from septum.lab.scenarios import kvm_build, kvm_faults, kvm_lifetime, kvm_memory
from septum.lab.strategies import sampler

FIXED: Final = "v6.19"
"""A kernel with all fixes that the scenarios need."""
VARIANTS: Final = {
    "two-faults": (("same=yes",), ("tables=missing",)),
    "fault-vs-punch-hole": (("same=yes",), ("vcpus=2",)),
    "zap-vs-accept": (("pages=2",),),
    "track-vs-enter": (("vcpus=2",),),
    "migration-vs-zap": (("moves=2",),),
    "prefault-vs-fault": (("guest=linux",),),
    "notifier-vs-fault": (("memory=shared",),),
    "conversion-vs-fault": (("to=private",),),
}
"""Other parameters that are of interest, by scenario."""
ABOUT_ENDS: Final = ("fault-vs-memslot-delete", "prefault-vs-memslot-delete")
"""Scenarios whose bug is that somebody never ends: explored with the check of liveness."""
STRATEGIES: Final = ("random", "pct")


@dataclass(frozen=True, slots=True)
class Row:
    """A scenario with parameters on a kernel: what the exploration said, and what runs found."""

    scenario: str
    parameters: tuple[str, ...]
    kernel: str
    verdict: str
    states: int
    runs: int
    violations: int
    property: str
    first: str


def kvm_scenarios() -> list[Scenario]:
    """The scenarios of the table."""
    return [
        scenario for module in (kvm_build, kvm_faults, kvm_memory, kvm_lifetime) for scenario in scenarios_of(module)
    ]


def rows(names: Sequence[str], times: int, seconds: int) -> Iterator[Row]:
    """The table, row by row."""
    for scenario in [find_scenario(name) for name in names] or kvm_scenarios():
        for parameters in ((), *VARIANTS.get(scenario.name, ())):
            for kernel in kernels():
                yield row(scenario, parameters, kernel, times, seconds)


def row(scenario: Scenario, parameters: tuple[str, ...], kernel: str, times: int, seconds: int) -> Row:
    """One row: ``times`` runs, half of them by each strategy, and an exploration of at most so many seconds."""
    values = scenario.values([*parameters, f"kernel={kernel}"])
    liveness = scenario.name in ABOUT_ENDS
    verdict = explore(scenario, values, Bounds(seconds=seconds), reductions=REDUCTIONS, liveness=liveness)
    violations, what, first = 0, verdict.property or "", ""
    for strategy in STRATEGIES:
        found = sample_runs(scenario, values, sampler(scenario, values, strategy), times=times // 2, stop=False)
        for ending, tally in found.violations.items():
            violations += tally.runs
            first = first or f"{strategy} {tally.first_seed}"
            what = what or f"{ending.violation}"
    return Row(scenario.name, parameters, kernel, verdict.verdict, verdict.states, times, violations, what, first)


HEAD: Final = """\
# The table of races

Each scenario of [Races in KVM](kvm-scenarios.md) on each kernel: explored for at most {seconds} seconds, and run
{times:,} times, one half by each of `--strategy random` and `pct`. *First seed* is a run that violates the property:
`septum run SCENARIO --kernel K --strategy random --seed N`. `python -m septum.lab.race_table` makes this page.

States are those that were found until the violation, the bound or the end; without a violation they were all looked at
where the verdict is *proved*. How far a *bounded* search comes depends on what else the machine does; the other rows do
not. Scenarios about memslots are explored with `--liveness`, without reductions.

| scenario | kernel | explored | states | runs violated | property | first seed |
| --- | --- | --- | ---: | ---: | --- | --- |
"""


def main() -> int:
    """Prints the page."""
    parser = argparse.ArgumentParser(description="the table of races")
    parser.add_argument("scenarios", nargs="*", help="which scenarios (all)")
    parser.add_argument("--times", type=int, default=2000, help="runs of each scenario on each kernel")
    parser.add_argument("--seconds", type=int, default=120, help="bound of each exploration")
    options = parser.parse_args()
    sys.stdout.write(HEAD.format(seconds=options.seconds, times=options.times))
    for found in rows(options.scenarios, options.times, options.seconds):
        name = " ".join([f"`{found.scenario}`", *found.parameters])
        cells = (
            name,
            found.kernel,
            found.verdict,
            f"{found.states:,}",
            f"{found.violations:,}",
            found.property,
            found.first,
        )
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
