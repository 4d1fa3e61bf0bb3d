"""Ioctls that build a TD, made by two threads at once: KVM up to 6.18 lets them meet in the module.

Each ioctl on a vCPU holds that vCPU's mutex and little else, while the module locks the TD as a whole: exclusively for
TDH.VP.INIT (version 1), TDH.MEM.PAGE.ADD, TDH.MR.EXTEND and TDH.MR.FINALIZE, shared for all others. Whoever comes
second is told TDX_OPERAND_BUSY, and KVM takes that for a bug and kills the VM.

Evidence: Linux 15945e9ec195 ("state-locks") and 9a89894f30d5 ("vp-init-excludes-zaps"), both of 6.19; Yan Zhao's
selftests in aLFiPq1smdzN3Ary and aLa34QCJCXGLk/fl (lore.kernel.org).
"""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL, EIO, EOPNOTSUPP

from septum.arch.pages import PAGE_4K
from septum.lab.hosts import KERNEL, TdHost, Thread
from septum.lab.scenario import Built, Parameter, scenario


def _init_vcpu(td: TdHost, index: int) -> Thread:
    return td.thread(f"vCPU {index}", f"KVM_TDX_INIT_VCPU on vCPU {index}", td.init_vcpu(index))


def _init_mem_region(td: TdHost, gpa: int, index: int = 0, *, returns: tuple[int, ...] | None = None) -> Thread:
    """The page's tables are there already if another page was added before."""
    what = f"KVM_TDX_INIT_MEM_REGION gpa={gpa:#x}"
    return td.thread(f"vCPU {index}", what, td.init_mem_region(gpa, index), returns=returns)


def _finalize(td: TdHost) -> Thread:
    return td.thread("main", "KVM_TDX_FINALIZE_VM", td.finalize())


@scenario(KERNEL, Parameter("vcpus", 2, "vCPUs that are initialised at once", 2, 4))
def init_vcpu_race(kernel: str, vcpus: int) -> Built:
    """KVM_TDX_INIT_VCPU on several vCPUs at once (Linux 15945e9ec195).

    TDH.VP.INIT locks the TDR exclusively, TDH.VP.CREATE and TDH.VP.ADDCX of the others share it. No KVM_BUG_ON.
    """
    td = TdHost(kernel, vcpus, initialised=0)
    return td.setting([_init_vcpu(td, index) for index in range(vcpus)], built=False)


@scenario(KERNEL)
def init_mem_region_race(kernel: str) -> Built:
    """KVM_TDX_INIT_MEM_REGION against KVM_TDX_INIT_VCPU of another vCPU (aLFiPq1smdzN3Ary).

    A page is added and measured (TDR exclusive) while another vCPU is initialised. No KVM_BUG_ON.
    """
    td = TdHost(kernel, 2, initialised=1)
    td.make(td.init_mem_region(0))
    return td.setting([_init_mem_region(td, PAGE_4K), _init_vcpu(td, 1)], built=False)


@scenario(KERNEL)
def init_mem_region_twice(kernel: str) -> Built:
    """KVM_TDX_INIT_MEM_REGION of two pages, through two vCPUs.

    ``slots_lock`` keeps TDH.MEM.PAGE.ADD and TDH.MR.EXTEND of one apart from those of the other. Both succeed; in which
    order they are measured is userspace's problem.
    """
    td = TdHost(kernel, 2, initialised=2)
    td.make(td.init_mem_region(0))
    threads = [_init_mem_region(td, (1 + index) * PAGE_4K, index, returns=(0,)) for index in range(2)]
    return td.setting(threads, built=False)


@scenario(KERNEL)
def init_mem_region_same_page(kernel: str) -> Built:
    """KVM_TDX_INIT_MEM_REGION of one page, by two threads.

    One adds it; the other is told that it is there. The page is added and measured once, and no VM is bugged.
    """
    td = TdHost(kernel, 2, initialised=2)
    td.make(td.init_mem_region(0))
    threads = [_init_mem_region(td, PAGE_4K, index, returns=(0, -EEXIST)) for index in range(2)]
    return td.setting(threads, built=False)


@scenario(KERNEL)
def finalize_race(kernel: str) -> Built:
    """KVM_TDX_FINALIZE_VM against KVM_TDX_INIT_VCPU (Linux 15945e9ec195).

    TDH.MR.FINALIZE locks the TDR exclusively. No KVM_BUG_ON.
    """
    td = TdHost(kernel, 2, initialised=1)
    return td.setting([_finalize(td), _init_vcpu(td, 1)], built=False)


@scenario(KERNEL)
def finalize_vs_init_mem_region(kernel: str) -> Built:
    """KVM_TDX_FINALIZE_VM while a page is added.

    Either the page is in the measurement, or it is refused: no page may be premapped when the TD begins to run.
    """
    td = TdHost(kernel, 1, initialised=1)
    td.make(td.init_mem_region(0))
    add = _init_mem_region(td, PAGE_4K, returns=(0, -EINVAL))
    return td.setting([_finalize(td), add], built=False)


@scenario(KERNEL)
def create_vcpu_vs_finalize(kernel: str) -> Built:
    """A vCPU is created and initialised while KVM_TDX_FINALIZE_VM ends the build (Linux 15945e9ec195).

    The new vCPU is not among those whose mutexes 6.19 takes: while one is being created, the others are told -EBUSY.
    """
    td = TdHost(kernel, 1, initialised=1)
    create = td.thread(
        "new vCPU",
        "KVM_CREATE_VCPU, KVM_TDX_INIT_VCPU",
        td.create_and_init_vcpu(1),
        returns=(0, -EBUSY, -EINVAL, -EIO),
    )
    return td.setting([_finalize(td), create], built=False)


@scenario(KERNEL)
def punch_hole_vs_vp_init(kernel: str) -> Built:
    """A hole punched during KVM_TDX_INIT_VCPU (Linux 9a89894f30d5).

    A page that was added is blocked and removed while TDH.VP.INIT has the TDR exclusively: kicking vCPUs does not help,
    because it is no vCPU that is in the way. No KVM_BUG_ON.
    """
    td = TdHost(kernel, 2, initialised=1)
    td.make(td.init_mem_region(0))
    return td.setting([td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(0)), _init_vcpu(td, 1)], built=False)


@scenario(KERNEL, Parameter("same", "no", "whether the hole is where the page is added", choices=("no", "yes")))
def punch_hole_vs_init_mem_region(kernel: str, same: str) -> Built:
    """A hole punched while a page is added to the TD.

    The file's invalidate lock excludes the two: nobody ever zaps a page that is premapped, but not yet added.
    """
    td = TdHost(kernel, 1, initialised=1)
    td.make(td.init_mem_region(0))
    hole = td.punch_hole(PAGE_4K if same == "yes" else 0)
    add = _init_mem_region(td, PAGE_4K, returns=(0,))
    return td.setting([add, td.thread("main", "fallocate(PUNCH_HOLE)", hole)], built=False)


@scenario(KERNEL)
def prefault_during_build(kernel: str) -> Built:
    """KVM_PRE_FAULT_MEMORY of a page while it is added.

    A page that is mapped before the TD runs without being added would not be measured: until then -EOPNOTSUPP.
    """
    td = TdHost(kernel, 2, initialised=2)
    td.make(td.init_mem_region(0))
    fault = td.thread("vCPU 1", "KVM_PRE_FAULT_MEMORY", td.pre_fault(PAGE_4K, 1), returns=(-EOPNOTSUPP,))
    return td.setting([_init_mem_region(td, PAGE_4K, returns=(0,)), fault], built=False)
