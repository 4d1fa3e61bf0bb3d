"""No lock of the migration functions can be broken without a check that notices."""

from __future__ import annotations

import pytest

from tests.mutation.broken import CALL, Breakage, Mutant, acquisitions, broken
from tests.mutation.lines import is_of_migration, lines_with_locks
from tests.mutation.migration import all_mutants, cases, footprint, is_noticed


def test_every_line_that_takes_a_lock_is_on_the_way_of_a_case() -> None:
    reached = {acquisition.site for case in cases() for acquisition in acquisitions(footprint, case)}
    there = {site for path, site in lines_with_locks() if is_of_migration(path)}
    assert there
    assert there - reached == set()


def test_without_a_broken_lock_nothing_is_noticed() -> None:
    for case in cases():
        assert not is_noticed(Mutant(case, CALL, -1, "no lock", Breakage.SKIPPED))


def test_the_call_under_test_is_the_one_that_is_broken() -> None:
    case = next(case for case in cases() if case.name == "export track")
    broken_one = Mutant(case, CALL, 0, "PAMT_1G", Breakage.SKIPPED)
    operations, _, _ = footprint(case, under=lambda: broken(broken_one))
    assert operations[0] == case.operations[1]


def test_a_sample_of_broken_locks_is_noticed() -> None:
    survivors = [str(mutant) for mutant in all_mutants()[::12] if not is_noticed(mutant)]
    assert survivors == []


@pytest.mark.slow
def test_every_broken_lock_is_noticed() -> None:
    every = all_mutants()
    assert len(every) > 400
    assert [str(mutant) for mutant in every if not is_noticed(mutant)] == []
