"""TDH.MEM.RD and WR: the debugger's access."""

from __future__ import annotations

from dataclasses import replace

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_2M, Level
from septum.arch.sept import ARCH_STATE, SVE, SeptState
from septum.arch.status import Status, with_operand
from tests.tdx.machines import PARAMS
from tests.tdx.mem_machine import DEBUG, SMALL, MemMachine

H = HostLeaf
RD, WR = H.TDH_MEM_RD, H.TDH_MEM_WR


@pytest.fixture
def machine() -> MemMachine:
    machine = MemMachine(replace(PARAMS, attributes=DEBUG), final=False)
    machine.add_page(machine.tdr, 0, bytes(range(64)))
    machine.finalize()
    return machine


def test_read_and_write(machine: MemMachine) -> None:
    old = int.from_bytes(bytes(range(8, 16)), "little")
    regs = machine.call(RD, rcx=8, rdx=machine.tdr)
    assert (regs.rax, regs.rcx, regs.rdx, regs.r8) == (0, 0, 0, old)
    new = 0xFEDC_BA98_7654_3210
    assert machine.call(WR, rcx=8, rdx=machine.tdr, r8=new).r8 == old
    assert machine.call(RD, rcx=8, rdx=machine.tdr).r8 == new
    assert machine.call(RD, rcx=0, rdx=machine.tdr).r8 == int.from_bytes(bytes(range(8)), "little")


@pytest.mark.parametrize("leaf", [RD, WR])
def test_only_debuggable_tds(leaf: HostLeaf) -> None:
    machine = MemMachine()
    regs = machine.call(leaf, rcx=1, rdx=machine.tdr, r8=5)
    assert (regs.rax, regs.r8) == (Status.TDX_TD_NON_DEBUG, 0)


@pytest.mark.parametrize("leaf", [RD, WR])
def test_bad_addresses(machine: MemMachine, leaf: HostLeaf) -> None:
    for gpa in (4, 1 << 47, 1 << 60):
        regs = machine.call(leaf, rcx=gpa, rdx=machine.tdr)
        assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
        assert (regs.rcx, regs.rdx) == (0, 0)


@pytest.mark.parametrize("leaf", [RD, WR])
def test_pages_that_are_not_accessible(machine: MemMachine, leaf: HostLeaf) -> None:
    machine.aug(SMALL)
    pending = machine.entry(SMALL)[0]
    for gpa, entry, level, state in [
        (SMALL + 8, pending, Level.PT, SeptState.PENDING),
        (SMALL - 8, SVE, Level.PT, SeptState.FREE),
        (PAGE_2M, SVE, Level.PD, SeptState.FREE),
    ]:
        regs = machine.call(leaf, rcx=gpa, rdx=machine.tdr)
        assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_NOT_PRESENT, Operand.RCX)
        assert (regs.rcx, regs.rdx) == (entry, ARCH_STATE[state] << 8 | level)
