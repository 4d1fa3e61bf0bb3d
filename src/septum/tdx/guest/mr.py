"""TDG.MR.*: run-time measurement and reports.

What the CPU adds to a report cannot be modelled: the identity of the module (TEE_TCB_INFO) is all zero, which says
that none of its fields is valid, and so is the MAC.
Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/tdg_mr_{rtmr_extend,report,verifyreport}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.leaves import GuestLeaf
from septum.arch.operands import Operand
from septum.arch.pages import is_aligned
from septum.arch.status import Status
from septum.arch.structures import NUM_RTMRS, SHA384_SIZE, ReportMac, TdReport, TeeTcbInfo, report_hashes
from septum.core.trylocks import Mode
from septum.tdx.guest.call import GuestCall, map_guest_gpa
from septum.tdx.measurement import extend_rtmr, td_info, tee_info_hash
from septum.tdx.outcome import check
from septum.tdx.state.hardware import VerifyReport
from septum.tdx.vm_exit import Interrupted

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler

REPORT_SIZE: Final = 1024
REPORT_DATA_SIZE: Final = 64
REPORT_MAC_SIZE: Final = 256
_RTMR_DATA_ALIGNMENT: Final = 64
_WITH_SERVICE_TDS: Final = 1
"""Report version of a TD that has service TDs."""
_VERIFY_STATUS: Final = {
    VerifyReport.SUCCESS: Status.TDX_SUCCESS,
    VerifyReport.INVALID_CPUSVN: Status.TDX_INVALID_CPUSVN,
    VerifyReport.INVALID_REPORTMACSTRUCT: Status.TDX_INVALID_REPORTMACSTRUCT,
}


async def tdg_mr_rtmr_extend(call: GuestCall) -> int:
    """TDG.MR.RTMR.EXTEND: extends a run-time measurement register. RCX: GPA of 48 bytes; RDX: index."""
    regs, tdcs = call.regs, call.td.tdcs
    check(is_aligned(regs.rcx, _RTMR_DATA_ALIGNMENT), Status.TDX_OPERAND_INVALID, Operand.RCX)
    pa = map_guest_gpa(call, regs.rcx, Operand.RCX, private=True)
    data = call.module.memory.read(pa, SHA384_SIZE)
    check(regs.rdx < NUM_RTMRS, Status.TDX_OPERAND_INVALID, Operand.RDX)
    await call.locks.take(call.td.rtmr_lock, Mode.EXCLUSIVE, Operand.RTMR)
    index, rtmr = regs.rdx, tdcs.rtmr
    tdcs.rtmr = (*rtmr[:index], extend_rtmr(rtmr[index], data), *rtmr[index + 1 :])
    tdcs.last_teeinfo_hash_valid = False
    return Status.TDX_SUCCESS


async def tdg_mr_report(call: GuestCall) -> int:
    """TDG.MR.REPORT: writes a TDREPORT_STRUCT. RCX: GPA for it; RDX: GPA of 64 bytes to go into it; R8: sub-type, 0.

    :raises Interrupted: an interrupt for the host is pending; the hash of the measurements is kept for the next time.
    """
    regs, module, tdcs = call.regs, call.module, call.td.tdcs
    check(is_aligned(regs.rcx, REPORT_SIZE), Status.TDX_OPERAND_INVALID, Operand.RCX)
    check(is_aligned(regs.rdx, REPORT_DATA_SIZE), Status.TDX_OPERAND_INVALID, Operand.RDX)
    data_pa = map_guest_gpa(call, regs.rdx, Operand.RDX)
    check(not regs.r8, Status.TDX_OPERAND_INVALID, Operand.R8)
    version = _WITH_SERVICE_TDS if tdcs.servtd_num else 0
    await call.locks.take(call.td.rtmr_lock, Mode.SHARED, Operand.RTMR)
    info, info_hash = td_info(tdcs), tee_info_hash(tdcs)
    await call.locks.release(call.td.rtmr_lock)
    if module.hardware.interrupt_pending(call.lp.index):
        raise Interrupted
    tcb = TeeTcbInfo()
    mac = ReportMac(
        report_version=version,
        tee_tcb_info_hash=report_hashes(tcb, info)[0],
        tee_info_hash=info_hash,
        report_data=module.memory.read(data_pa, REPORT_DATA_SIZE),
    )
    pa = map_guest_gpa(call, regs.rcx, Operand.RCX, write=True)
    module.memory.write(pa, TdReport(mac, tcb, info).pack())
    return Status.TDX_SUCCESS


async def tdg_mr_verifyreport(call: GuestCall) -> int:
    """TDG.MR.VERIFYREPORT: whether a report was made on this machine, as the CPU says. RCX: GPA of REPORTMACSTRUCT."""
    regs, module = call.regs, call.module
    check(is_aligned(regs.rcx, REPORT_MAC_SIZE), Status.TDX_OPERAND_INVALID, Operand.RCX)
    map_guest_gpa(call, regs.rcx, Operand.RCX, private=True)
    return _VERIFY_STATUS[VerifyReport(module.hardware.inputs.verify_report)]


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_MR_RTMR_EXTEND: tdg_mr_rtmr_extend,
    GuestLeaf.TDG_MR_REPORT: tdg_mr_report,
    GuestLeaf.TDG_MR_VERIFYREPORT: tdg_mr_verifyreport,
}
