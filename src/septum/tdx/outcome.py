"""How an interface function ends early."""

from __future__ import annotations

from septum.arch.operands import Operand
from septum.arch.status import with_operand


class Fail(Exception):
    """Ends an interface function with a completion status in RAX; the locks it holds are dropped by the dispatcher."""

    def __init__(self, status: int, operand: Operand | int | None = None) -> None:
        super().__init__(status, operand)
        self.status = int(status) if operand is None else with_operand(status, operand)


class ModuleHalt(Exception):
    """A sanity check of the module failed: the real module disables itself on every LP and never answers again."""


def check(condition: object, status: int, operand: Operand | int | None = None) -> None:
    """Fails the interface function with ``status`` unless ``condition`` holds."""
    if not condition:
        raise Fail(status, operand)


def sanity(condition: object, what: str) -> None:
    """``tdx_sanity_check``: halts the module unless ``condition`` holds."""
    if not condition:
        raise ModuleHalt(what)
