"""TDH.SYS.RD, TDH.SYS.RDALL, TDH.MNG.RD, TDH.MNG.WR, TDH.VP.RD and TDH.VP.WR: metadata fields for the host.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_{sys_rd,sys_rdall,mng_rd_wr,vp_rd_wr}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.metadata import NULL_FIELD_ID, Access, Context
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.status import Status
from septum.tdx.call import SHARED, HostCall, check_shared_hpa, lock_op_state, lock_tdr
from septum.tdx.metadata import Scope, answer_read, answer_write, clear_outputs, dump_list, host_access
from septum.tdx.outcome import check
from septum.tdx.vcpu import associate, check_tdvps_pages, lock_owner, lock_tdvpr

if TYPE_CHECKING:
    from septum.tdx.host import Handler

LAST_VERSION = 1


def _sys_scope(call: HostCall) -> Scope:
    return Scope(call.module, call.lp, Context.SYS, Access.HOST)


async def tdh_sys_rd(call: HostCall) -> int:
    """TDH.SYS.RD: reads a field of the module. RDX: field id. Out RDX: next field id; R8: value."""
    field_id = call.regs.rdx
    clear_outputs(call.regs, iterate=True)
    check(call.lp.initialised, Status.TDX_SYS_LP_INIT_NOT_DONE)
    return answer_read(_sys_scope(call), call.regs, field_id, iterate=True)


async def tdh_sys_rdall(call: HostCall) -> int:
    """TDH.SYS.RDALL: writes a list of the module's fields to memory. RDX: a page of the host; R8: first field id.

    Out R8: the first field that did not fit.
    """
    regs, first = call.regs, call.regs.r8
    regs.r8 = NULL_FIELD_ID
    check(call.lp.initialised, Status.TDX_SYS_LP_INIT_NOT_DONE)
    check_shared_hpa(call, regs.rdx, PAGE_4K, Operand.RDX)
    dump = dump_list(_sys_scope(call), first, PAGE_4K)
    call.module.memory.write(call.module.pa_format.address(regs.rdx), dump.data)
    regs.r8 = dump.next_id
    return dump.status


async def _td_scope(call: HostCall) -> Scope:
    """The TD whose TDR is in RCX, with shared locks on TDR and OP_STATE."""
    td = await lock_tdr(call, call.regs.rcx, Operand.RCX, SHARED)
    await lock_op_state(call, td)
    return Scope(call.module, call.lp, Context.TD, host_access(td), td)


async def tdh_mng_rd(call: HostCall) -> int:
    """TDH.MNG.RD: reads a field of a TD. RCX: TDR; RDX: field id. Out R8: value; version 1, RDX: next field id."""
    field_id, iterate = call.regs.rdx, call.version > 0
    clear_outputs(call.regs, iterate=iterate)
    check(call.version <= LAST_VERSION, Status.TDX_OPERAND_INVALID, Operand.RAX)
    return answer_read(await _td_scope(call), call.regs, field_id, iterate=iterate)


async def tdh_mng_wr(call: HostCall) -> int:
    """TDH.MNG.WR: writes a field of a TD. RCX: TDR; RDX: field id; R8: value; R9: write mask. Out R8: old value."""
    regs, value = call.regs, call.regs.r8
    clear_outputs(regs, iterate=False)
    return await answer_write(await _td_scope(call), regs, regs.rdx, value, regs.r9)


async def _vp_scope(call: HostCall, *, allow_disabled: bool) -> Scope:
    """The VCPU whose TDVPR is in RCX, with shared locks on TDVPR, TDR and OP_STATE, associated with the LP."""
    page, vp = await lock_tdvpr(call, call.regs.rcx, Operand.RCX, SHARED)
    td = await lock_owner(call, page)
    await lock_op_state(call, td)
    check_tdvps_pages(td, vp)
    await associate(call, td, vp, allow_disabled=allow_disabled)
    return Scope(call.module, call.lp, Context.VP, host_access(td), td, vp)


async def tdh_vp_rd(call: HostCall) -> int:
    """TDH.VP.RD: reads a field of a VCPU. RCX: TDVPR; RDX: field id. Out R8: value; version 1, RDX: next field id."""
    field_id, iterate = call.regs.rdx, call.version > 0
    clear_outputs(call.regs, iterate=iterate)
    check(call.version <= LAST_VERSION, Status.TDX_OPERAND_INVALID, Operand.RAX)
    return answer_read(await _vp_scope(call, allow_disabled=True), call.regs, field_id, iterate=iterate)


async def tdh_vp_wr(call: HostCall) -> int:
    """TDH.VP.WR: writes a field of a VCPU. RCX: TDVPR; RDX: field id; R8: value; R9: write mask. Out R8: old value."""
    regs, value = call.regs, call.regs.r8
    clear_outputs(regs, iterate=False)
    return await answer_write(await _vp_scope(call, allow_disabled=False), regs, regs.rdx, value, regs.r9)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_SYS_RD: tdh_sys_rd,
    HostLeaf.TDH_SYS_RDALL: tdh_sys_rdall,
    HostLeaf.TDH_MNG_RD: tdh_mng_rd,
    HostLeaf.TDH_MNG_WR: tdh_mng_wr,
    HostLeaf.TDH_VP_RD: tdh_vp_rd,
    HostLeaf.TDH_VP_WR: tdh_vp_wr,
}
