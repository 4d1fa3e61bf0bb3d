"""The lock footprint of a call on the model: every lock operation in order, and the lock words afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from septum.arch.pamt import PageType
from septum.arch.sept import TDEL
from septum.core.steps import PRIMITIVES, ctx
from septum.lab import contention
from septum.lab.conform import Runner
from septum.tdx.module import Module
from tests.mutation.cases import Case

_PAGES: Final = {
    PageType.TDR: "TDR",
    PageType.TDVPR: "TDVPR",
    PageType.TDCX: "TDCX",
    PageType.EPT: "SEPT_PAGE",
    PageType.REG: "REG",
    PageType.NDA: "FREE_PAGE",
}


class Events:
    """A trace that keeps the lock events."""

    def __init__(self, module: Module) -> None:
        self.operations: list[str] = []
        self._pages = {key: entry.page_type for key, entry in dict.items(module.pamt)}

    def add(self, kind: str, text: str, data: dict[str, Any]) -> None:
        """An event of the call."""
        if kind == "lock":
            self.operations.append(f"{text[0]}{self._kind(text[1:])}/{data['mode'].name[:2]}")

    def _kind(self, label: str) -> str:
        name, _, inside = label.partition("[")
        if name == "PAMT_4K":
            return f"PAMT_4K[{_PAGES[PageType(self._pages.get(int(inside[:-1], 16), PageType.NDA))]}]"
        if name == "SEPT_ENTRY":
            return f"SEPT_ENTRY[{int(inside[:-1], 16) >> 3 & 511}]"
        return re.sub(r"\[.*", "", label)


def words(module: Module) -> dict[Any, int]:
    """Lock words that are not 0, and the locked Secure EPT entries."""
    locked = {("sept", pa): entry & TDEL for pa, entry in dict.items(module.sept) if entry & TDEL}
    return {**dict(dict.items(module.locks)), **locked}


def observed(
    module: Module, run: Callable[[], str], *, before: Callable[[], None] = lambda: None
) -> tuple[tuple[str, ...], dict[Any, int], str]:
    """Lock operations of what ``run`` does, lock words afterwards, and its answer; ``before`` comes just before."""
    level = ctx.level
    events = Events(module)
    before()
    try:
        ctx.trace, ctx.level = events, PRIMITIVES  # type: ignore[assignment]
        answer = run()
    finally:
        ctx.trace, ctx.level = None, level
    return tuple(events.operations), words(module), answer


Footprint = Callable[..., tuple[tuple[str, ...], dict[Any, int], str]]
"""The footprint of a case, with ``before`` called between the calls that come before and the call itself."""


def recorded(runner: Runner) -> Footprint:
    """Footprints of recorded calls, on a machine that is put back after each."""

    def footprint(
        case: Case, *, before: Callable[[], None] = lambda: None
    ) -> tuple[tuple[str, ...], dict[Any, int], str]:
        machine = runner.machine_on_the_way(*contention._start(case.start))
        module, journal = machine.module, machine.journal
        mark = journal.mark()
        try:
            for call in case.before:
                contention._finish(contention.call_of(module, call))
            operations, afterwards, answer = observed(
                module,
                lambda: contention._finish(contention.call_of(module, case.call), level=PRIMITIVES)[1],
                before=before,
            )
        finally:
            journal.undo(mark)
        return operations if case.releases else _without_releases(operations), afterwards, answer

    return footprint


def _without_releases(operations: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in operations if text[0] != "-")
