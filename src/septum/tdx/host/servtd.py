"""TDH.SERVTD.*: binding a service TD (a migration TD) to a TD.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/migration_api_calls/tdh_servtd_*.c``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from septum.arch import op_state
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, check_build_state, check_shared_hpa, lock_op_state, lock_tdr
from septum.tdx.measurement import tee_info_hash
from septum.tdx.outcome import check
from septum.tdx.servtd import (
    ATTRIBUTES_ALLOWED,
    IGNORE_TDINFO_MASK,
    IGNORE_TDINFO_SHIFT,
    INSTANCE_BINDING,
    MAX_SERVTDS,
    MIGRATION_TD,
    Binding,
    BindingState,
    binding_handle,
)

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.state.td import Td

_HASH_ALIGNMENT: Final = 64
_HASH_SIZE: Final = 48


async def tdh_servtd_prebind(call: HostCall) -> int:
    """TDH.SERVTD.PREBIND: says which service TD may be bound later.

    RCX: TDR. RDX: SERVTD_INFO_HASH in the host's memory. R8: slot. R9: type. R10: SERVTD_ATTR.
    """
    module, regs = call.module, call.regs
    td = await lock_tdr(call, regs.rcx, Operand.RCX, SHARED)
    await lock_op_state(call, td)
    check_shared_hpa(call, regs.rdx, _HASH_ALIGNMENT, Operand.RDX)
    await _lock_slot(call, td)
    binding = Binding.unpack(td.tdcs.servtd_bindings_table)
    check(binding.state != BindingState.BOUND, Status.TDX_SERVTD_BOUND)

    if binding.state == BindingState.NOT_BOUND:
        td.tdcs.servtd_num += 1
    info_hash = module.memory.read(module.pa_format.address(regs.rdx), _HASH_SIZE)
    pre_bound = replace(binding, state=BindingState.PRE_BOUND, type=regs.r9, attributes=regs.r10, info_hash=info_hash)
    td.tdcs.servtd_bindings_table = pre_bound.pack()
    return Status.TDX_SUCCESS


async def tdh_servtd_bind(call: HostCall) -> int:
    """TDH.SERVTD.BIND: binds a service TD, for the first time, as pre-bound, or again.

    RCX: TDR of the target TD. RDX: TDR of the service TD. R8: slot. R9: type. R10: SERVTD_ATTR. Outputs: RCX: binding
    handle. R10 to R13: TD_UUID of the target TD.
    """
    regs = call.regs
    target_pa, service_pa, attributes = regs.rcx, regs.rdx, regs.r10
    regs.rcx = regs.r10 = regs.r11 = regs.r12 = regs.r13 = 0
    check(target_pa != service_pa, Status.TDX_OPERAND_INVALID, Operand.RDX)
    td = await lock_tdr(call, target_pa, Operand.RCX, SHARED)
    await lock_op_state(call, td)
    service = await lock_tdr(call, service_pa, Operand.RDX, SHARED)
    check_build_state(service)
    await call.locks.take(service.op_state_lock, SHARED, Operand.OP_STATE)
    check(service.tdcs.op_state in op_state.SERVTD_BIND_SERVICE_ALLOWED, Status.TDX_OP_STATE_INCORRECT)
    await _lock_slot(call, td, attributes)
    await call.locks.take(service.rtmr_lock, SHARED, Operand.RTMR)
    info_hash = tee_info_hash(service.tdcs, attributes >> IGNORE_TDINFO_SHIFT & IGNORE_TDINFO_MASK)
    await call.locks.release(service.rtmr_lock)

    old = Binding.unpack(td.tdcs.servtd_bindings_table)
    new = Binding(BindingState.BOUND, regs.r9, attributes, service.tdr.td_uuid, info_hash)
    if old.state == BindingState.NOT_BOUND:
        building = (OpState.UNINITIALIZED, OpState.INITIALIZED)
        check(td.tdcs.op_state in building, Status.TDX_OP_STATE_INCORRECT)
        td.tdcs.servtd_num += 1
    else:
        _check_same(old, new)
    td.tdcs.servtd_bindings_table = new.pack()
    regs.rcx = binding_handle(td.pa, regs.r8, new.uuid)
    regs.r10, regs.r11, regs.r12, regs.r13 = td.tdr.td_uuid
    return Status.TDX_SUCCESS


async def _lock_slot(call: HostCall, td: Td, attributes: int | None = None) -> None:
    """Checks slot (R8), type (R9) and SERVTD_ATTR (R10), and locks the binding table."""
    regs = call.regs
    attributes = regs.r10 if attributes is None else attributes
    check(regs.r8 < MAX_SERVTDS, Status.TDX_OPERAND_INVALID, Operand.R8)
    check(regs.r9 == MIGRATION_TD, Status.TDX_OPERAND_INVALID, Operand.R9)
    check(not attributes & ~ATTRIBUTES_ALLOWED, Status.TDX_OPERAND_INVALID, Operand.R10)
    await call.locks.take(td.servtd_bindings_lock, EXCLUSIVE, Operand.SERVTD_BINDINGS)


def _check_same(old: Binding, new: Binding) -> None:
    """Whether a service TD is the one that was pre-bound or bound before."""
    check(old.type == new.type, Status.TDX_SERVTD_TYPE_MISMATCH)
    check(old.attributes == new.attributes, Status.TDX_SERVTD_ATTR_MISMATCH)
    if old.state == BindingState.BOUND and new.attributes & INSTANCE_BINDING:
        check(old.uuid == new.uuid, Status.TDX_SERVTD_UUID_MISMATCH)
    else:
        check(old.info_hash == new.info_hash, Status.TDX_SERVTD_INFO_HASH_MISMATCH)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_SERVTD_BIND: tdh_servtd_bind,
    HostLeaf.TDH_SERVTD_PREBIND: tdh_servtd_prebind,
}
