"""The way to a VCPU: its TDVPR and TDR locked, its pages counted, its association with the LP.

Source: TDX Module 1.5.01, ``src/common/helpers/helpers.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.op_state import VcpuState
from septum.arch.operands import Operand
from septum.arch.pamt import PageType
from septum.arch.status import Status
from septum.core.steps import ATOMICS, ctx, step
from septum.tdx.call import SHARED, LockedPage, PamtLock, lock_page
from septum.tdx.outcome import check
from septum.tdx.state.vp import NO_LP

if TYPE_CHECKING:
    from septum.core.trylocks import Mode
    from septum.tdx.call import HostCall
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

MIN_TDVPS_PAGES = 6
PAGES_PER_L2_VM = 3


async def atomic(what: str) -> None:
    """A place where others may act at the finest granularity: before an atomic instruction outside the locks."""
    if ctx.level >= ATOMICS:
        await step("atomic", what)


async def lock_tdvpr(call: HostCall, pa: int, operand: Operand, mode: Mode) -> tuple[LockedPage, Vp]:
    """The VCPU whose TDVPR is at ``pa``, its page locked in ``mode``."""
    page = await lock_page(call, pa, operand, mode, PageType.TDVPR)
    return page, call.module.vp(page.pa)


async def lock_owner(call: HostCall, page: LockedPage, mode: Mode = SHARED) -> Td:
    """``lock_and_map_implicit_tdr``: the TD that a page belongs to, its TDR locked.

    :raises Fail: OPERAND_BUSY with TDR.
    """
    module = call.module
    owner = module.pamt_entry(page.key).owner
    await call.locks.take(PamtLock(module.locks, owner), mode, Operand.TDR)
    return module.td(owner)


def check_tdvps_pages(td: Td, vp: Vp) -> None:
    """``map_tdvps``: the VCPU has all pages that its TD needs; else TDCX_NUM_INCORRECT."""
    enough = vp.tdvps.num_tdvps_pages >= MIN_TDVPS_PAGES + PAGES_PER_L2_VM * td.tdcs.num_l2_vms
    check(enough, Status.TDX_TDCX_NUM_INCORRECT)


async def associate(call: HostCall, td: Td, vp: Vp, *, allow_disabled: bool = False) -> bool:
    """``check_and_associate_vcpu``: ties the VCPU to this LP; returns whether it was not before.

    :raises Fail: VCPU_STATE_INCORRECT, or VCPU_ASSOCIATED with another LP.
    """
    state = vp.tdvps.vcpu_state
    ready = state == VcpuState.READY or (allow_disabled and state == VcpuState.DISABLED)
    check(ready, Status.TDX_VCPU_STATE_INCORRECT)
    return await tie_to_lp(call, td, vp)


async def tie_to_lp(call: HostCall, td: Td, vp: Vp) -> bool:
    """``associate_vcpu``: the same for a VCPU in any state.

    :raises Fail: VCPU_ASSOCIATED with another LP.
    """
    tdvps, lp = vp.tdvps, call.lp.index
    await atomic("ASSOC_LPID")
    before = tdvps.assoc_lpid
    check(before in (NO_LP, lp), Status.TDX_VCPU_ASSOCIATED)
    if before == lp:
        return False
    tdvps.assoc_lpid = lp
    tdvps.lp_dependent_hpa_updated = False
    await count_associated(td, 1)
    return True


async def count_associated(td: Td, change: int) -> None:
    """Counts a VCPU of the TD that is associated with an LP now (1) or no longer is (-1)."""
    await atomic("NUM_ASSOC_VCPUS")
    td.tdcs.num_assoc_vcpus += change


async def count_inside(td: Td, epoch: int, change: int) -> None:
    """Counts a VCPU that is inside the TD since ``epoch`` (1) or has left it (-1)."""
    await atomic("EPOCH_REFCOUNT")
    even, odd = td.tdcs.refcount
    td.tdcs.refcount = (even, odd + change) if epoch & 1 else (even + change, odd)
