"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from septum.arch.errors import UsageError


def read_params(pairs: list[str]) -> dict[str, str]:
    """The ``--param NAME=VALUE`` options as a dictionary. Raises ``UsageError``."""
    params: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and name and value):
            raise UsageError(f"--param {pair!r} has no name or no value: write --param NAME=VALUE, such as rounds=2")
        if name in params:
            raise UsageError(f"--param {name} is given twice: give each parameter once")
        params[name] = value
    return params


def show_size(size: int) -> str:
    """A size as a person writes it: ``2 GiB``, ``540 KiB``, ``17 bytes``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit:,} {name}"
    return f"{size:,} bytes"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer itself.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")]
Params = Annotated[list[str], typer.Option("--param", metavar="NAME=VALUE", help="A parameter of the scenario.")]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory of the TD, such as 2G.")]
Firmware = Annotated[Path, typer.Argument(metavar="FIRMWARE", help="A TDVF image.")]
