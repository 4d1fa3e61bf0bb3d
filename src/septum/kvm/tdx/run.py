"""Into the guest and out of it again.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_vcpu_run`` and what it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

from septum.arch.exits import ExitReason
from septum.arch.operands import Operand
from septum.arch.status import CODE, SW_ERROR, Status
from septum.core.steps import require, step
from septum.kvm.contention.again import busy_with
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.guest_protocol import GuestCpu
from septum.tdx.registers import GPR_NAMES, Regs

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.vcpu import Vcpu

NO_EXIT: Final = 0xFFFF_FFFF
"""Exit reason of an attempt to enter that says nothing about the guest."""
_TELLS_A_REASON: Final = frozenset(
    {
        Status.TDX_SUCCESS,
        Status.TDX_NON_RECOVERABLE_VCPU,
        Status.TDX_NON_RECOVERABLE_TD,
        Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        Status.TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE,
    }
)
_R10, _R11 = GPR_NAMES.index("r10"), GPR_NAMES.index("r11")
_FORWARDED: Final = frozenset(
    {
        ExitReason.CPUID_INSTRUCTION,
        ExitReason.HLT_INSTRUCTION,
        ExitReason.IO_INSTRUCTION,
        ExitReason.MSR_READ,
        ExitReason.MSR_WRITE,
    }
)
"""TDVMCALLs whose leaf is the exit reason of the instruction they stand for."""


RERUNS: Final[Mapping[str, Callable[[int], bool]]] = {
    "rerun": tdx_operand_busy,
    "rerun-tree-only": busy_with(Operand.SEPT_TREE),
}
"""With which BUSY the vCPU simply enters again."""


class Fastpath(Enum):
    """``fastpath_t``: whether an exit is dealt with before interrupts are on again."""

    NONE = 0
    EXIT_HANDLED = 1


async def tdx_vcpu_run(vcpu: Vcpu, cpu: Cpu) -> Fastpath:
    """``tdx_vcpu_run``: with interrupts off. Keeps out while a zap has its second attempt.

    TDX_OPERAND_BUSY is no error: the thread goes round the outer loop, with interrupts on for those who kick it.
    """
    await step("read", "wait_for_sept_zap")
    kvm = vcpu.kvm
    if kvm.wait_for_sept_zap:
        return Fastpath.EXIT_HANDLED
    guest = vcpu.guest
    require(guest is not None, "scenario", f"{vcpu} runs, but no guest is attached to it")
    assert guest is not None
    module = kvm.host.module
    view = GuestCpu(module, module.td(kvm.tdr_page), module.vp(vcpu.tdvpr_page), cpu, lambda: take_posted(vcpu))
    args = Regs.from_tuple(vcpu.vp_enter_args)
    regs = await kvm.host.seamcalls.tdh_vp_enter(vcpu.tdvpr_page, args, guest, view)
    vcpu.vp_enter_ret = regs.rax
    vcpu.vp_enter_args = regs.to_tuple()
    vcpu.exit_reason = tdx_to_vmx_exit_reason(vcpu)
    return Fastpath.EXIT_HANDLED if RERUNS[kvm.host.kernel.policies["enter"]](regs.rax) else Fastpath.NONE


def take_posted(vcpu: Vcpu) -> tuple[int, ...]:
    """The CPU takes the interrupts out of the vCPU's posted-interrupt descriptor."""
    vectors = vcpu.posted
    if vectors:
        vcpu.posted = ()
    return vectors


def tdx_to_vmx_exit_reason(vcpu: Vcpu) -> int:
    """``tdx_to_vmx_exit_reason``: what the exit would be for an ordinary guest; :data:`NO_EXIT` if there was none."""
    ret = vcpu.vp_enter_ret
    if ret & CODE not in _TELLS_A_REASON:
        return NO_EXIT
    reason = ret & 0xFFFF_FFFF
    if reason == ExitReason.TDCALL:
        if vcpu.vp_enter_args[_R10]:
            return ExitReason.VMCALL_INSTRUCTION
        leaf = vcpu.vp_enter_args[_R11]
        if leaf in _FORWARDED:
            return leaf
        return ExitReason.EPT_MISCONFIGURATION if leaf == ExitReason.EPT_VIOLATION else ExitReason.TDCALL
    return NO_EXIT if reason == ExitReason.EPT_MISCONFIGURATION else reason


def is_sw_error(ret: int) -> bool:
    """Whether the SEAMCALL instruction itself failed."""
    return ret & SW_ERROR == SW_ERROR
