"""A TD that runs, for tests of what happens when it stops."""

from __future__ import annotations

from typing import Any

from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.pages import PAGE_4K, page_info
from septum.arch.structures import TdParams
from septum.core.run import run, solo_call
from septum.core.steps import CALLS, Program, Task
from septum.core.trylocks import Taken
from septum.tdx.module import Module
from septum.tdx.registers import Regs
from septum.tdx.state.td import Td
from septum.tdx.state.vp import Vp
from septum.tdx.vm_exit import VmExit
from tests.tdx.machines import PARAMS, Machine

LONG_MODE = {0x2806: 0xD01, 0x4816: 0xA09B}
"""EFER and the access rights of CS of a guest in 64-bit mode."""
LONG_AFTER = 100_000
"""TSC ticks after which an interrupt is not taken for single-stepping."""
DATA = 0x1000
"""A page of the guest's that is mapped."""
PENDING = 0x2000
"""A page that the host has added and the guest has not accepted."""
HOLE = 0x3000
"""An address with nothing behind it."""


class GuestMachine(Machine):
    """A machine with a TD of one VCPU, which runs on LP 0."""

    def __init__(self, params: TdParams = PARAMS, *, vcpus: int = 1, features: frozenset[str] = frozenset()) -> None:
        super().__init__(features=features)
        self.tdr = self.td_of(params, vcpus)
        self.vps: list[int] = self._vps
        self.enter()

    def td_of(self, params: TdParams, vcpus: int) -> int:
        """The TD with its pages."""
        tdr = self.td(params)
        self.add_tables(tdr, 0)
        self.data_pa = self.add_page(tdr, DATA)
        self._vps = [self.create_vcpu(tdr) for _ in range(vcpus)]
        self.ok(HostLeaf.TDH_MR_FINALIZE, rcx=tdr)
        self.ok(HostLeaf.TDH_MEM_PAGE_AUG, rcx=page_info(PENDING), rdx=tdr, r8=self.page())
        return tdr

    @property
    def of_td(self) -> Td:
        """The TD."""
        return self.module.td(self.tdr)

    @property
    def vp(self) -> Vp:
        """Its first VCPU."""
        return self.module.vp(self.vps[0])

    @property
    def gprs(self) -> Regs:
        """The registers of its first VCPU."""
        return Regs.from_tuple(self.vp.tdvps.gprs)

    def enter(self, *, vcpu: int = 0, lp: int = 0, flags: int = 0, **registers: int) -> Regs:
        """TDH.VP.ENTER, whatever comes of it."""
        return self.call(HostLeaf.TDH_VP_ENTER, lp=lp, rcx=self.vps[vcpu] | flags, **registers)

    def exit(self, reason: int, *, lp: int = 0, vmcs: dict[int, int] | None = None, **details: Any) -> Regs | None:
        """A VM exit; the host's registers if it left the TD. The guest is in 64-bit mode."""
        gprs = details.pop("gprs", None)
        details.setdefault("instruction_length", 2)
        return solo_call(self.module.td_exit(lp, VmExit(reason, gprs=gprs, vmcs=LONG_MODE | (vmcs or {}), **details)))

    def interrupt(self, *, lp: int = 0, **details: Any) -> Regs:
        """An interrupt for the host, after the guest has run for a while; the host's registers."""
        self.module.hardware.inputs.tsc += LONG_AFTER
        seen = self.exit(ExitReason.INTERRUPT, lp=lp, interruption=0x8000_0020, **details)
        assert seen is not None
        return seen

    def tdcall(self, leaf: int, *, lp: int = 0, vcpu: int = 0, **registers: int) -> Regs:
        """A TDCALL that the guest survives; its registers afterwards."""
        left = self.exit(77, lp=lp, gprs=Regs.of({"rax": leaf, **registers}), instruction_length=4)
        assert left is None, f"the TD was left: {left}"
        return Regs.from_tuple(self.module.vp(self.vps[vcpu]).tdvps.gprs)

    def tdcall_out(self, leaf: int, **registers: int) -> Regs:
        """A TDCALL that leaves the TD; the host's registers."""
        left = self.exit(77, gprs=Regs.of({"rax": leaf, **registers}), instruction_length=4)
        assert left is not None, f"the TD goes on: {self.gprs}"
        return left

    def accept(self, gpa: int = PENDING) -> None:
        """The guest accepts a page."""
        assert self.tdcall(GuestLeaf.TDG_MEM_PAGE_ACCEPT, rcx=gpa).rax == 0

    def write(self, gpa: int, data: bytes) -> None:
        """The guest writes its data page."""
        assert gpa >= DATA
        assert gpa + len(data) <= DATA + PAGE_4K
        self.module.memory.write(self.data_pa + gpa - DATA, data)

    def read(self, gpa: int, size: int) -> bytes:
        """What is in the guest's data page."""
        return self.module.memory.read(self.data_pa + gpa - DATA, size)

    def exit_locks(self, exit_: VmExit) -> list[tuple[str, str]]:
        """The lock primitives of a VM exit, in order: ``+`` or ``-`` and the lock's name, and the mode."""
        return lock_trace(self.module, lambda: self.module.td_exit(0, exit_))

    def call_locks(self, leaf: HostLeaf, **registers: int) -> list[tuple[str, str]]:
        """The same for a SEAMCALL."""
        regs = Regs.of({"rax": leaf, **registers})
        return lock_trace(self.module, lambda: self.module.seamcall(0, regs))


def lock_trace(module: Module, body: Any) -> list[tuple[str, str]]:
    """What a call does to locks, without its failed attempts."""
    outcome = run([Program(Task("caller", cpu=0), body)], level=CALLS)
    assert outcome.violation is None, outcome.message
    events = [event for event in outcome.trace.events if event.kind == "lock"]
    return [(e.text, e.data["mode"].name) for e in events if e.data.get("taken", Taken.YES) is Taken.YES]
