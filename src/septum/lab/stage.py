"""A scenario that is built once and run many times: building a machine can take longer than a thousand runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from septum.core.cells import Journal
from septum.core.run import Chooser, Outcome, run
from septum.lab.scenario import Scenario, Value


class Stage:
    """A scenario's tasks in a world that is put back to its beginning after each run."""

    def __init__(self, scenario: Scenario, values: Mapping[str, Value]) -> None:
        self.level = scenario.level
        self.setting = scenario.setting(values)
        self._journal = Journal(self.setting.world)

    def run(self, choose: Chooser, **options: Any) -> Outcome:
        """One live run; ``options`` are those of :func:`septum.core.run.run`."""
        world, journal = self.setting.world, self._journal
        journal.resume()
        mark, objects = journal.mark(), world.mark()
        try:
            return run(self.setting.programs, choose, level=self.level, invariants=self.setting.invariants, **options)
        finally:
            journal.undo(mark)
            world.forget(objects)
            journal.close()
