"""TDH.VP.CREATE, ADDCX, INIT, FLUSH and ENTER as the host sees them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from septum.arch.cpuid import recording_cpu
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import LastExit, VcpuState
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.core.trylocks import SharexHp
from septum.tdx.registers import Regs
from septum.tdx.state.vp import NO_LP
from septum.tdx.vm_exit import VmExit
from tests.tdx.guests import LONG_AFTER, GuestMachine, lock_trace
from tests.tdx.machines import PARAMS, VCPU_PAGES, Machine

V1 = frozenset({"vp_init_v1"})
BUSY = Status.TDX_OPERAND_BUSY
INVALID = Status.TDX_OPERAND_INVALID


def footprint(shared: Path, op: str, td: str) -> list[tuple[str, str]]:
    """The recorded lock primitives of an operation, under the names of kinds of locks."""
    rows = json.loads((shared / "contention" / "lock_footprints.json").read_text())
    row = next(row for row in rows if row["op"] == op and row["td"] == td)
    modes = {"SH": "SHARED", "EX": "EXCLUSIVE"}
    return [(step["op"] + kind(step["lock"]), modes[step["mode"]]) for step in row["trace"]]


def kind(lock: str) -> str:
    """``PAMT_4K`` of ``PAMT_4K[TDR:run]``, ``OP_STATE`` of ``TDCS.op_state_lock(TDCX:run)``."""
    name = re.split(r"[\[(]", lock)[0]
    return {"TDCS.op_state_lock": "OP_STATE", "TDCS.epoch_lock": "TD_EPOCH", "TDCS.rtmr_lock": "RTMR"}.get(name, name)


def kinds(trace: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(text[0] + kind(text[1:]), mode) for text, mode in trace]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def uninitialised(machine: Machine, tdr: int, pages: int = VCPU_PAGES) -> int:
    """A VCPU that TDH.VP.INIT has not seen yet."""
    tdvpr = machine.page()
    machine.ok(HostLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=tdr)
    for _ in range(pages):
        machine.ok(HostLeaf.TDH_VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    return tdvpr


def test_initial_state_of_a_vcpu(machine: Machine) -> None:
    tdr = machine.td()
    first, second = uninitialised(machine, tdr), uninitialised(machine, tdr)
    machine.ok(HostLeaf.TDH_VP_INIT, rcx=first, rdx=0x1234)
    machine.ok(HostLeaf.TDH_VP_INIT, rcx=second, lp=1)
    tdvps = machine.module.vp(first).tdvps
    gprs = {name: value for name, value in Regs.from_tuple(tdvps.gprs).values().items() if value}
    assert gprs == {"rcx": 0x1234, "r8": 0x1234, "rbx": 48, "rdx": recording_cpu().fms}
    assert (tdvps.vcpu_state, tdvps.assoc_lpid, tdvps.vcpu_index) == (VcpuState.READY, 0, 0)
    other = machine.module.vp(second).tdvps
    assert (other.assoc_lpid, other.vcpu_index, Regs.from_tuple(other.gprs).rsi) == (1, 1, 1)
    tdcs = machine.module.td(tdr).tdcs
    assert (tdcs.num_vcpus, tdcs.num_assoc_vcpus) == (2, 2)


def test_a_vcpu_counts_its_pages_as_children_of_the_td(machine: Machine) -> None:
    tdr = machine.td()
    before = machine.module.td(tdr).tdr.chldcnt
    uninitialised(machine, tdr)
    assert machine.module.td(tdr).tdr.chldcnt == before + 1 + VCPU_PAGES


def test_init_needs_all_pages_and_happens_once(machine: Machine) -> None:
    tdvpr = uninitialised(machine, machine.td(), VCPU_PAGES - 1)
    assert machine.call(HostLeaf.TDH_VP_INIT, rcx=tdvpr).rax == Status.TDX_TDCX_NUM_INCORRECT
    machine.ok(HostLeaf.TDH_VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    machine.ok(HostLeaf.TDH_VP_INIT, rcx=tdvpr)
    assert machine.call(HostLeaf.TDH_VP_INIT, rcx=tdvpr).rax == Status.TDX_VCPU_STATE_INCORRECT
    addcx = machine.call(HostLeaf.TDH_VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    assert addcx.rax == Status.TDX_VCPU_STATE_INCORRECT


def test_a_vcpu_has_at_most_fifteen_pages(machine: Machine) -> None:
    tdvpr = uninitialised(machine, machine.td(), 14)
    addcx = machine.call(HostLeaf.TDH_VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    assert addcx.rax == Status.TDX_TDCX_NUM_INCORRECT


def test_no_more_vcpus_than_td_params_say(machine: Machine) -> None:
    tdr = machine.td(dataclasses.replace(PARAMS, max_vcpus=1))
    machine.create_vcpu(tdr)
    assert machine.call(HostLeaf.TDH_VP_INIT, rcx=uninitialised(machine, tdr)).rax == Status.TDX_MAX_VCPUS_EXCEEDED
    assert machine.module.td(tdr).tdcs.num_vcpus == 1


def test_pages_in_use_and_wrong_pages(machine: Machine) -> None:
    tdr = machine.td()
    tdvpr = uninitialised(machine, tdr)
    wrong = Status.TDX_PAGE_METADATA_INCORRECT
    assert machine.call(HostLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=tdr).rax == with_operand(wrong, Operand.RCX)
    assert machine.call(HostLeaf.TDH_VP_INIT, rcx=tdr).rax == with_operand(wrong, Operand.RCX)
    assert machine.call(HostLeaf.TDH_VP_ADDCX, rcx=tdvpr, rdx=tdvpr).rax == with_operand(BUSY, Operand.RCX)
    assert machine.call(HostLeaf.TDH_VP_FLUSH, rcx=tdvpr + 1).rax == with_operand(INVALID, Operand.RCX)


def test_a_page_that_was_a_vcpu_starts_anew(machine: Machine) -> None:
    tdr = machine.td()
    tdvpr = machine.create_vcpu(tdr)
    module = machine.module
    old = module.vp(tdvpr)
    new = module.new_vp(tdvpr)
    assert old.tdvps.vcpu_state == VcpuState.READY
    assert old.vmcs[0x6800]
    assert new is module.vp(tdvpr)
    assert new.tdvps.vcpu_state == VcpuState.UNINITIALIZED
    assert not new.vmcs[0x6800]


def test_version_1_of_init_is_a_feature_of_newer_modules() -> None:
    machine = Machine()
    tdvpr = uninitialised(machine, machine.td())
    assert machine.call(HostLeaf.TDH_VP_INIT, version=1, rcx=tdvpr).rax == with_operand(INVALID, Operand.RAX)

    machine = Machine(features=V1)
    tdr = machine.td()
    first, second = uninitialised(machine, tdr), uninitialised(machine, tdr)
    assert machine.call(HostLeaf.TDH_VP_INIT, version=2, rcx=first).rax == with_operand(INVALID, Operand.RAX)
    wide = machine.call(HostLeaf.TDH_VP_INIT, version=1, rcx=first, r8=1 << 32)
    assert wide.rax == with_operand(INVALID, Operand.R8)
    machine.ok(HostLeaf.TDH_VP_INIT, version=1, rcx=first, r8=7)
    assert machine.call(HostLeaf.TDH_VP_INIT, version=1, rcx=second, r8=7).rax == 0xC000_0621_0000_0007
    assert machine.module.td(tdr).tdcs.num_vcpus == 1
    locks = machine.locks_of(HostLeaf.TDH_VP_INIT, version=1, rcx=second, r8=0)
    assert locks[3] == (f"PAMT_4K[{tdr:#x}]", "EXCLUSIVE")


def test_association_ties_a_vcpu_to_an_lp() -> None:
    machine = GuestMachine()
    machine.interrupt()
    assert machine.enter(lp=1).rax == Status.TDX_VCPU_ASSOCIATED
    assert machine.call(HostLeaf.TDH_VP_FLUSH, lp=1, rcx=machine.vps[0]).rax == Status.TDX_VCPU_NOT_ASSOCIATED
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=machine.vps[0])
    assert machine.vp.tdvps.assoc_lpid == NO_LP
    assert machine.of_td.tdcs.num_assoc_vcpus == 0
    machine.enter(lp=1)
    assert machine.module.lps[1].running == machine.vps[0]
    assert machine.of_td.tdcs.num_assoc_vcpus == 1


def test_a_running_vcpu_keeps_its_locks_and_its_epoch() -> None:
    machine = GuestMachine(vcpus=2)
    tdvpr, tdr = machine.vps[0], machine.tdr
    assert sum(machine.of_td.tdcs.refcount) == 1
    assert machine.call(HostLeaf.TDH_VP_FLUSH, lp=1, rcx=tdvpr).rax == with_operand(BUSY, Operand.RCX)
    assert machine.call(HostLeaf.TDH_MNG_VPFLUSHDONE, lp=1, rcx=tdr).rax == with_operand(BUSY, Operand.RCX)
    machine.ok(HostLeaf.TDH_MEM_TRACK, lp=1, rcx=tdr)
    assert machine.call(HostLeaf.TDH_MEM_TRACK, lp=1, rcx=tdr).rax == Status.TDX_PREVIOUS_TLB_EPOCH_BUSY
    machine.interrupt()
    machine.ok(HostLeaf.TDH_MEM_TRACK, lp=1, rcx=tdr)
    assert machine.of_td.tdcs.refcount == (0, 0)
    words = set(dict.values(machine.module.locks))
    assert words == {SharexHp.HP}, "after the TD exit only the wishes of the two hosts that found locks busy are left"


def test_running_vcpus_do_not_keep_each_other_out() -> None:
    machine = GuestMachine(vcpus=2)
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=machine.vps[1])
    machine.enter(vcpu=1, lp=1)
    assert sum(machine.of_td.tdcs.refcount) == 2
    machine.interrupt(lp=1)
    machine.interrupt()
    assert machine.of_td.tdcs.refcount == (0, 0)
    assert not machine.module.locks


@pytest.mark.parametrize(
    ("msr", "value", "status"),
    [
        (0x1A0, 1 << 22, Status.TDX_LIMIT_CPUID_MAXVAL_SET),
        (0x3B, 1, with_operand(Status.TDX_INCONSISTENT_MSR, 0x3B)),
    ],
)
def test_enter_looks_at_msrs(msr: int, value: int, status: int) -> None:
    machine = GuestMachine()
    machine.interrupt()
    machine.module.hardware.msrs[0, msr] = value
    assert machine.enter().rax == status
    assert machine.of_td.tdcs.refcount == (0, 0)
    assert not machine.module.locks


def test_time_must_not_go_back() -> None:
    machine = GuestMachine()
    machine.interrupt()
    machine.module.hardware.inputs.tsc = 0
    assert machine.enter().rax == Status.TDX_TSC_ROLLBACK


def test_flags_of_enter_need_their_occasion() -> None:
    machine = GuestMachine()
    machine.interrupt()
    for flags in (1, 1 << 52, 1 << 53, 1 << 54):
        assert machine.enter(flags=flags).rax == with_operand(INVALID, Operand.RCX)
    machine.vp.tdvps.last_td_exit = LastExit.ASYNC_TRAP
    machine.enter(flags=1 << 52)
    assert machine.gprs.rax == 1 << 60


def test_lock_footprints(shared: Path) -> None:
    building = Machine()
    tdr = building.td()

    def trace(leaf: HostLeaf, **registers: int) -> list[tuple[str, str]]:
        regs = Regs.of({"rax": leaf, **registers})
        return kinds(lock_trace(building.module, lambda: building.module.seamcall(0, regs)))

    tdvpr = building.page()
    assert trace(HostLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=tdr) == footprint(shared, "VP.CREATE", "build")
    page = building.page()
    assert trace(HostLeaf.TDH_VP_ADDCX, rcx=page, rdx=tdvpr) == footprint(shared, "VP.ADDCX", "build")
    for _ in range(VCPU_PAGES - 1):
        building.ok(HostLeaf.TDH_VP_ADDCX, rcx=building.page(), rdx=tdvpr)
    assert trace(HostLeaf.TDH_VP_INIT, rcx=tdvpr) == footprint(shared, "VP.INIT", "build")
    assert trace(HostLeaf.TDH_VP_ENTER, rcx=tdvpr) == footprint(shared, "VP.ENTER", "build")
    assert trace(HostLeaf.TDH_VP_FLUSH, rcx=tdvpr) == footprint(shared, "VP.FLUSH", "build")

    running = GuestMachine()
    running.module.hardware.inputs.tsc += LONG_AFTER
    interrupt = VmExit(1, interruption=0x8000_0020)
    left = kinds(running.exit_locks(interrupt))
    assert left == footprint(shared, "TD:EPT_VIOLATION(exit)", "run")
    entered = kinds(running.call_locks(HostLeaf.TDH_VP_ENTER, rcx=running.vps[0]))
    assert entered == footprint(shared, "VP.ENTER", "run")
