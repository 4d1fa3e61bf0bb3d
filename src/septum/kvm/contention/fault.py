"""A private fault that must be tried again: in the host, or through the guest.

Each TDH.VP.ENTER that ends at the same instruction makes the module suspect a zero-step attack; when it does, it locks
the Secure EPT exclusively at every entry, and all faults of the TD contend with that.
Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_handle_ept_violation`` (commit b0327bb2e7e0).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from errno import EIO
from typing import TYPE_CHECKING, Final

from septum.core.steps import Step, step
from septum.kvm.events import kvm_vcpu_has_events
from septum.kvm.memslot import KVM_MEMSLOT_INVALID, gfn_to_memslot
from septum.kvm.mmu.fault import RetPf
from septum.kvm.requests import KVM_REQ_VM_DEAD, kvm_check_request
from septum.kvm.signals import signal_pending

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

#: One attempt at the fault: a :class:`RetPf` or a negative errno.
Attempt = Callable[[], Coroutine[Step, None, int]]


async def retry_locally(vcpu: Vcpu, gfn: int, attempt: Attempt) -> int:
    """Linux 6.16: without bound and without the guest, unless an event, a signal or the VM's death is to be seen to.

    The thread stays in its SRCU read section, so a memslot deletion waits for it; with the fix
    "no-local-retry-on-invalid-slot" (6.18) it leaves when the slot is being deleted.
    """
    while True:
        r = await attempt()
        if r != RetPf.RETRY or kvm_vcpu_has_events(vcpu) or signal_pending(vcpu.kvm.host):
            return r
        await step("read", "vcpu->requests")
        if kvm_check_request(KVM_REQ_VM_DEAD, vcpu):
            return -EIO
        if vcpu.kvm.host.kernel.has("no-local-retry-on-invalid-slot"):
            slot = gfn_to_memslot(vcpu.kvm.memslots, gfn)
            if slot is not None and slot.flags & KVM_MEMSLOT_INVALID:
                return r


async def re_enter(vcpu: Vcpu, gfn: int, attempt: Attempt) -> int:
    """Kernels before: one attempt, then the guest runs into the same fault again."""
    return await attempt()


FAULT_POLICIES: Final[Mapping[str, Callable[[Vcpu, int, Attempt], Coroutine[Step, None, int]]]] = {
    "retry-locally": retry_locally,
    "re-enter": re_enter,
}
