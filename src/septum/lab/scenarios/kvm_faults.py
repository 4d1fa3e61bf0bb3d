"""Private page faults and zaps of a running TD: the contention that the founding discussion of KVM's TDX support was
about.

Faults map with ``mmu_lock`` held for read and, when the module is busy, are tried again in the host. Zaps hold it for
write, must not fail, and so kick all vCPUs out of the guest and try once more. That the second attempt is never busy is
what these scenarios prove, for as many vCPUs and pages as they have; a policy at the site "zap" changes the design.

Evidence: Linux b0327bb2e7e0 (local retry), 4b2abc49712b (kick and retry once); for a kick without a flag that keeps
vCPUs out, Sean Christopherson in Z2L0CPLKg9dh6imZ and Yan Zhao in Z2N8bl6ofE2ocQsW (lore.kernel.org).
"""

from __future__ import annotations

from functools import partial

from septum.arch.pages import PAGE_4K
from septum.lab.hosts import KERNEL, VCPUS
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import ELSEWHERE, accept_and_rest, accepts, leave, punches, running_td

_SAME_PAGE = Parameter("same", "no", "whether both sides want one page", choices=("no", "yes"))
_PAGES = Parameter("pages", 1, "pages that each vCPU asks for", 1, 4)


@scenario(
    KERNEL,
    Parameter("vcpus", 2, "vCPUs that fault", 2, 4),
    _PAGES,
    Parameter("tables", "present", "whether the Secure EPT has its tables", choices=("present", "missing")),
    _SAME_PAGE,
)
def two_faults(kernel: str, vcpus: int, pages: int, tables: str, same: str) -> Built:
    """vCPUs that fault at the same time under one Secure EPT table (Linux b0327bb2e7e0).

    TDH.MEM.PAGE.AUG against TDH.MEM.PAGE.AUG or TDG.MEM.PAGE.ACCEPT in the same 2 MiB, and, without tables, against
    TDH.MEM.SEPT.ADD: frozen entries, entry locks, the PAMT. All pages are accepted, mirror and Secure EPT agree.
    """
    td = running_td(kernel, vcpus, tables=tables == "present")
    first = [0 if same == "yes" else index * pages * PAGE_4K for index in range(vcpus)]
    return td.setting([accepts(td, index, gpa, pages) for index, gpa in enumerate(first)], built=True, stays=True)


@scenario(KERNEL, VCPUS, _SAME_PAGE)
def fault_vs_punch_hole(kernel: str, vcpus: int, same: str) -> Built:
    """A page fault while a page is zapped (Linux 4b2abc49712b).

    TDH.MEM.PAGE.AUG and TDH.VP.ENTER against TDH.MEM.RANGE.BLOCK, TDH.MEM.TRACK and TDH.MEM.PAGE.REMOVE of another page
    or the one that vCPU 0 asks for. The zap succeeds, mirror and Secure EPT agree.
    """
    td = running_td(kernel, vcpus)
    faults = [accepts(td, index, index * PAGE_4K) for index in range(vcpus)]
    return td.setting([*faults, punches(td, 0 if same == "yes" else ELSEWHERE)], built=True, stays=True)


@scenario(KERNEL, VCPUS, Parameter("pages", 1, "pages that are zapped", 1, 4))
def zap_vs_accept(kernel: str, vcpus: int, pages: int) -> Built:
    """TDG.MEM.PAGE.ACCEPT of a page while it is zapped (Linux 4b2abc49712b).

    The guest has the entry's lock when TDH.MEM.RANGE.BLOCK or TDH.MEM.PAGE.REMOVE wants it. The zap succeeds; the guest
    faults the page in again.
    """
    td = running_td(kernel, vcpus)
    for index in range(max(vcpus, pages)):
        td.make(td.pre_fault(index * PAGE_4K))
    guests = [accepts(td, index, index * PAGE_4K) for index in range(vcpus)]
    return td.setting([*guests, punches(td, 0, pages)], built=True, stays=True)


@scenario(KERNEL, VCPUS, Parameter("exits", 2, "how often each vCPU leaves and enters", 1, 8))
def track_vs_enter(kernel: str, vcpus: int, exits: int) -> Built:
    """TDH.MEM.TRACK of a zap while vCPUs leave and enter.

    TDH.VP.ENTER shares the epoch lock, and sees it busy; the previous epoch must be empty when the next one begins. The
    zap succeeds, and no vCPU stays outside for ever.
    """
    td = running_td(kernel, vcpus)
    guests = [
        td.thread(f"vCPU {index}", f"KVM_RUN of vCPU {index}", td.run_vcpu(index, partial(leave, exits)), returns=(0,))
        for index in range(vcpus)
    ]
    return td.setting([*guests, punches(td, ELSEWHERE)], built=True, stays=True)


@scenario(KERNEL, Parameter("moves", 1, "to how many other CPUs the thread moves", 1, 2))
def migration_vs_zap(kernel: str, moves: int) -> Built:
    """A vCPU moves to another CPU while a page is zapped.

    Each time its thread runs the vCPU on another CPU than before, an IPI has it flushed where it was (TDH.VP.FLUSH),
    while the zap kicks it wherever it may be. No KVM_BUG_ON, and it is on one CPU's list at most.
    """
    td = running_td(kernel, 1)
    first, *others = (1, 3)[:moves]
    runs = td.run_vcpu(0, partial(accept_and_rest, moves), moves_to=others)
    guest = td.thread("vCPU 0", "KVM_RUN of vCPU 0", runs, cpu=first, returns=(0,))
    zap = td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(ELSEWHERE), cpu=2, returns=(0,))
    return td.setting([guest, zap], built=True, cpus=others)
