"""What a scenario is: a world with tasks, made from parameters, and what must hold in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Final

from septum.arch.errors import UsageError
from septum.core.automata import Invariant
from septum.core.cells import Tracking, World
from septum.core.steps import CALLS, Program

Value = int | str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a scenario: integers lie in ``low``..``high``, strings are one of ``choices``."""

    name: str
    default: Value
    meaning: str
    low: int = 0
    high: int = 1 << 62
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> Value:
        """The value that ``text`` stands for.

        :raises UsageError: when it is not one that the parameter can have.
        """
        if self.choices:
            if text in self.choices:
                return text
            raise UsageError(f"parameter {self.name}: {text!r} is not one of {', '.join(self.choices)}")
        try:
            value = int(text, 0)
        except ValueError:
            raise UsageError(f"parameter {self.name}: {text!r} is not a number; give one as in {self}") from None
        if not self.low <= value <= self.high:
            raise UsageError(f"parameter {self.name}: {value} is out of range; give {self.low} to {self.high}")
        return value

    def __str__(self) -> str:
        return f"{self.name}={self.default}"


@dataclass(slots=True)
class Setting:
    """A scenario ready to run: its world, its tasks, and the properties of all its states."""

    world: World
    programs: Sequence[Program]
    invariants: Sequence[Invariant] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named scenario. ``build`` gets the parameters by name, in a fresh world, and returns tasks and invariants.

    A scenario that is not ``reducible`` is there for its number of states, which reductions would change.
    """

    name: str
    title: str
    build: Callable[..., tuple[Sequence[Program], Sequence[Invariant]]]
    parameters: tuple[Parameter, ...] = ()
    level: int = CALLS
    reducible: bool = True

    def setting(self, values: Mapping[str, Value]) -> Setting:
        """Builds the scenario in a world of its own (or in one that it brings)."""
        Tracking.world = World()
        programs, invariants = self.build(**values)
        return Setting(Tracking.world, programs, invariants)

    def values(self, given: Iterable[str] = ()) -> dict[str, Value]:
        """All parameters, from ``NAME=VALUE`` texts and defaults.

        :raises UsageError: for a text of another form, an unknown name, or a bad value.
        """
        values: dict[str, Value] = {parameter.name: parameter.default for parameter in self.parameters}
        known = {parameter.name: parameter for parameter in self.parameters}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--param {text}: write NAME=VALUE, as in {next(iter(self.parameters), 'n=1')}")
            if name not in known:
                has = ", ".join(map(str, self.parameters)) or "none"
                raise UsageError(f"scenario {self.name} has no parameter {name!r}; it has: {has}")
            values[name] = known[name].parse(value)
        return values


#: Where the scenarios are: each module has ``SCENARIOS``.
_MODULES: Final = (
    "septum.lab.scenarios.trylock",
    "septum.lab.scenarios.locking",
    "septum.lab.scenarios.seamcalls",
    "septum.lab.scenarios.kvm_build",
    "septum.lab.scenarios.kvm_faults",
)


def scenarios() -> dict[str, Scenario]:
    """All scenarios by name."""
    return {scenario.name: scenario for module in _MODULES for scenario in import_module(module).SCENARIOS}


def find_scenario(name: str) -> Scenario:
    """The scenario with this name.

    :raises UsageError: when there is none.
    """
    known = scenarios()
    if name not in known:
        raise UsageError(f"there is no scenario {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]
