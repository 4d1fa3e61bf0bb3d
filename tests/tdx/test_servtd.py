"""TDH.SERVTD.*: binding a service TD."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.tdx.measurement import tee_info_hash
from septum.tdx.servtd import INSTANCE_BINDING, Binding, BindingState, binding_handle, open_handle
from tests.tdx.machines import BUFFER, Machine

U64 = (1 << 64) - 1
IGNORE_ALL = 0x7FF << 32
words = st.integers(0, U64)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def service(machine: Machine) -> int:
    """A service TD that can run."""
    return machine.finalized_td()[0]


def bind(machine: Machine, target: int, service: int, attributes: int = 0) -> int:
    return machine.call(HostLeaf.TDH_SERVTD_BIND, rcx=target, rdx=service, r10=attributes).rax


@given(
    st.integers(0, 2),
    st.integers(0, 0xFFFF),
    words,
    st.tuples(words, words, words, words),
    st.binary(min_size=48, max_size=48),
)
def test_a_binding_survives_packing(state: int, kind: int, attributes: int, uuid: tuple[int, ...], info: bytes) -> None:
    binding = Binding(state, kind, attributes, uuid, info)
    assert len(binding.pack()) == 16
    assert Binding.unpack(binding.pack()) == binding


@given(st.integers(1, (1 << 40) - 1), words)
def test_only_the_service_td_can_open_its_handle(page: int, secret: int) -> None:
    handle = binding_handle(page << 12, 0, (secret, 0, 0, 0))
    assert open_handle(handle, (secret, 0, 0, 0)) == (page << 12, 0)
    assert open_handle(handle, (secret ^ 1 << 20, 0, 0, 0)) != (page << 12, 0)


def test_first_binding_gives_a_handle_and_the_targets_uuid(machine: Machine, service: int) -> None:
    target = machine.td()
    regs = machine.ok(HostLeaf.TDH_SERVTD_BIND, rcx=target, rdx=service)
    td, uuid = machine.module.td(target), machine.module.td(service).tdr.td_uuid
    assert open_handle(regs.rcx, uuid) == (target, 0)
    assert (regs.r10, regs.r11, regs.r12, regs.r13) == td.tdr.td_uuid
    binding = Binding.unpack(td.tdcs.servtd_bindings_table)
    assert binding == Binding(BindingState.BOUND, 0, 0, uuid, tee_info_hash(machine.module.td(service).tdcs))
    assert td.tdcs.servtd_num == 1


def test_servtd_hash_covers_the_binding(machine: Machine, service: int) -> None:
    target = machine.td()
    assert bind(machine, target, service) == Status.TDX_SUCCESS
    machine.create_vcpu(target)
    machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=target)
    info_hash = tee_info_hash(machine.module.td(service).tdcs)
    assert machine.module.td(target).tdcs.servtd_hash == hashlib.sha384(info_hash + bytes(10)).digest()


def test_a_running_td_can_only_be_bound_again(machine: Machine, service: int) -> None:
    never, once = machine.finalized_td()[0], machine.td()
    assert bind(machine, never, service) == Status.TDX_OP_STATE_INCORRECT
    assert bind(machine, once, service) == Status.TDX_SUCCESS
    machine.create_vcpu(once)
    machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=once)
    assert bind(machine, once, service) == Status.TDX_SUCCESS
    assert bind(machine, once, service, IGNORE_ALL) == Status.TDX_SERVTD_ATTR_MISMATCH
    assert machine.module.td(once).tdcs.servtd_num == 1


def test_instance_binding_is_to_one_td_only(machine: Machine, service: int) -> None:
    target, twin = machine.td(), machine.finalized_td()[0]
    for attributes, status in ((0, Status.TDX_SUCCESS), (INSTANCE_BINDING, Status.TDX_SERVTD_UUID_MISMATCH)):
        target = machine.td()
        assert bind(machine, target, service, attributes) == Status.TDX_SUCCESS
        assert bind(machine, target, twin, attributes) == status


def test_late_binding_is_to_what_was_announced(machine: Machine, service: int) -> None:
    module = machine.module
    info_hash = tee_info_hash(module.td(service).tdcs)
    target = machine.td()
    module.memory.write(BUFFER, b"\1" * 48)
    machine.ok(HostLeaf.TDH_SERVTD_PREBIND, rcx=target, rdx=BUFFER)
    assert bind(machine, target, service) == Status.TDX_SERVTD_INFO_HASH_MISMATCH
    module.memory.write(BUFFER, info_hash)
    machine.ok(HostLeaf.TDH_SERVTD_PREBIND, rcx=target, rdx=BUFFER)
    machine.create_vcpu(target)
    machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=target)
    assert bind(machine, target, service) == Status.TDX_SUCCESS
    assert module.td(target).tdcs.servtd_num == 1


def test_what_is_bound_cannot_be_announced(machine: Machine, service: int) -> None:
    target = machine.td()
    assert bind(machine, target, service) == Status.TDX_SUCCESS
    regs = machine.call(HostLeaf.TDH_SERVTD_PREBIND, rcx=target, rdx=BUFFER)
    assert regs.rax == Status.TDX_SERVTD_BOUND
    assert not dict(machine.module.locks)


@pytest.mark.parametrize(
    ("registers", "operand"),
    [
        ({"rdx": BUFFER + 8}, Operand.RDX),
        ({"r8": 1}, Operand.R8),
        ({"r9": 1}, Operand.R9),
        ({"r9": 1 << 16}, Operand.R9),
        ({"r10": 2}, Operand.R10),
        ({"r10": 1 << 43}, Operand.R10),
    ],
)
def test_wrong_operands(machine: Machine, registers: dict[str, int], operand: Operand) -> None:
    given = {"rcx": machine.td(), "rdx": BUFFER} | registers
    regs = machine.call(HostLeaf.TDH_SERVTD_PREBIND, **given)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, operand)


def test_a_td_does_not_serve_itself(machine: Machine, service: int) -> None:
    regs = machine.call(HostLeaf.TDH_SERVTD_BIND, rcx=service, rdx=service, r10=1, r11=1, r12=1, r13=1)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
    assert (regs.rcx, regs.r10, regs.r11, regs.r12, regs.r13) == (0, 0, 0, 0, 0)


def test_a_td_that_is_not_final_cannot_serve(machine: Machine) -> None:
    assert bind(machine, machine.td(), machine.td()) == Status.TDX_OP_STATE_INCORRECT


def test_locks_of_both_tds_are_taken(machine: Machine, service: int) -> None:
    target = machine.td()
    taken = machine.locks_of(HostLeaf.TDH_SERVTD_BIND, rcx=target, rdx=service)
    tdr = ["PAMT_1G", "PAMT_2M", "PAMT_4K", "OP_STATE"]
    assert [name.partition("[")[0] for name, _ in taken] == [*tdr, *tdr, "SERVTD_BINDINGS", "RTMR"]
    assert taken[-2][1] == "EXCLUSIVE"
    assert {mode for name, mode in taken if name != "SERVTD_BINDINGS"} == {"SHARED"}
    assert not dict(machine.module.locks)
