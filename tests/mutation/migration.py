"""Breaks every lock of TDH.EXPORT.*, TDH.IMPORT.* and TDH.MIG.STREAM.CREATE, one at a time.

Nothing was recorded for them. What is right is the table of ``tests/tdx/migration_calls.py``, read from the module's
source, which the right model is tested against; a mutant is noticed when its lock operations, the lock words that it
leaves, or its status differ from the right model's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

from septum.core.cells import Tracking, World
from septum.core.steps import SOLO, ctx
from septum.tdx.registers import Regs
from tests.mutation.broken import Mutant, broken, mutants
from tests.mutation.cases import Case
from tests.mutation.footprint import observed
from tests.tdx.migration_calls import CALLS
from tests.tdx.migration_machine import Migration


def cases() -> list[Case]:
    """Every call of the table."""
    bare = [Case(name, leaf.abi_name, "", (), {}, ()) for name, (leaf, *_) in CALLS.items()]
    return [replace(case, operations=footprint(case)[0]) for case in bare]


def footprint(
    case: Case,
    *,
    before: Callable[[], None] = lambda: None,
    under: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[tuple[str, ...], dict[Any, int], str]:
    """Lock operations of a case's call, lock words afterwards, and its status; ``under`` holds during the call only."""
    Tracking.world = World()
    move = Migration()
    leaf, prepare, _, _ = CALLS[case.name]
    regs = Regs.of({"rax": leaf, **prepare(move)})
    with under():
        return observed(move.module, lambda: _status(move, regs), before=before)


def _status(move: Migration, regs: Regs) -> str:
    call = move.module.seamcall(0, regs)
    try:
        while True:
            call.send(None)
    except StopIteration:
        return hex(regs.rax)


def all_mutants() -> list[Mutant]:
    """All mutants of all cases."""
    return [mutant for case in cases() for mutant in mutants(footprint, case)]


@cache
def _right(name: str) -> tuple[tuple[str, ...], dict[Any, int], str]:
    return footprint(Case(name, CALLS[name][0].abi_name, "", (), {}, ()))


def is_noticed(mutant: Mutant) -> bool:
    """Whether a mutant's footprint is another than the right model's, or it cannot even get to its end."""
    right = _right(mutant.case.name)
    try:
        return footprint(mutant.case, under=lambda: broken(mutant)) != right
    except Exception:
        ctx.level, ctx.trace, ctx.task = SOLO, None, None
        return True
