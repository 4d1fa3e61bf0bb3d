"""Seeded runs of the scenarios: the published table of races can be had again, and kernels with all fixes never fail.

``SEPTUM_SHARD=K/N`` chooses the K-th of N parts of the 2,000 seeds for the slow test.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from septum.lab.race_table import FIXED, STRATEGIES, VARIANTS, kvm_scenarios, row
from septum.lab.sampled import sample_runs
from septum.lab.scenario import find_scenario
from septum.lab.strategies import sampler

PAGE = Path(__file__).resolve().parents[2] / "docs/concepts/race-table.md"
ROW = re.compile(r"\| `([\w-]+)`([^|]*) \| ([^|]*) \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([^|]*) \| ([^|]*) \|")
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
CASES = [(scenario.name, params) for scenario in kvm_scenarios() for params in ((), *VARIANTS.get(scenario.name, ()))]
MODULE_RACE = ("prefault-vs-fault", ("guest=linux",))
"""What the module does to a guest that no kernel can help."""


def test_the_table_has_all_scenarios_and_fixed_kernels_do_not_fail() -> None:
    assert {(name, tuple(params.split())) for name, params, *_ in ROWS} == {*CASES}
    failing = {
        (name, tuple(params.split()))
        for name, params, kernel, verdict, _, violations, *_ in ROWS
        if kernel == FIXED and (verdict == "violated" or violations != "0")
    }
    assert failing == {MODULE_RACE}


@pytest.mark.parametrize(
    ("name", "params", "kernel", "prop", "first"),
    [
        (name, tuple(params.split()), kernel, prop, first)
        for name, params, kernel, _, _, _, prop, first in ROWS
        if first
    ],
)
def test_the_first_seed_of_a_row_violates_its_property(
    name: str, params: tuple[str, ...], kernel: str, prop: str, first: str
) -> None:
    scenario = find_scenario(name)
    values = scenario.values((*params, f"kernel={kernel}"))
    strategy, seed = first.split()
    found = sample_runs(scenario, values, sampler(scenario, values, strategy), times=1, seed=int(seed))
    (ending,) = found.violations
    # An exploration finds that somebody takes for ever; a run, that it does not end.
    assert ending.violation == prop or (ending.violation, prop) == ("every run ends", "progress")


def test_a_row_is_what_was_found() -> None:
    scenario = find_scenario("finalize-race")
    broken, fixed = (row(scenario, (), kernel, 40, 60) for kernel in ("v6.16", FIXED))
    assert (broken.verdict, broken.property, broken.first) == ("violated", "no KVM_BUG_ON", "random 1")
    assert 0 < broken.violations < broken.runs
    assert (fixed.verdict, fixed.property, fixed.violations, fixed.first) == ("proved", "", 0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), [case for case in CASES if case != MODULE_RACE])
def test_no_seed_fails_on_a_kernel_with_all_fixes(name: str, params: tuple[str, ...]) -> None:
    shard, shards = map(int, os.environ.get("SEPTUM_SHARD", "1/40").split("/"))
    scenario = find_scenario(name)
    values = scenario.values((*params, f"kernel={FIXED}"))
    begin, end = (1000 * part // shards for part in (shard - 1, shard))
    for strategy in STRATEGIES:
        choosers = sampler(scenario, values, strategy)
        found = sample_runs(scenario, values, choosers, times=end - begin, seed=begin)
        assert found.verdict == "sampled", found.shown and found.shown.message
