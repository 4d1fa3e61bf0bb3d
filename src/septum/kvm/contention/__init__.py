"""What KVM does when the module says that an operand is busy: one small function per policy.

A policy for a SEAMCALL gets the call and returns the registers of the attempt that counts. What the caller makes of a
status that is still BUSY depends on the call site: a fault unwinds with -EBUSY, a zap bugs the VM.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Final

from septum.core.steps import Step
from septum.kvm.contention.kick import kick_and_retry_once, kick_without_flag
from septum.kvm.contention.once import once

if TYPE_CHECKING:
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs

#: One attempt at a SEAMCALL.
Attempt = Callable[[], Coroutine[Step, None, "Regs"]]
Policy = Callable[["Vm", Attempt], Coroutine[Step, None, "Regs"]]

POLICIES: Final[Mapping[str, Policy]] = {
    "unwind": once,
    "once": once,
    "kick-and-retry-once": kick_and_retry_once,
    "kick-without-flag": kick_without_flag,
}


async def contend(site: str, kvm: Vm, attempt: Attempt) -> Regs:
    """Makes a SEAMCALL under the policy that the VM's kernel has at a call site."""
    return await POLICIES[kvm.host.kernel.policies[site]](kvm, attempt)
