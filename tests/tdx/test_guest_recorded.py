"""What the real module answered to running guests, in part; the whole is for ``septum conform``."""

from __future__ import annotations

from pathlib import Path

import pytest

from septum.lab.conform import conform


@pytest.mark.parametrize(
    ("file", "sequence", "limit"),
    [
        ("dev/stepping", None, None),
        ("guest/guest_cpuid", None, 60),
        ("guest/guest_exits", "exit/B", None),
        ("guest/guest_exits", "ept_violation/C", None),
        ("guest/guest_exits", "idtv", None),
        ("guest/guest_msr", "efer", None),
        ("guest/guest_tdcall", "rtmr", 30),
        ("guest/guest_tdcall", "report", 30),
        ("guest/guest_tdcall", "l2_misc", None),
        ("guest/guest_tdcall", "leaves", None),
    ],
)
def test_answers_are_those_of_the_real_module(shared: Path, file: str, sequence: str | None, limit: int | None) -> None:
    report = conform(shared / "vectors" / f"{file}.jsonl.gz", sequence=sequence, limit=limit)
    assert report.events > 0
    assert report.passed == report.events, report.differences[0]
