"""What a scenario is: a world with tasks, made from parameters, and what must hold in it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from septum.arch.errors import UsageError
from septum.core.automata import Invariant
from septum.core.cells import Tracking, World
from septum.core.steps import CALLS, Program

if TYPE_CHECKING:
    from types import ModuleType

    from septum.kvm.host import Host

Value = int | str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a scenario: integers lie in ``low``..``high``, strings are one of ``choices``, or what ``check``
    has nothing against (it raises ``UsageError``)."""

    name: str
    default: Value
    meaning: str
    low: int = 0
    high: int = 1 << 62
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None

    def parse(self, text: str) -> Value:
        """The value that ``text`` stands for.

        :raises UsageError: when it is not one that the parameter can have.
        """
        if self.choices:
            if text in self.choices:
                return text
            raise UsageError(f"parameter {self.name}: {text!r} is not one of {', '.join(self.choices)}")
        if self.check:
            self.check(text)
            return text
        try:
            value = int(text, 0)
        except ValueError:
            raise UsageError(f"parameter {self.name}: {text!r} is not a number; give one as in {self}") from None
        if not self.low <= value <= self.high:
            raise UsageError(f"parameter {self.name}: {value} is out of range; give {self.low} to {self.high}")
        return value

    def __str__(self) -> str:
        return f"{self.name}={self.default}"


class Built(NamedTuple):
    """What a scenario is built into. ``host`` is for reports: whose SEAMCALLs are counted."""

    programs: Sequence[Program]
    invariants: Sequence[Invariant] = ()
    host: Host | None = None


Build = Callable[..., tuple[Sequence[Program], Sequence[Invariant]] | Built]


@dataclass(slots=True)
class Setting:
    """A scenario ready to run: its world, its tasks, and the properties of all its states."""

    world: World
    programs: Sequence[Program]
    invariants: Sequence[Invariant] = field(default_factory=list)
    host: Host | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named scenario. ``build`` gets the parameters by name, in a fresh world, and returns tasks and invariants.

    A scenario that is not ``reducible`` is there for its number of states, which reductions would change.
    """

    name: str
    title: str
    build: Build
    parameters: tuple[Parameter, ...] = ()
    level: int = CALLS
    reducible: bool = True

    @property
    def description(self) -> str:
        """What the function that builds it says of it."""
        return inspect.getdoc(self.build) or self.title

    def setting(self, values: Mapping[str, Value]) -> Setting:
        """Builds the scenario in a world of its own (or in one that it brings)."""
        Tracking.world = World()
        built = Built(*self.build(**values))
        return Setting(Tracking.world, *built)

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


def scenario(*parameters: Parameter, level: int = CALLS) -> Callable[[Build], Scenario]:
    """Makes a scenario of the function below: named as it, with ``-`` for ``_``, its title the first line of its text.

    The function gets the parameters by name and returns the tasks and what must hold in every state.
    """

    def made(build: Build) -> Scenario:
        name = getattr(build, "__name__", "scenario").replace("_", "-")
        title = (inspect.getdoc(build) or name).partition("\n")[0].rstrip(".").replace("``", "")
        return Scenario(name, title, build, parameters, level)

    return made


def file_stem(name: str) -> str:
    """The name of a scenario as a part of file names."""
    return re.sub(r"[^\w-]+", "-", name.rpartition(":")[2].rpartition("/")[2])


#: Where the scenarios are. A module has ``SCENARIOS``, or they are its global variables.
_MODULES: Final = (
    "septum.lab.scenarios.trylock",
    "septum.lab.scenarios.locking",
    "septum.lab.scenarios.seamcalls",
    "septum.lab.scenarios.kvm_build",
    "septum.lab.scenarios.kvm_faults",
    "septum.lab.scenarios.kvm_memory",
    "septum.lab.scenarios.kvm_lifetime",
    "septum.lab.scenarios.kvm_hugepages",
    "septum.lab.scenarios.kvm_zerostep",
    "septum.lab.scenarios.kvm_module_faults",
)


def scenarios() -> dict[str, Scenario]:
    """All scenarios by name."""
    return {found.name: found for module in _MODULES for found in scenarios_of(import_module(module))}


def scenarios_of(module: ModuleType) -> list[Scenario]:
    """The scenarios of a module, in its order."""
    everything: Iterable[Any] = getattr(module, "SCENARIOS", vars(module).values())
    return [thing for thing in everything if isinstance(thing, Scenario)]


def find_scenario(name: str) -> Scenario:
    """The scenario with this name; ``FILE.py:NAME`` is one of a file (the name can be left out if it is the only one).

    :raises UsageError: when there is none, or the file cannot be used.
    """
    if match := re.fullmatch(r"(.*\.py)(?::(.*))?", name):
        from septum.lab.scenario_file import scenarios_in  # noqa: PLC0415 -- a name needs no file

        path, wanted = match.groups()
        known = scenarios_in(path)
        chosen = next(iter(known)) if not wanted and len(known) == 1 else wanted or ""
        if chosen not in known:
            raise UsageError(f"{path} has no scenario {chosen!r}; it has: {', '.join(known)}")
        return replace(known[chosen], name=f"{path}:{chosen}")
    known = scenarios()
    if name not in known:
        raise UsageError(f"there is no scenario {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]
