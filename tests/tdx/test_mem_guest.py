"""TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import sept, sept_l2
from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import NULL_PA, PAGE_1G, PAGE_2M, PAGE_4K, Level
from septum.arch.sept import ARCH_STATE, SeptState
from septum.arch.status import Status, with_details, with_operand
from septum.tdx import sept_l2 as l2
from septum.tdx.state.hardware import IA32_INTR_PENDING
from tests.tdx.machines import PARAMS
from tests.tdx.mem_machine import DEBUG, LARGE, SMALL, MemMachine

G, H = GuestLeaf, HostLeaf
MAPPED, PENDING, FREE, PENDING_BLOCKED = (
    ARCH_STATE[s] for s in (SeptState.MAPPED, SeptState.PENDING, SeptState.FREE, SeptState.PENDING_BLOCKED)
)
PENDING_FLAG = 1 << 62
WRITE = 1 << 1
"""In the qualification of an EPT violation: a write was tried."""
ACCEPT, ATTR_WR = 1, 5
"""Types of extended exit qualification."""


@pytest.fixture
def machine() -> MemMachine:
    machine = MemMachine()
    machine.aug(SMALL)
    machine.aug(LARGE, Level.PD)
    machine.run()
    return machine


def interrupt(machine: MemMachine, *, pending: bool) -> None:
    machine.module.hardware.msrs.store((0, IA32_INTR_PENDING), 1 if pending else None)


def test_accept_zeroes_the_page(machine: MemMachine) -> None:
    page = machine.entry(SMALL)[0] & sept.HPA_MASK
    machine.module.memory.write(page + 100, b"left by the host")
    regs = machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL)
    assert (regs.rax, regs.rcx) == (0, SMALL)
    assert machine.module.memory.page(page) == bytes(PAGE_4K)
    entry, state = machine.entry(SMALL)
    assert state == MAPPED
    assert entry == sept.arch_entry(sept.leaf_entry(page, SeptState.MAPPED, sept.RWX))
    again = machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL)
    assert again.rax == with_details(Status.TDX_PAGE_ALREADY_ACCEPTED, Level.PT)


def test_accept_takes_no_room(machine: MemMachine) -> None:
    pages = len(machine.module.memory.pages)
    machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD)
    assert len(machine.module.memory.pages) <= pages


@pytest.mark.parametrize(
    ("rcx", "level"), [(SMALL | Level.PD, None), (SMALL & ~0xFFFF | Level.PD, Level.PD), (LARGE, Level.PD)]
)
def test_accept_in_the_wrong_size(machine: MemMachine, rcx: int, level: Level | None) -> None:
    if rcx == LARGE:
        regs = machine.guest_exit(G.TDG_MEM_PAGE_ACCEPT, rcx)
        assert regs is not None
        wanted = Level.PT | Level.PD << 3 | PENDING << 6 | 1 << 14
        assert (regs.rax, regs.rcx, regs.rdx) == (ExitReason.EPT_VIOLATION, WRITE, wanted << 32 | ACCEPT)
        assert regs.r8 == LARGE
        return
    regs = machine.guest(G.TDG_MEM_PAGE_ACCEPT, rcx)
    if level is None:
        assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    else:
        assert regs.rax == with_details(Status.TDX_PAGE_SIZE_MISMATCH, level)


def test_accept_of_a_part_of_an_accepted_page(machine: MemMachine) -> None:
    machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD)
    regs = machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE + SMALL)
    assert regs.rax == with_details(Status.TDX_PAGE_ALREADY_ACCEPTED, Level.PD)


@pytest.mark.parametrize("gpa", [1 << 47, 1 << 52, SMALL | 8, SMALL | Level.PDPT])
def test_accept_of_bad_addresses(machine: MemMachine, gpa: int) -> None:
    regs = machine.guest(G.TDG_MEM_PAGE_ACCEPT, gpa)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)


@pytest.mark.parametrize(
    ("gpa", "level", "state"), [(0, Level.PT, FREE), (PAGE_2M * 2, Level.PD, FREE), (PAGE_1G, Level.PDPT, FREE)]
)
def test_accept_of_nothing_is_for_the_host(machine: MemMachine, gpa: int, level: Level, state: int) -> None:
    regs = machine.guest_exit(G.TDG_MEM_PAGE_ACCEPT, gpa)
    assert regs is not None
    info = level << 3 | state << 6
    assert (regs.rax, regs.rcx, regs.rdx, regs.r8) == (ExitReason.EPT_VIOLATION, WRITE, info << 32 | ACCEPT, gpa)
    assert not any(sept.is_locked(value) for value in machine.module.sept.values())


def test_accept_of_a_blocked_page_is_for_the_host(machine: MemMachine) -> None:
    machine.block(SMALL, track=False)
    regs = machine.guest_exit(G.TDG_MEM_PAGE_ACCEPT, SMALL)
    assert regs is not None
    assert regs.rdx == (PENDING_BLOCKED << 6 | 1 << 14) << 32 | ACCEPT


@given(done=st.integers(1, 30))
def test_a_large_accept_goes_on_where_it_was_interrupted(done: int) -> None:
    machine = MemMachine()
    page = machine.aug(LARGE, Level.PD)
    for chunk in range(512):
        machine.module.memory.write(page + chunk * PAGE_4K, b"old")
    machine.run()
    interrupt(machine, pending=True)
    for _ in range(done):
        regs = machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD)
        assert regs.rax == G.TDG_MEM_PAGE_ACCEPT
    assert machine.state(LARGE, Level.PD) == PENDING
    left = [machine.module.memory.read(page + chunk * PAGE_4K, 3) == b"old" for chunk in range(512)]
    assert left == [False] * done + [True] * (512 - done)
    interrupt(machine, pending=False)
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD).rax == 0
    assert machine.entry(LARGE, Level.PD)[0] & sept.HPA_MASK == page
    assert not any(machine.module.memory.read(page + chunk * PAGE_4K, 3).strip(b"\0") for chunk in range(512))


def test_blocking_forgets_how_far_an_accept_was(machine: MemMachine) -> None:
    page = machine.entry(LARGE, Level.PD)[0] & sept.HPA_MASK
    interrupt(machine, pending=True)
    machine.guest(G.TDG_MEM_PAGE_ACCEPT, LARGE | Level.PD)
    interrupt(machine, pending=False)
    assert machine.entry(LARGE, Level.PD)[0] & sept.ACCEPT_COUNTER_MASK
    machine.block(LARGE, Level.PD, track=False)
    assert machine.entry(LARGE, Level.PD)[0] & sept.HPA_MASK == page


# -- attributes --------------------------------------------------------------------------------------------------------

RW, ALL = l2.VALID | l2.R | l2.W, 0xFFFF


@pytest.fixture
def partitioned() -> MemMachine:
    """A TD with two L2 VMs that have tables for the first 2 MiB; its VCPU runs, one page is accepted, one pending."""
    machine = MemMachine(replace(PARAMS, attributes=DEBUG, num_l2_vms=2))
    for level in (Level.PML4, Level.PDPT, Level.PD):
        pages = {"r8": NULL_PA, "r9": machine.page(), "r10": machine.page(), "r11": NULL_PA}
        machine.do(H.TDH_MEM_SEPT_ADD, 0, level, version=1, **pages)
    machine.aug(SMALL)
    machine.aug(0)
    machine.aug(LARGE, Level.PD)
    machine.run()
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, 0).rax == 0
    return machine


def seen_by_host(machine: MemMachine, gpa: int) -> int:
    return machine.do(H.TDH_MEM_SEPT_RD, gpa, rdx=machine.tdr | 1).r8


def test_attr_rd(machine: MemMachine) -> None:
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_RD, SMALL + 0x123)
    assert (regs.rax, regs.rcx, regs.rdx) == (0, SMALL | PENDING_FLAG, 0)
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_RD, LARGE + SMALL)
    assert regs.rcx == LARGE | Level.PD | PENDING_FLAG
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_RD, 1 << 47, rdx=5)
    assert (regs.rax, regs.rcx, regs.rdx) == (with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX), 0, 0)
    left = machine.guest_exit(G.TDG_MEM_PAGE_ATTR_RD, 0x1234)
    assert left is not None
    assert (left.rax, left.rcx, left.rdx, left.r8) == (ExitReason.EPT_VIOLATION, 0, 0, 0x1000)


@pytest.mark.parametrize(("gpa", "flag"), [(0, 0), (SMALL, PENDING_FLAG)])
def test_an_alias_comes_changes_and_goes(partitioned: MemMachine, gpa: int, flag: int) -> None:
    machine = partitioned
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, gpa, RW << 16 | (RW | l2.XS) << 32, ALL << 16 | ALL << 32)
    assert (regs.rax, regs.rcx, regs.rdx) == (0, gpa | flag, RW << 16 | (RW | l2.XS) << 32)
    assert seen_by_host(machine, gpa) == regs.rdx
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, gpa, l2.VALID << 16 | l2.VALID << 32, l2.W << 16)
    assert regs.rdx == (RW & ~l2.W) << 16 | (RW | l2.XS) << 32
    assert machine.guest(G.TDG_MEM_PAGE_ATTR_RD, gpa).rdx == regs.rdx
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, gpa, l2.VALID << 32, ALL << 32)
    assert regs.rdx == l2.VALID << 32
    assert machine.guest(G.TDG_MEM_PAGE_ATTR_RD, gpa).rdx == (RW & ~l2.W) << 16


def test_accept_unblocks_the_alias(partitioned: MemMachine) -> None:
    machine = partitioned
    machine.guest(G.TDG_MEM_PAGE_ATTR_WR, SMALL, RW << 16, ALL << 16)
    page = machine.entry(SMALL)[0] & sept.HPA_MASK
    (pa,) = [pa for pa, value in machine.module.sept_l2.items() if value & sept.HPA_MASK == page]
    assert sept_l2.state(machine.module.sept_l2[pa]) == sept_l2.L2State.BLOCKED
    assert machine.guest(G.TDG_MEM_PAGE_ACCEPT, SMALL).rax == 0
    assert machine.module.sept_l2[pa] & sept.RWX == sept.R | sept.W
    assert seen_by_host(machine, SMALL) == RW << 16


def test_removal_takes_the_alias_away_and_relocation_moves_it(partitioned: MemMachine) -> None:
    machine = partitioned
    machine.guest(G.TDG_MEM_PAGE_ATTR_WR, 0, RW << 16, ALL << 16)
    machine.leave()
    machine.block(0)
    assert seen_by_host(machine, 0) == RW << 16
    new = machine.page()
    machine.do(H.TDH_MEM_PAGE_RELOCATE, 0, r8=new)
    (pa,) = [pa for pa, value in machine.module.sept_l2.items() if value & sept.HPA_MASK == new]
    assert machine.module.sept_l2[pa] & sept.RWX == sept.R | sept.W
    machine.block(0)
    machine.do(H.TDH_MEM_PAGE_REMOVE, 0)
    assert not machine.module.sept_l2[pa]


@pytest.mark.parametrize(
    ("rdx", "r8", "operand"),
    [
        (RW, 0, Operand.RDX),
        (RW << 48, 0, Operand.RDX),
        (l2.R << 16, 0, Operand.RDX),
        (0, 1, Operand.R8),
        (0, ALL << 48, Operand.R8),
    ],
)
def test_attributes_for_the_wrong_vm(partitioned: MemMachine, rdx: int, r8: int, operand: Operand) -> None:
    regs = partitioned.guest(G.TDG_MEM_PAGE_ATTR_WR, 0, rdx, r8)
    assert (regs.rax, regs.rcx, regs.rdx) == (with_operand(Status.TDX_OPERAND_INVALID, operand), 0, 0)


@pytest.mark.parametrize("bad", [l2.VALID | l2.W, l2.VALID | l2.R | l2.SVE, RW | 1 << 8, l2.VALID | l2.XS | l2.PWA])
def test_illegal_attributes_change_nothing(partitioned: MemMachine, bad: int) -> None:
    machine = partitioned
    machine.guest(G.TDG_MEM_PAGE_ATTR_WR, 0, RW << 16, ALL << 16)
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, 0, bad << 16 | RW << 32, ALL << 16 | ALL << 32)
    assert (regs.rax, regs.rcx, regs.rdx) == (Status.TDX_PAGE_ATTR_INVALID, 0, RW << 16 | RW << 32)
    assert seen_by_host(machine, 0) == RW << 16


def test_an_alias_where_l2_has_no_tables(partitioned: MemMachine) -> None:
    machine = partitioned
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, LARGE | Level.PD, RW << 32, ALL << 32)
    assert (regs.rax, regs.rdx) == (0, RW << 32)
    machine.leave()
    machine.add_tables(machine.tdr, 1 << 39)
    machine.aug(1 << 39)
    machine.run()
    regs = machine.guest(G.TDG_MEM_PAGE_ATTR_WR, 1 << 39, RW << 16, ALL << 16)
    assert regs.rax == with_details(Status.TDX_L2_SEPT_WALK_FAILED, Level.PML4, 0, 1, 0)
    machine.of_td.tdcs.vm_ctls = (0, 1, 0, 0)
    left = machine.guest_exit(G.TDG_MEM_PAGE_ATTR_WR, 1 << 39, RW << 16, ALL << 16)
    assert left is not None
    assert left.rdx == (Level.PML4 << 3 | 1 << 20) << 32 | 2
    assert left.r8 == 1 << 39


def test_attr_wr_of_nothing_is_for_the_host(machine: MemMachine) -> None:
    left = machine.guest_exit(G.TDG_MEM_PAGE_ATTR_WR, 0)
    assert left is not None
    assert (left.rcx, left.rdx) == (WRITE, FREE << 38 | ATTR_WR)


@given(st.integers(0, 0x7F))
def test_attributes_survive_a_round_trip_through_an_entry(bits: int) -> None:
    attributes = bits | l2.VALID
    for blocked in (False, True):
        entry = l2.new_leaf(0x1234000, attributes, blocked=blocked)
        assert l2.attributes_of(entry, blocked_for_writing=False) == attributes
        assert entry & sept.HPA_MASK == 0x1234000
        changed = l2.with_attributes(entry, l2.VALID | l2.R)
        assert l2.attributes_of(changed, blocked_for_writing=False) == l2.VALID | l2.R
        assert (sept_l2.state(changed) == sept_l2.L2State.BLOCKED) == blocked
