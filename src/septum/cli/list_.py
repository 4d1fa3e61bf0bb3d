"""``septum list``: what there is to name on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from septum.arch.errors import UsageError
from septum.cli.main import GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import show


def _scenarios() -> list[dict[str, Any]]:
    from septum.lab.scenario import scenarios

    return [
        {
            "name": scenario.name,
            "title": scenario.title,
            "details": scenario.description,
            "parameters": {str(parameter.name): parameter.default for parameter in scenario.parameters},
        }
        for scenario in scenarios().values()
    ]


def _platforms() -> list[dict[str, Any]]:
    from septum.arch.platform import profile, profile_names

    return [
        {
            "name": platform.name,
            "description": platform.description,
            "packages": platform.num_packages,
            "lps": platform.num_lps,
            "private_memory": platform.private_memory,
            "private_hkids": len(platform.private_hkids),
        }
        for platform in map(profile, profile_names())
    ]


def _kernels() -> list[dict[str, Any]]:
    from septum.kvm.kernel import SITES, Kernel, kernels

    found = []
    for kernel in map(Kernel, kernels()):
        unusual = {name: policy for name, policy in kernel.policies.items() if policy != SITES[name].policies[0]}
        found.append({"name": kernel.name, "fixes": sorted(kernel.fixes or ()), "policies": unusual})
    return found


def _fixes() -> list[dict[str, Any]]:
    from septum.kvm.kernel import FIXES

    return [
        {"name": fix.name, "since": fix.since, "commit": fix.commit, "does": fix.does}
        for fix in sorted(FIXES.values(), key=lambda fix: fix.since)
    ]


def _policies() -> list[dict[str, Any]]:
    from septum.kvm.kernel import DESIGNS, GROUPS, SITES

    designs = [{"name": name, "kind": "design", "policies": dict(sites)} for name, sites in DESIGNS.items()]
    sites = [{"name": site.name, "kind": "call site", "policies": site.policies} for site in SITES.values()]
    groups = [{"name": name, "kind": "call sites", "policies": members} for name, members in GROUPS.items()]
    return designs + sites + groups


KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "scenarios": _scenarios,
    "platforms": _platforms,
    "kernels": _kernels,
    "fixes": _fixes,
    "policies": _policies,
}
"""What can be listed, and what is known of each thing."""


def list_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(KINDS)}.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """List what there is: scenarios to run and explore, platforms, kernels and what can be changed in them."""
    from septum.report.tables import Table

    if kind not in KINDS:
        raise UsageError(f"there is no list of {kind!r}: give one of {', '.join(KINDS)}")
    things = KINDS[kind]()
    names = "\n".join(thing["name"] for thing in things)
    keys = [key for key in things[0] if key != "details"]
    columns = tuple(key.replace("_", " ") for key in keys)
    rows = tuple(tuple(_cell(key, thing[key]) for key in keys) for thing in things)
    show({kind: things}, names, [Table(rows, columns)], as_json=as_json, quiet=quiet)
    return GOOD


def _cell(key: str, value: Any) -> object:
    if isinstance(value, dict):
        return " ".join(f"{name}={default}" for name, default in value.items())
    if isinstance(value, list | tuple):
        return " ".join(value)
    return f"{value / (1 << 30):,.1f} GiB" if key.endswith("memory") else value
