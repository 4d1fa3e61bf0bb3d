"""TDCALLs: TDG.VP.*, TDG.MR.* and what all of them have in common."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import sept, vmcs
from septum.arch.errors import UsageError
from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.arch.structures import TdAttributes, TdReport
from septum.tdx.guest.call import ExtendedExit
from septum.tdx.registers import Regs
from septum.tdx.state.hardware import IA32_INTR_PENDING, VerifyReport
from tests.tdx.guests import DATA, HOLE, PENDING, GuestMachine
from tests.tdx.machines import PARAMS, SOURCE

INVALID = Status.TDX_OPERAND_INVALID
EXTEND = GuestLeaf.TDG_MR_RTMR_EXTEND
REPORT = GuestLeaf.TDG_MR_REPORT
SHARED_GPA = 1 << 47


@pytest.fixture
def machine() -> GuestMachine:
    return GuestMachine()


@pytest.fixture(scope="module")
def patient() -> GuestMachine:
    """A guest whose calls all fail."""
    return GuestMachine()


# -- all calls ---------------------------------------------------------------------------------------------------------


@given(leaf=st.integers(0, 0xFFFF).filter(lambda leaf: leaf not in set(GuestLeaf)))
def test_unknown_leaves(patient: GuestMachine, leaf: int) -> None:
    assert patient.tdcall(leaf).rax == with_operand(INVALID, Operand.RAX)


@given(leaf=st.sampled_from(GuestLeaf), bits=st.integers(1, (1 << 48) - 1))
def test_versions_and_reserved_bits_of_rax(patient: GuestMachine, leaf: GuestLeaf, bits: int) -> None:
    if leaf != GuestLeaf.TDG_VM_RD or bits >> 8:
        assert patient.tdcall(leaf | bits << 16).rax == with_operand(INVALID, Operand.RAX)


def test_tdcall_outside_64_bit_mode_is_a_general_protection_fault(machine: GuestMachine) -> None:
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    assert machine.exit(77, gprs=Regs(rax=GuestLeaf.TDG_VP_INFO), vmcs={vmcs.GUEST_EFER: 0x901}) is None
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == 0x8000_0B0D
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip
    assert machine.gprs.rax == GuestLeaf.TDG_VP_INFO


def test_a_completed_call_moves_rip_past_tdcall(machine: GuestMachine) -> None:
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    machine.tdcall(GuestLeaf.TDG_VP_INFO)
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip + 4


def test_no_exit_without_a_guest() -> None:
    machine = GuestMachine()
    with pytest.raises(UsageError, match="no guest runs on LP1"):
        machine.exit(ExitReason.HLT_INSTRUCTION, lp=1)


# -- TDG.VP.* ----------------------------------------------------------------------------------------------------------


def test_info_tells_the_shape_of_the_td() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, max_vcpus=5, attributes=TdAttributes.DEBUG), vcpus=2)
    info = machine.tdcall(GuestLeaf.TDG_VP_INFO, r11=9)
    assert (info.rax, info.rcx, info.rdx, info.r8) == (0, 48, TdAttributes.DEBUG, 5 << 32 | 2)
    assert (info.r9, info.r10, info.r11) == (0, 1, 0)


def test_ve_information_is_read_once_and_a_second_ve_is_a_double_fault(machine: GuestMachine) -> None:
    nothing = machine.tdcall(GuestLeaf.TDG_VP_VEINFO_GET, rcx=1, r10=1)
    assert (nothing.rax, nothing.rcx, nothing.r10) == (Status.TDX_NO_VALID_VE_INFO, 0, 0)
    machine.exit(ExitReason.IO_INSTRUCTION, qualification=0x70_0008, vmcs={vmcs.EXIT_INSTRUCTION_INFO: 5})
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == 0x8000_0314
    assert machine.vp.vmcs[vmcs.GUEST_RFLAGS] & vmcs.RFLAGS_RF
    machine.exit(ExitReason.HLT_INSTRUCTION)
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == 0x8000_0B08
    info = machine.tdcall(GuestLeaf.TDG_VP_VEINFO_GET)
    assert (info.rax, info.rcx, info.rdx, info.r10) == (0, ExitReason.IO_INSTRUCTION, 0x70_0008, 5 << 32 | 2)
    assert machine.tdcall(GuestLeaf.TDG_VP_VEINFO_GET).rax == Status.TDX_NO_VALID_VE_INFO


@given(bits=st.integers(4, (1 << 64) - 1))
def test_cpuidve_set_knows_two_bits(patient: GuestMachine, bits: int) -> None:
    assert patient.tdcall(GuestLeaf.TDG_VP_CPUIDVE_SET, rcx=bits).rax == with_operand(INVALID, Operand.RCX)


# -- TDG.MR.* ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_rtmr_is_extended_by_sha_384(machine: GuestMachine, index: int) -> None:
    first, second = bytes(range(48)), b"\xa5" * 48
    expected = bytes(48)
    for data in (first, second):
        machine.write(DATA + 64, data)
        assert machine.tdcall(EXTEND, rcx=DATA + 64, rdx=index).rax == 0
        expected = hashlib.sha384(expected + data).digest()
    others = [rtmr for i, rtmr in enumerate(machine.of_td.tdcs.rtmr) if i != index]
    assert machine.of_td.tdcs.rtmr[index] == expected
    assert others == [bytes(48)] * 3


@pytest.mark.parametrize(
    ("gpa", "index", "operand"),
    [
        (DATA + 32, 9, Operand.RCX),
        (SHARED_GPA | DATA, 9, Operand.RCX),
        (1 << 52, 9, Operand.RCX),
        (DATA, 4, Operand.RDX),
    ],
)
def test_rtmr_extend_checks_its_operands_in_order(
    machine: GuestMachine, gpa: int, index: int, operand: Operand
) -> None:
    assert machine.tdcall(EXTEND, rcx=gpa, rdx=index).rax == with_operand(INVALID, operand)


def test_a_report_shows_the_measurements(machine: GuestMachine) -> None:
    machine.write(DATA, b"\x11" * 48)
    machine.tdcall(EXTEND, rcx=DATA, rdx=2)
    machine.write(DATA + 64, bytes(range(64)))
    assert machine.tdcall(REPORT, rcx=DATA + 1024, rdx=DATA + 64).rax == 0
    report = TdReport.unpack(machine.read(DATA + 1024, 1024))
    tdcs = machine.of_td.tdcs
    assert report.hashes_match()
    assert report.mac.report_data == bytes(range(64))
    assert (report.td_info.mr_td, report.td_info.rtmr_2) == (tdcs.mrtd, tdcs.rtmr[2])
    assert report.td_info.rtmr_0 == bytes(48)
    assert report.mac.tee_info_hash == tdcs.last_teeinfo_hash
    assert tdcs.last_teeinfo_hash_valid


@pytest.mark.parametrize(
    ("rcx", "rdx", "r8", "operand"),
    [
        (DATA + 512, DATA + 1, 1, Operand.RCX),
        (DATA, DATA + 32, 1, Operand.RDX),
        (DATA, 1 << 52, 1, Operand.RDX),
        (HOLE, DATA, 1, Operand.R8),
        (1 << 52, DATA, 0, Operand.RCX),
    ],
)
def test_report_checks_its_operands_in_order(
    machine: GuestMachine, rcx: int, rdx: int, r8: int, operand: Operand
) -> None:
    assert machine.tdcall(REPORT, rcx=rcx, rdx=rdx, r8=r8).rax == with_operand(INVALID, operand)


def test_an_interrupted_report_is_called_again(machine: GuestMachine) -> None:
    machine.module.hardware.msrs[0, IA32_INTR_PENDING] = 1
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    asked = {"rcx": DATA, "rdx": DATA, "r9": 7}
    again = machine.tdcall(REPORT, **asked)
    assert again.values() == Regs.of({"rax": REPORT, **asked}).values()
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip
    assert machine.of_td.tdcs.last_teeinfo_hash_valid
    assert not machine.of_td.rtmr_lock.words.get(machine.of_td.rtmr_lock.key)


def test_verifyreport_gives_the_cpus_answer(machine: GuestMachine) -> None:
    verify = GuestLeaf.TDG_MR_VERIFYREPORT
    assert machine.tdcall(verify, rcx=DATA + 128).rax == with_operand(INVALID, Operand.RCX)
    for answer, status in (
        (VerifyReport.SUCCESS, Status.TDX_SUCCESS),
        (VerifyReport.INVALID_CPUSVN, Status.TDX_INVALID_CPUSVN),
        (VerifyReport.INVALID_REPORTMACSTRUCT, Status.TDX_INVALID_REPORTMACSTRUCT),
    ):
        machine.module.hardware.inputs.verify_report = answer
        assert machine.tdcall(verify, rcx=DATA).rax == status


# -- memory operands ---------------------------------------------------------------------------------------------------


def test_an_operand_that_is_not_mapped_leaves_the_td(machine: GuestMachine) -> None:
    seen = machine.tdcall_out(EXTEND, rcx=HOLE + 64)
    assert {n: v for n, v in seen.values().items() if v} == {"rax": 48, "rcx": 1, "r8": HOLE}


def test_a_pending_operand_is_a_ve(machine: GuestMachine) -> None:
    before = Regs(rax=EXTEND, rcx=PENDING + 64)
    assert machine.exit(77, gprs=before, instruction_length=4) is None
    info = machine.vp.tdvps.ve_info
    assert info[:5] == (48, 0xFFFF_FFFF, 1, 0, PENDING + 64)
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == 0x8000_0314
    assert machine.gprs.values() == before.values()


def test_or_a_td_exit_if_the_td_wants_no_such_ve() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, attributes=TdAttributes.SEPT_VE_DISABLE))
    seen = machine.tdcall_out(EXTEND, rcx=PENDING)
    assert (seen.rax, seen.rcx, seen.rdx, seen.r8) == (48, 1, ExtendedExit.PENDING_EPT_VIOLATION, PENDING)


def shared_table(machine: GuestMachine, leaf: int, gpa: int = 0) -> None:
    """A Shared EPT of the host with one leaf."""
    memory, table = machine.module.memory, SOURCE
    for level in (3, 2, 1):
        index = (SHARED_GPA | gpa) >> 12 + 9 * level & 0x1FF
        memory.write(table + 8 * index, (table + 0x1000 | 7).to_bytes(8, "little"))
        table += 0x1000
    memory.write(table + 8 * (gpa >> 12 & 0x1FF), leaf.to_bytes(8, "little"))
    machine.vp.vmcs[vmcs.SHARED_EPTP] = SOURCE


@pytest.mark.parametrize(
    ("leaf", "reason", "qualification"),
    [
        (0, "ve", 3),
        (sept.SVE, ExitReason.EPT_VIOLATION, 3),
        (0x30000 | sept.MT_WB | sept.R, "ve", 2 | 1 << 3),
        (0x30000 | sept.MT_WB | sept.R | sept.SVE, ExitReason.EPT_VIOLATION, 2 | 1 << 3),
        (0x30000 | sept.W, ExitReason.EPT_MISCONFIGURATION, 0),
        (0x30000 | 2 << 3 | sept.RWX, ExitReason.EPT_MISCONFIGURATION, 0),
        (1 << 51 | sept.MT_WB | sept.RWX, ExitReason.EPT_MISCONFIGURATION, 0),
    ],
)
def test_shared_operands_are_walked_in_the_hosts_ept(
    machine: GuestMachine, leaf: int, reason: object, qualification: int
) -> None:
    shared_table(machine, leaf)
    call = {"rcx": SHARED_GPA, "rdx": DATA}
    if reason == "ve":
        machine.tdcall(REPORT, **call)
        assert machine.vp.tdvps.ve_info.exit_qualification == qualification
    else:
        seen = machine.tdcall_out(REPORT, **call)
        assert (seen.rax, seen.rcx, seen.r8) == (reason, qualification, SHARED_GPA)


def test_a_report_can_go_to_shared_memory(machine: GuestMachine) -> None:
    shared_table(machine, 0x30000 | sept.MT_WB | sept.RWX)
    assert machine.tdcall(REPORT, rcx=SHARED_GPA, rdx=DATA).rax == 0
    assert TdReport.unpack(machine.module.memory.read(0x30000, 1024)).hashes_match()


# -- L2 VMs ------------------------------------------------------------------------------------------------------------


def test_calls_about_l2_vms_know_how_many_there_are() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, num_l2_vms=0))
    enter, invept, invvpid = GuestLeaf.TDG_VP_ENTER, GuestLeaf.TDG_VP_INVEPT, GuestLeaf.TDG_VP_INVVPID
    assert machine.tdcall(invept).rax == 0
    assert machine.tdcall(invept, rcx=2).rax == with_operand(INVALID, Operand.RCX)
    assert machine.tdcall(invvpid, rcx=1 << 52).rax == with_operand(INVALID, Operand.RCX)
    assert machine.tdcall(enter, rcx=1 << 52, rdx=DATA + 1).rax == with_operand(INVALID, Operand.RDX)
    assert machine.tdcall(enter, rcx=1 << 52, rdx=DATA).rax == with_operand(INVALID, Operand.RCX)


@pytest.fixture
def l1_vmm() -> GuestMachine:
    """A guest that has an L2 VM, as far as the module's checks go."""
    machine = GuestMachine()
    machine.of_td.tdcs.num_l2_vms = 1
    machine.vp.fields["L2_VAPIC_GPA", 1] = (1 << 64) - 1
    return machine


def test_entering_an_l2_vm_is_checked_up_to_the_entry(l1_vmm: GuestMachine) -> None:
    enter, vm = GuestLeaf.TDG_VP_ENTER, 1 << 52
    assert l1_vmm.tdcall(enter, rcx=vm, rdx=DATA).rax == with_operand(INVALID, Operand.L2_VAPIC_GPA)
    l1_vmm.vp.fields["L2_VAPIC_GPA", 1] = DATA
    l1_vmm.vp.vmcs[vmcs.GUEST_INTERRUPT_STATUS] = 0x30
    assert l1_vmm.tdcall(enter, rcx=vm, rdx=DATA).rax == Status.TDX_PENDING_INTERRUPT
    l1_vmm.vp.vmcs.pop(vmcs.GUEST_INTERRUPT_STATUS)
    with pytest.raises(UsageError, match="L2 VMs do not run"):
        l1_vmm.tdcall(enter, rcx=vm, rdx=DATA)


def test_the_debugger_can_stop_before_an_l2_vm_is_entered(l1_vmm: GuestMachine) -> None:
    l1_vmm.vp.fields["L2_VAPIC_GPA", 1] = DATA
    l1_vmm.vp.fields["L2_DEBUG_CTLS", 1] = 1
    seen = l1_vmm.tdcall_out(GuestLeaf.TDG_VP_ENTER, rcx=1 << 52, rdx=DATA)
    assert seen.rax == Status.TDX_TD_EXIT_BEFORE_L2_ENTRY


def test_a_list_of_addresses_to_invalidate(l1_vmm: GuestMachine) -> None:
    invvpid, rcx = GuestLeaf.TDG_VP_INVVPID, 1 << 52 | 1
    l1_vmm.write(DATA, b"".join(entry.to_bytes(8, "little") for entry in (0x1000, 0xFFFF_8000_0000_0003, 1 << 60)))
    assert l1_vmm.tdcall(invvpid, rcx=rcx, rdx=2 << 52 | DATA).rdx == DATA | 2
    beyond = l1_vmm.tdcall(invvpid, rcx=rcx, rdx=3 << 52 | DATA)
    assert beyond.rax == Status.TDX_GLA_NOT_CANONICAL
    too_many = l1_vmm.tdcall(invvpid, rcx=rcx, rdx=512 << 52 | DATA | 1)
    assert too_many.rax == with_operand(INVALID, Operand.RDX)
    l1_vmm.module.hardware.msrs[0, IA32_INTR_PENDING] = 1
    interrupted = l1_vmm.tdcall(invvpid, rcx=rcx, rdx=2 << 52 | DATA)
    assert (interrupted.rax, interrupted.rdx) == (invvpid, 1 << 52 | DATA | 1)
