"""What the tests of migration share."""

from __future__ import annotations

import pytest

from tests.tdx.migration_machine import Migration


@pytest.fixture
def move() -> Migration:
    return Migration()


@pytest.fixture
def begun(move: Migration) -> Migration:
    """Both sides have the immutable state; the source still runs."""
    move.begin()
    return move
