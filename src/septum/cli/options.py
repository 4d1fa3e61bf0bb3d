"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show_size(size: int) -> str:
    """A size as a person writes it: ``2 GiB``, ``540 KiB``, ``17 bytes``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit:,} {name}"
    return count(size, "byte")


def count(number: int, thing: str) -> str:
    """A number of things: ``1 run``, ``12,000 runs``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer itself.")]
Scenario = Annotated[str, typer.Argument(metavar="SCENARIO", help="What to run: see septum list scenarios.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")]
Params = Annotated[
    list[str],
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        help="A parameter of the scenario; repeatable.",
        default_factory=list,
        show_default=False,
    ),
]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory of the TD, such as 2G.")]
Firmware = Annotated[Path, typer.Argument(metavar="FIRMWARE", help="A TDVF image.")]
