"""TDH.MEM.PAGE.DEMOTE and PROMOTE: splitting and joining mappings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch import sept
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_4K, Level
from septum.arch.pamt import PageType
from septum.arch.sept import ARCH_STATE, SeptState
from septum.arch.status import Status, with_operand
from septum.tdx.state.hardware import IA32_INTR_PENDING
from tests.tdx.machines import PARAMS
from tests.tdx.mem_machine import LARGE, SMALL, MemMachine

H = HostLeaf
MAPPED, PENDING, NL_MAPPED, FREE = (
    ARCH_STATE[s] for s in (SeptState.MAPPED, SeptState.PENDING, SeptState.NL_MAPPED, SeptState.FREE)
)


@pytest.fixture
def machine() -> MemMachine:
    return MemMachine()


def demoted(machine: MemMachine) -> tuple[int, int]:
    """A large page, blocked and split: the page, and the table."""
    page, table = machine.aug(LARGE, Level.PD), machine.page()
    machine.block(LARGE, Level.PD)
    machine.do(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=table)
    return page, table


def test_demote(machine: MemMachine) -> None:
    before = machine.of_td.tdr.chldcnt
    page, table = demoted(machine)
    assert machine.of_td.tdr.chldcnt == before + 512 + 1
    assert machine.entry(LARGE, Level.PD) == (sept.RWX, NL_MAPPED)
    assert machine.page_type(page, Level.PD) == PageType.NDA
    assert machine.page_type(table) == PageType.EPT
    for i in (0, 1, 255, 511):
        small = page + i * PAGE_4K
        entry, state = machine.entry(LARGE + i * PAGE_4K)
        assert (entry & sept.HPA_MASK, state) == (small, PENDING)
        assert machine.pamt(small) == (PageType.REG, machine.tdr, 0)


def test_demote_wants_blocking_and_tracking(machine: MemMachine) -> None:
    machine.aug(LARGE, Level.PD)
    before = machine.entry(LARGE, Level.PD)
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.page())
    assert regs.rax == with_operand(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (before[0], before[1] << 8 | Level.PD)
    machine.block(LARGE, Level.PD, track=False)
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.page())
    assert regs.rax == with_operand(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    machine.track()
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.tdvpr)
    assert regs.rax == with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)


def test_demote_of_small_pages_and_of_tables(machine: MemMachine) -> None:
    machine.aug(SMALL)
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, SMALL, Level.PT, r8=machine.page())
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, 0, Level.PD, r8=machine.page())
    assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


def test_promote_undoes_demote(machine: MemMachine) -> None:
    page, table = demoted(machine)
    before = machine.of_td.tdr.chldcnt
    whole = sept.leaf_entry(page, SeptState.PENDING)
    machine.block(LARGE, Level.PD)
    regs = machine.do(H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD, version=1)
    assert (regs.rcx, regs.rdx, regs.r9, regs.r10, regs.r11) == (table, 0, NULL_PA, NULL_PA, NULL_PA)
    assert machine.entry(LARGE, Level.PD) == (sept.arch_entry(whole), PENDING)
    assert machine.of_td.tdr.chldcnt == before - 1
    assert machine.page_type(page, Level.PD) == PageType.REG
    assert machine.page_type(page) == machine.page_type(table) == PageType.NDA
    machine.do(H.TDH_MEM_SEPT_ADD, 0x40_0000, Level.PD, r8=table)
    assert machine.state(0x40_0000) == FREE


def spoil_address(machine: MemMachine) -> None:
    machine.block(LARGE + 5 * PAGE_4K)
    machine.do(H.TDH_MEM_PAGE_RELOCATE, LARGE + 5 * PAGE_4K, r8=machine.page())


def spoil_state(machine: MemMachine) -> None:
    machine.block(LARGE + 511 * PAGE_4K)


def spoil_hole(machine: MemMachine) -> None:
    machine.block(LARGE)
    machine.do(H.TDH_MEM_PAGE_REMOVE, LARGE)


@pytest.mark.parametrize("spoil", [spoil_address, spoil_state, spoil_hole])
def test_pages_that_cannot_be_joined(machine: MemMachine, spoil: Callable[[MemMachine], None]) -> None:
    demoted(machine)
    spoil(machine)
    entries = dict(machine.module.sept)
    machine.block(LARGE, Level.PD)
    regs = machine.mem(H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD)
    assert regs.rax == with_operand(Status.TDX_EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX)
    assert regs.rdx >> 8 == ARCH_STATE[SeptState.NL_BLOCKED]
    machine.do(H.TDH_MEM_RANGE_UNBLOCK, LARGE, Level.PD)
    assert dict(machine.module.sept) == entries


def test_promote_of_what_is_no_table(machine: MemMachine) -> None:
    machine.aug(LARGE, Level.PD)
    regs = machine.mem(H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD)
    assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


@pytest.mark.parametrize("leaf", [H.TDH_MEM_PAGE_DEMOTE, H.TDH_MEM_PAGE_PROMOTE])
def test_an_interrupt_has_the_call_made_again(machine: MemMachine, leaf: HostLeaf) -> None:
    machine.aug(LARGE, Level.PD)
    registers = {"r8": machine.page()}
    machine.block(LARGE, Level.PD)
    if leaf == H.TDH_MEM_PAGE_PROMOTE:
        machine.do(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, **registers)
        machine.block(LARGE, Level.PD)
    entry = machine.entry(LARGE, Level.PD)
    machine.module.hardware.msrs[0, IA32_INTR_PENDING] = 1
    regs = machine.mem(leaf, LARGE, Level.PD, **registers)
    assert regs.rax == Status.TDX_INTERRUPTED_RESTARTABLE
    assert (regs.rcx, regs.rdx) == (LARGE | Level.PD, machine.tdr)
    assert machine.entry(LARGE, Level.PD) == entry
    machine.module.hardware.msrs.pop((0, IA32_INTR_PENDING))
    machine.do(leaf, LARGE, Level.PD, **registers)


@settings(max_examples=20)
@given(content=st.binary(min_size=1, max_size=64), place=st.integers(0, 511), rounds=st.integers(1, 3))
def test_contents_stay_in_place(content: bytes, place: int, rounds: int) -> None:
    machine = MemMachine()
    page = machine.aug(LARGE, Level.PD)
    machine.run()
    machine.module.memory.write(page + place * PAGE_4K, b"from before")
    assert machine.guest(GuestLeaf.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD).rax == 0
    machine.leave()
    machine.module.memory.write(page + place * PAGE_4K, content)
    for _ in range(rounds):
        machine.block(LARGE, Level.PD)
        machine.do(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.page())
        entry, state = machine.entry(LARGE + place * PAGE_4K)
        assert (entry & sept.HPA_MASK, state) == (page + place * PAGE_4K, MAPPED)
        machine.block(LARGE, Level.PD)
        machine.do(H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD)
    assert machine.entry(LARGE, Level.PD)[1] == MAPPED
    assert machine.module.memory.read(page + place * PAGE_4K, len(content)) == content


def test_l2_vms_need_a_page_only_with_an_alias() -> None:
    machine = MemMachine(replace(PARAMS, num_l2_vms=1))
    for level in (Level.PML4, Level.PDPT):
        machine.do(H.TDH_MEM_SEPT_ADD, 0, level, version=1, r8=NULL_PA, r9=machine.page(), r10=NULL_PA, r11=NULL_PA)
    page = machine.aug(LARGE, Level.PD)
    machine.run()
    assert machine.guest(GuestLeaf.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD).rax == 0
    assert machine.guest(GuestLeaf.TDG_MEM_PAGE_ATTR_WR, LARGE | Level.PD, 0x8003_0000, 0xFFFF_0000).rax == 0
    machine.leave()
    machine.block(LARGE, Level.PD)
    regs = machine.mem(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, r8=machine.page(), r9=NULL_PA)
    assert regs.rax == with_operand(Status.TDX_L2_SEPT_PAGE_NOT_PROVIDED, Operand.R9)
    table, l2_table = machine.page(), machine.page()
    machine.do(H.TDH_MEM_PAGE_DEMOTE, LARGE, Level.PD, rdx=machine.tdr | 1, r8=table, r9=l2_table)
    assert machine.page_type(l2_table) == PageType.EPT
    l2_entry = machine.module.sept_l2[l2_table + 8 * 7]
    assert l2_entry & sept.HPA_MASK == page + 7 * PAGE_4K
    assert l2_entry & sept.RWX == sept.R | sept.W
    machine.block(LARGE, Level.PD)
    regs = machine.do(H.TDH_MEM_PAGE_PROMOTE, LARGE, Level.PD, version=1)
    assert (regs.rcx, regs.r9) == (table, l2_table)
    assert machine.page_type(l2_table) == PageType.NDA
