"""Waiting for the other SEAMCALL, and letting ``mmu_lock`` go: designs that were proposed and not taken.

Source: the thread "Re: [PATCH v11 018/113] KVM: TDX: create/destroy VM structure", lore.kernel.org, January 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.core.klocks import might_sleep
from septum.core.steps import current_task, step, wait_until
from septum.kvm.contention.busy import tdx_operand_busy

if TYPE_CHECKING:
    from septum.kvm.contention import Attempt
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs


async def waitqueue(kvm: Vm, attempt: Attempt) -> Regs:
    """Contention-and-wait (Zhi Wang, 20230117214414.00003229): sleeps until another CPU's SEAMCALL returns.

    TDH.VP.ENTER returns when the guest is left, long after the module has let its locks go. Whoever waits enqueues
    first and tries once more before it sleeps, so that no wake-up is lost. Sleeping with ``mmu_lock`` held, or anywhere
    else where it is not allowed, is a violation, and reported as one.
    """
    returns, name = kvm.host.seamcall_returns, current_task().name
    while True:
        await step("enqueue", "SEAMCALL waitqueue")
        returns.enqueue()
        regs = await attempt()
        if not tdx_operand_busy(regs.rax):
            returns.dequeue()
            return regs
        might_sleep("the waitqueue of SEAMCALLs")
        await wait_until(lambda: returns.has_woken(name), "wait for a SEAMCALL to return", "SEAMCALL waitqueue")


async def needbreak(kvm: Vm, attempt: Attempt) -> Regs:
    """``seamcall_needbreak`` (Kai Huang, eadc4a4e37ea): as ``rwlock_needbreak``, lets ``mmu_lock`` go, and tries again.

    What the caller has read of the page tables may be stale then. Where ``mmu_lock`` is not held it only tries again.
    """
    while True:
        regs = await attempt()
        if not tdx_operand_busy(regs.rax):
            return regs
        name = current_task().name
        if name == kvm.mmu_lock.writer or name in kvm.mmu_lock.readers:
            await kvm.mmu_lock.resched()
        else:
            await step("cond_resched")
