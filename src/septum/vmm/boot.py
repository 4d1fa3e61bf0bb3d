"""The life of a TD from its first page to its last, on a machine of its own: ``septum boot``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from septum.arch.errors import UsageError
from septum.arch.platform import Platform, profile
from septum.arch.structures import TdReport
from septum.core.cells import Tracking, World
from septum.core.run import Chooser, Outcome, run, solo
from septum.core.steps import CALLS, SOLO
from septum.guest.hob import Memory
from septum.guest.scripted import Script, ScriptedGuest
from septum.guest.scripts import Done, Job, script
from septum.guest.tlb import Tlb
from septum.kvm.host import Host
from septum.kvm.kernel import Kernel
from septum.kvm.seamcall import Injection
from septum.vmm.hob import td_hob_section
from septum.vmm.layout import MemoryLayout, parse_size, plan_layout
from septum.vmm.measure import measure_image
from septum.vmm.payload import builtin_payload
from septum.vmm.qemu import Qemu
from septum.vmm.tdvf import TdvfImage, parse_image

DEFAULT_MEMORY: Final = 2 << 30
BUSY: Final = "TDX_OPERAND_BUSY"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the life: its name, SEAMCALLs by leaf in it, seconds of real time."""

    name: str
    by_leaf: Mapping[str, int]
    seconds: float

    @property
    def seamcalls(self) -> int:
        """SEAMCALLs in all."""
        return sum(self.by_leaf.values())


@dataclass(slots=True)
class BootResult:
    """What became of a TD.

    ``exit`` is why it ended, ``mrtd`` what the module says, ``predicted_mrtd`` what the image says. ``counts`` has
    SEAMCALLs by leaf and status, ``done`` what each vCPU reported of itself, ``problems`` all that is not as it must
    be.
    """

    exit: str = ""
    mrtd: bytes = b""
    predicted_mrtd: bytes = b""
    report: TdReport | None = None
    rtmrs: tuple[bytes, ...] = ()
    attributes: int = 0
    xfam: int = 0
    done: list[Done | None] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    peak_pages: int = 0
    leaked_pages: int = 0
    leaks: dict[str, int] = field(default_factory=dict)
    leaked_keyids: list[int] = field(default_factory=list)
    warnings: dict[str, int] = field(default_factory=dict)
    outcome: Outcome | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def seamcalls(self) -> int:
        """SEAMCALLs in all, from the TD's first to its last."""
        return sum(phase.seamcalls for phase in self.phases)

    @property
    def accepted_4k(self) -> int:
        """Pages of 4 KiB that the guest accepted, at once or when it touched them."""
        return sum(done.accepted_4k + done.accepted_on_ve for done in self.done if done)

    @property
    def accepted_2m(self) -> int:
        """Pages of 2 MiB that the guest accepted at once."""
        return sum(done.accepted_2m for done in self.done if done)

    @property
    def busy(self) -> int:
        """SEAMCALLs that found an operand busy."""
        return sum(by_status.get(BUSY, 0) for by_status in self.counts.values())

    @property
    def seconds(self) -> float:
        """Real time, in seconds."""
        return sum(phase.seconds for phase in self.phases)


class _Phases:
    """Counts and times between the beginnings of phases."""

    def __init__(self, host: Host, progress: Callable[[str], None]) -> None:
        self._host = host
        self._progress = progress
        self._name = ""
        self._before: dict[str, int] = {}
        self._start = 0.0
        self.finished: list[Phase] = []

    def begin(self, name: str) -> None:
        """Ends the last phase and begins another."""
        now, counts = time.perf_counter(), self._counts()
        if self._name:
            made = {leaf: n - self._before.get(leaf, 0) for leaf, n in counts.items()}
            by_leaf = {leaf: n for leaf, n in made.items() if n}
            self.finished.append(Phase(self._name, by_leaf, now - self._start))
        self._name, self._before, self._start = name, counts, now
        self._progress(name)

    def _counts(self) -> dict[str, int]:
        return {leaf: sum(by_status.values()) for leaf, by_status in self._host.counts.items()}


def builtin_image() -> TdvfImage:
    """What is booted when no firmware is given."""
    return parse_image(builtin_payload(), "built-in payload")


def boot(
    image: TdvfImage | None = None,
    memory: int | str = DEFAULT_MEMORY,
    vcpus: int = 1,
    kernel: Kernel | str = "v6.16",
    guest: Script | str = "boot",
    platform: Platform | str = "default",
    *,
    job: Job | None = None,
    attributes: int = 0,
    choose: Chooser = solo,
    level: int | None = None,
    trace: bool = False,
    injections: Iterable[Injection] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> BootResult:
    """Builds a TD from a firmware image, lets its vCPUs run a script, destroys it, and checks what must hold.

    ``guest`` is a ready script by name, doing ``job``, or a script. Of ``attributes`` the TD has what KVM supports.
    The schedule is solo unless ``choose`` says otherwise; ``level`` is the granularity of steps (by default none in a
    solo run), ``trace`` keeps the events. ``injections`` make SEAMCALLs of the TD fail. ``progress`` is told what
    begins. Changes the world of this process.

    :raises UsageError: when there is no such VM: memory that does not hold the image, more vCPUs than CPUs, an unknown
        kernel, platform or script.
    """
    image = image or builtin_image()
    size = parse_size(memory) if isinstance(memory, str) else memory
    layout = plan_layout(image, size)
    machine = profile(platform) if isinstance(platform, str) else platform
    if not 1 <= vcpus <= machine.num_lps:
        raise UsageError(
            f"{vcpus} vCPUs on platform {machine.name}, which has {machine.num_lps} CPUs: give 1 to {machine.num_lps}"
        )
    code = script(guest, _with_memory(job or Job(), image, layout)) if isinstance(guest, str) else guest
    if level is None:
        level = SOLO if choose is solo and not trace else CALLS

    Tracking.world = World()
    host = Host(machine, kernel if isinstance(kernel, Kernel) else Kernel(kernel))
    host.boot()
    host.seamcalls.inject(*injections)
    free_before, counts_before = host.pages.in_use, host.counts
    phases = _Phases(host, progress)
    tlb = Tlb()
    guests = [ScriptedGuest(code, f"guest{i}", tlb) for i in range(vcpus)]
    qemu = Qemu(host, image, layout, guests, attributes=attributes, phase=phases.begin)
    outcome = run([*qemu.programs(), *host.interrupt_contexts()], choose, level=level, keep_events=trace)
    phases.begin("")

    result = BootResult(exit=qemu.state.reason, outcome=outcome, phases=phases.finished)
    result.predicted_mrtd = measure_image(image)
    result.counts = _difference(host.counts, counts_before)
    result.peak_pages = host.pages.peak - free_before
    result.leaked_pages = host.pages.in_use - free_before
    result.leaks = dict(host.pages.leaks_by_reason())
    result.leaked_keyids = host.keyids_in_use()
    result.warnings = dict(host.log.warnings + host.log.bugs)
    result.done = [guest.result if isinstance(guest.result, Done) else None for guest in guests]
    if qemu.td is not None:
        tdcs = qemu.td.tdcs
        result.mrtd, result.rtmrs, result.attributes, result.xfam = tdcs.mrtd, tdcs.rtmr, tdcs.attributes, tdcs.xfam
    if result.done[0] is not None and result.done[0].report:
        result.report = TdReport.unpack(result.done[0].report)
    result.problems = _problems(result, guests)
    return result


def _with_memory(job: Job, image: TdvfImage, layout: MemoryLayout) -> Job:
    """The job of a guest that gets no HOB: it is told what its memory is."""
    if td_hob_section(image.sections) is not None:
        return job
    added = sorted((s.memory_address, s.memory_end) for s in image.sections if s.added)
    memory = []
    for ram in layout.ram:
        start = ram.start
        for low, high in [*((a, b) for a, b in added if ram.start <= a < ram.end), (ram.end, ram.end)]:
            if start < low:
                memory.append(Memory(start, low))
            start = high
    return replace(job, memory=tuple(memory))


def _difference(
    counts: Mapping[str, Mapping[str, int]], before: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """What was counted since."""
    since = {
        leaf: {status: n - before.get(leaf, {}).get(status, 0) for status, n in by_status.items()}
        for leaf, by_status in counts.items()
    }
    return {leaf: left for leaf, by in since.items() if (left := {status: n for status, n in by.items() if n})}


def _problems(result: BootResult, guests: Sequence[ScriptedGuest]) -> list[str]:
    """All that is not as it must be, in words."""
    found = []
    outcome = result.outcome
    if outcome is not None and outcome.violation:
        return [f"violated: {outcome.violation}: {outcome.message}"]
    if result.exit != "power off":
        found.append(f"the VM ended with: {result.exit or 'nothing'}")
    if not result.mrtd:
        found.append("the TD was not built")
    elif result.mrtd != result.predicted_mrtd:
        found.append(f"MRTD is not that of the image, {result.predicted_mrtd.hex()}")
    if result.report is not None and result.report.td_info.mr_td != result.mrtd:
        found.append("the guest's report shows another MRTD")
    if result.report is not None and result.report.td_info.rtmrs != result.rtmrs:
        found.append("the guest's report shows other RTMRs")
    if result.mrtd and not all(guest.finished for guest in guests):
        late = [str(i) for i, guest in enumerate(guests) if not guest.finished]
        found.append(f"not finished: vCPU {', '.join(late)}")
    if result.leaked_pages:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in result.leaks.items())
        found.append(f"{result.leaked_pages} pages leaked ({reasons or 'nobody knows why'})")
    if result.leaked_keyids:
        found.append(f"KeyIDs leaked: {', '.join(map(str, result.leaked_keyids))}")
    found += [f"the kernel warned: {text}" for text in result.warnings]
    return found
