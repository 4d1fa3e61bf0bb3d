"""What all tests share: the place of recorded data, and how hard hypothesis tries."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# No deadlines: a loaded machine is not a defect. A failing example is printed so that it can be pasted into a test.
hypothesis.settings.register_profile("septum", deadline=None, print_blob=True)
hypothesis.settings.load_profile("septum")


def shared_data() -> Path | None:
    """The folder of data recorded from the real module, real firmware and real hosts; None when it is not here."""
    named = os.environ.get("SEPTUM_SHARED")
    place = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    return place if place.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded data; the test is skipped where it is absent."""
    place = shared_data()
    if place is None:
        pytest.skip("needs the recorded data: set SEPTUM_SHARED to its folder, or put it beside the repository")
    return place
