"""TDH.MEM.PAGE.ADD, AUG, REMOVE and RELOCATE."""

from __future__ import annotations

import hashlib

import pytest

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_2M, PAGE_4K, Level, page_info
from septum.arch.pamt import PageType
from septum.arch.sept import ARCH_STATE, SeptState
from septum.arch.status import Status, with_operand
from tests.tdx.machines import SOURCE
from tests.tdx.mem_machine import LARGE, SMALL, MemMachine

H = HostLeaf
FREE, MAPPED, PENDING, BLOCKED, PENDING_BLOCKED = (
    ARCH_STATE[s]
    for s in (SeptState.FREE, SeptState.MAPPED, SeptState.PENDING, SeptState.BLOCKED, SeptState.PENDING_BLOCKED)
)
ABOVE = 1 << 47
"""A GPA with the SHARED bit."""


@pytest.fixture
def building() -> MemMachine:
    return MemMachine(final=False)


@pytest.fixture
def machine() -> MemMachine:
    return MemMachine()


def failure(status: Status, operand: Operand) -> int:
    return with_operand(status, operand)


def test_add_copies_the_page_and_measures_its_address(building: MemMachine) -> None:
    before = building.of_td.tdr.chldcnt
    page = building.add_page(building.tdr, SMALL, b"firmware")
    assert building.module.memory.read(page, 16) == b"firmware".ljust(16, b"\0")
    entry, state = building.entry(SMALL)
    assert state == MAPPED
    assert entry & sept.HPA_MASK == page
    assert entry & sept.RWX == sept.RWX
    assert building.page_type(page) == PageType.REG
    assert building.pamt(page).owner == building.tdr
    assert building.of_td.tdr.chldcnt == before + 1
    building.finalize()
    record = b"MEM.PAGE.ADD".ljust(16, b"\0") + SMALL.to_bytes(8, "little")
    assert building.of_td.tdcs.mrtd == hashlib.sha384(record.ljust(128, b"\0")).digest()


def test_add_only_while_the_td_is_built(machine: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_PAGE_ADD, SMALL, r8=machine.page(), r9=SOURCE)
    assert regs.rax == Status.TDX_OP_STATE_INCORRECT


@pytest.mark.parametrize(
    ("rcx", "status"),
    [
        (page_info(SMALL, Level.PD), Status.TDX_OPERAND_INVALID),
        (SMALL | 8, Status.TDX_OPERAND_INVALID),
        (ABOVE, Status.TDX_OPERAND_INVALID),
        (page_info(PAGE_2M), Status.TDX_EPT_WALK_FAILED),
    ],
)
def test_add_bad_gpa(building: MemMachine, rcx: int, status: Status) -> None:
    regs = building.call(H.TDH_MEM_PAGE_ADD, rcx=rcx, rdx=building.tdr, r8=building.page(), r9=SOURCE)
    assert regs.rax == failure(status, Operand.RCX)
    walked = status == Status.TDX_EPT_WALK_FAILED
    assert (regs.rcx, regs.rdx) == ((sept.SVE, Level.PD) if walked else (0, 0))


def test_add_checks_the_source_before_the_page(building: MemMachine) -> None:
    private_source = building.page() | building.platform.private_hkids.start << building.platform.pa_format.hkid_shift
    for source in (SOURCE + 8, private_source):
        regs = building.mem(H.TDH_MEM_PAGE_ADD, SMALL, r8=building.tdr, r9=source)
        assert regs.rax == failure(Status.TDX_OPERAND_INVALID, Operand.R9)
    regs = building.mem(H.TDH_MEM_PAGE_ADD, SMALL, r8=building.tdr, r9=SOURCE)
    assert regs.rax == failure(Status.TDX_OPERAND_BUSY, Operand.R8)
    regs = building.mem(H.TDH_MEM_PAGE_ADD, SMALL, r8=building.tdvpr, r9=SOURCE)
    assert regs.rax == failure(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)


@pytest.mark.parametrize(("gpa", "level"), [(SMALL, Level.PT), (LARGE, Level.PD)])
def test_aug_maps_pending(machine: MemMachine, gpa: int, level: Level) -> None:
    before = machine.of_td.tdr.chldcnt
    page = machine.aug(gpa, level)
    entry, state = machine.entry(gpa, level)
    assert state == PENDING
    assert entry & sept.RWX == 0
    assert entry & sept.HPA_MASK == page
    assert machine.page_type(page, level) == PageType.REG
    assert machine.of_td.tdr.chldcnt - before == 1 << 9 * level
    again = machine.mem(H.TDH_MEM_PAGE_AUG, gpa, level, r8=machine.huge_page())
    assert again.rax == failure(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert (again.rcx, again.rdx) == (entry, state << 8 | level)


def test_aug_needs_a_free_page(machine: MemMachine) -> None:
    used = machine.aug(SMALL)
    for page, status in [
        (used, Status.TDX_PAGE_METADATA_INCORRECT),
        (used + 8, Status.TDX_OPERAND_INVALID),
        (machine.platform.tdmrs[-1].end, Status.TDX_OPERAND_ADDR_RANGE_ERROR),
        (machine.tdr, Status.TDX_OPERAND_BUSY),
    ]:
        regs = machine.mem(H.TDH_MEM_PAGE_AUG, SMALL + PAGE_4K, r8=page)
        assert regs.rax == failure(status, Operand.R8)
    assert machine.state(SMALL + PAGE_4K) == FREE


def test_a_large_page_must_be_free_in_all_its_parts(machine: MemMachine) -> None:
    page = machine.huge_page()
    machine.do(H.TDH_MEM_PAGE_AUG, SMALL, r8=page + 0x7000)
    regs = machine.mem(H.TDH_MEM_PAGE_AUG, LARGE, Level.PD, r8=page)
    assert regs.rax == failure(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)
    machine.block(SMALL)
    machine.do(H.TDH_MEM_PAGE_REMOVE, SMALL)
    machine.do(H.TDH_MEM_PAGE_AUG, LARGE, Level.PD, r8=page)
    regs = machine.mem(H.TDH_MEM_PAGE_AUG, SMALL, r8=page + 0x7000)
    assert regs.rax == failure(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)


def test_no_gigabyte_pages(machine: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_PAGE_AUG, 0, Level.PDPT, r8=machine.huge_page())
    assert regs.rax == failure(Status.TDX_OPERAND_INVALID, Operand.RCX)


@pytest.mark.parametrize(("gpa", "level"), [(SMALL, Level.PT), (LARGE, Level.PD)])
def test_remove_gives_the_page_back(machine: MemMachine, gpa: int, level: Level) -> None:
    before = machine.of_td.tdr.chldcnt
    page = machine.aug(gpa, level)
    machine.block(gpa, level)
    regs = machine.do(H.TDH_MEM_PAGE_REMOVE, gpa, level)
    assert (regs.rcx, regs.rdx) == (page, 0)
    assert machine.state(gpa, level) == FREE
    assert machine.page_type(page, level) == PageType.NDA
    assert machine.pamt(page, level).owner == machine.tdr
    assert machine.of_td.tdr.chldcnt == before
    machine.do(H.TDH_MEM_PAGE_AUG, gpa, level, r8=page)


def test_remove_before_the_td_runs_needs_no_blocking(building: MemMachine) -> None:
    page = building.add_page(building.tdr, SMALL)
    assert building.do(H.TDH_MEM_PAGE_REMOVE, SMALL).rcx == page


def test_remove_wants_blocking_and_tracking(machine: MemMachine) -> None:
    machine.aug(SMALL)
    entry = machine.entry(SMALL)[0]
    regs = machine.mem(H.TDH_MEM_PAGE_REMOVE, SMALL)
    assert regs.rax == failure(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (entry, PENDING << 8)
    machine.block(SMALL, track=False)
    regs = machine.mem(H.TDH_MEM_PAGE_REMOVE, SMALL)
    assert regs.rax == failure(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (0, 0)
    machine.track()
    machine.do(H.TDH_MEM_PAGE_REMOVE, SMALL)


def test_remove_of_nothing(machine: MemMachine) -> None:
    regs = machine.mem(H.TDH_MEM_PAGE_REMOVE, SMALL)
    assert regs.rax == failure(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert (regs.rcx, regs.rdx) == (sept.SVE, FREE)


def test_removal_during_an_import_leaves_the_epoch(machine: MemMachine) -> None:
    page = machine.aug(SMALL)
    tdcs = machine.of_td.tdcs
    tdcs.op_state, tdcs.mig_epoch = OpState.POST_IMPORT, 7
    machine.do(H.TDH_MEM_PAGE_REMOVE, SMALL)
    entry = next(value for value in machine.module.sept.values() if value & sept.STATE_MASK == SeptState.REMOVED)
    assert entry == sept.removed_entry(7)
    tdcs.op_state = OpState.RUNNABLE
    machine.do(H.TDH_MEM_PAGE_AUG, SMALL, r8=page)


def test_relocate_moves_content_and_unblocks(building: MemMachine) -> None:
    old = building.add_page(building.tdr, SMALL, b"content")
    building.finalize()
    building.block(SMALL)
    new = building.page()
    regs = building.do(H.TDH_MEM_PAGE_RELOCATE, SMALL, r8=new)
    assert regs.rcx == old
    entry, state = building.entry(SMALL)
    assert state == MAPPED
    assert entry & sept.HPA_MASK == new
    assert entry & sept.RWX == sept.RWX
    assert building.module.memory.read(new, 7) == b"content"
    assert (building.page_type(old), building.page_type(new)) == (PageType.NDA, PageType.REG)
    assert building.pamt(new).bepoch == 0


def test_relocate_of_a_pending_page_copies_nothing(machine: MemMachine) -> None:
    old = machine.aug(SMALL)
    machine.module.memory.write(old, b"left by someone")
    machine.block(SMALL)
    new = machine.page()
    machine.do(H.TDH_MEM_PAGE_RELOCATE, SMALL, r8=new)
    assert machine.state(SMALL) == PENDING
    assert machine.module.memory.read(new, 4) == bytes(4)


def test_relocate_to_itself_is_told_before_anything_else(machine: MemMachine) -> None:
    page = machine.aug(SMALL)
    regs = machine.mem(H.TDH_MEM_PAGE_RELOCATE, SMALL, r8=page)
    assert regs.rax == failure(Status.TDX_OPERAND_INVALID, Operand.R8)
    regs = machine.mem(H.TDH_MEM_PAGE_RELOCATE, SMALL, r8=machine.page())
    assert regs.rax == failure(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    machine.block(SMALL)
    other = machine.aug(SMALL + PAGE_4K)
    regs = machine.mem(H.TDH_MEM_PAGE_RELOCATE, SMALL, r8=other)
    assert regs.rax == failure(Status.TDX_PAGE_METADATA_INCORRECT, Operand.R8)
    assert machine.state(SMALL) == PENDING_BLOCKED


def test_the_tdr_is_checked_first(machine: MemMachine) -> None:
    for rdx, status in [
        (machine.tdr + 8, Status.TDX_OPERAND_INVALID),
        (machine.tdvpr, Status.TDX_PAGE_METADATA_INCORRECT),
        (machine.platform.tdmrs[-1].end, Status.TDX_OPERAND_ADDR_RANGE_ERROR),
    ]:
        for leaf in (H.TDH_MEM_PAGE_ADD, H.TDH_MEM_PAGE_AUG, H.TDH_MEM_PAGE_REMOVE, H.TDH_MEM_PAGE_RELOCATE):
            regs = machine.call(leaf, rcx=7, rdx=rdx)
            assert regs.rax == failure(status, Operand.RDX)
            assert (regs.rcx, regs.rdx) == (0, 0)


def test_no_call_leaves_a_lock(machine: MemMachine) -> None:
    for leaf in (H.TDH_MEM_PAGE_AUG, H.TDH_MEM_PAGE_REMOVE, H.TDH_MEM_PAGE_RELOCATE, H.TDH_MEM_PAGE_DEMOTE):
        for gpa in (0, SMALL, LARGE, 1 << 30, ABOVE):
            for level in (Level.PT, Level.PD, Level.PDPT):
                machine.mem(leaf, gpa, level, r8=machine.page())
    assert not machine.module.locks
    assert not any(sept.is_locked(value) for value in machine.module.sept.values())
