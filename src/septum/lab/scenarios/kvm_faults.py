"""Private page faults and zaps of a running TD: the contention that the founding discussion of KVM's TDX support was
about.

Faults map with ``mmu_lock`` held for read and, when the module is busy, are tried again in the host. Zaps hold it for
write, must not fail, and so kick all vCPUs out of the guest and try once more. That the second attempt is never busy is
what these scenarios prove, for as many vCPUs and pages as they have; ``zap`` changes the design.

Evidence: Linux b0327bb2e7e0 (local retry), 4b2abc49712b (kick and retry once); for a kick without a flag that keeps
vCPUs out, Sean Christopherson in Z2L0CPLKg9dh6imZ and Yan Zhao in Z2N8bl6ofE2ocQsW (lore.kernel.org).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from septum.arch.pages import PAGE_4K
from septum.core.automata import Invariant
from septum.core.steps import Program
from septum.kvm.kernel import SITES, Kernel, kernels
from septum.lab.scenario import Parameter, Scenario

if TYPE_CHECKING:
    from septum.guest.vcpu import Vcpu
    from septum.lab.hosts import TdHost, Thread

Built = tuple[list[Program], list[Invariant]]

ELSEWHERE = 256 * PAGE_4K
"""A page that no vCPU asks for, under the same table."""


def _td(kernel: str, zap: str, vcpus: int, *, tables: bool = True) -> TdHost:
    """A TD that can run. With ``tables``, the Secure EPT has all tables and every vCPU has entered the page tables."""
    from septum.lab.hosts import TdHost  # noqa: PLC0415 -- a list of scenarios needs no host

    td = TdHost(Kernel(kernel).with_policy("zap", zap), vcpus, initialised=vcpus)
    td.make(td.finalize())
    for index in range(vcpus if tables else 0):
        td.make(td.pre_fault(ELSEWHERE + index * PAGE_4K, index), cpu=index)
    return td


async def _accept(gpa: int, vcpu: Vcpu) -> None:
    await vcpu.accept(gpa, gpa + PAGE_4K)


def _accepts(td: TdHost, index: int, gpa: int) -> Thread:
    """A vCPU whose guest accepts a page, which faults first if it is not mapped."""
    return td.thread(f"vCPU {index}", f"KVM_RUN of vCPU {index}", td.run_vcpu(index, partial(_accept, gpa)))


def _punches(td: TdHost, gpa: int, pages: int) -> Thread:
    return td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(gpa, pages))


def two_faults(kernel: str, vcpus: int, tables: str, same: str) -> Built:
    """vCPUs that fault at the same time, on pages of their own or on one page."""
    td = _td(kernel, "kick-and-retry-once", vcpus, tables=tables == "present")
    pages = [0 if same == "yes" else index * PAGE_4K for index in range(vcpus)]
    return td.setting([_accepts(td, index, gpa) for index, gpa in enumerate(pages)], built=True)


def fault_vs_punch_hole(kernel: str, zap: str, vcpus: int, same: str) -> Built:
    """vCPUs that fault while another page is taken away, or the one that vCPU 0 asks for."""
    td = _td(kernel, zap, vcpus)
    faults = [_accepts(td, index, index * PAGE_4K) for index in range(vcpus)]
    return td.setting([*faults, _punches(td, 0 if same == "yes" else ELSEWHERE, 1)], built=True)


def zap_vs_accept(kernel: str, zap: str, vcpus: int, pages: int) -> Built:
    """Guests that accept pages that are mapped, while pages from the first on are taken away."""
    td = _td(kernel, zap, vcpus)
    for index in range(max(vcpus, pages)):
        td.make(td.pre_fault(index * PAGE_4K))
    accepts = [_accepts(td, index, index * PAGE_4K) for index in range(vcpus)]
    return td.setting([*accepts, _punches(td, 0, pages)], built=True)


_KERNEL = Parameter("kernel", "v6.16", "which kernel", choices=kernels())
_ZAP = Parameter("zap", "kick-and-retry-once", "what a zap does about BUSY", choices=SITES["zap"].policies)
_SAME_PAGE = Parameter("same", "no", "whether both sides want one page", choices=("no", "yes"))
_VCPUS = Parameter("vcpus", 1, "vCPUs that run", 1, 3)

SCENARIOS = (
    Scenario(
        "two-faults",
        "vCPUs that fault at the same time under one Secure EPT table (Linux b0327bb2e7e0)",
        two_faults,
        (
            _KERNEL,
            Parameter("vcpus", 2, "vCPUs that fault", 2, 4),
            Parameter("tables", "present", "whether the Secure EPT has its tables", choices=("present", "missing")),
            _SAME_PAGE,
        ),
    ),
    Scenario(
        "fault-vs-punch-hole",
        "a page fault while a page is zapped (Linux 4b2abc49712b)",
        fault_vs_punch_hole,
        (_KERNEL, _ZAP, _VCPUS, _SAME_PAGE),
    ),
    Scenario(
        "zap-vs-accept",
        "TDG.MEM.PAGE.ACCEPT of a page while it is zapped (Linux 4b2abc49712b)",
        zap_vs_accept,
        (_KERNEL, _ZAP, _VCPUS, Parameter("pages", 1, "pages that are zapped", 1, 4)),
    ),
)
