"""TDH.MR.*: measuring the TD's initial content, and finalising its measurement.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mr_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.pages import Level, is_valid_gpa, level_size
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE, HostCall, lock_op_state, lock_tdr
from septum.tdx.measurement import CHUNK_SIZE, extend_record
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import return_entry, walk_sept
from septum.tdx.servtd import Binding

if TYPE_CHECKING:
    from septum.tdx.host import Handler


async def tdh_mr_extend(call: HostCall) -> int:
    """TDH.MR.EXTEND: measures 256 bytes of an added page into MRTD. RCX: their GPA. RDX: TDR.

    When nothing is mapped there, RCX and RDX tell the entry at which the walk ended.
    """
    module, regs = call.module, call.regs
    gpa, tdr_pa = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = await lock_tdr(call, tdr_pa, Operand.RDX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    valid = not gpa & (CHUNK_SIZE - 1) and is_valid_gpa(gpa, td.tdcs.gpaw, private=True)
    check(valid, Status.TDX_OPERAND_INVALID, Operand.RCX)
    # The TDR is locked exclusively, and with it the whole Secure EPT.
    entry = walk_sept(module, td, gpa, Level.PT)
    if not (sept.is_leaf(entry.value) and sept.is_present(entry.value)):
        return_entry(call, entry)
        raise Fail(Status.TDX_EPT_ENTRY_NOT_PRESENT, Operand.RCX)
    check(sept.host_allowed(HostLeaf.TDH_MR_EXTEND, entry.value), Status.TDX_EPT_ENTRY_NOT_PRESENT)

    chunk = module.memory.read(entry.page | gpa & level_size(entry.level) - 1, CHUNK_SIZE)
    td.tdcs.mrtd_hash = td.tdcs.mrtd_hash.update(extend_record(gpa, chunk))
    return Status.TDX_SUCCESS


async def tdh_mr_finalize(call: HostCall) -> int:
    """TDH.MR.FINALIZE: completes MRTD and SERVTD_HASH; from here on the TD can run. RCX: TDR."""
    td = await lock_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    tdcs = td.tdcs
    check(tdcs.num_vcpus, Status.TDX_NO_VCPUS)

    tdcs.mrtd = tdcs.mrtd_hash.digest()
    tdcs.servtd_hash = Binding.unpack(tdcs.servtd_bindings_table).servtd_hash()
    tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MR_EXTEND: tdh_mr_extend,
    HostLeaf.TDH_MR_FINALIZE: tdh_mr_finalize,
}
