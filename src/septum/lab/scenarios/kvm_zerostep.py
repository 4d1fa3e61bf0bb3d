"""vCPUs that fault at one instruction again and again: the module's zero-step defence, and what KVM makes of it.

From the seventh EPT violation at one instruction on, the module enters the vCPU only when no page that it faulted on
would fault again, and locks the Secure EPT tree exclusively to look. So other vCPUs' faults are told TDX_OPERAND_BUSY,
the vCPU's own entry is told so when another maps a page, and what it comes back with may be an EPT violation that no
guest has caused. In module 1.5.01 a page that is pending counts as one that would fault again
(``is_epf_expected`` in ``src/td_transitions/td_exit_stepping.c``).

Evidence: Yan Zhao's selftest in ZvPrqMj1BWrkkwqN@yzhao56-desk.sh.intel.com, Sean Christopherson in
ZuR09EqzU1WbQYGd@google.com, Linux b0327bb2e7e0 (local retry).
"""

from __future__ import annotations

from errno import EFAULT
from functools import partial

from septum.arch.pages import PAGE_4K
from septum.core.steps import progress, require
from septum.guest.vcpu import Vcpu
from septum.kvm.run_struct import MemoryFaultExit
from septum.lab.hosts import KERNEL, Call, TdHost
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import ELSEWHERE, accepts

SHARED = 5 * PAGE_4K
"""A page that the guest uses as private, though it is shared as far as KVM knows."""


async def _touch(gpa: int, vcpu: Vcpu) -> None:
    """Uses a page; the first time, a #VE says that it is pending, and the handler accepts it."""
    await vcpu.touch(gpa)


def _td(kernel: str, vcpus: int) -> TdHost:
    """A TD with :data:`SHARED` shared, and with all tables."""
    td = TdHost(kernel, vcpus, initialised=vcpus, sept_ve_disable=False)
    td.make(td.finalize())
    for index in range(vcpus):
        td.make(td.pre_fault(ELSEWHERE + index * PAGE_4K, index), cpu=index)
    td.make(td.set_shared(SHARED))
    return td


def _stubborn(td: TdHost, index: int, gpa: int) -> tuple[Call, Call]:
    """A vCPU that uses a page at ``gpa``: its thread, and one KVM_RUN. The thread does nothing about memory faults."""
    guest, run = td.script(index, partial(_touch, gpa)), td.vmm.kvm_run(td.vcpus[index])

    async def once() -> int:
        result = await td.vmm.run(td.vcpus[index])
        told = result == 0 or (result == -EFAULT and isinstance(run.exit, MemoryFaultExit))
        require(told, "userspace is told", f"KVM_RUN of vCPU {index} returns {result} with {run.describe()}")
        progress(f"KVM_RUN returned {result}")
        return result

    async def until_done() -> int:
        result = 0
        while not guest.finished:
            result = await once()
        return result

    return until_done, once


@scenario(
    KERNEL,
    Parameter("violations", 7, "EPT violations at one instruction that there were before", 0, 12),
    Parameter("vcpus", 1, "vCPUs; all but the first fault on pages of their own", 1, 3),
    Parameter("converts", "yes", "whether the VMM makes the page private", choices=("no", "yes", "at once")),
)
def zero_step_conversion(kernel: str, violations: int, vcpus: int, converts: str) -> Built:
    """A VMM that does not convert a page for so long that the module suspects it (ZvPrqMj1BWrkkwqN).

    vCPU 0 uses a page that KVM has as shared: KVM_RUN fails with KVM_EXIT_MEMORY_FAULT, and the VMM makes it again.
    After the seventh time module 1.5.01 lets the vCPU in only when the page is accepted, not merely mapped; but who
    should accept it, if not this vCPU: with ``--liveness`` it goes round in KVM_RUN for ever, and nobody is told
    (``--with no-progress-exits``: userspace is). Other vCPUs' faults meet its look at the tree; KVM bears all of that.
    With ``converts=at once`` there are no more violations than ``violations`` says, and the one that maps the page.
    """
    td = _td(kernel, vcpus)
    thread, once = _stubborn(td, 0, SHARED)
    for _ in range(violations):
        td.make(once, fails=-EFAULT)
    threads = [td.thread("vCPU 0", "KVM_RUN of vCPU 0", thread)]
    for index in range(1, vcpus):
        other, _ = _stubborn(td, index, index * PAGE_4K)
        threads.append(td.thread(f"vCPU {index}", f"KVM_RUN of vCPU {index}", other, returns=(0,)))
    convert = td.convert(SHARED, private=True)
    if converts == "at once":
        td.make(convert)
    elif converts == "yes":
        threads.append(td.thread("main", "KVM_SET_MEMORY_ATTRIBUTES", convert, returns=(0,)))
    return td.setting(threads, built=True)


@scenario(KERNEL, Parameter("violations", 7, "EPT violations at one instruction that there were before", 0, 12))
def zero_step_rescue(kernel: str, violations: int) -> Built:
    """A vCPU that the module suspects, and another that accepts the page for it.

    Then the page would not fault again, and the module lets the vCPU in: both come to their end (``--liveness``).
    """
    td = _td(kernel, 2)
    thread, once = _stubborn(td, 0, SHARED)
    for _ in range(violations):
        td.make(once, fails=-EFAULT)
    td.make(td.convert(SHARED, private=True))
    td.make(td.pre_fault(SHARED, 1), cpu=1)
    return td.setting([td.thread("vCPU 0", "KVM_RUN of vCPU 0", thread), accepts(td, 1, SHARED)], built=True)
