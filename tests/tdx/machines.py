"""A small machine on which tests build TDs, all through SEAMCALLs."""

from __future__ import annotations

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import SysState
from septum.arch.pages import PAGE_2M, PAGE_4K, Level, page_info
from septum.arch.platform import Platform, profile
from septum.arch.status import Status
from septum.arch.structures import TdParams
from septum.core.cells import Tracking, World
from septum.core.run import run, solo_call
from septum.core.steps import CALLS, Program, Task
from septum.core.trylocks import Taken
from septum.tdx.module import Module
from septum.tdx.registers import Regs

MIN_TDCX = 6
VCPU_PAGES = 5
"""Pages of a VCPU beside its TDVPR; and three more for each L2 VM."""
BUFFER = 0x10000
"""Where the host puts what the module is to read, in memory that is no TD's."""
SOURCE = 0x20000
"""Where the host keeps the content of pages to add."""

PARAMS = TdParams(xfam=3, max_vcpus=8, eptp_controls=0x1E, tsc_frequency=40)
"""TD_PARAMS of an ordinary TD: x87 and SSE, four levels of Secure EPT, a TSC of 1 GHz."""


class Machine:
    """The module on a platform of two packages, ready unless told otherwise, in a world of its own."""

    def __init__(
        self, platform: Platform | None = None, *, boot: bool = True, features: frozenset[str] = frozenset()
    ) -> None:
        Tracking.world = World()
        self.platform = platform or profile("small")
        self.module = Module(self.platform, features=features)
        self.hkids = iter(self.platform.private_hkids[1:])
        memory = self.platform.tdmrs[0].available[0]
        self._next = memory.base + PAGE_2M & -PAGE_2M
        self._next_huge = memory.end & -PAGE_2M
        if boot:
            self.boot()

    # -- calls -----------------------------------------------------------------------------------------------------

    def call(self, leaf: HostLeaf, *, lp: int = 0, version: int = 0, **registers: int) -> Regs:
        """A SEAMCALL; its registers afterwards."""
        regs = Regs.of({"rax": leaf | version << 16, **registers})
        return solo_call(self.module.seamcall(lp, regs))

    def ok(self, leaf: HostLeaf, *, lp: int = 0, version: int = 0, **registers: int) -> Regs:
        """A SEAMCALL that succeeds."""
        regs = self.call(leaf, lp=lp, version=version, **registers)
        assert regs.rax == Status.TDX_SUCCESS, f"{leaf.name}: {Status(regs.rax & ~0xFFFF_FFFF).name} {regs}"
        return regs

    def locks_of(self, leaf: HostLeaf, *, lp: int = 0, version: int = 0, **registers: int) -> list[tuple[str, str]]:
        """The locks that a SEAMCALL takes, in order: name and mode."""
        regs = Regs.of({"rax": leaf | version << 16, **registers})
        task = Task("caller", cpu=lp)
        outcome = run([Program(task, lambda: self.module.seamcall(lp, regs))], level=CALLS)
        assert outcome.violation is None, outcome.message
        taken = [event for event in outcome.trace.events if event.kind == "lock" and event.text[0] in "+^"]
        return [(e.text[1:], e.data["mode"].name) for e in taken if e.data["taken"] is Taken.YES]

    # -- memory ----------------------------------------------------------------------------------------------------

    def page(self) -> int:
        """The next 4 KiB page that nobody uses."""
        self._next += PAGE_4K
        return self._next - PAGE_4K

    def huge_page(self) -> int:
        """A 2 MiB page that nobody uses."""
        self._next_huge -= PAGE_2M
        return self._next_huge

    # -- the module ------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """From power-on to a module that is ready, with all its TDMRs."""
        memory = self.module.memory
        self.ok(HostLeaf.TDH_SYS_INIT)
        for lp in range(self.platform.num_lps):
            self.ok(HostLeaf.TDH_SYS_LP_INIT, lp=lp)
        for i, tdmr in enumerate(self.platform.tdmrs):
            memory.write(BUFFER + 8 * i, (SOURCE + 512 * i).to_bytes(8, "little"))
            memory.write(SOURCE + 512 * i, tdmr.info().pack())
        hkid = self.platform.global_private_hkid
        self.ok(HostLeaf.TDH_SYS_CONFIG, rcx=BUFFER, rdx=len(self.platform.tdmrs), r8=hkid)
        for lp in self.lp_of_each_package:
            self.ok(HostLeaf.TDH_SYS_KEY_CONFIG, lp=lp)
        for tdmr in self.platform.tdmrs:
            while self.ok(HostLeaf.TDH_SYS_TDMR_INIT, rcx=tdmr.base).rdx < tdmr.end:
                pass
        assert self.module.sys.state == SysState.READY

    @property
    def lp_of_each_package(self) -> list[int]:
        """One LP of each package."""
        return [self.platform.lp_package.index(package) for package in range(self.platform.num_packages)]

    # -- TDs -------------------------------------------------------------------------------------------------------

    def create_td(self) -> int:
        """A TD with an HKID; the address of its TDR."""
        tdr = self.page()
        self.ok(HostLeaf.TDH_MNG_CREATE, rcx=tdr, rdx=next(self.hkids))
        return tdr

    def td_with_keys(self) -> int:
        """A TD whose keys are configured."""
        tdr = self.create_td()
        for lp in self.lp_of_each_package:
            self.ok(HostLeaf.TDH_MNG_KEY_CONFIG, lp=lp, rcx=tdr)
        return tdr

    def td_with_tdcs(self, pages: int = MIN_TDCX) -> int:
        """A TD that TDH.MNG.INIT can initialise."""
        tdr = self.td_with_keys()
        for _ in range(pages):
            self.ok(HostLeaf.TDH_MNG_ADDCX, rcx=self.page(), rdx=tdr)
        return tdr

    def init_td(self, tdr: int, params: TdParams = PARAMS) -> Regs:
        """TDH.MNG.INIT with these TD_PARAMS; its registers afterwards."""
        self.module.memory.write(BUFFER, params.pack())
        return self.call(HostLeaf.TDH_MNG_INIT, rcx=tdr, rdx=BUFFER)

    def td(self, params: TdParams = PARAMS) -> int:
        """An initialised TD; the address of its TDR."""
        tdr = self.td_with_tdcs(MIN_TDCX + params.num_l2_vms)
        assert self.init_td(tdr, params).rax == Status.TDX_SUCCESS
        return tdr

    def add_tables(self, tdr: int, gpa: int, lowest: Level = Level.PT) -> None:
        """The Secure EPT pages under which ``gpa`` can be mapped by an entry of level ``lowest``."""
        top = self.module.td(tdr).tdcs.eptp >> 3 & 7
        for level in range(top, lowest, -1):
            at = page_info(gpa & -(PAGE_4K << 9 * level), level)
            self.ok(HostLeaf.TDH_MEM_SEPT_ADD, rcx=at, rdx=tdr, r8=self.page())

    def add_page(self, tdr: int, gpa: int, content: bytes = b"") -> int:
        """Adds a page with content while the TD is built; its address."""
        page = self.page()
        self.module.memory.set_page(SOURCE, content.ljust(PAGE_4K, b"\0"))
        self.ok(HostLeaf.TDH_MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r8=page, r9=SOURCE)
        return page

    def create_vcpu(self, tdr: int) -> int:
        """A VCPU with all its pages, initialised; the address of its TDVPR."""
        tdvpr = self.page()
        self.ok(HostLeaf.TDH_VP_CREATE, rcx=tdvpr, rdx=tdr)
        for _ in range(VCPU_PAGES + 3 * self.module.td(tdr).tdcs.num_l2_vms):
            self.ok(HostLeaf.TDH_VP_ADDCX, rcx=self.page(), rdx=tdvpr)
        self.ok(HostLeaf.TDH_VP_INIT, rcx=tdvpr)
        return tdvpr

    def finalized_td(self, params: TdParams = PARAMS) -> tuple[int, int]:
        """A TD that can run, with tables for its first 2 MiB and one VCPU; the addresses of TDR and TDVPR."""
        tdr = self.td(params)
        self.add_tables(tdr, 0)
        tdvpr = self.create_vcpu(tdr)
        self.ok(HostLeaf.TDH_MR_FINALIZE, rcx=tdr)
        return tdr, tdvpr
