"""Translations that CPUs may have cached: the worst that the architecture allows.

A CPU may use a translation that it has used before until it is made to forget it, whatever the Secure EPT says
meanwhile. The module makes a CPU forget all translations of a TD when a VCPU enters it in a newer TD epoch than last
time, or on another logical processor. With a :class:`Tlb` a guest's CPU forgets nothing before that, and using a
translation to a page that is no longer the TD's is a violation of *no stale translation is ever used*.

Source: TDX Module 1.5.01, ``adjust_tlb_tracking_state`` in ``src/td_transitions/tdh_vp_enter.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from septum.arch.pages import PAGE_2M, PAGE_4K, Level
from septum.arch.pamt import PageType
from septum.core.cells import Fixed, SharedMap
from septum.core.steps import require
from septum.kvm.guest_protocol import GuestCpu

CAPACITY: Final = 64
"""Translations that a CPU keeps of one TD; the oldest goes first."""


class Tlb(Fixed):
    """What all logical processors hold of the private memory of one TD. The guests of a TD share one."""

    __slots__ = ("_entered", "_held")

    def __init__(self, name: str = "TLB") -> None:
        self._held: SharedMap[int, tuple[tuple[int, int], ...]] = SharedMap(name, ())
        """Per LP: guest pages and the pages behind them, the oldest first."""
        self._entered: SharedMap[int, tuple[int, int]] = SharedMap(f"{name} epochs", (-1, -1))
        """Per VCPU (its TDVPR): the LP that it ran on last, and in which TD epoch it entered."""

    def enter(self, cpu: GuestCpu) -> None:
        """The VCPU runs: after an entry in another epoch or on another LP the LP holds nothing any more."""
        lp = cpu.cpu.index
        now = (lp, cpu.vp.tdvps.vcpu_epoch)
        if self._entered[cpu.vp.pa] != now:
            self._entered.store(cpu.vp.pa, now)
            self._held.store(lp, ())

    def look_up(self, cpu: GuestCpu, gpa: int) -> int | None:
        """The physical address behind a private one, if the LP holds its translation."""
        page = gpa & -PAGE_4K
        return next((pa | gpa % PAGE_4K for held, pa in self._held[cpu.cpu.index] if held == page), None)

    def keep(self, cpu: GuestCpu, gpa: int, pa: int) -> None:
        """The LP has used a translation."""
        lp = cpu.cpu.index
        self._held[lp] = (*self._held[lp], (gpa & -PAGE_4K, pa & -PAGE_4K))[-CAPACITY:]

    @staticmethod
    def check(cpu: GuestCpu, gpa: int, pa: int) -> None:
        """A held translation is used.

        :raises Violation: when the page behind it is no longer the TD's.
        """
        module = cpu.module
        keys = (pa & -PAGE_4K, pa & -PAGE_2M | Level.PD)
        owners = {e.owner for e in map(module.pamt_entry, keys) if e.page_type == PageType.REG}
        require(
            cpu.td.pa in owners,
            "no stale translation is ever used",
            f"{cpu.vp} uses a translation of {gpa:#x} to {pa:#x}, but that page is no longer the TD's",
        )


@dataclass(frozen=True, slots=True)
class CachingCpu(GuestCpu):
    """A CPU that uses a translation again without looking."""

    tlb: Tlb

    @classmethod
    def of(cls, cpu: GuestCpu, tlb: Tlb) -> CachingCpu:
        """The CPU of a guest that runs now."""
        tlb.enter(cpu)
        return cls(cpu.module, cpu.td, cpu.vp, cpu.cpu, cpu.posted, tlb)
