"""Splitting a mapping of the Secure EPT: TDH.MEM.RANGE.BLOCK, TRACK and PAGE.DEMOTE.

Source: huge pages v3 (20260106101646.24809-1-yan.y.zhao), ``arch/x86/kvm/vmx/tdx.c``, ``tdx_sept_split_private_spte``.
"""

from __future__ import annotations

from errno import EBUSY, EIO, EOPNOTSUPP
from typing import TYPE_CHECKING

from septum.arch.status import CODE, Status
from septum.kvm.contention import contend
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.mmu.spte import PG_LEVEL_2M
from septum.kvm.requests import KVM_REQ_OUTSIDE_GUEST_MODE, kvm_make_all_cpus_request
from septum.kvm.tdx.sept import pg_level_to_tdx_sept_level, tdx_track
from septum.kvm.vm import TdState, kvm_bug_on, seamcall_bug_on

if TYPE_CHECKING:
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs


async def tdx_sept_split_private_spte(kvm: Vm, gfn: int, level: int, spt: int, *, mmu_lock_shared: bool) -> int:
    """``tdx_sept_split_private_spte``: 2 MiB at ``gfn`` become 512 entries in the page ``spt``. 0 or a negative errno.

    Only with ``mmu_lock`` held for write. No TDH.MEM.RANGE.UNBLOCK follows: TDH.MEM.PAGE.DEMOTE unblocks.
    """
    tdx_level = pg_level_to_tdx_sept_level(level)
    running = kvm.state == TdState.RUNNABLE and level == PG_LEVEL_2M
    if await kvm_bug_on(not running, kvm, "a mapping that cannot be split"):
        return -EIO
    if mmu_lock_shared:
        if kvm.host.kernel.policies["accept"] == "split-shared":
            return await split_under_shared_mmu_lock(kvm, gfn << 12, tdx_level, spt)
        kvm.host.log.warn_on(True, "splitting under shared mmu_lock")
        return -EOPNOTSUPP
    tdh = kvm.host.seamcalls
    regs = await contend("block", kvm, lambda: tdh.tdh_mem_range_block(kvm.tdr_page, gfn << 12, tdx_level))
    if await seamcall_bug_on(kvm, "TDH_MEM_RANGE_BLOCK", regs, "rcx", "rdx"):
        return -EIO
    await tdx_track(kvm)
    regs = await contend("demote", kvm, lambda: tdh_mem_page_demote(kvm, gfn << 12, tdx_level, spt))
    if await seamcall_bug_on(kvm, "TDH_MEM_PAGE_DEMOTE", regs, "rcx", "rdx"):
        return -EIO
    return 0


async def tdh_mem_page_demote(kvm: Vm, gpa: int, tdx_level: int, spt: int) -> Regs:
    """``tdh_mem_page_demote``; with the fix "demote-loops" again as often as it is interrupted, without bound."""
    tdh = kvm.host.seamcalls
    while True:
        regs = await tdh.tdh_mem_page_demote(kvm.tdr_page, gpa, tdx_level, spt)
        interrupted = regs.rax & CODE == Status.TDX_INTERRUPTED_RESTARTABLE
        if not interrupted or not kvm.host.kernel.has("demote-loops"):
            return regs


async def split_under_shared_mmu_lock(kvm: Vm, gpa: int, tdx_level: int, spt: int) -> int:
    """The design that the series rejects (its patch 9): a call that is busy means to go back, by
    TDH.MEM.RANGE.UNBLOCK, which may itself be busy; then the range stays blocked for ever. 0, -EBUSY or -EIO."""
    tdh, tdr = kvm.host.seamcalls, kvm.tdr_page
    regs = await tdh.tdh_mem_range_block(tdr, gpa, tdx_level)
    if tdx_operand_busy(regs.rax):
        return -EBUSY
    if await seamcall_bug_on(kvm, "TDH_MEM_RANGE_BLOCK", regs, "rcx", "rdx"):
        return -EIO
    regs = await tdh.tdh_mem_track(tdr)
    await kvm_make_all_cpus_request(kvm, KVM_REQ_OUTSIDE_GUEST_MODE)
    if not regs.rax:
        regs = await tdh_mem_page_demote(kvm, gpa, tdx_level, spt)
    if tdx_operand_busy(regs.rax):
        await tdh.tdh_mem_range_unblock(tdr, gpa, tdx_level)
        return -EBUSY
    return -EIO if await seamcall_bug_on(kvm, "TDH_MEM_PAGE_DEMOTE", regs, "rcx", "rdx") else 0
