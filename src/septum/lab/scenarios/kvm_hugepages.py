"""Private memory that is mapped 2 MiB at a time: what splits a mapping, and what can come between.

Every kernel here gets the series "KVM: TDX huge page support for private memory", v3, and, as that needs it, no
references to private pages: mappings are split with ``mmu_lock`` held for write, by TDH.MEM.RANGE.BLOCK, TRACK, a kick
of all vCPUs, and TDH.MEM.PAGE.DEMOTE. A policy at the site "accept" changes what is done when a guest accepts 4 KiB of
a larger mapping, one at the site "zap" what a split does about BUSY.

Evidence: Yan Zhao, 20260106101646.24809-1-yan.y.zhao (lore.kernel.org), in particular patches 8 (split), 9 (not under
shared mmu_lock), 13 (the guest's accept level), 15 (conversions), 16 (holes) and 24 (modules without interruptions).
"""

from __future__ import annotations

from errno import ENOMEM

from septum.arch.pages import PAGE_2M, PAGE_4K, Level
from septum.core.steps import Program, Task, step
from septum.guest.vcpu import Vcpu
from septum.kvm.host import HUGE_PAGE_FEATURES, MODULE_FEATURES
from septum.lab.hosts import KERNEL, TdHost
from septum.lab.kernels import read_kernel
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import accepts, punches
from septum.tdx.state.hardware import IA32_INTR_PENDING

HOLE = 5 * PAGE_4K
"""A page that no vCPU asks for."""


def _td(kernel: str, vcpus: int, *fixes: str, mapped: bool = True, features: frozenset[str] | None = None) -> TdHost:
    """A TD that can run, its 2 MiB of memory mapped as one, or not yet. Its only table is there, and the folio."""
    chosen = read_kernel(kernel).with_("huge-pages", "no-page-pinning", *fixes)
    td = TdHost(chosen, vcpus, initialised=vcpus, features=features)
    td.make(td.finalize())
    for index in range(vcpus):
        td.make(td.pre_fault(0, index), cpu=index)
    if not mapped:
        td.make(td.punch_hole(0, 512))
        td.make(td.allocate(0))
    return td


@scenario(KERNEL, Parameter("vcpus", 1, "vCPUs that accept a page each", 1, 3))
def accept_splits(kernel: str, vcpus: int) -> Built:
    """TDG.MEM.PAGE.ACCEPT of 4 KiB where 2 MiB are mapped (20260106101646.24809-1-yan.y.zhao).

    The guest's accept exits to KVM, which must split. ``--policy accept=split-shared`` is the design that the series
    rejects, ``--policy ignore`` has the guest exit for ever (``--liveness``).
    """
    td = _td(kernel, vcpus)
    return td.setting([accepts(td, index, index * PAGE_4K) for index in range(vcpus)], built=True)


@scenario(KERNEL)
def hole_splits(kernel: str) -> Built:
    """A hole of one page in a mapping of 2 MiB, and an accept beside it (20260106101646.24809-1-yan.y.zhao)."""
    td = _td(kernel, 1)
    return td.setting([accepts(td, 0, 0), punches(td, HOLE)], built=True)


async def _accept_large(vcpu: Vcpu) -> None:
    """Once: whatever becomes of it."""
    await vcpu.accept_page(0, Level.PD)


@scenario(KERNEL)
def huge_fault_vs_hole(kernel: str) -> Built:
    """A fault that maps 2 MiB while a hole is punched into them (20260106101646.24809-1-yan.y.zhao).

    The fault is on a page outside the hole, which the invalidation does not hold off; it found a folio of 2 MiB. That
    is so in patch 16 as posted; ``--with hole-invalidates-folios`` is a way out. Whether the guest_memfd that the
    series is made for excludes it in another way is unverified.
    """
    td = _td(kernel, 1, mapped=False)
    fault = td.thread("vCPU 0", "KVM_RUN of vCPU 0", td.run_vcpu(0, _accept_large), returns=(0,))
    return td.setting([fault, punches(td, HOLE)], built=True)


@scenario(KERNEL)
def conversion_without_memory(kernel: str) -> Built:
    """A fault after a conversion that failed for want of memory (20260106101646.24809-1-yan.y.zhao).

    A page was to be made shared, and there was no memory for the page table of a split. There is now, and the guest
    goes on; but patch 15 as posted has begun an invalidation that nobody ends (``--liveness``).
    ``--with failed-conversion-ends`` is a way out.
    """
    td = _td(kernel, 1)
    pages = td.host.pages
    some, *_ = iter(pages.alloc_huge, 0)
    while pages.alloc():
        pass
    td.make(td.set_shared(HOLE), fails=-ENOMEM)
    for page in range(some, some + PAGE_2M, PAGE_4K):
        pages.free(page)
    return td.setting([accepts(td, 0, HOLE)], built=True)


@scenario(KERNEL, Parameter("module", "1.5.28", "which TDX Module, by what it can do", choices=("1.5.28", "1.5.01")))
def demote_interrupted(kernel: str, module: str) -> Built:
    """A split on a CPU that is interrupted again and again by NMIs (20260106101646.24809-1-yan.y.zhao).

    KVM makes TDH.MEM.PAGE.DEMOTE again as often as it is interrupted, which older modules allow without bound
    (``--liveness``). The series has no huge pages on those, and no loop.
    """
    features = MODULE_FEATURES if module == "1.5.01" else HUGE_PAGE_FEATURES
    td = _td(kernel, 1, "demote-loops", features=features)
    built = td.setting([accepts(td, 0, 0)], built=True)
    pending, lp = td.host.module.hardware.msrs, built.programs[0].task.cpu

    async def storm() -> None:
        while True:
            await step("NMI on", f"CPU {lp}")
            pending.store((lp, IA32_INTR_PENDING), 1)
            await step("NMI over on", f"CPU {lp}")
            pending.store((lp, IA32_INTR_PENDING), None)

    return built._replace(programs=[*built.programs, Program(Task("NMIs", cpu=lp), storm, daemon=True)])
