"""Scenarios from a user's own file."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from septum.arch.errors import UsageError
from septum.core.steps import Program, Violation
from septum.lab.scenario import Build, Built, Scenario, Value, scenarios_of

_EXTENSION: Final = ".py"


def scenarios_in(path: str) -> dict[str, Scenario]:
    """The scenarios of a Python file by name. What its tasks raise is a violated property.

    :raises UsageError: when the file cannot be read or run, or has no scenario.
    """
    name = f"scenario file {Path(path).resolve()}".removesuffix(_EXTENSION).replace(".", "-")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise UsageError(f"{path}: there is no such file; give a Python file with scenarios")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(where(error, path)) from None
    found = {
        scenario.name: replace(scenario, build=_guarded(scenario.build, path)) for scenario in scenarios_of(module)
    }
    if not found:
        raise UsageError(f"{path}: has no scenario; decorate a function with septum.lab.scenario.scenario(...)")
    return found


def where(error: BaseException, path: str = "") -> str:
    """An exception on one line, led by the place that raised it: the last one in ``path``, if it was there."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if frame.filename.endswith(path)), frames[-1])
    return f"{place.filename}:{place.lineno}: {type(error).__name__}: {error}".rstrip(": ")


def _guarded(build: Build, path: str) -> Build:
    def built(**values: Value) -> Built:
        try:
            programs, *rest = build(**values)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(where(error, path)) from None
        return Built([_guarded_program(program, path) for program in programs], *rest)

    built.__doc__ = build.__doc__
    return built


def _guarded_program(program: Program, path: str) -> Program:
    return Program(
        program.task, guarded(program.body, path), daemon=program.daemon, group=program.group, owns=program.owns
    )


def guarded(body: Callable[..., Any], path: str = "") -> Callable[..., Any]:
    """A task's body whose exceptions are violations, with the line that raised them."""

    async def run(*arguments: Any) -> Any:
        try:
            return await body(*arguments)
        except (Violation, UsageError):
            raise
        except Exception as error:
            name = "assertion" if isinstance(error, AssertionError) else type(error).__name__
            raise Violation(name, where(error, path)) from error

    return run
