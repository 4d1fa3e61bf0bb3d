"""A module that is broken, or hostile: what KVM does about answers that it should never get.

Whether a busy module is one that is in use or one that never answers otherwise KVM cannot tell: where it may try again
(faults, TDH.VP.ENTER) it does so for ever, which ``--liveness`` finds; where it must not fail (zaps) it tries twice and
bugs the VM. A module that says it has done what it has not is caught when the next call finds out, if one does.
"""

from __future__ import annotations

from functools import partial

from septum.arch.pages import PAGE_4K
from septum.guest.vcpu import Vcpu
from septum.kvm.module_faults import MODULE_FAULTS
from septum.lab.hosts import KERNEL, VCPUS
from septum.lab.scenario import Built, Parameter, scenario
from septum.lab.scenarios.parts import ELSEWHERE, running_td


async def _accept_once(gpa: int, vcpu: Vcpu) -> None:
    """Whatever the module says, the guest goes on."""
    await vcpu.accept_page(gpa)


@scenario(
    KERNEL,
    VCPUS,
    Parameter("module", "aug-busy", "how it is broken", choices=tuple(MODULE_FAULTS)),
)
def broken_module(kernel: str, vcpus: int, module: str) -> Built:
    """vCPUs that fault, and a hole punched, on a module that is broken (--liveness).

    ``module`` is one of :data:`septum.kvm.module_faults.MODULE_FAULTS`, from when the TD is built on.
    """
    td = running_td(kernel, vcpus)
    td.host.seamcalls.broken = (MODULE_FAULTS[module],)
    guests = [
        td.thread(
            f"vCPU {index}", f"KVM_RUN of vCPU {index}", td.run_vcpu(index, partial(_accept_once, index * PAGE_4K))
        )
        for index in range(vcpus)
    ]
    punch = td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(ELSEWHERE))
    return td.setting([*guests, punch], built=True)
