"""Checks on control registers and VM-execution controls that the fields of L1 and L2 VMs have in common.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_vp.c``.
"""

from __future__ import annotations

from collections.abc import Callable

from septum.arch.metadata import Element
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.metadata.scope import Scope
from septum.tdx.outcome import check

#: Checks a new value, the fourth argument, and returns what is to be stored, or None if it has seen to that. The third
#: argument is the mask of bits that the writer has a right to.
Effect = Callable[[Scope, Element, int, int], int | None]

U32 = (1 << 32) - 1
DEBUGCTL_TR, DEBUGCTL_BTS, DEBUGCTL_UNCORE_PMI = 1 << 6, 1 << 7, 1 << 13
IA32_DEBUGCTL = 0x1D9
IA32_VMX_PROCBASED_CTLS2 = 0x48B
IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E
IA32_VMX_PROCBASED_CTLS3 = 0x492


def native(scope: Scope, msr: int) -> int:
    """What the CPU says in a VMX capability MSR."""
    return scope.module.hardware.rdmsr(scope.lp.index, msr)


def allows(capability: int, controls: int, write_mask: int) -> bool:
    """Whether the writable bits of 32 controls are as a capability MSR wants them.

    Bits that are 1 in its low half must be 1, bits that are 0 in its high half must be 0.
    """
    return not write_mask & U32 & (~controls & capability | controls & ~(capability >> 32))


def read_cr(value: int, mask: int, shadow: int) -> int:
    """A control register as its guest sees it: the read shadow in bits that it does not own."""
    return value & ~mask | shadow & mask


def write_cr(old: int, new: int, mask: int, shadow: int) -> int:
    """The value of a control register after its guest writes ``new``.

    :raises Fail: METADATA_FIELD_VALUE_NOT_VALID if that would change, for the guest's eyes, a bit that it does not own.
    """
    check((new ^ shadow) & mask == 0, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return old & mask | new & ~mask


def debugctl(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """Branch trace messages only for debug TDs; bit 13 stays the host's."""
    traces = new & (DEBUGCTL_TR | DEBUGCTL_BTS) == DEBUGCTL_TR
    debug = scope.of_td.tdcs.attributes & TdAttributes.DEBUG
    check(debug or not traces, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return new & ~DEBUGCTL_UNCORE_PMI | native(scope, IA32_DEBUGCTL) & DEBUGCTL_UNCORE_PMI
