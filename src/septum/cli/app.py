"""The commands of ``septum`` and the options before them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from septum.cli.boot import boot
from septum.cli.conform import conform
from septum.cli.contention import contention
from septum.cli.explore import explore
from septum.cli.ingest import ingest
from septum.cli.list_ import list_
from septum.cli.measure import measure
from septum.cli.replay import replay
from septum.cli.run import run
from septum.cli.status import status

COMMANDS: dict[str, Callable[..., int]] = {
    "boot": boot,
    "measure": measure,
    "conform": conform,
    "contention": contention,
    "ingest": ingest,
    "run": run,
    "explore": explore,
    "replay": replay,
    "status": status,
    "list": list_,
}
"""Every command that exists, in the order that ``--help`` shows."""


def command() -> Any:
    """The whole command line, ready for ``main(args)``."""
    app = typer.Typer(
        add_completion=False,
        # The boxes of rich are for terminals; files and pipes get plain text.
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    )
    app.callback()(septum)
    for name, function in COMMANDS.items():
        app.command(name)(function)
    return typer.main.get_command(app)


def _print_version(asked: bool) -> None:
    if asked:
        from septum import __version__

        print(f"septum {__version__}")
        raise typer.Exit


def septum(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A TDX host you can take apart: Intel's TDX Module and KVM on top of it, with every interleaving under control.

    Exit status: 0 the answer is good, 1 the answer is bad, 2 the command was misused.
    """
