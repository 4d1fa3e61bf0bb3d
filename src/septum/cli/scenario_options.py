"""Options of the commands that take a scenario: which kernel it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from septum.arch.errors import UsageError

if TYPE_CHECKING:
    from septum.lab.scenario import Scenario, Value

Kernel = Annotated[str | None, typer.Option("--kernel", metavar="K", help="Which kernel: short for --param kernel=K.")]
Fixes = Annotated[
    list[str],
    typer.Option(
        "--with",
        metavar="FIX",
        help="A fix that the kernel gets; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
Unfixed = Annotated[
    list[str],
    typer.Option(
        "--without",
        metavar="FIX",
        help="A fix that the kernel loses; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
Policies = Annotated[
    list[str],
    typer.Option(
        "--policy",
        metavar="[SITE=]P",
        help="Another contention policy, at a call site; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]


def chosen_scenario(
    name: str,
    params: Sequence[str],
    kernel: str | None,
    fixes: Sequence[str],
    without: Sequence[str],
    policies: Sequence[str],
) -> tuple[Scenario, dict[str, Value], dict[str, str | None]]:
    """The scenario, its parameters, and what JSON says of its kernel: ``kernel`` and ``policy``.

    :raises UsageError: for an unknown name or a bad value, and when the scenario has no kernel to change.
    """
    from septum.lab.scenario import find_scenario

    chosen = find_scenario(name)
    values = chosen.values(params)
    if "kernel" not in values:
        if kernel or fixes or without or policies:
            raise UsageError(f"scenario {chosen.name} runs no kernel; leave --kernel, --with, --without, --policy out")
        return chosen, values, {"kernel": None, "policy": None}
    from septum.lab.kernels import changed_kernel, kernel_and_policy

    text = changed_kernel(kernel or str(values["kernel"]), fixes=fixes, without=without, policies=policies)
    values = chosen.values([*params, f"kernel={text}"])
    release, policy = kernel_and_policy(text)
    return chosen, values, {"kernel": release, "policy": policy}
