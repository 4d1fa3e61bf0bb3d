"""TDG.VP.ENTER, INVEPT and INVVPID: an L1 VMM inside a TD and its L2 VMs.

L2 VMs do not run here: TDG.VP.ENTER is modelled up to the point where one would. TLBs are not modelled, so
the invalidations only check their operands.
Source: TDX Module 1.5.01, ``src/td_transitions/tdg_vp_enter.c``, ``tdg_vp_{invept,invvpid}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.errors import UsageError
from septum.arch.leaves import GuestLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, is_aligned, is_canonical
from septum.arch.status import Status
from septum.tdx.guest.call import GuestCall, check_guest_gpa, map_guest_gpa
from septum.tdx.outcome import check
from septum.tdx.vm_exit import Interrupted, TdExit

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler

_VM_SHIFT: Final = 52
_INVEPT_MODES: Final = 3
_LIST: Final = 1
"""Low bits of RCX: of TDG.VP.ENTER, of TDG.VP.INVVPID."""
_ENTER_STATE_ALIGNMENT: Final = 256
_NULL_PA: Final = (1 << 64) - 1
_TD_EXIT_ON_L1_TO_L2: Final = 1
_PRIORITY: Final = 0xF0
_VAPIC_PPR: Final = 0xA0
_LIST_RESERVED: Final = 7 << 9 | 3 << 62
_ENTRIES: Final = 512
_LINEAR_ADDRESS_WIDTH: Final = 57


def _vm_of(call: GuestCall, flags: int) -> int:
    """The L2 VM that RCX names in bits 53:52, with no bits set but those and ``flags``; else OPERAND_INVALID."""
    rcx = call.regs.rcx
    vm = rcx >> _VM_SHIFT & 3
    known = not rcx & ~(3 << _VM_SHIFT | flags) and 0 < vm <= call.td.tdcs.num_l2_vms
    check(known, Status.TDX_OPERAND_INVALID, Operand.RCX)
    return vm


async def tdg_vp_enter(call: GuestCall) -> int:
    """TDG.VP.ENTER: enters an L2 VM. RCX: VM and flags; RDX: GPA of its registers.

    :raises UsageError: when all is well and the L2 VM would be entered.
    """
    regs, vp = call.regs, call.vp
    check(is_aligned(regs.rdx, _ENTER_STATE_ALIGNMENT), Status.TDX_OPERAND_INVALID, Operand.RDX)
    check_guest_gpa(call, regs.rdx, Operand.RDX, private=True)
    vm = _vm_of(call, _INVEPT_MODES)
    check(vp.fields["L2_VAPIC_GPA", vm] != _NULL_PA, Status.TDX_OPERAND_INVALID, Operand.L2_VAPIC_GPA)
    requested = vp.vmcs[vmcs.GUEST_INTERRUPT_STATUS] & _PRIORITY
    check(requested <= vp.fields["VAPIC", _VAPIC_PPR // 8] & _PRIORITY, Status.TDX_PENDING_INTERRUPT)
    if vp.fields["L2_DEBUG_CTLS", vm] & _TD_EXIT_ON_L1_TO_L2:
        raise TdExit(Status.TDX_TD_EXIT_BEFORE_L2_ENTRY, report_bus_lock=False)
    raise UsageError(
        f"TDG.VP.ENTER: {vp} would enter its L2 VM {vm}, and L2 VMs do not run in Septum; use L1 guests only"
    )


async def tdg_vp_invept(call: GuestCall) -> int:
    """TDG.VP.INVEPT: invalidates translations of L2 VMs. RCX: mask of VMs."""
    allowed = (2 << call.td.tdcs.num_l2_vms) - 2
    check(not call.regs.rcx & ~allowed, Status.TDX_OPERAND_INVALID, Operand.RCX)
    return Status.TDX_SUCCESS


async def tdg_vp_invvpid(call: GuestCall) -> int:
    """TDG.VP.INVVPID: invalidates translations of linear addresses of an L2 VM.

    RCX: VM, and whether RDX is an entry or tells of a list of them in a private page. Out RDX: the rest of the list.
    """
    regs, module = call.regs, call.module
    _vm_of(call, _LIST)
    if not regs.rcx & _LIST:
        _invalidate(regs.rdx)
        return Status.TDX_SUCCESS
    first, count = regs.rdx & (_ENTRIES - 1), regs.rdx >> _VM_SHIFT & 0x3FF
    fits = not regs.rdx & _LIST_RESERVED and first + count <= _ENTRIES
    check(fits, Status.TDX_OPERAND_INVALID, Operand.RDX)
    page = map_guest_gpa(call, regs.rdx & PAGE_MASK, Operand.RDX, private=True)
    interrupted = False
    while count and not interrupted:
        _invalidate(int.from_bytes(module.memory.read(page + 8 * first, 8), "little"))
        first, count = first + 1 & (_ENTRIES - 1), count - 1
        interrupted = module.hardware.interrupt_pending(call.lp.index)
    regs.rdx = first | regs.rdx & PAGE_MASK | count << _VM_SHIFT
    if interrupted:
        raise Interrupted
    return Status.TDX_SUCCESS


def _invalidate(entry: int) -> None:
    """INVVPID for up to 4096 pages (bits 11:0, less one) from an address; all must be canonical."""
    base, more = entry & -PAGE_4K, entry & (PAGE_4K - 1)
    canonical = all(is_canonical(base + PAGE_4K * i & _NULL_PA, _LINEAR_ADDRESS_WIDTH) for i in (0, more))
    check(canonical, Status.TDX_GLA_NOT_CANONICAL)


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_VP_ENTER: tdg_vp_enter,
    GuestLeaf.TDG_VP_INVEPT: tdg_vp_invept,
    GuestLeaf.TDG_VP_INVVPID: tdg_vp_invvpid,
}
