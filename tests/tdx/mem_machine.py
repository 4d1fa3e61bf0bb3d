"""A TD whose pages tests add, block, move and take away again."""

from __future__ import annotations

from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.pages import PAGE_2M, Level, page_info
from septum.arch.pamt import PageType
from septum.arch.structures import TdParams
from septum.core.run import solo_call
from septum.tdx.registers import Regs
from septum.tdx.state.memory import PamtEntry
from septum.tdx.state.td import Td
from septum.tdx.vm_exit import VmExit
from tests.tdx.guests import LONG_AFTER, LONG_MODE
from tests.tdx.machines import PARAMS, Machine

H = HostLeaf
DEBUG = 1
SMALL, LARGE = 0x4000, PAGE_2M
"""Where tests map a page of 4 KiB and one of 2 MiB."""


class MemMachine(Machine):
    """A machine with one TD that has tables for its first 2 MiB and one VCPU. It is final unless told otherwise."""

    def __init__(self, params: TdParams = PARAMS, *, final: bool = True) -> None:
        super().__init__()
        self.tdr = self.td(params)
        self.add_tables(self.tdr, 0)
        self.tdvpr = self.create_vcpu(self.tdr)
        if final:
            self.finalize()

    @property
    def of_td(self) -> Td:
        """The TD."""
        return self.module.td(self.tdr)

    def mem(self, leaf: HostLeaf, gpa: int, level: int = Level.PT, *, version: int = 0, **registers: int) -> Regs:
        """A TDH.MEM leaf that names an entry of the TD in RCX."""
        rdx = registers.pop("rdx", self.tdr)
        return self.call(leaf, version=version, rcx=page_info(gpa, level), rdx=rdx, **registers)

    def do(self, leaf: HostLeaf, gpa: int, level: int = Level.PT, *, version: int = 0, **registers: int) -> Regs:
        """The same, and it succeeds."""
        regs = self.mem(leaf, gpa, level, version=version, **registers)
        assert regs.rax == 0, f"{leaf.name}: {regs}"
        return regs

    def finalize(self) -> None:
        """The TD can run from now on."""
        self.ok(H.TDH_MR_FINALIZE, rcx=self.tdr)

    def aug(self, gpa: int, level: int = Level.PT) -> int:
        """A new pending page; its address."""
        page = self.page() if level == Level.PT else self.huge_page()
        self.do(H.TDH_MEM_PAGE_AUG, gpa, level, r8=page)
        return page

    def block(self, gpa: int, level: int = Level.PT, *, track: bool = True) -> None:
        """Blocks an entry, and tracks unless told otherwise."""
        self.do(H.TDH_MEM_RANGE_BLOCK, gpa, level)
        if track:
            self.track()

    def track(self) -> None:
        """TDH.MEM.TRACK."""
        self.ok(H.TDH_MEM_TRACK, rcx=self.tdr)

    def entry(self, gpa: int, level: int = Level.PT) -> tuple[int, int]:
        """An entry as the host sees it, and its state."""
        regs = self.do(H.TDH_MEM_SEPT_RD, gpa, level)
        assert regs.rdx & 7 == level
        return regs.rcx, regs.rdx >> 8

    def state(self, gpa: int, level: int = Level.PT) -> int:
        """The state number of an entry."""
        return self.entry(gpa, level)[1]

    def pamt(self, pa: int, level: int = Level.PT) -> PamtEntry:
        """The PAMT entry of a page."""
        return self.module.pamt_entry(pa | level)

    def page_type(self, pa: int, level: int = Level.PT) -> PageType:
        """What the PAMT says a page is."""
        return PageType(self.pamt(pa, level).page_type)

    def run(self) -> None:
        """The TD's VCPU runs on LP 0, in 64-bit mode."""
        self.call(H.TDH_VP_ENTER, rcx=self.tdvpr)
        assert self.module.lps[0].running == self.tdvpr
        for field, value in LONG_MODE.items():
            self.module.vp(self.tdvpr).vmcs[field] = value

    def guest(self, leaf: GuestLeaf, rcx: int = 0, rdx: int = 0, r8: int = 0) -> Regs:
        """A TDCALL of the running VCPU that leaves it running; its registers afterwards."""
        left = self.guest_exit(leaf, rcx, rdx, r8)
        assert left is None, f"the TD was left: {left}"
        return Regs.from_tuple(self.module.vp(self.tdvpr).tdvps.gprs)

    def guest_exit(self, leaf: GuestLeaf, rcx: int = 0, rdx: int = 0, r8: int = 0) -> Regs | None:
        """A TDCALL of the running VCPU; what the host gets if the TD was left."""
        return solo_call(self.module.td_exit(0, VmExit.tdcall(Regs(leaf, rcx, rdx, r8))))

    def leave(self) -> None:
        """An interrupt for the host takes the VCPU out."""
        self.module.hardware.inputs.tsc += LONG_AFTER
        assert solo_call(self.module.td_exit(0, VmExit(ExitReason.INTERRUPT, interruption=0x8000_0020))) is not None
