"""TDH.MEM.SEPT.ADD, RD and REMOVE, also for the L2 VMs of a partitioned TD."""

from __future__ import annotations

from dataclasses import replace

import pytest

from septum.arch import sept, sept_l2
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_1G, Level
from septum.arch.pamt import PageType
from septum.arch.sept import ARCH_STATE, SeptState
from septum.arch.status import Status, with_details, with_operand
from septum.tdx.call import PAGE_NOT_USED
from septum.tdx.secure_ept import table_entries
from septum.tdx.state.hardware import IA32_INTR_PENDING
from tests.tdx.machines import PARAMS
from tests.tdx.mem_machine import DEBUG, LARGE, SMALL, MemMachine

H = HostLeaf
FREE, NL_MAPPED, NL_BLOCKED = (ARCH_STATE[s] for s in (SeptState.FREE, SeptState.NL_MAPPED, SeptState.NL_BLOCKED))
L2_FREE = 0x40
HOLE = PAGE_1G
"""No table of 2 MiB entries covers this address yet."""


@pytest.fixture
def machine() -> MemMachine:
    return MemMachine()


@pytest.fixture
def partitioned() -> MemMachine:
    """Two L2 VMs; the host may look at all attributes."""
    return MemMachine(replace(PARAMS, attributes=DEBUG, num_l2_vms=2))


def pending_interrupt(machine: MemMachine) -> None:
    machine.module.hardware.msrs[0, IA32_INTR_PENDING] = 1


def test_add_a_table(machine: MemMachine) -> None:
    before = machine.of_td.tdr.chldcnt
    assert machine.entry(LARGE, Level.PD) == (sept.SVE, FREE)
    page = machine.page()
    regs = machine.do(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=page)
    assert (regs.rcx, regs.rdx, regs.r8) == (0, 0, page)
    assert machine.entry(LARGE, Level.PD) == (sept.RWX, NL_MAPPED)
    assert machine.entry(LARGE) == (sept.SVE, FREE)
    assert machine.page_type(page) == PageType.EPT
    assert machine.of_td.tdr.chldcnt == before + 1
    again = machine.mem(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=machine.page())
    assert again.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert (again.rcx, again.rdx) == (sept.RWX, NL_MAPPED << 8 | Level.PD)


def test_a_table_that_is_there_already_can_be_fine(machine: MemMachine) -> None:
    regs = machine.do(H.TDH_MEM_SEPT_ADD, 0, Level.PD, rdx=machine.tdr | 1, r8=0x1234)
    assert regs.r8 == 0x1234
    regs = machine.do(H.TDH_MEM_SEPT_ADD, 0, Level.PD, version=1, rdx=machine.tdr | 1, r8=0x1234, r9=NULL_PA,
                      r10=NULL_PA, r11=NULL_PA)  # fmt: skip
    assert regs.r8 == 0x1234 | PAGE_NOT_USED


def test_tables_of_a_td_before_are_no_tables_of_this_one(machine: MemMachine) -> None:
    table = machine.page()
    machine.do(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=table)
    machine.aug(LARGE)
    for pa in table_entries(table):
        assert machine.module.sept[pa] != 0
    other = MemMachine()
    other.module.sept.store(table, machine.module.sept[table])
    other.do(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=table)
    assert other.state(LARGE) == FREE


@pytest.mark.parametrize(("level", "ok"), [(Level.PT, False), (Level.PD, True), (Level.PML4, True), (5, False)])
def test_levels(machine: MemMachine, level: int, ok: bool) -> None:
    regs = machine.mem(H.TDH_MEM_SEPT_ADD, 1 << 40 if level == Level.PML4 else LARGE, level, r8=machine.page())
    assert regs.rax == (0 if ok else with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX))


def test_five_levels() -> None:
    machine = MemMachine(replace(PARAMS, eptp_controls=0x26, config_flags=1))
    assert machine.state(0, Level.PML5) == NL_MAPPED
    machine.do(H.TDH_MEM_SEPT_ADD, 1 << 48, Level.PML5, r8=machine.page())


def test_walk_ends_early(machine: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_SEPT_ADD, HOLE, Level.PD, r8=machine.page())
    assert regs.rax == with_operand(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (sept.SVE, FREE << 8 | Level.PDPT)


def test_reserved_bits_of_rdx(machine: MemMachine) -> None:
    for bit in (2, 1 << 11, 1 << 52, 1 << 63):
        for leaf in (H.TDH_MEM_SEPT_ADD, H.TDH_MEM_PAGE_DEMOTE):
            regs = machine.mem(leaf, LARGE, Level.PD, rdx=machine.tdr | bit, r8=machine.page())
            assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)


def test_versions(machine: MemMachine) -> None:
    for leaf in (H.TDH_MEM_SEPT_ADD, H.TDH_MEM_SEPT_REMOVE, H.TDH_MEM_PAGE_PROMOTE):
        regs = machine.mem(leaf, LARGE, Level.PD, version=2)
        assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)
    assert machine.mem(H.TDH_MEM_SEPT_RD, 0, version=1).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)


def test_no_l1_page(machine: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=NULL_PA)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R8)
    regs = machine.mem(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, version=1, r8=NULL_PA)
    assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


def test_remove_a_table(machine: MemMachine) -> None:
    before = machine.of_td.tdr.chldcnt
    page = machine.page()
    machine.do(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, r8=page)
    regs = machine.mem(H.TDH_MEM_SEPT_REMOVE, LARGE, Level.PD)
    assert regs.rax == with_operand(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    machine.block(LARGE, Level.PD, track=False)
    regs = machine.mem(H.TDH_MEM_SEPT_REMOVE, LARGE, Level.PD)
    assert regs.rax == with_operand(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    machine.track()
    regs = machine.do(H.TDH_MEM_SEPT_REMOVE, LARGE, Level.PD, version=1)
    assert (regs.rcx, regs.rdx, regs.r9, regs.r10, regs.r11) == (page, 0, NULL_PA, NULL_PA, NULL_PA)
    assert machine.entry(LARGE, Level.PD) == (sept.SVE, FREE)
    assert machine.page_type(page) == PageType.NDA
    assert machine.of_td.tdr.chldcnt == before


def test_a_table_in_use_stays(machine: MemMachine) -> None:
    machine.aug(SMALL)
    machine.block(0, Level.PD)
    regs = machine.mem(H.TDH_MEM_SEPT_REMOVE, 0, Level.PD)
    assert regs.rax == with_operand(Status.TDX_EPT_PAGE_NOT_FREE, Operand.RCX)
    assert regs.rdx == NL_BLOCKED << 8 | Level.PD


def test_rd_of_l2_attributes_only_for_debuggable_tds(machine: MemMachine, partitioned: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_SEPT_RD, 0, rdx=machine.tdr | 1)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
    assert partitioned.do(H.TDH_MEM_SEPT_RD, 0, rdx=partitioned.tdr | 1).r8 == 0


# -- L2 ----------------------------------------------------------------------------------------------------------------


def add_l2(machine: MemMachine, gpa: int, level: Level, *, l1: bool = False) -> tuple[int, int]:
    """Adds tables for both L2 VMs at one place; their addresses."""
    pages = machine.page(), machine.page()
    r8 = machine.page() if l1 else NULL_PA
    regs = machine.do(H.TDH_MEM_SEPT_ADD, gpa, level, version=1, r8=r8, r9=pages[0], r10=pages[1], r11=NULL_PA)
    assert (regs.r8, regs.r9, regs.r10, regs.r11) == (NULL_PA,) * 4
    return pages


def test_tables_for_l2(partitioned: MemMachine) -> None:
    before = partitioned.of_td.tdr.chldcnt
    for level in (Level.PML4, Level.PDPT):
        add_l2(partitioned, 0, level)
    first, second = add_l2(partitioned, LARGE, Level.PD, l1=True)
    assert partitioned.of_td.tdr.chldcnt == before + 2 + 2 + 3
    assert {partitioned.page_type(page) for page in (first, second)} == {PageType.EPT}
    assert partitioned.entry(LARGE, Level.PD) == (sept.RWX, NL_MAPPED)
    attributes = partitioned.do(H.TDH_MEM_SEPT_RD, LARGE, Level.PD, rdx=partitioned.tdr | 1).r8
    assert attributes == 0x800F_800F_0000


def test_blocking_and_removal_reach_l2(partitioned: MemMachine) -> None:
    for level in (Level.PML4, Level.PDPT):
        add_l2(partitioned, 0, level)
    first, second = add_l2(partitioned, LARGE, Level.PD, l1=True)
    entries = [pa for pa, value in partitioned.module.sept_l2.items() if value & sept.HPA_MASK in (first, second)]
    partitioned.block(LARGE, Level.PD)
    states = {sept_l2.state(partitioned.module.sept_l2[pa]) for pa in entries}
    assert states == {sept_l2.L2State.NL_BLOCKED}
    partitioned.do(H.TDH_MEM_RANGE_UNBLOCK, LARGE, Level.PD)
    states = {sept_l2.state(partitioned.module.sept_l2[pa]) for pa in entries}
    assert states == {sept_l2.L2State.NL_MAPPED}
    partitioned.block(LARGE, Level.PD)
    regs = partitioned.do(H.TDH_MEM_SEPT_REMOVE, LARGE, Level.PD, version=1)
    assert (regs.r9, regs.r10, regs.r11) == (first, second, NULL_PA)
    assert not any(partitioned.module.sept_l2[pa] for pa in entries)
    assert {partitioned.page_type(page) for page in (first, second)} == {PageType.NDA}


def test_l2_needs_its_own_upper_tables(partitioned: MemMachine) -> None:
    regs = partitioned.mem(H.TDH_MEM_SEPT_ADD, LARGE, Level.PD, version=1, r8=partitioned.page(),
                           r9=partitioned.page(), r10=NULL_PA, r11=NULL_PA)  # fmt: skip
    assert regs.rax == with_details(Status.TDX_L2_SEPT_WALK_FAILED, Level.PML4, 0, 1, 0)
    assert (regs.rcx, regs.rdx) == (sept.SVE, 1 << 16 | L2_FREE << 8 | Level.PML4)
    assert partitioned.state(LARGE, Level.PD) == FREE


def test_l2_vms_that_do_not_exist(partitioned: MemMachine) -> None:
    regs = partitioned.mem(H.TDH_MEM_SEPT_ADD, 0, Level.PML4, version=1, r8=NULL_PA, r9=NULL_PA, r10=NULL_PA,
                           r11=partitioned.page())  # fmt: skip
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R11)


def test_an_l2_table_that_is_there_already(partitioned: MemMachine) -> None:
    add_l2(partitioned, 0, Level.PML4)
    new = partitioned.page()
    pages = {"r8": NULL_PA, "r9": new, "r10": NULL_PA, "r11": NULL_PA}
    regs = partitioned.mem(H.TDH_MEM_SEPT_ADD, 0, Level.PML4, version=1, **pages)
    assert regs.rax == with_details(Status.TDX_L2_SEPT_ENTRY_NOT_FREE, Level.PML4, 0, 1, 0)
    regs = partitioned.do(H.TDH_MEM_SEPT_ADD, 0, Level.PML4, version=1, rdx=partitioned.tdr | 1, **pages)
    assert regs.r9 == new | PAGE_NOT_USED


def test_an_interrupt_stops_between_two_pages(partitioned: MemMachine) -> None:
    pages = [partitioned.page() for _ in range(2)]
    pending_interrupt(partitioned)
    registers = {"r8": NULL_PA, "r9": pages[0], "r10": pages[1], "r11": NULL_PA}
    regs = partitioned.mem(H.TDH_MEM_SEPT_ADD, 0, Level.PML4, version=1, **registers)
    assert regs.rax == Status.TDX_INTERRUPTED_RESUMABLE
    assert (regs.rcx, regs.rdx) == (Level.PML4, partitioned.tdr)
    assert (regs.r8, regs.r9, regs.r10, regs.r11) == (NULL_PA, NULL_PA, pages[1], NULL_PA)
    registers = {"r8": regs.r8, "r9": regs.r9, "r10": regs.r10, "r11": regs.r11}
    regs = partitioned.do(H.TDH_MEM_SEPT_ADD, 0, Level.PML4, version=1, **registers)
    assert regs.r10 == NULL_PA
    assert {partitioned.page_type(page) for page in pages} == {PageType.EPT}
