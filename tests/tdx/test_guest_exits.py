"""VM exits that the module answers itself: CPUID, MSRs, control registers, EPT violations, events under way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import vmcs
from septum.arch.cpuid import cpuid_table, recording_cpu
from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf
from septum.arch.msr import Action, Bitmap, msr_table
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from tests.tdx.guests import DATA, HOLE, PENDING, GuestMachine
from tests.tdx.machines import PARAMS

UD, GP, VE, DF, PF = 0x8000_0306, 0x8000_0B0D, 0x8000_0314, 0x8000_0B08, 0x8000_0B0E
DEBUG = dataclasses.replace(PARAMS, attributes=TdAttributes.DEBUG)
U64 = st.integers(0, (1 << 64) - 1)


@pytest.fixture
def machine() -> GuestMachine:
    return GuestMachine()


@pytest.fixture(scope="module")
def runner() -> GuestMachine:
    """A guest that never leaves the TD."""
    return GuestMachine()


def event(machine: GuestMachine, reason: int, **details: Any) -> int:
    """The event that the module injects upon an exit; 0 for none. VE_INFO is free before and after."""
    machine.vp.tdvps.ve_info = machine.vp.tdvps.ve_info._replace(valid=0)
    assert machine.exit(reason, **details) is None
    injected = machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION]
    machine.vp.tdvps.ve_info = machine.vp.tdvps.ve_info._replace(valid=0)
    return injected if injected & vmcs.VALID else 0


@pytest.mark.parametrize(
    ("reason", "injected"),
    [
        (ExitReason.HLT_INSTRUCTION, VE),
        (ExitReason.VMCALL_INSTRUCTION, VE),
        (ExitReason.WBINVD_INSTRUCTION, VE),
        (ExitReason.GETSEC_INSTRUCTION, UD),
        (ExitReason.SEAMCALL, UD),
        (ExitReason.ENQCMD_PASID_TRANSLATION_FAILURE, GP),
        (ExitReason.RDPMC_INSTRUCTION, GP),
    ],
)
def test_instructions_that_a_td_may_not_use(runner: GuestMachine, reason: ExitReason, injected: int) -> None:
    rip = runner.vp.vmcs[vmcs.GUEST_RIP]
    assert event(runner, reason) == injected
    assert runner.vp.vmcs[vmcs.GUEST_RIP] == rip


# -- CPUID -------------------------------------------------------------------------------------------------------------


def cpuid(machine: GuestMachine, leaf: int, subleaf: int = 0, **details: Any) -> tuple[int, int, int, int] | None:
    """EAX to EDX, or None for a #VE."""
    if event(machine, ExitReason.CPUID_INSTRUCTION, gprs=Regs(rax=leaf, rcx=subleaf), **details):
        return None
    regs = machine.gprs
    return regs.rax, regs.rbx, regs.rcx, regs.rdx


def test_cpuid_gives_virtual_values_or_a_ve(runner: GuestMachine) -> None:
    for entry in cpuid_table():
        subleaf = entry.subleaf & 0xFF
        values = cpuid(runner, entry.leaf, subleaf)
        assert (values is None) == entry.faulting, hex(entry.leaf)
        if values is not None:
            assert all(value < 1 << 32 for value in values)
    assert cpuid(runner, 0x4000_0000) is None


def test_dynamic_parts_of_cpuid(machine: GuestMachine) -> None:
    machine.vp.tdvps.vcpu_index = 5
    values = cpuid(machine, 1, vmcs={vmcs.GUEST_CR4: 0x2040 | 1 << 18})
    assert values is not None
    assert (values[1] >> 24, values[2] >> 27 & 1) == (5, 1)
    values = cpuid(machine, 1, vmcs={vmcs.GUEST_CR4: 0x2040})
    assert values is not None
    assert not values[2] >> 27 & 1
    values = cpuid(machine, 0x8000_0001)
    assert values is not None
    assert values[3] >> 11 & 1


def test_leaves_above_the_last_one_count_as_the_last_base_leaf(runner: GuestMachine) -> None:
    last = cpuid(runner, 0x23)
    assert cpuid(runner, 0x24) == cpuid(runner, 0x3FFF_FFFF) == cpuid(runner, 0xFFFF_FFFF) == last


def test_a_guest_can_ask_for_a_ve_by_privilege_level(machine: GuestMachine) -> None:
    user = {vmcs.GUEST_SS_ACCESS_RIGHTS: 0xC0F3}
    for control, kernel_ve, user_ve in ((0, False, False), (1, True, False), (2, False, True), (3, True, True)):
        machine.tdcall(GuestLeaf.TDG_VP_CPUIDVE_SET, rcx=control)
        supervisor = {vmcs.GUEST_SS_ACCESS_RIGHTS: 0xC093}
        assert (cpuid(machine, 0, vmcs=supervisor) is None) == kernel_ve
        assert (cpuid(machine, 0, vmcs=user) is None) == user_ve


# -- MSRs --------------------------------------------------------------------------------------------------------------


def access(machine: GuestMachine, address: int, value: int | None = None) -> int:
    """RDMSR, or WRMSR of ``value``: the event that it causes."""
    if value is None:
        return event(machine, ExitReason.MSR_READ, gprs=Regs(rcx=address))
    gprs = Regs(rax=value & 0xFFFF_FFFF, rcx=address, rdx=value >> 32)
    return event(machine, ExitReason.MSR_WRITE, gprs=gprs)


def test_msrs_answer_as_the_table_says(runner: GuestMachine) -> None:
    expected = {Action.VE: VE, Action.GP: GP}
    for row in msr_table():
        for handling, value in ((row.read, None), (row.write, 0)):
            if handling.bitmap is Bitmap.FIXED_1 and handling.action in expected:
                assert access(runner, row.start, value) == expected[handling.action], row.name
    for unknown in (0x2, 0x1FFF, 0x2000, 0xC000_0000, 0xC000_2000, 0xFFFF_FFFF):
        assert access(runner, unknown) == VE


def test_an_exit_that_the_bitmaps_forbid_halts_the_module(machine: GuestMachine) -> None:
    with pytest.raises(ModuleHalt, match="0x174"):
        access(machine, 0x174)


def test_debugctl_is_virtual(machine: GuestMachine) -> None:
    assert access(machine, 0x1D9, 1 << 3) == GP
    assert access(machine, 0x1D9, 1 << 6) == VE
    assert access(machine, 0x1D9, 0x2000 | 3) == 0
    assert machine.vp.vmcs[vmcs.GUEST_DEBUGCTL] == 3
    assert access(machine, 0x1D9) == 0
    assert (machine.gprs.rax, machine.gprs.rdx) == (3, 0)


def test_efer_may_only_change_in_syscall_enable(machine: GuestMachine) -> None:
    assert access(machine, 0xC000_0080, 0xD00) == 0
    assert machine.vp.vmcs[vmcs.GUEST_EFER] == 0xD00
    assert access(machine, 0xC000_0080, 0x501) == VE


def test_xss_has_what_xfam_has() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, xfam=3 | 1 << 11 | 1 << 12))
    assert access(machine, 0xDA0, 1 << 11) == 0
    assert machine.vp.tdvps.ia32_xss == 1 << 11
    assert access(machine, 0xDA0, 1 << 8) == GP


def test_vmx_msrs_read_as_fields_of_the_td(runner: GuestMachine) -> None:
    assert access(runner, 0x480) == 0
    regs = runner.gprs
    assert regs.rdx << 32 | regs.rax == runner.of_td.fields["VIRTUAL_IA32_VMX_BASIC", 0]


# -- control registers -------------------------------------------------------------------------------------------------


def write_cr(machine: GuestMachine, register: int, value: int, **details: Any) -> int:
    """MOV from RDX to CR0 or CR4: the event that it causes."""
    return event(machine, ExitReason.CR_ACCESS, qualification=register | 2 << 8, gprs=Regs(rdx=value), **details)


@pytest.mark.parametrize(
    ("value", "injected"),
    [
        (0x8001_0033, 0),
        (0x8001_0032, GP),
        (0x0001_0030, VE),
        (0x8001_0013, GP),
        (0xC001_0033, VE),
        (1 << 32 | 0x8001_0033, GP),
    ],
)
def test_cr0(machine: GuestMachine, value: int, injected: int) -> None:
    assert write_cr(machine, 0, value) == injected
    assert (machine.vp.vmcs[vmcs.GUEST_CR0] == value) == (not injected)


def test_cr4_is_a_ve_or_a_general_protection_fault(machine: GuestMachine) -> None:
    assert write_cr(machine, 4, 0x0) == VE
    assert write_cr(machine, 4, 1 << 22) == GP, "protection keys that XFAM has not"
    assert write_cr(machine, 4, 1 << 40) == GP


def test_lmsw_changes_three_bits(machine: GuestMachine) -> None:
    machine.vp.vmcs[vmcs.GUEST_CR0] = 0x8000_0021
    assert event(machine, ExitReason.CR_ACCESS, qualification=0xFFFF << 16 | 3 << 4) == 0
    assert machine.vp.vmcs[vmcs.GUEST_CR0] == 0x8000_002F


def test_other_control_registers_exit_for_debuggers_only(machine: GuestMachine) -> None:
    seen = machine.exit(ExitReason.CR_ACCESS, qualification=3)
    assert seen is not None
    assert seen.rax == Status.TDX_NON_RECOVERABLE_TD | 1 << 61 | ExitReason.CR_ACCESS
    seen = GuestMachine(DEBUG).exit(ExitReason.CR_ACCESS, qualification=3)
    assert seen is not None
    assert (seen.rax, seen.rcx) == (ExitReason.CR_ACCESS, 3)


@given(value=U64)
def test_xcr0_is_always_a_valid_combination(runner: GuestMachine, value: int) -> None:
    gprs = Regs(rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    injected = event(runner, ExitReason.XSETBV_INSTRUCTION, gprs=gprs)
    assert injected == (0 if value in (1, 3) else GP)
    assert runner.vp.tdvps.xcr0 in (1, 3)


def test_xcr0_with_more_features() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, xfam=0xE7))
    allowed = [v for v in range(256) if not event(machine, ExitReason.XSETBV_INSTRUCTION, gprs=Regs(rax=v))]
    assert allowed == [1, 3, 7, 0xE7]
    assert event(machine, ExitReason.XSETBV_INSTRUCTION, gprs=Regs(rax=1, rcx=1)) == GP


# -- EPT violations ----------------------------------------------------------------------------------------------------


def test_a_hole_is_the_hosts_and_a_pending_page_the_guests(machine: GuestMachine) -> None:
    assert (
        event(machine, ExitReason.EPT_VIOLATION, gpa=PENDING + 8, gla=0xFFFF_8000_0000_0008, qualification=0x181) == VE
    )
    info = machine.vp.tdvps.ve_info
    assert (info.gpa, info.gla, info.exit_qualification) == (PENDING + 8, 0xFFFF_8000_0000_0008, 0x181)
    machine.accept()
    seen = machine.exit(ExitReason.EPT_VIOLATION, gpa=HOLE + 8, qualification=0x1FFF)
    assert seen is not None
    assert {n: v for n, v in seen.values().items() if v} == {"rax": 48, "rcx": 0x7F, "r8": HOLE}


@pytest.mark.parametrize("disabled", [False, True])
def test_pending_ve_disable_decides_who_gets_a_pending_page(disabled: bool) -> None:
    machine = GuestMachine()
    machine.of_td.tdcs.td_ctls = int(disabled)
    seen = machine.exit(ExitReason.EPT_VIOLATION, gpa=PENDING, qualification=1)
    assert (seen is None) == (not disabled)
    if seen is not None:
        assert (seen.rax, seen.rdx, seen.r8) == (48, 6, PENDING)


def test_an_address_above_shared_is_a_reserved_bit_page_fault(machine: GuestMachine) -> None:
    gla = 0x7FFF_0000_1234
    user = {vmcs.GUEST_SS_ACCESS_RIGHTS: 0xC0F3}
    violation = {"gpa": 1 << 48 | DATA, "gla": gla, "qualification": 0x82}
    assert event(machine, ExitReason.EPT_VIOLATION, vmcs=user, **violation) == PF
    assert (machine.vp.tdvps.cr2, machine.vp.vmcs[vmcs.ENTRY_ERROR_CODE]) == (gla, 1 | 2 | 4 | 8)


@pytest.mark.parametrize(("delivering", "outcome"), [(PF, DF), (VE, DF), (GP, PF), (DF, None)])
def test_a_page_fault_while_an_exception_is_delivered(
    machine: GuestMachine, delivering: int, outcome: int | None
) -> None:
    details: dict[str, Any] = {"gpa": 1 << 48, "qualification": 0x80, "vmcs": {vmcs.IDT_VECTORING: delivering}}
    if outcome is None:
        seen = machine.exit(ExitReason.EPT_VIOLATION, **details)
        assert seen is not None
        assert seen.rax == Status.TDX_NON_RECOVERABLE_VCPU | ExitReason.TRIPLE_FAULT
    else:
        assert event(machine, ExitReason.EPT_VIOLATION, **details) == outcome


def test_an_event_under_way_is_delivered_after_the_violation_is_mended(machine: GuestMachine) -> None:
    under_way = {vmcs.IDT_VECTORING: PF | 1 << 12, vmcs.IDT_VECTORING_ERROR_CODE: 6}
    seen = machine.exit(ExitReason.EPT_VIOLATION, gpa=HOLE, qualification=1, vmcs=under_way)
    assert seen is not None
    machine.enter()
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == PF
    assert machine.vp.vmcs[vmcs.ENTRY_ERROR_CODE] == 6


def test_ept_misconfiguration_of_a_private_address_halts_the_module(machine: GuestMachine) -> None:
    shared = 1 << 47
    seen = machine.exit(ExitReason.EPT_MISCONFIGURATION, gpa=shared | 0x1234)
    assert seen is not None
    assert (seen.rax, seen.r8) == (49, shared | 0x1000)
    machine.enter()
    with pytest.raises(ModuleHalt, match="private"):
        machine.exit(ExitReason.EPT_MISCONFIGURATION, gpa=DATA)


# -- NMIs and debuggers ------------------------------------------------------------------------------------------------


def test_an_nmi_waits_for_its_window_and_for_the_ve_to_be_handled(machine: GuestMachine) -> None:
    machine.vp.tdvps.pend_nmi = True
    machine.exit(ExitReason.HLT_INSTRUCTION)
    assert not machine.vp.vmcs[vmcs.PROCBASED_CTLS] & vmcs.NMI_WINDOW_EXITING
    machine.tdcall(GuestLeaf.TDG_VP_VEINFO_GET)
    assert machine.vp.vmcs[vmcs.PROCBASED_CTLS] & vmcs.NMI_WINDOW_EXITING
    assert machine.exit(ExitReason.NMI_WINDOW, instruction_length=0) is None
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] == 0x8000_0202
    assert not machine.vp.vmcs[vmcs.PROCBASED_CTLS] & vmcs.NMI_WINDOW_EXITING
    assert not machine.vp.tdvps.pend_nmi


def test_the_debugger_sees_the_exceptions_it_asked_for() -> None:
    machine = GuestMachine(DEBUG)
    machine.vp.vmcs[vmcs.EXCEPTION_BITMAP] = 1 << vmcs.VECTOR_UD
    assert machine.exit(ExitReason.HLT_INSTRUCTION) is None
    seen = machine.exit(ExitReason.VMXON_INSTRUCTION)
    assert seen is not None
    assert (seen.rax, seen.r9) == (ExitReason.EXCEPTION_OR_NMI, UD)


def test_exceptions_exit_for_debuggers_only() -> None:
    seen = GuestMachine(DEBUG).exit(ExitReason.EXCEPTION_OR_NMI, interruption=GP)
    assert seen is not None
    assert (seen.rax, seen.r9) == (0, GP)
    with pytest.raises(ModuleHalt, match="exception"):
        GuestMachine().exit(ExitReason.EXCEPTION_OR_NMI, interruption=GP)


def test_the_model_cpu_has_the_features_that_these_tests_use() -> None:
    assert recording_cpu().cpuid(0xD).eax & 0xE7 == 0xE7
