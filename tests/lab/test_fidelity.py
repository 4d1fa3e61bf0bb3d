"""Fidelity only goes up: the figures kept beside this file against a run over all recordings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from septum.lab.fidelity import measure, page, unverified, worse

FIGURES = Path(__file__).with_name("fidelity.json")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_no_figure_went_down(shared: Path) -> None:
    now = measure(shared, jobs=os.cpu_count() or 1, interleavings=False)  # those have tests of their own
    kept = json.loads(FIGURES.read_text())
    del kept["interleavings"], kept["interleavings by leaf"]
    assert worse(kept, now) == []


def test_the_page_is_what_the_figures_say() -> None:
    assert (DOCS / "fidelity.md").read_text() == page(
        json.loads(FIGURES.read_text()), (DOCS / "fidelity-notes.md").read_text()
    ), "run python -m septum.lab.fidelity"


def test_what_goes_down_is_named() -> None:
    kept = {"vectors": {"A": {"passed": 2, "events": 2}, "B": {"passed": 1, "events": 1}}, "contention": {}}
    now = {"vectors": {"A": {"passed": 1, "events": 9}}}
    assert worse(kept, now) == ["vectors A: passed went from 2 to 1", "vectors B: is gone"]
    assert worse(kept, kept) == []


def test_every_unverified_place_has_a_sentence() -> None:
    found = list(unverified())
    assert found
    assert all("unverified" in sentence for _place, sentence in found)
