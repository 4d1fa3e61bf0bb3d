"""TDH.MR.*: MRTD as the hash of what was added and measured; and hashes as values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, Level, page_info
from septum.arch.sept import FREE_ENTRY
from septum.arch.status import Status, with_operand
from septum.tdx.measurement import (
    CHUNK_SIZE,
    Sha384,
    extend_record,
    extend_rtmr,
    page_add_record,
    td_info,
    tee_info_hash,
)
from septum.tdx.state.td import Tdcs
from tests.tdx.machines import Machine

NOT_PRESENT = with_operand(Status.TDX_EPT_ENTRY_NOT_PRESENT, Operand.RCX)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def tdr(machine: Machine) -> int:
    """A TD that is being built, with tables for its first 2 MiB."""
    tdr = machine.td()
    machine.add_tables(tdr, 0)
    return tdr


# -- values ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_running_hash_is_that_of_all_its_parts(parts: list[bytes]) -> None:
    running = Sha384()
    for part in parts:
        running = running.update(part)
    assert running.digest() == hashlib.sha384(b"".join(parts)).digest()
    assert running == Sha384().update(b"".join(parts))
    assert hash(running) == hash(Sha384().update(b"".join(parts)))


@given(st.binary(min_size=1, max_size=100))
def test_running_hash_is_never_changed(part: bytes) -> None:
    before = Sha384().update(b"x")
    digest = before.digest()
    after = before.update(part)
    assert before.digest() == digest != after.digest()
    assert before != after
    assert before != digest


def test_records_have_the_documented_form() -> None:
    assert page_add_record(0x123000) == b"MEM.PAGE.ADD".ljust(16, b"\0") + (0x123000).to_bytes(112, "little")
    chunk = bytes(range(256))
    assert extend_record(0x100, chunk) == b"MR.EXTEND".ljust(16, b"\0") + (0x100).to_bytes(112, "little") + chunk
    assert extend_rtmr(bytes(48), b"\1" * 48) == hashlib.sha384(bytes(48) + b"\1" * 48).digest()


@given(st.integers(0, (1 << 11) - 1))
def test_ignored_fields_of_tdinfo_are_zero(ignore: int) -> None:
    rtmr = tuple(bytes([i + 1]) * 48 for i in range(4))
    tdcs = Tdcs("TDCS", attributes=1, xfam=3, mrtd=b"m" * 48, rtmr=rtmr, servtd_hash=b"s" * 48)
    tdcs.mrconfigid, tdcs.mrowner, tdcs.mrownerconfig = b"c" * 48, b"o" * 48, b"p" * 48
    info = td_info(tdcs, ignore)
    fields = [info.attributes, info.xfam, info.mr_td, info.mr_config_id, info.mr_owner, info.mr_owner_config]
    for bit, value in enumerate([*fields, *info.rtmrs, info.servtd_hash]):
        is_zero = not any(value) if isinstance(value, bytes) else value == 0
        assert is_zero == bool(ignore >> bit & 1)


def test_hash_of_tdinfo_is_kept_until_an_rtmr_changes() -> None:
    tdcs = Tdcs("TDCS", xfam=3)
    first = tee_info_hash(tdcs)
    assert first == hashlib.sha384(td_info(tdcs).pack()).digest()
    tdcs.xfam = 7
    assert tee_info_hash(tdcs) == first
    assert tee_info_hash(tdcs, ignore=1) == hashlib.sha384(td_info(tdcs, 1).pack()).digest()
    tdcs.last_teeinfo_hash_valid = False
    assert tee_info_hash(tdcs) == hashlib.sha384(td_info(tdcs).pack()).digest() != first


# -- TDH.MR.EXTEND and FINALIZE --------------------------------------------------------------------------------------


def test_mrtd_is_the_hash_of_added_and_measured_pages(machine: Machine, tdr: int) -> None:
    expected = hashlib.sha384()
    for number in range(3):
        gpa, content = number * PAGE_4K, bytes([number]) * 2000 + b"end"
        machine.add_page(tdr, gpa, content)
        expected.update(page_add_record(gpa))
        for chunk in range(gpa, gpa + PAGE_4K, CHUNK_SIZE) if number else ():
            regs = machine.ok(HostLeaf.TDH_MR_EXTEND, rcx=chunk, rdx=tdr)
            assert (regs.rcx, regs.rdx) == (0, 0)
            whole = content.ljust(PAGE_4K, b"\0")
            expected.update(extend_record(chunk, whole[chunk - gpa : chunk - gpa + CHUNK_SIZE]))
    machine.create_vcpu(tdr)
    tdcs = machine.module.td(tdr).tdcs
    assert tdcs.mrtd == bytes(48)
    machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=tdr)
    assert tdcs.mrtd == expected.digest()
    assert tdcs.op_state == OpState.RUNNABLE
    assert tdcs.servtd_hash == bytes(48)


@pytest.mark.parametrize("gpa", [0x80, 0xFF, 1 << 47, 1 << 51, 1 << 52, 1 << 63])
def test_extend_wants_a_private_gpa_at_a_chunk(machine: Machine, tdr: int, gpa: int) -> None:
    regs = machine.call(HostLeaf.TDH_MR_EXTEND, rcx=gpa, rdx=tdr)
    assert (regs.rax, regs.rcx, regs.rdx) == (with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX), 0, 0)


def test_extend_tells_where_nothing_is_mapped(machine: Machine, tdr: int) -> None:
    free = machine.call(HostLeaf.TDH_MR_EXTEND, rcx=0x1000, rdx=tdr)
    assert (free.rax, free.rcx, free.rdx) == (NOT_PRESENT, FREE_ENTRY & 1 << 63, Level.PT)
    no_table = machine.call(HostLeaf.TDH_MR_EXTEND, rcx=1 << 30, rdx=tdr)
    assert (no_table.rax, no_table.rdx) == (NOT_PRESENT, Level.PDPT)


def test_pending_and_blocked_pages_cannot_be_measured(machine: Machine, tdr: int) -> None:
    machine.ok(HostLeaf.TDH_MEM_PAGE_AUG, rcx=0x1000, rdx=tdr, r8=machine.page())
    pending = machine.call(HostLeaf.TDH_MR_EXTEND, rcx=0x1000, rdx=tdr)
    assert (pending.rax, pending.rdx >> 8) == (NOT_PRESENT, 2)
    machine.add_page(tdr, 0x2000)
    machine.ok(HostLeaf.TDH_MEM_RANGE_BLOCK, rcx=page_info(0x2000), rdx=tdr)
    blocked = machine.call(HostLeaf.TDH_MR_EXTEND, rcx=0x2000, rdx=tdr)
    assert (blocked.rax, blocked.rdx >> 8) == (NOT_PRESENT, 1)


def test_finalize_wants_a_vcpu_and_comes_once(machine: Machine, tdr: int) -> None:
    assert machine.call(HostLeaf.TDH_MR_FINALIZE, rcx=tdr).rax == Status.TDX_NO_VCPUS
    machine.add_page(tdr, 0)
    machine.create_vcpu(tdr)
    machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=tdr)
    for leaf, registers in ((HostLeaf.TDH_MR_FINALIZE, {"rcx": tdr}), (HostLeaf.TDH_MR_EXTEND, {"rdx": tdr})):
        assert machine.call(leaf, **registers).rax == Status.TDX_OP_STATE_INCORRECT


def test_measuring_locks_the_tdr_alone(machine: Machine, tdr: int, shared: Path) -> None:
    machine.add_page(tdr, 0)
    machine.create_vcpu(tdr)
    recorded = json.loads((shared / "contention" / "lock_footprints.json").read_text())
    for leaf, name, registers in (
        (HostLeaf.TDH_MR_EXTEND, "TDH.MR.EXTEND", {"rcx": 0, "rdx": tdr}),
        (HostLeaf.TDH_MR_FINALIZE, "TDH.MR.FINALIZE", {"rcx": tdr}),
    ):
        entry = next(e for e in recorded if e["leaf"] == name and e["status"] == "TDX_SUCCESS")
        taken = [lock.partition("[")[0] for lock, _ in machine.locks_of(leaf, **registers)]
        assert taken == [a["short"].partition("[")[0] for a in entry["acquired"]]
    assert not dict(machine.module.locks)
