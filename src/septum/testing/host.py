"""What a test declares: tasks, what must hold in every state, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from septum.core.automata import Invariant
from septum.core.cells import Fixed, Tracking, World
from septum.core.steps import CALLS, Program, Task, Violation, require
from septum.lab.scenario import Value, find_scenario
from septum.lab.scenario_file import guarded


class Host(Fixed):
    """A fresh world, and the tasks that a test lets run in it.

    Tasks and checks may use plain ``assert``. ``level`` is the granularity of steps.
    """

    def __init__(self) -> None:
        self.world = Tracking.world = World()
        self.programs: list[Program] = []
        self.invariants: list[Invariant] = []
        self.end_checks: list[Invariant] = []
        self.level = CALLS

    def spawn(
        self, body: Callable[..., Awaitable[Any]], *arguments: Any, name: str = "", cpu: int = -1, daemon: bool = False
    ) -> Task:
        """Adds a task that runs ``body(*arguments)``, on the next CPU unless one is given.

        A daemon need not come to an end.
        """
        place = len(self.programs)
        task = Task(name or f"{getattr(body, '__name__', 'task')} {place}", cpu=place if cpu < 0 else cpu)

        self.programs.append(Program(task, partial(guarded(body), *arguments), daemon=daemon))
        return task

    def always(self, check: Callable[[], bool | None], what: str = "") -> None:
        """``check`` must hold in every state: it returns a true value or ``None``, and raises nothing."""
        self.invariants.append(_checking(check, what))

    def at_end(self, check: Callable[[], bool | None], what: str = "") -> None:
        """``check`` must hold where all tasks have ended."""
        self.end_checks.append(_checking(check, what))

    def scenario(self, name: str, **values: Value) -> None:
        """Sets up a scenario of ``septum list scenarios`` instead of an empty world. Comes first.

        :raises UsageError: for an unknown scenario, parameter or value.
        """
        scenario = find_scenario(name)
        setting = scenario.setting(scenario.values(f"{key}={value}" for key, value in values.items()))
        self.world, self.level = setting.world, scenario.level
        self.programs += setting.programs
        self.invariants += setting.invariants


def _checking(check: Callable[[], bool | None], what: str) -> Invariant:
    name = what or getattr(check, "__name__", "check")

    def checked() -> None:
        try:
            holds = check()
        except AssertionError as error:
            raise Violation(name, str(error) or f"{name}: the assertion failed") from error
        require(holds is None or bool(holds), name, f"{name} does not hold")

    return checked
