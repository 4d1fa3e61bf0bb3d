"""TD exits: what the host and the guest find, and the defences against stepping."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import vmcs
from septum.arch.exits import BUS_LOCK_PREEMPTED, ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.op_state import LastExit, VcpuState
from septum.arch.operands import Operand
from septum.arch.pages import page_info
from septum.arch.status import Status, with_operand
from septum.arch.structures import ConfigFlags, TdAttributes
from septum.core.run import solo_call
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import GPR_NAMES, Regs
from septum.tdx.stepping import log_ept_violation
from septum.tdx.vm_exit import VmExit
from tests.tdx.guests import DATA, HOLE, GuestMachine
from tests.tdx.machines import PARAMS

VMCALL = GuestLeaf.TDG_VP_VMCALL
NUMBERS = {"rdx": 2, "rbx": 3, "rbp": 5, "rsi": 6, "rdi": 7} | {f"r{n}": n for n in range(8, 16)}
PASSED = sum(1 << n for n in NUMBERS.values())
U64 = st.integers(0, (1 << 64) - 1)
REGISTERS = st.lists(U64, min_size=15, max_size=15)
INTERRUPT: dict[str, Any] = {"reason": ExitReason.INTERRUPT, "interruption": 0x8000_0020}
DEBUG = dataclasses.replace(PARAMS, attributes=TdAttributes.DEBUG)


@pytest.fixture(scope="module")
def caller() -> GuestMachine:
    """A guest that only makes TDG.VP.VMCALLs, and a host that enters again."""
    return GuestMachine()


@given(mask=st.integers(0, PASSED), guest=REGISTERS, host=REGISTERS)
def test_vmcall_passes_the_registers_that_the_mask_selects(
    caller: GuestMachine, mask: int, guest: list[int], host: list[int]
) -> None:
    mask &= PASSED
    sent = dict(zip(GPR_NAMES, guest, strict=True)) | {"rax": VMCALL, "rcx": mask}
    seen = caller.tdcall_out(**{"leaf": VMCALL, **{n: v for n, v in sent.items() if n != "rax"}})
    assert (seen.rax, seen.rcx) == (ExitReason.TDCALL, mask)
    for name, number in NUMBERS.items():
        assert getattr(seen, name) == (sent[name] if mask >> number & 1 else 0), name
    answer = dict(zip(NUMBERS, host, strict=False))
    caller.enter(**answer)
    back = caller.gprs.values()
    assert (back["rax"], back["rcx"]) == (Status.TDX_SUCCESS, mask)
    for name, number in NUMBERS.items():
        assert back[name] == (answer[name] if mask >> number & 1 else sent[name]), name


@given(bits=U64.filter(lambda bits: bits & ~(PASSED | 0xFFFF_0000)))
def test_vmcall_refuses_masks_with_rax_rcx_rsp_or_high_bits(caller: GuestMachine, bits: int) -> None:
    after = caller.tdcall(VMCALL, rcx=bits)
    assert after.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)


def test_rbp_stays_the_hosts_if_the_td_is_so_configured() -> None:
    machine = GuestMachine(dataclasses.replace(PARAMS, config_flags=ConfigFlags.NO_RBP_MOD))
    assert machine.tdcall(VMCALL, rcx=1 << 5).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    machine.interrupt()
    machine.enter(rbp=0x1234)
    assert machine.tdcall_out(VMCALL, rbp=0x5678).rbp == 0x1234


def test_rip_moves_past_vmcall_but_not_past_an_interrupted_instruction() -> None:
    machine = GuestMachine()
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    machine.interrupt()
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip
    machine.enter()
    machine.tdcall_out(VMCALL)
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip + 4


def test_an_interrupt_leaves_the_td_and_its_registers_come_back() -> None:
    machine = GuestMachine()
    mine = Regs.of({name: n for n, name in enumerate(GPR_NAMES, 100)})
    seen = machine.interrupt(gprs=mine, qualification=5)
    assert {name: value for name, value in seen.values().items() if value} == {"rax": 1, "rcx": 5, "r9": 0x8000_0020}
    assert machine.vp.tdvps.vcpu_state == VcpuState.READY
    machine.enter(rdx=1, r12=2)
    assert machine.gprs.values() == mine.values()


def test_a_triple_fault_ends_the_vcpu_only() -> None:
    machine = GuestMachine(vcpus=2)
    seen = machine.exit(ExitReason.TRIPLE_FAULT)
    assert seen is not None
    assert seen.rax == Status.TDX_NON_RECOVERABLE_VCPU | 2
    assert machine.enter().rax == Status.TDX_VCPU_STATE_INCORRECT
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=machine.vps[0])
    machine.enter(vcpu=1)
    assert machine.module.lps[0].running == machine.vps[1]


def test_a_machine_check_ends_the_td_on_all_lps() -> None:
    machine = GuestMachine(vcpus=2)
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=machine.vps[1])
    machine.enter(vcpu=1, lp=1)
    machine_check = 0x8000_0300 | vmcs.VECTOR_MC
    seen = machine.exit(ExitReason.EXCEPTION_OR_NMI, interruption=machine_check)
    dead = Status.TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE | 1 << 61
    assert seen is not None
    assert seen.rax == dead
    assert machine.of_td.tdr.fatal
    assert machine.interrupt(lp=1).rax == dead | 1
    assert machine.enter().rax == Status.TDX_TD_FATAL


@pytest.mark.parametrize("reason", [ExitReason.RDTSC_INSTRUCTION, ExitReason.PAUSE_INSTRUCTION, ExitReason.DR_ACCESS])
def test_exits_that_only_a_debugger_asks_for(reason: ExitReason) -> None:
    seen = GuestMachine().exit(reason)
    assert seen is not None
    assert seen.rax == Status.TDX_NON_RECOVERABLE_TD | 1 << 61 | reason
    seen = GuestMachine(DEBUG).exit(reason)
    assert seen is not None
    assert seen.rax == reason


def test_a_corrupted_exit_reason_halts_the_module() -> None:
    machine = GuestMachine()
    with pytest.raises(ModuleHalt, match="exit reason"):
        machine.exit(1 << 16 | ExitReason.HLT_INSTRUCTION)
    with pytest.raises(ModuleHalt):
        machine.call(HostLeaf.TDH_SYS_INFO, lp=1)


def test_a_bus_lock_is_reported_once_with_the_next_td_exit() -> None:
    machine = GuestMachine()
    seen = machine.exit(BUS_LOCK_PREEMPTED | ExitReason.HLT_INSTRUCTION)
    assert seen is not None
    assert seen.rax == BUS_LOCK_PREEMPTED | ExitReason.BUS_LOCK
    machine.enter()
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] & vmcs.VECTOR_MASK == vmcs.VECTOR_VE
    assert machine.interrupt().rax == 1


def test_a_host_that_never_comes_back_for_a_lock_is_told() -> None:
    machine = GuestMachine()
    module, td = machine.module, machine.of_td
    key = ("rtmr", td.pa)
    module.locks[key] = td.rtmr_lock.HP
    busy = with_operand(Status.TDX_OPERAND_BUSY, Operand.RTMR)
    assert machine.tdcall(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA).rax == busy
    module.hardware.inputs.tsc += td.tdcs.hp_lock_timeout // 2
    assert machine.tdcall(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA).rax == busy
    module.hardware.inputs.tsc += td.tdcs.hp_lock_timeout // 2
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    seen = machine.tdcall_out(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA)
    assert seen.rax == Status.TDX_HOST_PRIORITY_BUSY_TIMEOUT
    assert machine.gprs.rax == busy
    assert machine.vp.vmcs[vmcs.GUEST_RIP] == rip + 4
    assert machine.vp.tdvps.last_td_exit == LastExit.ASYNC_TRAP


def test_success_in_between_starts_the_wait_anew() -> None:
    machine = GuestMachine()
    module, td = machine.module, machine.of_td
    module.locks["rtmr", td.pa] = td.rtmr_lock.HP
    machine.tdcall(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA)
    machine.tdcall(GuestLeaf.TDG_VP_INFO)
    module.hardware.inputs.tsc += 2 * td.tdcs.hp_lock_timeout
    assert machine.tdcall(GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA).rax >> 32 == Status.TDX_OPERAND_BUSY >> 32


# -- zero-step ---------------------------------------------------------------------------------------------------------


def violate(machine: GuestMachine, gpa: int = HOLE) -> Regs:
    """An access to nothing, reported to the host."""
    seen = machine.exit(ExitReason.EPT_VIOLATION, gpa=gpa | 0x123, qualification=0x82)
    assert seen is not None
    assert (seen.rax, seen.rcx, seen.r8) == (48, 2, gpa)
    return seen


def suspect(machine: GuestMachine) -> None:
    """EPT violations at one RIP, as many as arouse suspicion."""
    for _ in range(6):
        violate(machine)
        machine.enter()
        assert machine.module.lps[0].running
    violate(machine)


def suspects(machine: GuestMachine) -> tuple[int, ...]:
    """The addresses in the list of the first VCPU."""
    tdvps = machine.vp.tdvps
    return tdvps.last_epf_gpa_list[: tdvps.last_epf_gpa_list_idx]


def test_the_eighth_entry_without_progress_is_refused_until_the_page_is_accepted() -> None:
    machine = GuestMachine(vcpus=2)
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=machine.vps[1])
    machine.enter(vcpu=1, lp=1)
    suspect(machine)
    assert suspects(machine) == (HOLE | 0x123,)
    refused = machine.enter(rbp=9, r12=7)
    assert {n: v for n, v in refused.values().items() if v} == {"rax": 48, "rcx": 2, "r8": HOLE, "rbp": 9}
    assert not machine.module.lps[0].running
    assert sum(machine.of_td.tdcs.refcount) == 1
    machine.ok(HostLeaf.TDH_MEM_PAGE_AUG, rcx=page_info(HOLE), rdx=machine.tdr, r8=machine.page())
    assert machine.enter().rax == 48, "a pending page still faults"
    assert machine.tdcall(GuestLeaf.TDG_MEM_PAGE_ACCEPT, rcx=HOLE, lp=1, vcpu=1).rax == 0
    machine.enter()
    assert machine.module.lps[0].running == machine.vps[0]
    machine.interrupt()
    machine.interrupt(lp=1)
    assert not machine.module.locks


def test_suspicion_takes_the_tree_lock_exclusively() -> None:
    machine = GuestMachine()
    suspect(machine)
    td = machine.of_td
    taken = [text for text, _ in machine.call_locks(HostLeaf.TDH_VP_ENTER, rcx=machine.vps[0])]
    assert "+SEPT_TREE" in taken
    assert taken.index("-SEPT_TREE") < taken.index("-OP_STATE")
    machine.module.locks[td.secure_ept_lock.key] = td.secure_ept_lock.READER
    assert machine.enter().rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE)
    assert td.tdcs.refcount == (0, 0)


def test_progress_ends_the_suspicion() -> None:
    machine = GuestMachine()
    suspect(machine)
    machine.vp.tdvps.last_epf_gpa_list = (DATA, *machine.vp.tdvps.last_epf_gpa_list[1:])
    machine.enter()
    moved = {vmcs.GUEST_RIP: machine.vp.vmcs[vmcs.GUEST_RIP] + 3}
    machine.exit(ExitReason.EPT_VIOLATION, gpa=HOLE, qualification=2, vmcs=moved)
    assert machine.vp.tdvps.possibly_epf_stepping == 1
    assert suspects(machine) == ()


@given(gpas=st.lists(st.integers(1, 40), min_size=6, max_size=60))
def test_the_list_holds_each_address_once_and_at_most_thirty_two(gpas: list[int]) -> None:
    machine = GuestMachine()
    for gpa in gpas:
        log_ept_violation(machine.module.lps[0], machine.vp, HOLE + 0x1000 * gpa)
    listed = list(dict.fromkeys(HOLE + 0x1000 * gpa for gpa in gpas[6:]))[:32]
    assert list(suspects(machine)) == listed


def test_shared_addresses_arouse_no_suspicion() -> None:
    machine = GuestMachine()
    for _ in range(12):
        assert violate(machine, 1 << 47 | HOLE)
        machine.enter()
    assert machine.vp.tdvps.possibly_epf_stepping == 0


def test_a_td_can_ask_to_be_told_of_the_suspicion() -> None:
    machine = GuestMachine()
    machine.of_td.tdcs.notify_enables = 1
    suspect(machine)
    machine.vp.tdvps.last_epf_gpa_list = (DATA, *machine.vp.tdvps.last_epf_gpa_list[1:])
    machine.enter()
    info = machine.vp.tdvps.ve_info
    assert info.valid
    assert (info.exit_reason, info.gpa) == (ExitReason.EPT_VIOLATION, HOLE | 0x123)
    assert machine.vp.vmcs[vmcs.ENTRY_INTERRUPTION] & vmcs.VECTOR_MASK == vmcs.VECTOR_VE


# -- single-step -------------------------------------------------------------------------------------------------------


def test_an_early_interrupt_makes_the_module_step() -> None:
    machine = GuestMachine()
    machine.interrupt()
    machine.module.hardware.inputs.tsc_step = 100
    machine.enter()
    lp, steps = machine.module.lps[0], 0
    assert machine.exit(**INTERRUPT) is None
    assert lp.is_single_stepping
    assert machine.vp.vmcs[vmcs.PROCBASED_CTLS] & vmcs.MONITOR_TRAP_FLAG
    while lp.is_single_stepping:
        assert machine.exit(ExitReason.MTF) is None
        steps += 1
        assert steps <= 32
    assert not machine.vp.vmcs[vmcs.PROCBASED_CTLS] & vmcs.MONITOR_TRAP_FLAG
    seen = machine.exit(**INTERRUPT)
    assert seen is not None
    assert seen.rax == ExitReason.INTERRUPT


def test_an_interrupt_after_some_time_is_just_an_interrupt() -> None:
    machine = GuestMachine()
    machine.module.hardware.inputs.tsc += 5000
    assert machine.exit(**INTERRUPT) is not None
    machine.enter()
    rip = machine.vp.vmcs[vmcs.GUEST_RIP]
    assert machine.exit(**INTERRUPT, vmcs={vmcs.GUEST_RIP: rip + 33}) is not None, "soon, but far from where it began"


def test_where_time_stands_still_an_exit_can_say_that_the_guest_ran_long() -> None:
    machine = GuestMachine()
    machine.module.hardware.inputs.tsc_step = 0
    machine.interrupt()
    machine.enter()
    seen = solo_call(machine.module.td_exit(0, VmExit.interrupt(0x20)))
    assert seen is not None
    assert (seen.rax, seen.r9) == (ExitReason.INTERRUPT, 0x8000_0020)


def test_no_stepping_without_a_local_apic() -> None:
    machine = GuestMachine()
    machine.interrupt()
    machine.module.hardware.inputs.tsc_step = 100
    machine.enter()
    machine.module.hardware.msrs[0, 0x1B] = 0
    seen = machine.exit(**INTERRUPT)
    assert seen is not None
    assert seen.rax >> 32 == (Status.TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE | 1 << 61) >> 32


def test_locks_of_guest_calls() -> None:
    machine = GuestMachine()
    machine.tdcall(GuestLeaf.TDG_VP_INFO)
    exit_ = VmExit.tdcall(Regs(rax=GuestLeaf.TDG_MR_RTMR_EXTEND, rcx=DATA))
    assert machine.exit_locks(exit_) == [("+RTMR", "EXCLUSIVE"), ("-RTMR", "EXCLUSIVE")]
    exit_ = VmExit.tdcall(Regs(rax=GuestLeaf.TDG_MR_REPORT, rcx=DATA, rdx=DATA))
    assert machine.exit_locks(exit_) == [("+RTMR", "SHARED"), ("-RTMR", "SHARED")]
