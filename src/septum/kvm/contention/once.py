"""No retry at all: the caller deals with BUSY."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septum.kvm.contention import Attempt
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs


async def once(kvm: Vm, attempt: Attempt) -> Regs:
    """One attempt. At a map site this is "unwind": -EBUSY goes up to the fault handler, which tries again."""
    return await attempt()
