"""No lock of the model can be broken without a check that notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation.broken import CALL, Breakage, Mutant, acquisitions, broken
from tests.mutation.cases import EXIT, Case
from tests.mutation.lines import is_of_migration, lines_with_locks
from tests.mutation.locks import SURVIVED, Checks, is_equivalent, sample, try_all


@pytest.fixture(scope="module")
def checks(shared: Path) -> Checks:
    return Checks(shared)


def survivors(checks: Checks, chosen: list[Mutant]) -> list[str]:
    return [str(m) for m, by in try_all(checks, chosen) if by == SURVIVED and not is_equivalent(m)]


def test_lock_footprints_are_the_recorded_ones(checks: Checks) -> None:
    """Every lock that a call takes, promotes and releases, in order and with its mode."""
    assert len(checks.cases) > 70
    for case in checks.cases:
        operations, _, answer = checks.footprint(case)
        assert operations == case.operations, f"{case.name}: {answer}"


def test_every_line_that_takes_a_lock_is_on_the_way_of_a_case(checks: Checks) -> None:
    """A new lock needs a case here, so that it is broken too: a recorded footprint, or one of ``cases.FURTHER``."""
    reached = {a.site for case in checks.cases if case.leaf != EXIT for a in acquisitions(checks.footprint, case)}
    there = {site for path, site in lines_with_locks() if not is_of_migration(path)}
    assert there - reached == set()


def test_without_a_broken_lock_nothing_is_noticed(checks: Checks) -> None:
    """What notices everything would notice nothing: the instrumented model with no lock broken passes."""
    for case in checks.cases:
        if case.leaf != EXIT:
            with broken(Mutant(case, CALL, -1, "no lock", Breakage.SKIPPED)):
                assert checks.footprint(case)[0] == case.operations
    aug = next(case for case in checks.cases if case.name == "PAGE.AUG/2M on run")
    some = Checks(checks.shared, footprints=False)
    some._pairs = {aug.leaf: checks._pairs[aug.leaf][:100]}
    some._scenarios = {aug.leaf: checks._scenarios[aug.leaf][:3]}
    assert some.notice(Mutant(some.cases[0], CALL, -1, "no lock", Breakage.KEPT)) == SURVIVED


def test_a_sample_of_broken_locks_is_noticed(checks: Checks) -> None:
    chosen = sample(checks.mutants(), 300)
    assert {mutant.case.leaf for mutant in chosen} == {case.leaf for case in checks.cases}
    assert survivors(checks, chosen) == []


def test_broken_locks_show_in_what_calls_answer(shared: Path) -> None:
    """Not only in the order of lock operations: statuses and outcomes of concurrent calls change."""
    checks = Checks(shared, footprints=False)
    locks = ("OP_STATE", "SEPT_TREE", "SEPT_ENTRY", "TD_EPOCH", "KOT")
    leaves = ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MNG.VPFLUSHDONE", "TDG.MEM.PAGE.ACCEPT")
    chosen = [m for m in checks.mutants() if m.case.leaf in leaves and m.lock.startswith(locks)]
    assert len(chosen) > 20
    assert survivors(checks, chosen[::2]) == []


@pytest.mark.slow
def test_every_broken_lock_is_noticed(checks: Checks) -> None:
    every = checks.mutants()
    assert len(every) > 2500
    assert survivors(checks, every) == []


def test_every_equivalent_mutant_is_one(checks: Checks) -> None:
    """The table of equivalent mutants hides none that a check notices."""
    listed = [mutant for mutant in checks.mutants() if is_equivalent(mutant)]
    assert listed
    case: Case = listed[0].case
    right = checks.footprint(case)
    for mutant in listed[::40]:
        with broken(mutant):
            assert checks.footprint(case) == right
