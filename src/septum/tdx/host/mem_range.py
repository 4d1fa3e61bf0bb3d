"""TDH.MEM.RANGE.BLOCK and UNBLOCK, TDH.MEM.TRACK: the way to be sure that no TLB holds a translation.

Blocking notes the TD's epoch in the PAMT entry of the page; tracking starts a new epoch once no VCPU is left in the one
before the present. What was blocked in epoch E is out of all TLBs when the TD's epoch is E + 1 and no VCPU is left that
entered in E, and in any later epoch. Source: TDX Module 1.5.01,
``src/vmm_dispatcher/api_calls/tdh_mem_{range_block,range_unblock,track}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import op_state, sept, sept_l2
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import Level
from septum.arch.status import Status
from septum.tdx import sept_l2 as l2
from septum.tdx.call import EXCLUSIVE, HostCall, lock_td, owned_entry
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import (
    SeptEntry,
    check_entry_allows,
    check_tlb_tracked,
    lock_entry,
    return_entry,
    root_level,
    write_entry,
)
from septum.tdx.state.memory import PamtEntry

if TYPE_CHECKING:
    from septum.tdx.host import Handler


async def tdh_mem_range_block(call: HostCall) -> int:
    """TDH.MEM.RANGE.BLOCK: takes all permissions away from what an entry maps, and notes in which epoch.

    RCX: GPA and level. RDX: TDR. On an error that concerns the entry RCX and RDX tell it.
    """
    module, regs = call.module, call.regs
    gpa_and_level, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, root_level(td), EXCLUSIVE)
    if sept.is_any_blocked(entry.value):
        return_entry(call, entry)
        raise Fail(Status.TDX_GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
    check_entry_allows(call, entry)

    mapped = entry.value
    await write_entry(call, entry, sept.blocked(mapped, entry.level))
    blockedw = sept.is_any_blockedw(mapped)
    for alias in l2.aliases(call, td, entry, mapped):
        await l2.write(call, alias, sept_l2.block(alias.value, blocked_for_writing=blockedw))
    key, owned = _mapped_page(call, entry)
    module.pamt[key] = PamtEntry(owned.page_type, owned.owner, td.tdcs.td_epoch)
    return Status.TDX_SUCCESS


async def tdh_mem_range_unblock(call: HostCall) -> int:
    """TDH.MEM.RANGE.UNBLOCK: gives back the permissions, after TLBs were tracked if VCPUs may run.

    RCX: GPA and level. RDX: TDR. On an error that concerns the entry RCX and RDX tell it.
    """
    regs = call.regs
    gpa_and_level, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0

    td = await lock_td(call, tdr_pa)
    entry = await lock_entry(call, td, gpa_and_level, Level.PT, root_level(td), EXCLUSIVE)
    check_entry_allows(call, entry)
    blocked = entry.value
    if td.tdcs.op_state in op_state.TLB_TRACKING_REQUIRED:
        check_tlb_tracked(call, td, entry, _mapped_page(call, entry)[1].bepoch, Operand.SEPT_TREE)

    if not sept.is_any_pending(blocked):
        for alias in l2.aliases(call, td, entry, blocked):
            await l2.write(call, alias, sept_l2.unblock(alias.value))
    await write_entry(call, entry, sept.unblocked(blocked) & ~sept.TDEL)
    return Status.TDX_SUCCESS


def _mapped_page(call: HostCall, entry: SeptEntry) -> tuple[int, PamtEntry]:
    """PAMT key and entry of what a Secure EPT entry maps: a page of its level, or a page of the Secure EPT."""
    leaf = sept.is_leaf(entry.value)
    return owned_entry(call, entry.page if leaf else entry.table, entry.level if leaf else Level.PT)


async def tdh_mem_track(call: HostCall) -> int:
    """TDH.MEM.TRACK: starts the TD's next epoch, once no VCPU is left that entered in the last one.

    RCX: TDR.
    """
    td = await lock_td(call, call.regs.rcx, Operand.RCX)
    await call.locks.take(td.epoch_lock, EXCLUSIVE, Operand.TD_EPOCH)
    epoch = td.tdcs.td_epoch
    check(td.tdcs.refcount[1 - (epoch & 1)] == 0, Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    td.tdcs.td_epoch = epoch + 1
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MEM_RANGE_BLOCK: tdh_mem_range_block,
    HostLeaf.TDH_MEM_RANGE_UNBLOCK: tdh_mem_range_unblock,
    HostLeaf.TDH_MEM_TRACK: tdh_mem_track,
}
