"""The pytest plugin: shows the run behind a failure, and runs a schedule again with ``--septum-schedule``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--septum-schedule``."""
    parser.getgroup("septum").addoption(
        "--septum-schedule",
        metavar="SCHEDULE",
        help="run tests decorated with septum.explore along this schedule only, as a failure printed it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hands the option to the decorated tests."""
    schedule = config.getoption("--septum-schedule")
    if schedule is not None:
        from septum.testing.exploration import replaying  # noqa: PLC0415 -- most test runs do without

        replaying.schedule = schedule


def pytest_unconfigure() -> None:
    """Takes it back."""
    if exploration := sys.modules.get("septum.testing.exploration"):
        exploration.replaying.schedule = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the diagram and the command that shows it again to the report of a failure."""
    report = yield
    found = call.excinfo.value if call.excinfo is not None else None
    diagram, schedule = getattr(found, "diagram", None), getattr(found, "schedule", None)
    if isinstance(diagram, str) and isinstance(schedule, str):
        command = f"pytest {shlex.quote(item.nodeid)} --septum-schedule={shlex.quote(schedule)}"
        report.sections.append(("septum: the run that fails", f"{diagram}\nto run it again: {command}"))
    return report
