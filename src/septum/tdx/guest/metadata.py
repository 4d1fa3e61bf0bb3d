"""TDG.VM.RD, TDG.VM.WR, TDG.VP.RD, TDG.VP.WR, TDG.SYS.RD and TDG.SYS.RDALL: metadata fields for the guest.

Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/tdg_{vm_rd_wr,vp_rd_wr,sys_rd,sys_rdall}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import GuestLeaf
from septum.arch.metadata import NULL_FIELD_ID, Access, Context
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.status import Status
from septum.tdx.guest.call import GuestCall, map_guest_gpa
from septum.tdx.metadata import Scope, answer_read, answer_write, clear_outputs, dump_list
from septum.tdx.outcome import check

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler

LAST_VERSION = 1


def _scope(call: GuestCall, context: Context) -> Scope:
    return Scope(call.module, call.lp, context, Access.GUEST, call.td, call.vp)


async def tdg_vm_rd(call: GuestCall) -> int:
    """TDG.VM.RD: reads a field of the TD. RCX: 0; RDX: field id. Out R8: value; version 1, RDX: next field id."""
    regs, field_id, iterate = call.regs, call.regs.rdx, call.version > 0
    clear_outputs(regs, iterate=iterate)
    check(call.version <= LAST_VERSION, Status.TDX_OPERAND_INVALID, Operand.RAX)
    check(not regs.rcx, Status.TDX_OPERAND_INVALID, Operand.RCX)
    return answer_read(_scope(call, Context.TD), regs, field_id, iterate=iterate)


async def tdg_vm_wr(call: GuestCall) -> int:
    """TDG.VM.WR: writes a field of the TD. RCX: 0; RDX: field id; R8: value; R9: write mask. Out R8: old value."""
    return await _write(call, Context.TD)


async def tdg_vp_rd(call: GuestCall) -> int:
    """TDG.VP.RD: reads a field of the VCPU. RCX: 0; RDX: field id. Out RDX: next field id; R8: value."""
    regs, field_id = call.regs, call.regs.rdx
    clear_outputs(regs, iterate=True)
    check(not regs.rcx, Status.TDX_OPERAND_INVALID, Operand.RCX)
    return answer_read(_scope(call, Context.VP), regs, field_id, iterate=True)


async def tdg_vp_wr(call: GuestCall) -> int:
    """TDG.VP.WR: writes a field of the VCPU. RCX: 0; RDX: field id; R8: value; R9: write mask. Out R8: old value."""
    return await _write(call, Context.VP)


async def _write(call: GuestCall, context: Context) -> int:
    regs, value = call.regs, call.regs.r8
    clear_outputs(regs, iterate=False)
    check(not regs.rcx, Status.TDX_OPERAND_INVALID, Operand.RCX)
    return await answer_write(_scope(call, context), regs, regs.rdx, value, regs.r9)


async def tdg_sys_rd(call: GuestCall) -> int:
    """TDG.SYS.RD: reads a field of the module. RDX: field id. Out RDX: next field id; R8: value."""
    field_id = call.regs.rdx
    clear_outputs(call.regs, iterate=True)
    return answer_read(_scope(call, Context.SYS), call.regs, field_id, iterate=True)


async def tdg_sys_rdall(call: GuestCall) -> int:
    """TDG.SYS.RDALL: writes a list of the module's fields to a private page. RDX: its GPA; R8: first field id.

    Out R8: the first field that did not fit.
    """
    regs, first = call.regs, call.regs.r8
    regs.r8 = NULL_FIELD_ID
    check(not regs.rdx % PAGE_4K, Status.TDX_OPERAND_INVALID, Operand.RDX)
    page = map_guest_gpa(call, regs.rdx, Operand.RDX, write=True, private=True)
    dump = dump_list(_scope(call, Context.SYS), first, PAGE_4K)
    call.module.memory.write(page, dump.data)
    regs.r8 = dump.next_id
    return dump.status


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_VM_RD: tdg_vm_rd,
    GuestLeaf.TDG_VM_WR: tdg_vm_wr,
    GuestLeaf.TDG_VP_RD: tdg_vp_rd,
    GuestLeaf.TDG_VP_WR: tdg_vp_wr,
    GuestLeaf.TDG_SYS_RD: tdg_sys_rd,
    GuestLeaf.TDG_SYS_RDALL: tdg_sys_rdall,
}
