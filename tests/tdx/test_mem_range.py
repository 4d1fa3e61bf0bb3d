"""TDH.MEM.RANGE.BLOCK, UNBLOCK and TDH.MEM.TRACK: when a translation is out of all TLBs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch import sept
from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, Level
from septum.arch.sept import ARCH_STATE, SeptState
from septum.arch.status import Status, with_operand
from septum.tdx.secure_ept import is_tlb_tracked
from tests.tdx.guests import GuestMachine
from tests.tdx.mem_machine import LARGE, SMALL, MemMachine

H = HostLeaf
MAPPED, PENDING, BLOCKED, PENDING_BLOCKED, NL_MAPPED, NL_BLOCKED = (
    ARCH_STATE[s]
    for s in (
        SeptState.MAPPED,
        SeptState.PENDING,
        SeptState.BLOCKED,
        SeptState.PENDING_BLOCKED,
        SeptState.NL_MAPPED,
        SeptState.NL_BLOCKED,
    )
)


@pytest.fixture
def machine() -> MemMachine:
    machine = MemMachine(final=False)
    machine.add_page(machine.tdr, 0)
    machine.finalize()
    machine.aug(SMALL)
    machine.aug(LARGE, Level.PD)
    return machine


@pytest.mark.parametrize(
    ("gpa", "level", "before", "after"),
    [
        (0, Level.PT, MAPPED, BLOCKED),
        (SMALL, Level.PT, PENDING, PENDING_BLOCKED),
        (LARGE, Level.PD, PENDING, PENDING_BLOCKED),
        (0, Level.PD, NL_MAPPED, NL_BLOCKED),
        (0, Level.PDPT, NL_MAPPED, NL_BLOCKED),
        (0, Level.PML4, NL_MAPPED, NL_BLOCKED),
    ],
)
def test_block_and_unblock(machine: MemMachine, gpa: int, level: Level, before: int, after: int) -> None:
    whole, state = machine.entry(gpa, level)
    assert state == before
    machine.block(gpa, level, track=False)
    entry, state = machine.entry(gpa, level)
    assert state == after
    assert entry == whole & ~sept.RWX
    again = machine.mem(H.TDH_MEM_RANGE_BLOCK, gpa, level)
    assert again.rax == with_operand(Status.TDX_GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
    assert (again.rcx, again.rdx) == (entry, after << 8 | level)
    early = machine.mem(H.TDH_MEM_RANGE_UNBLOCK, gpa, level)
    assert early.rax == with_operand(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)
    machine.track()
    machine.do(H.TDH_MEM_RANGE_UNBLOCK, gpa, level)
    assert machine.entry(gpa, level) == (whole, before)


def test_what_is_blocked_above_cannot_be_reached(machine: MemMachine) -> None:
    machine.block(0, Level.PD)
    regs = machine.mem(H.TDH_MEM_RANGE_BLOCK, 0)
    assert regs.rax == with_operand(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    assert regs.rdx == NL_BLOCKED << 8 | Level.PD


def test_nothing_to_block_or_unblock(machine: MemMachine) -> None:
    for leaf, gpa in [(H.TDH_MEM_RANGE_BLOCK, PAGE_4K), (H.TDH_MEM_RANGE_UNBLOCK, SMALL)]:
        regs = machine.mem(leaf, gpa)
        assert regs.rax == with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
        assert regs.rdx == machine.state(gpa) << 8


def test_levels_up_to_the_root(machine: MemMachine) -> None:
    for leaf in (H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_RANGE_UNBLOCK, H.TDH_MEM_SEPT_RD):
        assert machine.mem(leaf, 0, Level.PML5).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)


def test_the_epoch_of_blocking_is_in_the_pamt(machine: MemMachine) -> None:
    page = machine.entry(SMALL)[0] & sept.HPA_MASK
    machine.track()
    machine.track()
    machine.block(SMALL, track=False)
    assert machine.pamt(page).bepoch == machine.of_td.tdcs.td_epoch
    table = machine.module.sept[machine.of_td.tdcs.eptp & sept.HPA_MASK] & sept.HPA_MASK
    machine.block(0, Level.PML4, track=False)
    assert machine.pamt(table).bepoch == machine.of_td.tdcs.td_epoch


def test_track_names_rcx_and_touches_no_register(machine: MemMachine) -> None:
    regs = machine.call(H.TDH_MEM_TRACK, rcx=machine.tdr, rdx=5)
    assert (regs.rax, regs.rcx, regs.rdx) == (0, machine.tdr, 5)
    regs = machine.call(H.TDH_MEM_TRACK, rcx=machine.tdvpr)
    assert regs.rax == with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)


@given(epoch=st.integers(1, 50), bepoch=st.integers(0, 50), inside=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_tracked_means_later_or_last_with_nobody_left(epoch: int, bepoch: int, inside: tuple[int, int]) -> None:
    td = _MACHINE.of_td
    td.tdcs.td_epoch, td.tdcs.refcount = epoch, inside
    last = bepoch == epoch - 1 and not inside[bepoch % 2]
    assert is_tlb_tracked(td, bepoch) == (bepoch < epoch - 1 or last)


_MACHINE = MemMachine()


class Model:
    """The rule for epochs, as a list of the epochs in which VCPUs entered (None: outside)."""

    def __init__(self, vcpus: int) -> None:
        self.epoch = 1
        self.inside: list[int | None] = [None] * vcpus
        self.blocked: int | None = None

    def track(self) -> bool:
        if self.epoch - 1 in self.inside:
            return False
        self.epoch += 1
        return True

    def tracked(self) -> bool:
        assert self.blocked is not None
        before = self.epoch - 1
        return self.blocked < before or (self.blocked == before and before not in self.inside)


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["block", "track", "unblock", "remove", 0, 1]), max_size=24))
def test_the_epoch_rule(operations: list[str | int]) -> None:
    machine = GuestMachine(vcpus=2)
    machine.interrupt()
    machine.ok(H.TDH_VP_FLUSH, rcx=machine.vps[1])
    model = Model(vcpus=2)
    model.epoch = machine.of_td.tdcs.td_epoch
    gpa = 0x2000
    for operation in operations:
        if operation == "track":
            status = machine.call(H.TDH_MEM_TRACK, rcx=machine.tdr).rax
            assert status == (0 if model.track() else Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
        elif operation == "block":
            regs = machine.call(H.TDH_MEM_RANGE_BLOCK, rcx=gpa, rdx=machine.tdr)
            if model.blocked is None:
                assert not regs.rax
                model.blocked = model.epoch
        elif isinstance(operation, str):
            remove = operation == "remove"
            leaf = H.TDH_MEM_PAGE_REMOVE if remove else H.TDH_MEM_RANGE_UNBLOCK
            regs = machine.call(leaf, rcx=gpa, rdx=machine.tdr)
            if model.blocked is not None and model.tracked():
                assert not regs.rax
                model.blocked = None
                if remove:
                    machine.ok(H.TDH_MEM_PAGE_AUG, rcx=gpa, rdx=machine.tdr, r8=machine.page())
            else:
                assert regs.rax
        elif model.inside[operation] is None:
            machine.enter(vcpu=operation, lp=operation)
            model.inside[operation] = model.epoch
        else:
            machine.interrupt(lp=operation)
            model.inside[operation] = None
    assert machine.of_td.tdcs.td_epoch == model.epoch


def test_blocked_range_comes_back_with_its_pages(machine: MemMachine) -> None:
    machine.block(0, Level.PD)
    machine.do(H.TDH_MEM_RANGE_UNBLOCK, 0, Level.PD)
    assert (machine.state(0), machine.state(SMALL)) == (MAPPED, PENDING)
    assert machine.state(LARGE, Level.PD) == PENDING
