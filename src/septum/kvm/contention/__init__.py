"""What KVM does when the module says that an operand is busy: one small function per policy.

A policy for a SEAMCALL gets the call and returns the registers of the attempt that counts. What the caller makes of a
status that is still BUSY depends on the call site: a fault unwinds with -EBUSY, a zap bugs the VM.

Some policies have a parameter behind a colon: ``retry:16`` tries 16 times more, ``loop-on:RCX`` as long as the operand
RCX is what is busy.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from septum.arch.operands import Operand
from septum.core.steps import Step
from septum.kvm.contention.again import again, busy_with
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.contention.counted import loop_counted
from septum.kvm.contention.kick import kick_and_retry_once, kick_without_flag
from septum.kvm.contention.once import once
from septum.kvm.contention.waiting import needbreak, waitqueue

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
    "loop": again(),
    "loop-counted": loop_counted,
    "waitqueue": waitqueue,
    "needbreak": needbreak,
}
WITH_PARAMETER: Final[Mapping[str, Callable[[str], Policy]]] = {
    "retry": lambda times: again(tdx_operand_busy, int(times)),
    "retry-exact": lambda times: again(busy_with(Operand.SEPT_TREE), int(times)),
    "loop-on": lambda operand: again(busy_with(Operand[operand])),
}


@lru_cache(maxsize=64)
def policy_of(name: str) -> Policy:
    """The policy of a name that :mod:`septum.kvm.kernel` knows."""
    kind, colon, parameter = name.partition(":")
    return WITH_PARAMETER[kind](parameter) if colon else POLICIES[name]


async def contend(site: str, kvm: Vm, attempt: Attempt) -> Regs:
    """Makes a SEAMCALL under the policy that the VM's kernel has at a call site."""
    return await policy_of(kvm.host.kernel.policies[site])(kvm, attempt)
