"""Whether a vCPU has something to take notice of.

Source: Linux 6.16, ``arch/x86/kvm/x86.c``, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.exits import ExitReason
from septum.kvm.vcpu import MpState
from septum.tdx.registers import GPR_NAMES

if TYPE_CHECKING:
    from septum.kvm.vcpu import Vcpu

_R12 = GPR_NAMES.index("r12")


def tdx_interrupt_allowed(vcpu: Vcpu) -> bool:
    """``tdx_interrupt_allowed``: always, as far as KVM knows, unless the guest halted with interrupts blocked."""
    return vcpu.exit_reason != ExitReason.HLT_INSTRUCTION or not vcpu.vp_enter_args[_R12]


def kvm_vcpu_has_events(vcpu: Vcpu) -> bool:
    """``kvm_vcpu_has_events``: interrupts in the posted-interrupt descriptor, if the guest would take them.

    The kernel also asks the module for those that the CPU has taken from there and the guest has not: the modelled CPU
    takes none before the guest does.
    """
    return bool(vcpu.posted) and tdx_interrupt_allowed(vcpu)


def kvm_arch_vcpu_runnable(vcpu: Vcpu) -> bool:
    """``kvm_arch_vcpu_runnable``."""
    return vcpu.mp_state == MpState.RUNNABLE or kvm_vcpu_has_events(vcpu)
