"""CPUID exits: the virtual values that TDH.MNG.INIT computed, with the parts that change while the guest runs.

Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/td_cpuid.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import vmcs
from septum.arch.cpuid import (
    CPUID_FIRST_EXTENDED_LEAF,
    CPUID_FIRST_RESERVED_LEAF,
    CPUID_LAST_BASE_LEAF,
    CPUID_LAST_RESERVED_LEAF,
    Registers,
    cpuid_table,
    index_of,
)
from septum.arch.exits import ExitReason
from septum.tdx.events import inject_ve, is_in_64bit_mode, privilege_level

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

U32: Final = (1 << 32) - 1
_SUPERVISOR_VE, _USER_VE = 1, 2
"""Bits of CPUID_CONTROL."""
_CR4_OSXSAVE: Final = 1 << 18
_CR4_PKE: Final = 1 << 22
_ECX_OSXSAVE: Final = 1 << 27
_ECX_OSPKE: Final = 1 << 4
_EBX_HLE_RTM: Final = 1 << 4 | 1 << 11
_EDX_SYSCALL: Final = 1 << 11
_TSX_CPUID_CLEAR: Final = 1 << 1
"""Bit of IA32_TSX_CTRL."""


def cpuid(module: Module, td: Td, vp: Vp) -> None:
    """Answers CPUID(EAX, ECX) in EAX to EDX, or injects a #VE: for what is not in the module's table, and for leaves or
    privilege levels for which the guest asked for one."""
    gprs = vp.tdvps.gprs
    leaf, subleaf = _effective_leaf(module, gprs[0] & U32), gprs[1] & U32
    index = index_of(leaf, subleaf)
    if index is None or cpuid_table()[index].faulting or _wants_ve(vp, index):
        inject_ve(vp, ExitReason.CPUID_INSTRUCTION, 0)
        return
    stored = td.tdcs.cpuid_values
    value = _dynamic(module, td, vp, leaf, subleaf, Registers.from_halves(stored[2 * index], stored[2 * index + 1]))
    vp.tdvps.gprs = (value.eax, value.ecx, value.edx, value.ebx, *gprs[4:])


def _effective_leaf(module: Module, leaf: int) -> int:
    """A leaf above the last one of its range counts as the last base leaf."""
    if CPUID_FIRST_RESERVED_LEAF <= leaf <= CPUID_LAST_RESERVED_LEAF:
        return leaf
    last_extended = module.hardware.cpu.cpuid(CPUID_FIRST_EXTENDED_LEAF).eax
    if leaf > last_extended or CPUID_LAST_BASE_LEAF < leaf < CPUID_FIRST_EXTENDED_LEAF:
        return CPUID_LAST_BASE_LEAF
    return leaf


def _wants_ve(vp: Vp, index: int) -> bool:
    """TDG.VP.CPUIDVE.SET for all leaves, CPUID_CONTROL for one."""
    tdvps, control = vp.tdvps, vp.fields["CPUID_CONTROL", index]
    if privilege_level(vp):
        return bool(tdvps.cpuid_user_ve or control & _USER_VE)
    return bool(tdvps.cpuid_supervisor_ve or control & _SUPERVISOR_VE)


def _dynamic(module: Module, td: Td, vp: Vp, leaf: int, subleaf: int, value: Registers) -> Registers:
    """Fills in what depends on the VCPU and its control registers."""
    cr4 = vp.vmcs[vmcs.GUEST_CR4]
    if leaf == 1:
        return value._replace(
            ebx=value.ebx & ~(0xFF << 24) | (vp.tdvps.vcpu_index & 0xFF) << 24,
            ecx=_put(value.ecx, _ECX_OSXSAVE, cr4 & _CR4_OSXSAVE),
        )
    if leaf == 7 and not subleaf:
        clear = td.tdcs.cpuid_flags.tsx and vp.fields["IA32_TSX_CTRL", 0] & _TSX_CPUID_CLEAR
        ebx = value.ebx & ~_EBX_HLE_RTM if clear else value.ebx
        return value._replace(ebx=ebx, ecx=_put(value.ecx, _ECX_OSPKE, cr4 & _CR4_PKE))
    if leaf == 0xD and subleaf <= 1:
        return value._replace(ebx=module.hardware.cpu.cpuid(leaf, subleaf).ebx)
    if leaf == 0x8000_0001:
        return value._replace(edx=_put(value.edx, _EDX_SYSCALL, is_in_64bit_mode(vp)))
    return value


def _put(value: int, bit: int, on: object) -> int:
    return value | bit if on else value & ~bit
