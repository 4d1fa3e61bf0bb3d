"""TDG.VP.*: what a VCPU asks about itself, and TDG.VP.VMCALL, by which it asks the host.

Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/tdg_vp_{info,veinfo_get,cpuidve_set,vmcall}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.leaves import GuestLeaf
from septum.arch.operands import Operand
from septum.arch.pages import gpa_width
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags
from septum.tdx.guest.call import GuestCall
from septum.tdx.outcome import check
from septum.tdx.vm_exit import TdVmcall

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler

_RAX_RCX_RSP: Final = 1 << 0 | 1 << 1 | 1 << 4
_RBP: Final = 1 << 5
_SYS_RD_AVAILABLE: Final = 1
_SUPERVISOR, _USER = 1, 2


async def tdg_vp_vmcall(call: GuestCall) -> int:
    """TDG.VP.VMCALL: to the host, and back with the host's answer.

    RCX: mask of GPRs (15:0, by number) and XMMs (31:16) that the host may read and write. XMMs are not modelled.
    """
    private = _RAX_RCX_RSP | (_RBP if call.td.tdcs.config_flags & ConfigFlags.NO_RBP_MOD else 0)
    mask = call.regs.rcx
    check(not mask >> 32 and not mask & private, Status.TDX_OPERAND_INVALID, Operand.RCX)
    raise TdVmcall


async def tdg_vp_info(call: GuestCall) -> int:
    """TDG.VP.INFO.

    Out RCX: GPA width; RDX: ATTRIBUTES; R8: number of VCPUs, and their maximum in 63:32; R9: VCPU_INDEX; R10: 1.
    """
    regs, tdcs = call.regs, call.td.tdcs
    regs.rcx = gpa_width(tdcs.gpaw)
    regs.rdx = tdcs.attributes
    regs.r8 = tdcs.max_vcpus << 32 | tdcs.num_vcpus
    regs.r9 = call.vp.tdvps.vcpu_index
    regs.r10 = _SYS_RD_AVAILABLE
    regs.r11 = 0
    return Status.TDX_SUCCESS


async def tdg_vp_veinfo_get(call: GuestCall) -> int:
    """TDG.VP.VEINFO.GET: why the guest got a #VE; it can get the next one from now on.

    Out RCX: exit reason; RDX: exit qualification; R8: GLA; R9: GPA; R10: instruction information << 32 | length.
    """
    regs, tdvps = call.regs, call.vp.tdvps
    info = tdvps.ve_info
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
    check(info.valid, Status.TDX_NO_VALID_VE_INFO)
    regs.rcx, regs.rdx = info.exit_reason, info.exit_qualification
    regs.r8, regs.r9 = info.gla, info.gpa
    regs.r10 = info.instruction_information << 32 | info.instruction_length
    tdvps.ve_info = info._replace(valid=0)
    return Status.TDX_SUCCESS


async def tdg_vp_cpuidve_set(call: GuestCall) -> int:
    """TDG.VP.CPUIDVE.SET: whether every CPUID gives a #VE. RCX: bit 0 in supervisor mode, bit 1 in user mode."""
    control, tdvps = call.regs.rcx, call.vp.tdvps
    check(not control & ~(_SUPERVISOR | _USER), Status.TDX_OPERAND_INVALID, Operand.RCX)
    tdvps.cpuid_supervisor_ve = bool(control & _SUPERVISOR)
    tdvps.cpuid_user_ve = bool(control & _USER)
    return Status.TDX_SUCCESS


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_VP_VMCALL: tdg_vp_vmcall,
    GuestLeaf.TDG_VP_INFO: tdg_vp_info,
    GuestLeaf.TDG_VP_VEINFO_GET: tdg_vp_veinfo_get,
    GuestLeaf.TDG_VP_CPUIDVE_SET: tdg_vp_cpuidve_set,
}
