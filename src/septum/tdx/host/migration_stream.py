"""TDH.MIG.STREAM.CREATE: the streams over which a TD is migrated.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/migration_api_calls/tdh_mig_stream_create.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pamt import PageType
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, add_children, lock_op_state, lock_page
from septum.tdx.migration.streams import lock_new_page, lock_sessions
from septum.tdx.outcome import check
from septum.tdx.state.memory import ZERO_PAGE
from septum.tdx.state.migsc import MAX_MIGS

if TYPE_CHECKING:
    from septum.tdx.host import Handler


async def tdh_mig_stream_create(call: HostCall) -> int:
    """TDH.MIG.STREAM.CREATE: makes a page the context of the TD's next migration stream. RCX: the page. RDX: TDR.

    The first stream is the backward one. At the end OP_STATE, TDR and MIG are let go of before the new page.
    """
    module, regs, locks = call.module, call.regs, call.locks
    tdr = await lock_page(call, regs.rdx, Operand.RDX, SHARED, PageType.TDR)
    td = module.td(tdr.pa)
    await lock_op_state(call, td, EXCLUSIVE)
    await lock_sessions(call, td, EXCLUSIVE)
    locks.first_out = (td.op_state_lock, *reversed(tdr.locks), td.mig_lock)
    number = td.tdcs.num_migs
    check(number < MAX_MIGS, Status.TDX_MAX_MIGS_NUM_EXCEEDED)
    page = await lock_new_page(call, regs.rcx, Operand.RCX)

    module.memory.set_page(page.pa, ZERO_PAGE)
    await add_children(td, 1)
    module.pamt[page.key] = module.pamt_entry(page.key)._replace(page_type=PageType.TDCX, owner=td.pa)
    migsc = td.stream(number).migsc
    migsc.hpa, migsc.initialised = page.pa, False
    td.tdcs.num_migs = number + 1
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {HostLeaf.TDH_MIG_STREAM_CREATE: tdh_mig_stream_create}
