"""What the page-fault tracepoints tell: faults that do not end, retries in the host, zaps, failed entries.

Sources: the events ``kvm_page_fault``, ``kvm_exit``, ``kvm_entry``, ``kvm_mmu_spte_requested`` and
``kvm_tdp_mmu_spte_changed`` of Linux, old and new forms; TDX Module 1.5.01 for the threshold of its zero-step defence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from septum.lab.ingest.lines import Line

SUSPECTS: Final = 7
"""EPT violations on one private GPA at one instruction with which the module begins to suspect a zero-step attack."""
_EPT_VIOLATION: Final = "EPT_VIOLATION"
_FROZEN: Final = (0x5A0, 0x8000_0000_0000_05A0)
"""FROZEN_SPTE, and the same with the bit that suppresses #VE."""
_PFN: Final = (1 << 40) - 1
"""Bits 51:12 of an SPTE."""
_UNKNOWN: Final = re.compile(r"^(?:UNKNOWN|0x[fF]+|-1$)")
"""Exit reasons that KVM could not decode: TDH.VP.ENTER returned an error, such as OPERAND_BUSY."""

_PATTERNS: Final[Mapping[str, re.Pattern[str]]] = {
    "kvm_page_fault": re.compile(
        r"(?:vcpu (?P<vcpu>\d+) rip 0x(?P<rip>[0-9a-f]+) )?"
        r"address (?:0x)?(?P<gpa>[0-9a-f]+) error_code (?:0x)?[0-9a-f]+"
    ),
    "kvm_exit": re.compile(r"(?:vcpu (?P<vcpu>\d+) )?(?:vcpu-)?reason (?P<reason>\S+)(?: rip 0x(?P<rip>[0-9a-f]+))?"),
    "kvm_entry": re.compile(r"vcpu (?P<vcpu>\d+)"),
    "kvm_mmu_spte_requested": re.compile(r"gfn (?:0x)?(?P<gfn>[0-9a-f]+) pfn (?:0x)?[0-9a-f]+ level (?P<level>\d)"),
    "kvm_tdp_mmu_spte_changed": re.compile(
        r"as id (?P<as>-?\d+) gfn (?:0x)?(?P<gfn>[0-9a-f]+) level (?P<level>\d) "
        r"old_spte (?:0x)?(?P<old>[0-9a-f]+) new_spte (?:0x)?(?P<new>[0-9a-f]+)"
    ),
    "kvm_mmu_set_spte": re.compile(r"gfn (?:0x)?(?P<gfn>[0-9a-f]+) spte (?:0x)?(?P<spte>[0-9a-f]+)"),
    "kvm_vm_set_mem_attributes": re.compile(r"(?P<start>\S+) -- (?P<end>\S+) \[(?P<attributes>\S+)\]"),
}


@dataclass(slots=True)
class Run:
    """Faults of one vCPU on one GPA, or at one RIP, with nothing else in between."""

    value: int
    count: int = 0
    line: int = 0

    def see(self, value: int, line: int) -> Run | None:
        """Counts one more; the run that has ended when it is of another value."""
        ended = self if value != self.value and self.count else None
        if value == self.value:
            self.count += 1
            return None
        self.value, self.count, self.line, done = value, 1, line, Run(self.value, self.count, self.line)
        return done if ended else None


@dataclass(slots=True)
class _Vcpu:
    gpas: Run = field(default_factory=lambda: Run(-1))
    rips: Run = field(default_factory=lambda: Run(-1))
    gfn: int = -1
    requests: int = 0
    """Mappings asked for since the last fault, on the page that faulted."""


@dataclass(slots=True)
class Faults:
    """Follows the tracepoints; ``storms`` are runs of at least :data:`SUSPECTS` faults, by vCPU."""

    events: int = 0
    faults: int = 0
    exits: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    """Local retries: mappings of one page asked for again without the guest in between."""
    worst_retries: tuple[int, str, int, int] = (0, "", 0, 0)
    """The most for one fault: how many, which vCPU, which gfn, in which line."""
    zaps: int = 0
    conversions: int = 0
    entry_errors: int = 0
    storms: list[tuple[str, str, Run]] = field(default_factory=list)
    by_gpa: dict[int, set[str]] = field(default_factory=dict)
    backs: dict[int, int] = field(default_factory=dict)
    """The gfn that a page frame was mapped for last."""
    _vcpus: dict[str, _Vcpu] = field(default_factory=dict)

    def see(self, line: Line) -> bool:
        """Takes one tracepoint; whether it is one of these, in a form that is known."""
        pattern = _PATTERNS.get(line.event)
        found = pattern.search(line.text) if pattern else None
        if found is None:
            return False
        self.events += 1
        _HANDLERS[line.event](self, line, {name: text for name, text in found.groupdict().items() if text is not None})
        return True

    def close(self) -> None:
        """The log has ended: runs that were going on end too."""
        for name, vcpu in self._vcpus.items():
            for what, run in (("GPA", vcpu.gpas), ("RIP", vcpu.rips)):
                self._end(name, what, run)
            self._settle(name, vcpu, 0)

    def shared_gpas(self) -> Iterator[tuple[int, list[str]]]:
        """GPAs on which more than one vCPU was seen faulting in a storm."""
        for gpa, vcpus in self.by_gpa.items():
            if len(vcpus) > 1:
                yield gpa, sorted(vcpus)

    # -- the tracepoints -----------------------------------------------------------------------------------------------

    def _page_fault(self, line: Line, found: Mapping[str, str]) -> None:
        self.faults += 1
        name, vcpu = self._vcpu(line, found)
        self._settle(name, vcpu, line.number)
        gpa, rip = int(found["gpa"], 16), int(found.get("rip", "0"), 16)
        vcpu.gfn = gpa >> 12
        if ended := vcpu.gpas.see(gpa & -4096, line.number):
            self._end(name, "GPA", ended)
        # KVM cannot read the RIP of a TD: it shows as 0, and says nothing then.
        if rip and (ended := vcpu.rips.see(rip, line.number)):
            self._end(name, "RIP", ended)

    def _exit(self, line: Line, found: Mapping[str, str]) -> None:
        reason = found["reason"]
        self.exits[reason] += 1
        name, vcpu = self._vcpu(line, found)
        if _UNKNOWN.match(reason):
            self.entry_errors += 1
        elif reason != _EPT_VIOLATION:
            # The guest got somewhere: what comes next is no repetition.
            for what, run in (("GPA", vcpu.gpas), ("RIP", vcpu.rips)):
                self._end(name, what, run)
            vcpu.gpas, vcpu.rips = Run(-1), Run(-1)

    def _entry(self, line: Line, found: Mapping[str, str]) -> None:
        name, vcpu = self._vcpu(line, found)
        self._settle(name, vcpu, line.number)

    def _requested(self, line: Line, found: Mapping[str, str]) -> None:
        for vcpu in (self._vcpus.get(f"task {line.pid}"), *self._vcpus.values()):
            if vcpu is not None and vcpu.gfn == int(found["gfn"], 16):
                vcpu.requests += 1
                return

    def _changed(self, line: Line, found: Mapping[str, str]) -> None:
        self.zaps += int(found["new"], 16) in _FROZEN or int(found["new"], 16) == 0

    def _set(self, line: Line, found: Mapping[str, str]) -> None:
        self.backs[int(found["spte"], 16) >> 12 & _PFN] = int(found["gfn"], 16)

    def _attributes(self, line: Line, found: Mapping[str, str]) -> None:
        self.conversions += 1

    # -- keeping count -------------------------------------------------------------------------------------------------

    def _vcpu(self, line: Line, found: Mapping[str, str]) -> tuple[str, _Vcpu]:
        """The vCPU by its number, or by its thread where an old kernel does not say."""
        name = f"vCPU {found['vcpu']}" if "vcpu" in found else f"task {line.pid}"
        return name, self._vcpus.setdefault(name, _Vcpu())

    def _settle(self, name: str, vcpu: _Vcpu, line: int) -> None:
        """The host is done with a fault: the requests beyond the first were retries."""
        again = vcpu.requests - 1
        if again > 0:
            self.retries += again
            self.worst_retries = max(self.worst_retries, (again, name, vcpu.gfn, line))
        vcpu.requests, vcpu.gfn = 0, -1

    def _end(self, name: str, what: str, run: Run) -> None:
        if run.count >= SUSPECTS:
            self.storms.append((name, what, run))
            if what == "GPA":
                self.by_gpa.setdefault(run.value, set()).add(name)


_HANDLERS: Final[Mapping[str, Callable[[Faults, Line, Mapping[str, str]], None]]] = {
    "kvm_page_fault": Faults._page_fault,
    "kvm_exit": Faults._exit,
    "kvm_entry": Faults._entry,
    "kvm_mmu_spte_requested": Faults._requested,
    "kvm_tdp_mmu_spte_changed": Faults._changed,
    "kvm_mmu_set_spte": Faults._set,
    "kvm_vm_set_mem_attributes": Faults._attributes,
}
