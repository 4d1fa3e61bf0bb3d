"""The same call again at once, with nothing let go and nobody asked.

Source: the retry wrapper ``seamcall_sept`` of the v11 series (January 2023, patch 056; 16 retries, the whole status
compared with TDX_OPERAND_BUSY for the Secure EPT tree), and the loops around TDH.MEM.TRACK, TDH.MEM.PAGE.REMOVE and
TDH.PHYMEM.PAGE.RECLAIM of v11 and v13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.kvm.contention.busy import tdx_operand_busy

if TYPE_CHECKING:
    from septum.kvm.contention import Attempt, Policy
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs


def busy_with(operand: Operand) -> Callable[[int], bool]:
    """Contention is TDX_OPERAND_BUSY with just this operand: what v11 compares with.

    A Secure EPT entry that a guest has locked is reported with another operand (RCX), and so is not tried again.
    """
    status = with_operand(Status.TDX_OPERAND_BUSY, operand)
    return lambda err: err == status


def again(is_contention: Callable[[int], bool] = tdx_operand_busy, times: int | None = None) -> Policy:
    """One call, and up to ``times`` more (None: without bound) while it meets contention."""

    async def policy(kvm: Vm, attempt: Attempt) -> Regs:
        regs, left = await attempt(), times
        while left != 0 and is_contention(regs.rax):
            regs, left = await attempt(), None if left is None else left - 1
        return regs

    return policy
