"""A service TD reads and writes the TD that it is bound to; what the host gets when the binding is not right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from septum.arch import vmcs
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.metadata import NULL_FIELD_ID, Access, Context, all_ids, field_table
from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import Status, with_operand
from septum.core.run import solo_call
from septum.core.trylocks import SharexHp
from septum.tdx.registers import Regs
from septum.tdx.servtd import Binding
from septum.tdx.vm_exit import VmExit
from tests.tdx.machines import Machine

ALL = (1 << 64) - 1
READ, WRITE = GuestLeaf.TDG_SERVTD_RD, GuestLeaf.TDG_SERVTD_WR
XFAM = field_table("td").named("XFAM").id
MIG_DEC_KEY = field_table("td").named("MIG_DEC_KEY").id
TRAP = Status.TDX_CROSS_TD_TRAP


class Bound:
    """A running service TD that is bound to a TD still being built."""

    def __init__(self) -> None:
        self.machine = Machine()
        service, self.tdvpr = self.machine.finalized_td()
        self.target_pa = self.machine.td()
        bind = self.machine.ok(HostLeaf.TDH_SERVTD_BIND, rcx=self.target_pa, rdx=service)
        self.handle = bind.rcx
        self.uuid = (bind.r10, bind.r11, bind.r12, bind.r13)
        self.target = self.machine.module.td(self.target_pa)
        self.service = self.machine.module.td(service)
        self.machine.call(HostLeaf.TDH_VP_ENTER, rcx=self.tdvpr)

    def call(self, leaf: GuestLeaf, uuid: tuple[int, ...] | None = None, **registers: int) -> tuple[Regs, Regs | None]:
        """A TDCALL, with the right handle and UUID unless told otherwise.

        Returns the guest's registers, and the host's if the TD was left.
        """
        r10, r11, r12, r13 = uuid or self.uuid
        given = {"rax": leaf, "rcx": self.handle, "r10": r10, "r11": r11, "r12": r12, "r13": r13, **registers}
        module = self.machine.module
        mode = {vmcs.GUEST_EFER: 0xD01, vmcs.GUEST_CS_ACCESS_RIGHTS: 0xA09B}
        host = solo_call(module.td_exit(0, replace(VmExit.tdcall(Regs.of(given)), vmcs=mode)))
        return Regs.from_tuple(module.vp(self.tdvpr).tdvps.gprs), host

    def host_gets(self, status: int, uuid: tuple[int, ...] | None = None, **registers: int) -> None:
        """Checks that a read ends as a cross-TD exit with a status."""
        guest, host = self.call(READ, uuid, rdx=XFAM, **registers)
        assert host is not None
        assert (host.rax, host.rdx, host.r8) == (TRAP, status, self.target_pa)
        assert guest.rax == status


def test_a_bound_service_td_reads_fields_and_writes_keys() -> None:
    bound = Bound()
    first, _ = bound.call(READ, rdx=NULL_FIELD_ID)
    assert first.rax == Status.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    assert first.rdx == next(all_ids(Context.TD, Access.SERVICE_TD))
    xfam, _ = bound.call(READ, rdx=XFAM)
    assert (xfam.rax, xfam.r8) == (Status.TDX_SUCCESS, bound.target.tdcs.xfam)
    assert xfam.rdx not in (XFAM, NULL_FIELD_ID)
    written, _ = bound.call(WRITE, rdx=MIG_DEC_KEY, r8=1234, r9=ALL)
    assert (written.rax, written.rdx, written.r8) == (Status.TDX_SUCCESS, MIG_DEC_KEY, 0)
    assert bound.target.tdcs.mig_dec_key[0] == 1234
    assert bound.service.tdcs.mig_dec_key[0] == 0
    refused, _ = bound.call(WRITE, rdx=XFAM, r8=1, r9=1)
    assert refused.rax == Status.TDX_METADATA_FIELD_NOT_WRITABLE
    assert all(word & ~SharexHp.HP == 0 for key, word in _locks(bound) if "bindings" in str(key))


def _locks(bound: Bound) -> list[tuple[object, int]]:
    return list(dict.items(bound.machine.module.locks))


def test_a_handle_names_slot_0() -> None:
    bound = Bound()
    regs, host = bound.call(READ, rdx=XFAM, rcx=bound.handle + 1)
    assert host is None
    assert (regs.rax, regs.rdx, regs.r8) == (
        with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX), NULL_FIELD_ID, 0,
    )  # fmt: skip


def test_the_caller_says_which_td_it_means() -> None:
    bound = Bound()
    regs, _ = bound.call(READ, (1, 2, 3, 4), rdx=XFAM)
    assert regs.rax == Status.TDX_TARGET_UUID_MISMATCH
    # A TD that it was bound to before an import has a new UUID.
    bound.target.tdcs.pre_import_uuid = (1, 2, 3, 4)
    regs, _ = bound.call(READ, (1, 2, 3, 4), rdx=XFAM)
    assert regs.rax == Status.TDX_TARGET_UUID_UPDATED
    assert (regs.r10, regs.r11, regs.r12, regs.r13) == bound.uuid


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"state": 1}, Status.TDX_SERVTD_NOT_BOUND),
        ({"uuid": (1, 2, 3, 4)}, Status.TDX_SERVTD_UUID_MISMATCH),
        ({"info_hash": bytes(48)}, Status.TDX_SERVTD_INFO_HASH_MISMATCH),
    ],
)
def test_a_wrong_binding_is_the_hosts_affair(change: dict[str, object], status: Status) -> None:
    bound = Bound()
    binding = Binding.unpack(bound.target.tdcs.servtd_bindings_table)
    bound.target.tdcs.servtd_bindings_table = replace(binding, **change).pack()  # type: ignore[arg-type]
    bound.host_gets(status)


def test_a_target_in_the_wrong_state_is_the_hosts_affair() -> None:
    bound = Bound()
    bound.target.tdr.fatal = True
    bound.host_gets(Status.TDX_TD_FATAL)
    bound = Bound()
    bound.target.tdcs.op_state = OpState.POST_EXPORT
    regs, host = bound.call(WRITE, rdx=MIG_DEC_KEY, r8=1, r9=ALL)
    assert host is not None
    assert (host.rax, regs.rax) == (TRAP, Status.TDX_OP_STATE_INCORRECT)


def test_busy_goes_to_the_guest_and_host_priority_to_the_host() -> None:
    bound = Bound()
    lock = bound.target.op_state_lock
    lock.words[lock.key] = SharexHp.EX
    regs, host = bound.call(READ, rdx=XFAM)
    assert host is None
    assert regs.rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.OP_STATE)
    lock.words[lock.key] = SharexHp.HP
    bound.host_gets(with_operand(Status.TDX_OPERAND_BUSY_HOST_PRIORITY, Operand.OP_STATE))
