"""What happens to memory behind a fault's back: memslots go, pages change between private and shared, userspace's own
memory goes.

A vCPU looks a memslot up once and stays in an SRCU read section while it tries a fault again; whoever deletes the slot
waits for it (``synchronize_srcu``). Up to 6.17 each waits for the other; nobody is blocked in it, the vCPU just never
gets on: ``septum explore --liveness`` proves that, random runs show it as runs without an end.

Evidence: Linux 2bc2694fe20b and 3ccbf6f47098 (6.18).
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, ENOENT
from functools import partial

from septum.arch.pages import PAGE_4K
from septum.guest.vcpu import Vcpu
from septum.lab.hosts import KERNEL, VCPUS, TdHost, Thread
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import ELSEWHERE, accept, accept_as_linux_does, accepts, convert, running_td


def _deletes(td: TdHost) -> Thread:
    return td.thread("main", "KVM_SET_USER_MEMORY_REGION2 (delete)", td.delete_memslot(), returns=(0,))


@scenario(KERNEL, VCPUS)
def fault_vs_memslot_delete(kernel: str, vcpus: int) -> Built:
    """A page fault while its memslot is deleted (Linux 2bc2694fe20b).

    The vCPU tries the fault again in the host while the slot is INVALID, in an SRCU read section that the deletion
    waits for. Both must come to an end; the guest then gets its page before the slot goes, or -EFAULT.
    """
    td = running_td(kernel, vcpus)
    faults = [accepts(td, index, index * PAGE_4K, returns=(0, -EFAULT)) for index in range(vcpus)]
    return td.setting([*faults, _deletes(td)], built=True, stays=True)


@scenario(KERNEL)
def prefault_vs_memslot_delete(kernel: str) -> Built:
    """KVM_PRE_FAULT_MEMORY while its memslot is deleted (Linux 3ccbf6f47098).

    As with a fault, but nothing at all ends the loop of the prefault. Both must come to an end.
    """
    td = running_td(kernel, 1)
    # -EFAULT and -ENOENT: the slot is gone already.
    allowed = (0, -EAGAIN, -EFAULT, -ENOENT)
    fault = td.thread("vCPU 0", "KVM_PRE_FAULT_MEMORY", td.pre_fault(0), returns=allowed)
    return td.setting([fault, _deletes(td)], built=True, stays=True)


@scenario(
    KERNEL,
    Parameter("same", "yes", "whether both want one page", choices=("no", "yes")),
    Parameter("guest", "patient", "what it does about TDX_PAGE_SIZE_MISMATCH", choices=("patient", "linux")),
)
def prefault_vs_fault(kernel: str, same: str, guest: str) -> Built:
    """KVM_PRE_FAULT_MEMORY through one vCPU while another faults.

    Two ways to TDH.MEM.PAGE.AUG: who comes second finds the entry frozen, or present. Both succeed. A guest that does
    not try again dies: TDG.MEM.PAGE.ACCEPT of module 1.5.01 looks at the entry before it has its lock, and takes one
    that TDH.MEM.PAGE.AUG fills meanwhile for a table (own finding from its source, not seen on hardware).
    """
    td = running_td(kernel, 2)
    gpa = 0 if same == "yes" else PAGE_4K
    script = partial(accept, 0, 1) if guest == "patient" else partial(accept_as_linux_does, 0)
    threads = [
        td.thread("vCPU 0", "KVM_RUN of vCPU 0", td.run_vcpu(0, script), returns=(0,)),
        td.thread("vCPU 1", "KVM_PRE_FAULT_MEMORY", td.pre_fault(gpa, 1), returns=(0,)),
    ]
    return td.setting(threads, built=True, stays=True)


@scenario(
    KERNEL,
    Parameter("memory", "private", "what the guest faults on", choices=("private", "shared")),
    Parameter("same", "yes", "whether the memory that goes is that of the fault", choices=("no", "yes")),
)
def notifier_vs_fault(kernel: str, memory: str, same: str) -> Built:
    """``madvise(MADV_DONTNEED)`` of userspace's memory during a fault.

    The mmu notifier invalidates a range of guest memory with nothing but ``mmu_lock``. A fault that looked before must
    try again; private pages stay where they are, and no page is freed that is still mapped.
    """
    td = running_td(kernel, 1)
    if memory == "shared":
        td.make(td.convert(0, private=False))
        script = partial(touch_shared, 0)
    else:
        script = partial(accept, 0, 1)
    fault = td.thread("vCPU 0", "KVM_RUN of vCPU 0", td.run_vcpu(0, script), returns=(0,))
    gone = td.drop_shared(0 if same == "yes" else ELSEWHERE)
    return td.setting([fault, td.thread("main", "madvise(MADV_DONTNEED)", gone, returns=(0,))], built=True, stays=True)


async def touch_shared(gpa: int, vcpu: Vcpu) -> None:
    """Writes to a shared page."""
    await vcpu.touch(gpa | vcpu.shared_bit)


@scenario(KERNEL, Parameter("to", "shared", "what becomes of the page", choices=("shared", "private")))
def conversion_vs_fault(kernel: str, to: str) -> Built:
    """KVM_SET_MEMORY_ATTRIBUTES while a vCPU faults on the page (generic design of mem_attr_array).

    The fault looks at the attribute after it has taken its snapshot of the sequence count: it maps what the page is, or
    is told -EFAULT. No mapping of the old kind survives.
    """
    td = running_td(kernel, 1)
    if to == "private":
        td.make(td.convert(0, private=False))
    fault = accepts(td, 0, 0, returns=(0, -EFAULT))
    change = td.thread("main", f"KVM_SET_MEMORY_ATTRIBUTES ({to})", td.convert(0, private=to == "private"))
    return td.setting([fault, change], built=True, stays=True)


@scenario(
    KERNEL,
    Parameter("vcpus", 2, "vCPUs that convert", 1, 4),
    Parameter("rounds", 1, "how often each page is made shared and private again", 1, 8),
)
def conversion_storm(kernel: str, vcpus: int, rounds: int) -> Built:
    """vCPUs that make pages shared and private again, all at once.

    MapGPA goes to userspace and comes back as KVM_SET_MEMORY_ATTRIBUTES, a hole in guest_memfd, and madvise: zaps of
    each vCPU against faults, accepts and zaps of the others. All come to an end, mirror and Secure EPT agree.
    """
    td = running_td(kernel, vcpus)
    threads = [
        td.thread(
            f"vCPU {index}",
            f"KVM_RUN of vCPU {index}",
            td.run_vcpu(index, partial(convert, index * PAGE_4K, rounds)),
            returns=(0,),
        )
        for index in range(vcpus)
    ]
    return td.setting(threads, built=True, stays=True)
