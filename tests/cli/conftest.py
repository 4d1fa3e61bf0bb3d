"""The ``septum`` fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calling import Septum


@pytest.fixture
def septum(tmp_path: Path) -> Septum:
    """Calls ``septum`` in an empty folder."""
    return Septum(tmp_path)
