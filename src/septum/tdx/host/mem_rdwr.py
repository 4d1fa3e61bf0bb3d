"""TDH.MEM.RD and TDH.MEM.WR: the debugger's access to the private memory of a TD.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mem_rd_wr.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import Level, is_valid_gpa, level_size
from septum.arch.pamt import PageType
from septum.arch.status import Status
from septum.tdx.call import SHARED, HostCall, lock_op_state, lock_page
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import check_entry_allows, lock_sept_entry, return_entry, walk_sept

if TYPE_CHECKING:
    from septum.tdx.host import Handler

_SIZE = 8
_DEBUG = 1
"""TD attribute DEBUG."""


async def tdh_mem_rd(call: HostCall) -> int:
    """TDH.MEM.RD: returns in R8 eight bytes of the private memory of a debuggable TD.

    RCX: GPA, aligned to 8. RDX: TDR. On an error that concerns the entry RCX and RDX tell it.
    """
    pa = await _find(call)
    call.regs.r8 = int.from_bytes(call.module.memory.read(pa, _SIZE), "little")
    return Status.TDX_SUCCESS


async def tdh_mem_wr(call: HostCall) -> int:
    """TDH.MEM.WR: writes R8 to the private memory of a debuggable TD; returns the old value there.

    RCX: GPA, aligned to 8. RDX: TDR. On an error that concerns the entry RCX and RDX tell it.
    """
    data = call.regs.r8
    pa = await _find(call)
    call.regs.r8 = int.from_bytes(call.module.memory.read(pa, _SIZE), "little")
    call.module.memory.write(pa, data.to_bytes(_SIZE, "little"))
    return Status.TDX_SUCCESS


async def _find(call: HostCall) -> int:
    """Takes the locks and walks to the page; returns the physical address. The TDR is let go of before the others."""
    module, regs, locks = call.module, call.regs, call.locks
    gpa, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = regs.r8 = 0

    tdr = await lock_page(call, tdr_pa, Operand.RDX, SHARED, PageType.TDR)
    td = module.td(tdr_pa)
    locks.first_out = tdr.locks[::-1]
    await lock_op_state(call, td)
    check(td.tdcs.attributes & _DEBUG, Status.TDX_TD_NON_DEBUG)
    check(not gpa % _SIZE, Status.TDX_OPERAND_INVALID, Operand.RCX)
    await locks.take(td.secure_ept_lock, SHARED, Operand.SEPT_TREE)
    check(is_valid_gpa(gpa, td.tdcs.gpaw, private=True), Status.TDX_OPERAND_INVALID, Operand.RCX)
    entry = walk_sept(module, td, gpa, Level.PT)
    if not sept.is_leaf(entry.value) or not sept.is_present(entry.value):
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_ENTRY_NOT_PRESENT, Operand.RCX)
    await lock_sept_entry(call, entry)
    check_entry_allows(call, entry)
    return entry.page | gpa & level_size(entry.level) - 1


LEAVES: dict[int, Handler] = {HostLeaf.TDH_MEM_RD: tdh_mem_rd, HostLeaf.TDH_MEM_WR: tdh_mem_wr}
