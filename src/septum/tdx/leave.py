"""Out of a TD and to the host, in either way.

Source: TDX Module 1.5.01, ``src/td_transitions/td_exit.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.exits import BUS_LOCK_PREEMPTED, ExitReason
from septum.arch.op_state import LastExit, VcpuState
from septum.arch.pages import PAGE_MASK, Level, level_size
from septum.arch.status import Status
from septum.core.steps import emit
from septum.core.trylocks import Mode
from septum.tdx import extended_state
from septum.tdx.call import PamtLock
from septum.tdx.events import advance_rip
from septum.tdx.held import HeldLocks
from septum.tdx.registers import GPR_BIT, Regs
from septum.tdx.vcpu import count_inside
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

_FATAL: Final = 1 << 61
_TRAP_LIKE: Final = 1 << 60
"""Bits of a completion status: the TD is dead; RIP is past the instruction and the host may give a hint."""
_NO_RBP_MOD: Final = 1 << 2
"""In CONFIG_FLAGS."""
_VCPU_AFTER: Final = {
    Status.TDX_SUCCESS: (VcpuState.READY, LastExit.ASYNC_FAULT),
    Status.TDX_CROSS_TD_FAULT: (VcpuState.READY, LastExit.ASYNC_FAULT),
    Status.TDX_TD_EXIT_BEFORE_L2_ENTRY: (VcpuState.READY, LastExit.ASYNC_FAULT),
    Status.TDX_CROSS_TD_TRAP: (VcpuState.READY, LastExit.ASYNC_TRAP),
    Status.TDX_HOST_PRIORITY_BUSY_TIMEOUT: (VcpuState.READY, LastExit.ASYNC_TRAP),
    Status.TDX_NON_RECOVERABLE_VCPU: (VcpuState.DISABLED, None),
}
"""VCPU_STATE and LAST_TD_EXIT (None: unchanged) by the status of a TD exit; every other status kills the TD."""


async def leave_async(module: Module, lp: Lp, td: Td, vp: Vp, end: TdExit) -> Regs:
    """``async_tdexit_internal``."""
    reason = end.reason & 0xFFFF_FFFF
    if end.report_bus_lock and lp.bus_lock_preempted:
        reason |= BUS_LOCK_PREEMPTED
    lp.bus_lock_preempted = False
    rax = end.status | reason
    after = _VCPU_AFTER.get(end.status)
    if after is None:
        td.tdr.fatal = True
        rax |= _FATAL
    else:
        state, last_exit = after
        vp.tdvps.vcpu_state = state
        if last_exit is not None:
            vp.tdvps.last_td_exit = last_exit
    regs = Regs(rax, end.qualification & 0xFFFF_FFFF, end.extended, end.gpa, end.interruption)
    accessible = end.status != Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE
    if accessible and rax & _TRAP_LIKE:
        advance_rip(vp)
    await _leave(module, lp, td, vp, accessible=accessible)
    return regs


async def leave_vmcall(module: Module, lp: Lp, td: Td, vp: Vp) -> Regs:
    """TDG.VP.VMCALL: the host gets the registers that the guest's mask in RCX selects, 0 in the others."""
    tdvps = vp.tdvps
    mask = tdvps.gprs[1]
    values = [value if mask & bit else 0 for value, bit in zip(tdvps.gprs, GPR_BIT, strict=True)]
    values[0] = ExitReason.TDCALL | (BUS_LOCK_PREEMPTED if lp.bus_lock_preempted else 0)
    values[1] = mask & 0xFFFF_FFFF
    regs = Regs.from_tuple(tuple(values))
    if td.tdcs.config_flags & _NO_RBP_MOD:
        regs.rbp = lp.host_rbp
    lp.bus_lock_preempted = False
    tdvps.vcpu_state = VcpuState.READY
    tdvps.last_td_exit = LastExit.TDVMCALL
    advance_rip(vp)
    await _leave(module, lp, td, vp)
    return regs


async def _leave(module: Module, lp: Lp, td: Td, vp: Vp, *, accessible: bool = True) -> None:
    """``td_vmexit_to_vmm``: the VCPU no longer counts as inside, and lets go of TDR and TDVPR."""
    if accessible:
        extended_state.save(module, vp)
        await count_inside(td, vp.tdvps.vcpu_epoch, -1)
    held = HeldLocks()
    held.adopt([(lock, Mode.SHARED) for lock in _entry_locks(module, td, vp)])
    await held.drop()
    lp.running = 0
    emit("exit", f"{vp} exits", vp=vp.pa)


def _entry_locks(module: Module, td: Td, vp: Vp) -> list[PamtLock]:
    """What TDH.VP.ENTER left locked, in the order in which it took them."""
    keys = [vp.pa & -level_size(level) & PAGE_MASK | level for level in (Level.PDPT, Level.PD, Level.PT)]
    return [PamtLock(module.locks, key) for key in (*keys, td.pa)]
