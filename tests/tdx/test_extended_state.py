"""Whether the module can load the guest's extended state again at TDH.VP.ENTER."""

from __future__ import annotations

import dataclasses

import pytest

from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.status import FATAL, Status
from septum.arch.structures import TdAttributes
from septum.tdx.extended_state import XBUFF, XCOMP_BV, XSTATE_BV
from tests.tdx.guests import GuestMachine
from tests.tdx.machines import PARAMS

VMCALL = GuestLeaf.TDG_VP_VMCALL
XMM0 = 1 << 16
LOAD_FAILURE = 4
DEBUG = dataclasses.replace(PARAMS, attributes=TdAttributes.DEBUG)


def header(guest: GuestMachine) -> tuple[int, int]:
    """XSTATE_BV and XCOMP_BV."""
    return guest.vp.fields[XBUFF, XSTATE_BV], guest.vp.fields[XBUFF, XCOMP_BV]


@pytest.mark.parametrize("mask", [0, XMM0, 0xFFFF << 16])
def test_a_guest_may_hand_over_xmm_registers(mask: int) -> None:
    guest = GuestMachine()
    assert header(guest) == (0, 1 << 63)
    guest.tdcall_out(VMCALL, rcx=mask)
    assert header(guest) == (0, 1 << 63 | PARAMS.xfam)
    guest.enter()
    assert guest.module.lps[0].running
    assert header(guest) == (2 if mask else 0, 1 << 63 | PARAMS.xfam)


def test_without_xsaves_the_td_dies_of_it() -> None:
    """As in the recordings, which replaced XSAVES by nothing."""
    guest = GuestMachine()
    guest.module.hardware.inputs.xsaves_writes_header = False
    guest.tdcall_out(VMCALL, rcx=0)
    guest.enter()
    assert guest.module.lps[0].running
    guest.tdcall_out(VMCALL, rcx=XMM0)
    regs = guest.enter(rbx=7)
    assert regs.rax == Status.TDX_NON_RECOVERABLE_TD | FATAL | ExitReason.FAILED_VMENTER_GS
    assert (regs.rcx, regs.rdx, regs.rbx) == (0, LOAD_FAILURE, 0)
    assert not guest.module.lps[0].running
    assert not dict(guest.module.locks)
    assert guest.enter().rax == Status.TDX_TD_FATAL
    assert guest.of_td.tdcs.refcount == (0, 0)


@pytest.mark.parametrize(("element", "value"), [(XCOMP_BV, 0), (XCOMP_BV, 1 << 63 | 1 << 9), (XSTATE_BV, 4), (70, 1)])
def test_a_header_that_the_cpu_would_refuse(element: int, value: int) -> None:
    guest = GuestMachine(DEBUG)
    guest.interrupt()
    guest.vp.fields[XBUFF, element] = value
    regs = guest.enter()
    assert regs.rax == Status.TDX_SUCCESS | ExitReason.FAILED_VMENTER_GS, "a debug TD lives on"
    assert not guest.of_td.tdr.fatal
    guest.vp.fields[XBUFF, element] = 0 if element != XCOMP_BV else 1 << 63
    assert guest.call(HostLeaf.TDH_VP_ENTER, rcx=guest.vps[0]).rax == Status.TDX_SUCCESS
