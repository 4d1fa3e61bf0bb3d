"""Interface functions that read and write fields: registers, walking through ids, locks, and whom they answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from septum.arch import vmcs
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.metadata import NULL_FIELD_ID, Access, Context, FieldId, all_ids, field_table
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.arch.structures import TdAttributes
from septum.core.run import solo_call
from septum.core.trylocks import Mode
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import VmExit
from tests.tdx.machines import PARAMS, Machine

ALL = (1 << 64) - 1
FIRST = Status.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
HOST_READS = (HostLeaf.TDH_MNG_RD, HostLeaf.TDH_VP_RD)
HOST_WRITES = (HostLeaf.TDH_MNG_WR, HostLeaf.TDH_VP_WR)
CONTEXT = {HostLeaf.TDH_MNG_RD: Context.TD, HostLeaf.TDH_VP_RD: Context.VP}
DEBUG_PARAMS = replace(PARAMS, attributes=TdAttributes.DEBUG)
HP_LOCK_TIMEOUT = field_table("td").named("HP_LOCK_TIMEOUT").id
TD_UUID = field_table("td").named("TD_UUID").id
NOTIFY_ENABLES = field_table("td").named("NOTIFY_ENABLES").id
VCPU_INDEX = field_table("vp").named("VCPU_INDEX").id
CPUID_USER_VE = field_table("vp").named("CPUID_USER_VE").id
SHARED_EPTP = FieldId.of(field_code=vmcs.SHARED_EPTP)
#: Locks as the recordings name them -> as the model does.
LOCK_NAMES = {"TDCS.op_state_lock": "OP_STATE"}


class Built:
    """A machine with a TD that can run and its VCPU."""

    def __init__(self, *, debug: bool = False) -> None:
        self.machine = Machine()
        self.tdr, self.tdvpr = self.machine.finalized_td(DEBUG_PARAMS if debug else PARAMS)

    def target(self, leaf: HostLeaf) -> int:
        """RCX of a leaf."""
        return self.tdr if leaf in (HostLeaf.TDH_MNG_RD, HostLeaf.TDH_MNG_WR) else self.tdvpr

    def call(self, leaf: HostLeaf, field_id: int, *, version: int = 0, lp: int = 0, **registers: int) -> Regs:
        """A SEAMCALL on the TD or VCPU."""
        return self.machine.call(leaf, version=version, lp=lp, rcx=self.target(leaf), rdx=field_id, **registers)

    def enter(self, lp: int = 0) -> None:
        """Runs the VCPU."""
        self.machine.call(HostLeaf.TDH_VP_ENTER, lp=lp, rcx=self.tdvpr)
        assert self.machine.module.lps[lp].running == self.tdvpr

    def guest(self, leaf: GuestLeaf, *, version: int = 0, lp: int = 0, **registers: int) -> Regs:
        """A TDCALL of the guest, in 64-bit mode, after which it goes on; its registers afterwards."""
        module = self.machine.module
        fields = module.vp(self.tdvpr).vmcs
        mode = {
            vmcs.GUEST_EFER: fields[vmcs.GUEST_EFER] | 1 << 10,
            vmcs.GUEST_CS_ACCESS_RIGHTS: fields[vmcs.GUEST_CS_ACCESS_RIGHTS] | 1 << 13,
        }
        exit_ = replace(VmExit.tdcall(Regs.of({"rax": leaf | version << 16, **registers})), vmcs=mode)
        assert solo_call(module.td_exit(lp, exit_)) is None
        return Regs.from_tuple(module.vp(self.tdvpr).tdvps.gprs)


@pytest.fixture(scope="module")
def built() -> Built:
    return Built()


@pytest.mark.parametrize("leaf", HOST_READS)
@pytest.mark.parametrize("debug", [False, True])
def test_version_1_leads_through_all_fields(leaf: HostLeaf, debug: bool) -> None:
    built, found = Built(debug=debug), []
    regs = built.call(leaf, NULL_FIELD_ID, version=1)
    assert regs.rax == FIRST
    assert regs.r8 == 0
    while regs.rdx != NULL_FIELD_ID:
        found.append(regs.rdx)
        current = regs.rdx
        regs = built.call(leaf, current, version=1)
        if regs.rax != Status.TDX_SUCCESS:
            # CPUID leaves without a value stop the walk; they are passed by asking for the id behind them.
            assert (regs.rax, regs.r8) == (Status.TDX_METADATA_FIELD_NOT_READABLE, 0)
            regs.rdx = _after(leaf, current, debug)
    assert found == list(all_ids(CONTEXT[leaf], Access.HOST_DEBUG if debug else Access.HOST))


def _after(leaf: HostLeaf, field_id: int, debug: bool) -> int:
    ids = list(all_ids(CONTEXT[leaf], Access.HOST_DEBUG if debug else Access.HOST))
    return ids[ids.index(FieldId(field_id)) + 1]


@pytest.mark.parametrize("leaf", HOST_READS)
def test_version_0_keeps_rdx_and_knows_no_first_field(built: Built, leaf: HostLeaf) -> None:
    for field_id in (NULL_FIELD_ID, NULL_FIELD_ID.replace(context_code=0)):
        regs = built.call(leaf, field_id, r8=5)
        assert (regs.rax, regs.rdx, regs.r8) == (Status.TDX_METADATA_FIELD_ID_INCORRECT, field_id, 0)
    known = TD_UUID if leaf == HostLeaf.TDH_MNG_RD else VCPU_INDEX
    regs = built.call(leaf, known)
    assert (regs.rax, regs.rdx) == (Status.TDX_SUCCESS, known)


@pytest.mark.parametrize("leaf", [*HOST_READS, *HOST_WRITES])
def test_versions_that_do_not_exist(built: Built, leaf: HostLeaf) -> None:
    regs = built.call(leaf, TD_UUID, version=2, r8=5)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)
    writes = leaf in HOST_WRITES
    assert (regs.rdx, regs.r8) == ((TD_UUID, 5) if writes else (NULL_FIELD_ID, 0))


def test_writes_return_the_old_value_and_failures_zero() -> None:
    built = Built()
    first = built.call(HostLeaf.TDH_MNG_WR, HP_LOCK_TIMEOUT, r8=50_000, r9=ALL)
    assert (first.rax, first.r8) == (Status.TDX_SUCCESS, 1_000_000)
    again = built.call(HostLeaf.TDH_MNG_WR, HP_LOCK_TIMEOUT, r8=60_000, r9=ALL)
    assert (again.rax, again.r8) == (Status.TDX_SUCCESS, 50_000)
    for mask, status in ((0, Status.TDX_METADATA_FIELD_NOT_WRITABLE), (1, Status.TDX_METADATA_WR_MASK_NOT_VALID)):
        failed = built.call(HostLeaf.TDH_MNG_WR, HP_LOCK_TIMEOUT, r8=50_000, r9=mask)
        assert (failed.rax, failed.r8) == (status, 0)
    assert built.call(HostLeaf.TDH_MNG_RD, HP_LOCK_TIMEOUT).r8 == 60_000


def test_reading_a_vcpu_associates_it_with_the_lp() -> None:
    built = Built()
    built.machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=built.tdvpr)
    assert built.call(HostLeaf.TDH_VP_RD, VCPU_INDEX, lp=1).rax == Status.TDX_SUCCESS
    assert built.call(HostLeaf.TDH_VP_RD, VCPU_INDEX, lp=0).rax == Status.TDX_VCPU_ASSOCIATED
    assert built.call(HostLeaf.TDH_VP_WR, SHARED_EPTP, lp=0, r8=0x5000, r9=ALL).rax == Status.TDX_VCPU_ASSOCIATED
    assert built.call(HostLeaf.TDH_VP_WR, SHARED_EPTP, lp=1, r8=0x5000, r9=ALL).rax == Status.TDX_SUCCESS
    built.enter(lp=1)
    assert built.call(HostLeaf.TDH_VP_RD, VCPU_INDEX, lp=0).rax == Status.TDX_VCPU_STATE_INCORRECT


def test_a_td_without_keys_has_no_fields() -> None:
    machine = Machine()
    regs = machine.call(HostLeaf.TDH_MNG_RD, version=1, rcx=machine.create_td(), rdx=NULL_FIELD_ID)
    assert (regs.rax, regs.rdx, regs.r8) == (Status.TDX_TD_KEYS_NOT_CONFIGURED, NULL_FIELD_ID, 0)


@pytest.mark.parametrize("name", ["MNG.RD", "MNG.WR", "VP.RD", "VP.WR"])
def test_locks_are_those_of_the_real_module(shared: Path, name: str) -> None:
    built = Built()
    leaf = HostLeaf[f"TDH_{name.replace('.', '_')}"]
    field_id = HP_LOCK_TIMEOUT if leaf in (HostLeaf.TDH_MNG_RD, HostLeaf.TDH_MNG_WR) else SHARED_EPTP
    taken = built.machine.locks_of(leaf, rcx=built.target(leaf), rdx=field_id, r8=0x10000, r9=ALL)
    footprints = json.loads((shared / "contention" / "lock_footprints.json").read_text())
    recorded = next(entry for entry in footprints if entry["op"] == name and entry["td"] == "run")
    modes = {"SH": Mode.SHARED.name, "EX": Mode.EXCLUSIVE.name}
    expected = [(_lock_name(lock["lock"]), modes[lock["mode"]]) for lock in recorded["acquired"]]
    assert [(_lock_name(lock), mode) for lock, mode in taken] == expected


def _lock_name(lock: str) -> str:
    plain = re.sub(r"[\[(].*", "", lock)
    return LOCK_NAMES.get(plain, plain)


# --- the guest's side --------------------------------------------------------------------------------------------


def test_a_guest_reads_and_writes_its_td_and_vcpu() -> None:
    built = Built()
    built.enter()
    first = built.guest(GuestLeaf.TDG_VM_RD, version=1, rdx=NULL_FIELD_ID)
    assert (first.rax, first.rdx) == (FIRST, TD_UUID)
    uuid = built.guest(GuestLeaf.TDG_VM_RD, version=1, rdx=TD_UUID)
    assert (uuid.r8, uuid.rdx) == (built.machine.module.td(built.tdr).tdr.td_uuid[0], TD_UUID + 1)
    assert built.guest(GuestLeaf.TDG_VM_RD, rdx=NULL_FIELD_ID).rax == Status.TDX_METADATA_FIELD_ID_INCORRECT
    written = built.guest(GuestLeaf.TDG_VM_WR, rdx=NOTIFY_ENABLES, r8=1, r9=1)
    assert (written.rax, written.r8) == (Status.TDX_SUCCESS, 0)
    assert built.guest(GuestLeaf.TDG_VM_RD, rdx=NOTIFY_ENABLES).r8 == 1
    assert built.guest(GuestLeaf.TDG_VP_RD, rdx=NULL_FIELD_ID).rax == FIRST
    assert built.guest(GuestLeaf.TDG_VP_WR, rdx=CPUID_USER_VE, r8=1, r9=0xFF).rax == Status.TDX_SUCCESS
    assert built.guest(GuestLeaf.TDG_VP_RD, rdx=CPUID_USER_VE).r8 == 1
    assert built.guest(GuestLeaf.TDG_SYS_RD, rdx=field_table("sys").named("VENDOR_ID").id).r8 == 0x8086


@pytest.mark.parametrize("leaf", [GuestLeaf.TDG_VM_RD, GuestLeaf.TDG_VM_WR, GuestLeaf.TDG_VP_RD, GuestLeaf.TDG_VP_WR])
def test_a_guest_has_only_itself(leaf: GuestLeaf) -> None:
    built = Built()
    built.enter()
    regs = built.guest(leaf, rcx=1, rdx=TD_UUID, r8=5, r9=ALL)
    assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    assert regs.r8 == 0


def test_a_guest_gets_the_list_of_what_it_may_know_in_a_private_page() -> None:
    built = Built()
    machine = built.machine
    page = machine.page()
    machine.ok(HostLeaf.TDH_MEM_PAGE_AUG, rcx=0, rdx=built.tdr, r8=page)
    built.enter()
    assert built.guest(GuestLeaf.TDG_MEM_PAGE_ACCEPT, rcx=0).rax == Status.TDX_SUCCESS
    regs = built.guest(GuestLeaf.TDG_SYS_RDALL, rdx=0, r8=NULL_FIELD_ID)
    assert (regs.rax, regs.r8) == (Status.TDX_SUCCESS, NULL_FIELD_ID)
    header = machine.module.memory.read(page, 16)
    assert 8 < int.from_bytes(header[:2], "little") < 512
    assert int.from_bytes(header[8:], "little") == field_table("sys").named("VENDOR_ID").id
    for wrong in (0x800, 1 << 47):
        regs = built.guest(GuestLeaf.TDG_SYS_RDALL, rdx=wrong, r8=NULL_FIELD_ID)
        assert regs.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
        assert regs.r8 == NULL_FIELD_ID
