"""Ioctls that build a TD, made by two threads at once: KVM up to 6.18 lets them meet in the module.

Each ioctl on a vCPU holds that vCPU's mutex and little else, while the module locks the TD as a whole: exclusively for
TDH.VP.INIT (version 1), TDH.MEM.PAGE.ADD, TDH.MR.EXTEND and TDH.MR.FINALIZE, shared for all others. Whoever comes
second is told TDX_OPERAND_BUSY, and KVM takes that for a bug and kills the VM. With ``fix`` a kernel gets the change
that excludes the race.

Evidence: Linux 15945e9ec195 ("state-locks") and 9a89894f30d5 ("vp-init-excludes-zaps"), both of 6.19; Yan Zhao's
selftests in aLFiPq1smdzN3Ary and aLa34QCJCXGLk/fl (lore.kernel.org).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.pages import PAGE_4K
from septum.core.automata import Invariant
from septum.core.steps import Program
from septum.kvm.kernel import Kernel, kernels
from septum.lab.scenario import Parameter, Scenario

if TYPE_CHECKING:
    from septum.lab.hosts import TdHost, Thread

Built = tuple[list[Program], list[Invariant]]


def _td(kernel: str, fix: str, vcpus: int, *, initialised: int) -> TdHost:
    from septum.lab.hosts import TdHost  # noqa: PLC0415 -- a list of scenarios needs no host

    chosen = Kernel(kernel)
    return TdHost(chosen if fix == "none" else chosen.with_(fix), vcpus, initialised=initialised)


def _init_vcpu(td: TdHost, index: int) -> Thread:
    return td.thread(f"vCPU {index}", f"KVM_TDX_INIT_VCPU on vCPU {index}", td.init_vcpu(index))


def init_vcpu_race(kernel: str, fix: str, vcpus: int) -> Built:
    """KVM_TDX_INIT_VCPU on each vCPU, by its own thread."""
    td = _td(kernel, fix, vcpus, initialised=0)
    return td.setting([_init_vcpu(td, index) for index in range(vcpus)], built=False)


def init_mem_region_race(kernel: str, fix: str) -> Built:
    """A page is added and measured while another vCPU is initialised. Its tables are there already."""
    td = _td(kernel, fix, 2, initialised=1)
    td.make(td.init_mem_region(0))
    add = td.thread("vCPU 0", "KVM_TDX_INIT_MEM_REGION", td.init_mem_region(PAGE_4K))
    return td.setting([add, _init_vcpu(td, 1)], built=False)


def finalize_race(kernel: str, fix: str) -> Built:
    """The build is ended while a vCPU is initialised."""
    td = _td(kernel, fix, 2, initialised=1)
    return td.setting([td.thread("main", "KVM_TDX_FINALIZE_VM", td.finalize()), _init_vcpu(td, 1)], built=False)


def punch_hole_vs_vp_init(kernel: str, fix: str) -> Built:
    """A page that was added is taken away while a vCPU is initialised."""
    td = _td(kernel, fix, 2, initialised=1)
    td.make(td.init_mem_region(0))
    return td.setting([td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(0)), _init_vcpu(td, 1)], built=False)


_KERNEL = Parameter("kernel", "v6.16", "which kernel", choices=kernels())
_STATE_LOCKS = Parameter("fix", "none", "a change that the kernel gets", choices=("none", "state-locks"))
_VP_INIT = Parameter("fix", "none", "a change that the kernel gets", choices=("none", "vp-init-excludes-zaps"))

SCENARIOS = (
    Scenario(
        "init-vcpu-race",
        "KVM_TDX_INIT_VCPU on several vCPUs at once (Linux 15945e9ec195)",
        init_vcpu_race,
        (_KERNEL, _STATE_LOCKS, Parameter("vcpus", 2, "vCPUs that are initialised at once", 2, 4)),
    ),
    Scenario(
        "init-mem-region-race",
        "KVM_TDX_INIT_MEM_REGION against KVM_TDX_INIT_VCPU of another vCPU (aLFiPq1smdzN3Ary)",
        init_mem_region_race,
        (_KERNEL, _STATE_LOCKS),
    ),
    Scenario(
        "finalize-race",
        "KVM_TDX_FINALIZE_VM against KVM_TDX_INIT_VCPU (Linux 15945e9ec195)",
        finalize_race,
        (_KERNEL, _STATE_LOCKS),
    ),
    Scenario(
        "punch-hole-vs-vp-init",
        "a hole punched during KVM_TDX_INIT_VCPU (Linux 9a89894f30d5)",
        punch_hole_vs_vp_init,
        (_KERNEL, _VP_INIT),
    ),
)
