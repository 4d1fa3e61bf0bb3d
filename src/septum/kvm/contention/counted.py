"""TDH.MEM.TRACK without bound, with vCPUs that spin outside of the guest meanwhile.

Source: v13 of the series (056, 20795cbc7d7e), ``tdx_track`` and ``tdx_flush_tlb_current``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.core.steps import step
from septum.kvm.contention.again import again
from septum.kvm.requests import KVM_REQ_TLB_FLUSH, kvm_make_all_cpus_request

if TYPE_CHECKING:
    from septum.kvm.contention import Attempt
    from septum.kvm.vm import Vm
    from septum.tdx.registers import Regs

_loop = again()


async def loop_counted(kvm: Vm, attempt: Attempt) -> Regs:
    """Counts in ``tdh_mem_track``, has all vCPUs leave to flush their TLBs, and calls until the module is not busy.

    A vCPU that serves the request waits for the count to be zero. One that entered before it was asked, and so has none
    to serve, can keep the module busy as long as it enters.
    """
    await step("write", "tdh_mem_track")
    kvm.tdh_mem_track += 1
    await kvm_make_all_cpus_request(kvm, KVM_REQ_TLB_FLUSH)
    regs = await _loop(kvm, attempt)
    await step("write", "tdh_mem_track")
    kvm.tdh_mem_track -= 1
    return regs
