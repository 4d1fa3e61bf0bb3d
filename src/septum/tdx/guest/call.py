"""A TDCALL in progress, and the building blocks of guest-side interface functions.

A guest-side function looks like a host-side one: it gets the call, takes locks through ``call.locks``, leaves outputs
in ``call.regs`` (the guest's registers, changed in place) and returns its completion status for the guest's RAX, or
fails with one. Three more endings: :class:`~septum.tdx.vm_exit.TdExit` (the host has to act; RIP stays on the
TDCALL), :class:`~septum.tdx.vm_exit.ResumeGuest` (no status: interrupted, or a #VE was injected) and
:class:`~septum.tdx.vm_exit.TdVmcall`.

Source: TDX Module 1.5.01, ``src/common/helpers/helpers.c``, ``src/td_dispatcher/vm_exits/td_other_exits.c``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from septum.arch import leaves, sept
from septum.arch.exits import ExitReason
from septum.arch.operands import Operand
from septum.arch.pages import is_shared_gpa, is_valid_gpa
from septum.arch.status import Status
from septum.tdx.ept import Walk, translate_private, translate_shared
from septum.tdx.events import inject_ve
from septum.tdx.held import HeldLocks
from septum.tdx.outcome import check
from septum.tdx.vm_exit import ResumeGuest, TdExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.registers import Regs
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

NO_GLA_BITS = ~0x1F80
"""Bits 12:7 of an EPT violation's qualification are not shown to the host."""
DATA_WRITE = 1 << 1


class ExtendedExit(IntEnum):
    """Type (bits 3:0) of the extended exit qualification in RDX of a TD exit."""

    NONE = 0
    ACCEPT = 1
    GPA_DETAILS = 2
    TD_ENTRY_MSR_LOAD_FAILURE = 3
    TD_ENTRY_XSTATE_LOAD_FAILURE = 4
    ATTR_WR = 5
    PENDING_EPT_VIOLATION = 6


class GuestCall:
    """One TDCALL: the VCPU that makes it, its registers, and the locks that the call holds."""

    __slots__ = ("leaf", "locks", "lp", "module", "regs", "td", "version", "vp")

    def __init__(self, module: Module, lp: Lp, td: Td, vp: Vp, regs: Regs) -> None:
        self.module = module
        self.lp = lp
        self.td = td
        self.vp = vp
        self.regs = regs
        self.leaf = regs.rax & leaves.LEAF_MASK
        self.version = regs.rax >> leaves.VERSION_SHIFT & leaves.VERSION_MASK
        self.locks = HeldLocks(guest=True)


def check_guest_gpa(call: GuestCall, gpa: int, operand: Operand, *, private: bool = False) -> None:
    """``check_gpa_validity``: no bit above the GPA width, and SHARED clear if only a private address will do.

    :raises Fail: OPERAND_INVALID.
    """
    check(is_valid_gpa(gpa, call.td.tdcs.gpaw, private=private), Status.TDX_OPERAND_INVALID, operand)


def map_guest_gpa(call: GuestCall, gpa: int, operand: Operand, *, write: bool = False, private: bool = False) -> int:
    """``check_walk_and_map_guest_side_gpa``: the physical address behind a memory operand.

    :raises Fail: OPERAND_INVALID for an address that no access can have.
    :raises TdExit: EPT violation or misconfiguration.
    :raises ResumeGuest: a #VE was injected: a private page is pending, or a shared one is not mapped.
    """
    check_guest_gpa(call, gpa, operand, private=private)
    td = call.td
    rights = sept.R | sept.W if write else sept.R
    shared = is_shared_gpa(gpa, td.tdcs.gpaw)
    if shared:
        found = translate_shared(call.module, td, call.vp, gpa, rights)
    else:
        found = translate_private(call.module, td, gpa, rights)
    if found.walk is Walk.SUCCESS:
        return found.pa
    qualification = rights & ~found.rights | found.rights << 3
    if found.walk is Walk.MISCONFIGURED:
        raise TdExit(Status.TDX_SUCCESS, ExitReason.EPT_MISCONFIGURATION, gpa=gpa & -4096)
    if not shared and sept.is_guest_acceptable(found.entry):
        if pending_exits_to_host(td):
            raise ept_violation(gpa, qualification, ExtendedExit.PENDING_EPT_VIOLATION)
    elif not shared or found.walk is Walk.VIOLATION:
        raise ept_violation(gpa, qualification)
    inject_ve(call.vp, ExitReason.EPT_VIOLATION, qualification, gpa)
    raise ResumeGuest


def pending_exits_to_host(td: Td) -> bool:
    """TD_CTLS.PENDING_VE_DISABLE: an access to a pending page is a TD exit, not a #VE."""
    return bool(td.tdcs.td_ctls & 1)


def ept_violation(gpa: int, qualification: int, extended: int = ExtendedExit.NONE) -> TdExit:
    """``tdx_ept_violation_exit_to_vmm``: what the host is told of an EPT violation."""
    return TdExit(
        Status.TDX_SUCCESS,
        ExitReason.EPT_VIOLATION,
        qualification=qualification & NO_GLA_BITS,
        extended=extended,
        gpa=gpa & -4096,
    )


def entry_violation(gpa: int, wanted_level: int, entry: int, level: int, kind: ExtendedExit) -> TdExit:
    """``async_tdexit_ept_violation``: TDG.MEM.PAGE.ACCEPT or ATTR.WR met an ``entry`` at ``level`` that only the host
    can change; RDX tells which."""
    info = wanted_level | level << 3 | sept.ARCH_STATE[entry & sept.STATE_MASK] << 6 | bool(entry & sept.PS) << 14
    return ept_violation(gpa, DATA_WRITE | (entry & sept.RWX) << 3, kind | info << 32)


__all__ = [
    "ExtendedExit",
    "GuestCall",
    "check_guest_gpa",
    "entry_violation",
    "ept_violation",
    "map_guest_gpa",
    "pending_exits_to_host",
]
