"""A host with nothing but the module: it enters a TD, gives it pages, and answers its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from septum.arch.exits import ExitReason
from septum.arch.leaves import HostLeaf
from septum.arch.pages import PAGE_2M, PAGE_4K, Level, is_shared_gpa, level_size, page_info
from septum.arch.status import Status
from septum.arch.structures import TdParams
from septum.core.cells import Fixed, SharedMap
from septum.core.interrupts import Cpu
from septum.core.run import solo_call
from septum.core.steps import Program, Task, wait_until
from septum.guest.scripted import Script, ScriptedGuest
from septum.guest.tlb import Tlb
from septum.kvm.guest_protocol import GuestCpu, external_interrupt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import VmExit
from tests.tdx.machines import PARAMS, Machine

Answer = Callable[[Regs], None]
"""What the host does about a TDG.VP.VMCALL: changes the registers that it gave into those that it gets back."""

_KICK = ((1, "kick", None),)


class GuestHost(Fixed):
    """A TD with tables for its first 2 MiB and a VCPU with a scripted guest for each script; VCPU n runs on LP n.

    What it notes for the tests is not state: it never reads it again (but for ``interrupt_everywhere``).
    """

    def __init__(
        self,
        *scripts: Script,
        params: TdParams = PARAMS,
        large: bool = False,
        added: Sequence[int] = (),
        caching: bool = False,
    ) -> None:
        """:param added: pages (in the first 2 MiB) that the guest has from the start.
        :param caching: CPUs use translations again as long as they may.
        """
        self.machine = machine = Machine()
        self.module = machine.module
        self.large = large
        self.tdr = machine.td(params)
        machine.add_tables(self.tdr, 0)
        for gpa in added:
            machine.add_page(self.tdr, gpa)
        self.tdvprs = [machine.create_vcpu(self.tdr) for _ in scripts]
        machine.ok(HostLeaf.TDH_MR_FINALIZE, rcx=self.tdr)
        for tdvpr in self.tdvprs:
            machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=tdvpr)
        self.td = self.module.td(self.tdr)
        tlb = Tlb() if caching else None
        self.guests = [ScriptedGuest(script, f"guest{i}", tlb) for i, script in enumerate(scripts)]
        self.cpus = [
            GuestCpu(self.module, self.td, self.module.vp(pa), Cpu(f"cpu{i}", index=i), lambda: ())
            for i, pa in enumerate(self.tdvprs)
        ]
        self.reasons: list[int] = []
        """Exit reasons of TD exits."""
        self.faults: list[int] = []
        """Addresses of EPT violations."""
        self.calls: list[Regs] = []
        """Registers of TDG.VP.VMCALLs, but for HLT."""
        self.halts = 0
        self.answers: dict[int, Answer] = {}
        self.interrupt_everywhere = False
        """An interrupt of the host comes before each time the guest may run."""
        self.pages: SharedMap[int, int] = SharedMap("pages of the guest", 0)

    def run(self, vcpu: int = 0, *, exits: int = 10_000) -> None:
        """Runs a VCPU until its script is finished.

        :raises AssertionError: when that takes more than ``exits`` TD exits.
        """
        solo_call(self.thread(vcpu, exits))

    def programs(self) -> list[Program]:
        """A thread for each VCPU, for a scheduler."""
        numbers = range(len(self.guests))
        return [Program(Task(f"vcpu{i}", cpu=i), partial(self.thread, i)) for i in numbers]

    async def thread(self, vcpu: int, exits: int | None = None) -> None:
        """Enters a VCPU again and again, at most ``exits`` times."""
        answer = None
        while not self.guests[vcpu].finished:
            if exits is not None:
                assert exits, "the guest does not come to its end"
                exits -= 1
            answer = await self.enter(vcpu, answer)

    async def enter(self, vcpu: int, answer: Regs | None = None) -> Regs | None:
        """One TDH.VP.ENTER, and what the host does about the TD exit; returns its answer to a call."""
        regs = answer or Regs()
        regs.rax, regs.rcx = HostLeaf.TDH_VP_ENTER, self.tdvprs[vcpu]
        await self.module.seamcall(vcpu, regs)
        left = await self._until_exit(vcpu)
        if left is None:
            # Every failed attempt leaves a reader too many in an exclusive lock's word: not again and again.
            await wait_until(self._can_enter, "enter", self.tdr)
            return answer
        reason = left.rax & 0xFFFF
        if reason == ExitReason.TDCALL and left.r11 == ExitReason.HLT_INSTRUCTION:
            self.halts += 1
            return None
        self.reasons.append(reason)
        if reason == ExitReason.INTERRUPT and self.cpus[vcpu].cpu.pending == _KICK:
            self.cpus[vcpu].cpu.pending = ()
        if reason == ExitReason.EPT_VIOLATION:
            await self._fault(vcpu, left)
        return self._answer(left) if reason == ExitReason.TDCALL else None

    def _can_enter(self) -> bool:
        locks = (self.td.epoch_lock, self.td.secure_ept_lock)
        return not any(lock.words.get(lock.key, 0) & lock.EX for lock in locks)

    async def _until_exit(self, vcpu: int) -> Regs | None:
        """Runs the guest until the TD is left; None when it was not entered."""
        cpu, guest, lp = self.cpus[vcpu], self.guests[vcpu], self.module.lps[vcpu]
        interrupt = self.interrupt_everywhere and self.reasons[-1:] != [ExitReason.INTERRUPT]
        left = None
        while lp.running:
            guest.deliver(cpu)
            if lp.is_single_stepping:
                exit_ = VmExit(ExitReason.MTF)
            elif interrupt or cpu.interrupted():
                exit_ = external_interrupt()
            else:
                exit_ = await guest.run(cpu)
                interrupt = self.interrupt_everywhere
            left = await self.module.td_exit(vcpu, exit_)
        return left

    async def _fault(self, vcpu: int, left: Regs) -> None:
        gpa = left.r8
        self.faults.append(gpa)
        assert not is_shared_gpa(gpa, self.td.tdcs.gpaw), f"a shared page is missing: {gpa:#x}"
        await self._give(vcpu, gpa, Level.PD if self.large else Level.PT)

    async def _give(self, vcpu: int, gpa: int, level: int) -> None:
        """TDH.MEM.PAGE.AUG, with the tables that it needs, unless another VCPU's thread was faster."""
        page = self.machine.huge_page() if level else self.machine.page()
        at = page_info(gpa & -level_size(level), level)
        for table in (None, Level.PML4, Level.PDPT, Level.PD):
            if table is None or table > level:
                if table is not None:
                    where = page_info(gpa & -level_size(table), table)
                    add = Regs(HostLeaf.TDH_MEM_SEPT_ADD, where, self.tdr, self.machine.page())
                    await self.module.seamcall(vcpu, add)
                regs = await self.module.seamcall(vcpu, Regs(HostLeaf.TDH_MEM_PAGE_AUG, at, self.tdr, page))
                if regs.rax == Status.TDX_SUCCESS:
                    self.pages[gpa & -level_size(level)] = page
                    return

    async def zap(self, lp: int, gpa: int, *, kick: bool = False) -> None:
        """Takes a page from the guest as KVM does: block, track, make all VCPUs leave, remove; again while busy."""
        await self.insist(lp, HostLeaf.TDH_MEM_RANGE_BLOCK, gpa)
        await self.insist(lp, HostLeaf.TDH_MEM_TRACK, self.tdr)
        for cpu in self.cpus if kick else ():
            cpu.cpu.pending = _KICK
        await self.insist(lp, HostLeaf.TDH_MEM_PAGE_REMOVE, gpa)

    async def insist(self, lp: int, leaf: HostLeaf, rcx: int) -> None:
        """Calls again and again until it succeeds."""
        while (await self.module.seamcall(lp, Regs(leaf, rcx, self.tdr))).rax != Status.TDX_SUCCESS:
            pass

    def _answer(self, left: Regs) -> Regs:
        self.calls.append(Regs.from_tuple(left.to_tuple()))
        answer = self.answers.get(left.r11)
        left.r10 = 0
        if answer is not None:
            answer(left)
        return left

    def content(self, gpa: int, size: int) -> bytes:
        """What the guest has at a private address that the host gave it."""
        page = self.pages[gpa & -PAGE_4K] or self.pages[gpa & -PAGE_2M] + (gpa & PAGE_2M - PAGE_4K)
        return self.module.memory.read(page + gpa % PAGE_4K, size)
