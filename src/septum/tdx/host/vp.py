"""TDH.VP.*: creating, initialising and flushing virtual processors. Entering them is in :mod:`septum.tdx.vm_entry`.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_vp_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import LastExit, Lifecycle, VcpuState
from septum.arch.operands import Operand
from septum.arch.pages import gpa_width
from septum.arch.pamt import PageType
from septum.arch.status import Status
from septum.tdx import extended_state
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, LockedPage, add_children, lock_op_state, lock_page, lock_tdr
from septum.tdx.outcome import Fail, check
from septum.tdx.registers import Regs
from septum.tdx.state.memory import ZERO_PAGE
from septum.tdx.state.vp import NO_LP, Vp
from septum.tdx.vcpu import atomic, check_tdvps_pages, count_associated, lock_owner, lock_tdvpr
from septum.tdx.vm_entry import check_tsc_adjust, tdh_vp_enter
from septum.tdx.vmcs_init import init_management, init_vmcs

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.td import Td

MAX_TDVPS_PAGES: Final = 15
X2APIC_ID_NOT_UNIQUE: Final = 0xC000_0621_0000_0000
X2APIC_IDS: Final = "X2APIC_IDS"
"""Field of ``Td.fields``: one more than the id of the VCPU with that index."""

_XCR0_RESET: Final = 1
_DR6_RESET: Final = 0xFFFF_0FF0
_FMASK_RESET: Final = 0x2_0200
_XFAM_LBR: Final = 1 << 15


async def tdh_vp_create(call: HostCall) -> int:
    """TDH.VP.CREATE: a page becomes the root page (TDVPR) of a new VCPU.

    RCX: the page. RDX: TDR.
    """
    regs, module = call.regs, call.module
    td = await lock_tdr(call, regs.rdx, Operand.RDX, SHARED)
    await lock_op_state(call, td)
    page = await lock_page(call, regs.rcx, Operand.RCX, EXCLUSIVE, PageType.NDA)
    tdvps = module.new_vp(page.pa).tdvps
    tdvps.num_tdvps_pages = 1
    tdvps.tdvps_page_pa = (module.pa_format.with_hkid(page.pa, td.tdr.hkid),)
    await _own(call, td, page, PageType.TDVPR)
    return Status.TDX_SUCCESS


async def tdh_vp_addcx(call: HostCall) -> int:
    """TDH.VP.ADDCX: a page becomes a further page (TDCX) of a VCPU that is not initialised yet.

    RCX: the page. RDX: TDVPR.
    """
    regs, module, locks = call.regs, call.module, call.locks
    tdvpr, vp = await lock_tdvpr(call, regs.rdx, Operand.RDX, EXCLUSIVE)
    locks.first_out = tdvpr.locks[::-1]
    td = await lock_owner(call, tdvpr)
    await lock_op_state(call, td)
    tdvps = vp.tdvps
    check(tdvps.vcpu_state == VcpuState.UNINITIALIZED, Status.TDX_VCPU_STATE_INCORRECT)
    check(tdvps.num_tdvps_pages < MAX_TDVPS_PAGES, Status.TDX_TDCX_NUM_INCORRECT)
    page = await lock_page(call, regs.rcx, Operand.RCX, EXCLUSIVE, PageType.NDA)
    locks.first_out += page.locks[::-1]
    tdvps.tdvps_page_pa = (*tdvps.tdvps_page_pa, module.pa_format.with_hkid(page.pa, td.tdr.hkid))
    tdvps.num_tdvps_pages += 1
    await _own(call, td, page, PageType.TDCX)
    return Status.TDX_SUCCESS


async def _own(call: HostCall, td: Td, page: LockedPage, page_type: PageType) -> None:
    """The page is cleared, and is the TD's from now on."""
    module = call.module
    module.memory.set_page(page.pa, ZERO_PAGE)
    await add_children(td, 1)
    module.pamt[page.key] = module.pamt_entry(page.key)._replace(page_type=page_type, owner=td.pa)


async def tdh_vp_init(call: HostCall) -> int:
    """TDH.VP.INIT: the VCPU gets its reset state and is associated with this LP.

    RCX: TDVPR. RDX: the guest's initial RCX and R8. Version 1 (newer modules): R8: x2APIC id; the TDR is locked
    exclusively.
    """
    regs, module = call.regs, call.module
    check(call.version <= 1, Status.TDX_OPERAND_INVALID, Operand.RAX)
    tdvpr, vp = await lock_tdvpr(call, regs.rcx, Operand.RCX, EXCLUSIVE)
    td = await lock_owner(call, tdvpr, EXCLUSIVE if call.version else SHARED)
    await lock_op_state(call, td)
    check_tdvps_pages(td, vp)
    tdvps = vp.tdvps
    check(tdvps.vcpu_state == VcpuState.UNINITIALIZED, Status.TDX_VCPU_STATE_INCORRECT)
    tdvps.vcpu_index = await _number(td)
    if call.version:
        await _give_x2apic_id(td, tdvps.vcpu_index, regs.r8)
    check_tsc_adjust(call)
    tdvps.last_exit_tsc = module.hardware.rdtsc()
    tdvps.xfam = td.tdcs.xfam
    _reset_state(call, td, vp, regs.rdx)
    tdvps.vcpu_state = VcpuState.READY
    tdvps.last_td_exit = LastExit.ASYNC_FAULT
    tdvps.assoc_lpid = call.lp.index
    await count_associated(td, 1)
    for vm in range(td.tdcs.num_l2_vms + 1):
        init_vmcs(module, td, vp, vm)
    init_management(module, td, vp)
    return Status.TDX_SUCCESS


async def _number(td: Td) -> int:
    """Takes the next VCPU_INDEX of the TD.

    :raises Fail: MAX_VCPUS_EXCEEDED.
    """
    tdcs = td.tdcs
    await atomic("NUM_VCPUS")
    index = tdcs.num_vcpus
    tdcs.num_vcpus = index + 1
    if index >= tdcs.max_vcpus:
        await _take_back_number(td)
        raise Fail(Status.TDX_MAX_VCPUS_EXCEEDED)
    return index


async def _take_back_number(td: Td) -> None:
    await atomic("NUM_VCPUS")
    td.tdcs.num_vcpus -= 1


async def _give_x2apic_id(td: Td, index: int, x2apic_id: int) -> None:
    """Keeps the id of a VCPU (``tdh_vp_init`` of newer modules).

    :raises Fail: OPERAND_INVALID with R8 for more than 32 bits, X2APIC_ID_NOT_UNIQUE with the id.
    """
    if x2apic_id >> 32:
        await _take_back_number(td)
        raise Fail(Status.TDX_OPERAND_INVALID, Operand.R8)
    if any(td.fields[X2APIC_IDS, i] == x2apic_id + 1 for i in range(index)):
        await _take_back_number(td)
        raise Fail(X2APIC_ID_NOT_UNIQUE, x2apic_id)
    td.fields[X2APIC_IDS, index] = x2apic_id + 1


def _reset_state(call: HostCall, td: Td, vp: Vp, rcx: int) -> None:
    """Registers and MSRs with which the guest begins; all others are 0."""
    tdvps, cpu, fields = vp.tdvps, call.module.hardware.cpu, vp.fields
    regs = Regs(rcx=rcx, r8=rcx, rdx=cpu.cpuid(1).eax)
    regs.rbx = gpa_width(td.tdcs.gpaw)
    regs.rsi = tdvps.vcpu_index
    tdvps.gprs = regs.to_tuple()
    tdvps.xcr0 = _XCR0_RESET
    fields["DR6", 0] = _DR6_RESET
    fields["IA32_FMASK", 0] = _FMASK_RESET
    extended_state.reset(vp)
    if td.tdcs.xfam & _XFAM_LBR:
        fields["IA32_LBR_DEPTH", 0] = 8 * (cpu.cpuid(0x1C).eax & 0xFF).bit_length()


async def tdh_vp_flush(call: HostCall) -> int:
    """TDH.VP.FLUSH: ends the VCPU's association with this LP and flushes its translations. RCX: TDVPR."""
    tdvpr, vp = await lock_tdvpr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    td = await lock_owner(call, tdvpr)
    check(td.tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED, Status.TDX_TD_KEYS_NOT_CONFIGURED)
    check_tdvps_pages(td, vp)
    check(vp.tdvps.assoc_lpid == call.lp.index, Status.TDX_VCPU_NOT_ASSOCIATED)
    vp.tdvps.assoc_lpid = NO_LP
    await count_associated(td, -1)
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_VP_ENTER: tdh_vp_enter,
    HostLeaf.TDH_VP_CREATE: tdh_vp_create,
    HostLeaf.TDH_VP_ADDCX: tdh_vp_addcx,
    HostLeaf.TDH_VP_INIT: tdh_vp_init,
    HostLeaf.TDH_VP_FLUSH: tdh_vp_flush,
}
