"""The module as a whole: its state, and the door through which SEAMCALLs come in."""

from __future__ import annotations

from typing import Any

from septum.arch import leaves, sept, sept_l2
from septum.arch.cpuid import CpuModel, recording_cpu
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import SysState
from septum.arch.operands import Operand
from septum.arch.pages import PA_MASK, PAGE_1G, PAGE_2M, PAGE_4K, is_below_max_pa, overlaps
from septum.arch.pamt import PageType
from septum.arch.platform import Platform
from septum.arch.status import Status
from septum.arch.structures import MAX_TDMRS
from septum.core.cells import BriefMap, Fixed, SharedMap
from septum.core.trylocks import Mutex, Sharex
from septum.tdx.call import HostCall
from septum.tdx.host import HANDLERS
from septum.tdx.outcome import Fail, ModuleHalt, check
from septum.tdx.registers import Regs
from septum.tdx.state.hardware import Hardware
from septum.tdx.state.memory import Memory, PamtEntry
from septum.tdx.state.platform import CacheWriteback, KotEntry, Lp, Sys, TdmrState
from septum.tdx.state.td import Td
from septum.tdx.state.vp import Vp
from septum.tdx.td_exit import td_exit
from septum.tdx.td_params import NativeCpu
from septum.tdx.vm_exit import VmExit

FREE_PAGE = PamtEntry(PageType.NDA, 0, 0)
RESERVED_PAGE = PamtEntry(PageType.RSVD, 0, 0)


class Module(Fixed):
    """TDX Module 1.5.01 on a platform, from power-on.

    All its state is in cells: ``memory`` (page contents), ``pamt`` (page metadata: only entries that are not at rest),
    ``sept`` and ``sept_l2`` (Secure EPT entries by physical address), ``locks`` (lock words that are not 0), and the
    records behind :meth:`td`, :meth:`vp`, ``sys``, ``lps``, ``kot``. ``hardware`` is where it gets time, entropy and
    MSRs from.
    """

    def __init__(self, platform: Platform, cpu: CpuModel | None = None, features: frozenset[str] = frozenset()) -> None:
        """``features`` are what newer modules have and 1.5.01 has not: ``vp_init_v1`` (TDH.VP.INIT version 1),
        ``enhanced_demote`` (TDH.MEM.PAGE.DEMOTE of a TD without L2 VMs is never interrupted; since 1.5.28.00.972)."""
        self.platform = platform
        self.features = features
        self.versioned = leaves.TWO_VERSIONS | ({HostLeaf.TDH_VP_INIT} if "vp_init_v1" in features else frozenset())
        self.pa_format = platform.pa_format
        self.reserved_in_private_pa = (1 << 64) - 1 & ~PA_MASK | self.pa_format.hkid_mask
        self.hardware = Hardware(platform, cpu or recording_cpu())
        self.native_cpu = NativeCpu(self.hardware.cpu)
        self.memory = Memory()
        self.locks: SharedMap[Any, int] = BriefMap("locks", 0)
        self.sept: SharedMap[int, int] = SharedMap("sept", sept.FREE_ENTRY)
        self.sept_l2: SharedMap[int, int] = SharedMap("sept_l2", sept_l2.L2State.FREE.value)
        self.pamt: SharedMap[int, PamtEntry] = SharedMap("pamt", None)
        self.sys = Sys("SYS")
        self.lps = [Lp(f"LP{i}", index=i, package=package) for i, package in enumerate(platform.lp_package)]
        self.kot = [KotEntry(f"KOT[{hkid}]") for hkid in range(platform.private_hkids.stop)]
        self.kot_lock = Sharex(self.locks, "kot", "KOT")
        self.sys_lock = Sharex(self.locks, "sys", "SYS")
        self.tdmrs = [TdmrState(f"TDMR{i}") for i in range(MAX_TDMRS)]
        self.tdmr_locks = [Mutex(self.locks, ("tdmr", i), f"TDMR[{i}]") for i in range(MAX_TDMRS)]
        self.writebacks = [CacheWriteback(f"WBT{i}") for i in range(platform.num_packages)]
        self.writeback_locks = [Mutex(self.locks, ("wbt", i), f"WBCACHE[{i}]") for i in range(platform.num_packages)]
        self._births: SharedMap[int, int] = SharedMap("births", 0)
        self._tds: dict[tuple[int, int], Td] = {}
        self._vps: dict[tuple[int, int], Vp] = {}

    # -- objects behind physical pages -----------------------------------------------------------------------------

    def td(self, pa: int) -> Td:
        """The TD whose TDR is (or could be) the page at ``pa``."""
        key = pa, self._births[pa]
        found = self._tds.get(key)
        if found is None:
            found = self._tds[key] = Td(pa, self.locks)
        return found

    def new_td(self, pa: int) -> Td:
        """A TD that has just been created in the page at ``pa``, whatever was there before."""
        self._births[pa] = self._births[pa] + 1
        return self.td(pa)

    def vp(self, pa: int) -> Vp:
        """The VCPU whose TDVPR is (or could be) the page at ``pa``."""
        key = pa, self._births[pa]
        found = self._vps.get(key)
        if found is None:
            found = self._vps[key] = Vp(pa)
        return found

    def new_vp(self, pa: int) -> Vp:
        """A VCPU that has just been created in the page at ``pa``, whatever was there before."""
        self._births[pa] = self._births[pa] + 1
        return self.vp(pa)

    # -- physical memory -------------------------------------------------------------------------------------------

    def is_shared_hpa(self, pa: int, size: int) -> bool:
        """``shared_hpa_check``: below MAX_PA, outside SEAMRR, with an HKID that is not private."""
        seamrr_base, seamrr_size = self.platform.seamrr
        return (
            is_below_max_pa(pa)
            and not overlaps(self.pa_format.address(pa), size, seamrr_base, seamrr_size)
            and self.pa_format.hkid(pa) < self.platform.private_hkids.start
        )

    def tdmr_of(self, pa: int) -> TdmrState | None:
        """The configured TDMR that holds an address."""
        for tdmr in self.tdmrs[: self.sys.num_tdmrs]:
            if tdmr.base <= pa < tdmr.base + tdmr.size:
                return tdmr
        return None

    def is_covered_by_pamt(self, pa: int) -> bool:
        """``pamt_get_block``: in a TDMR, in a 1 GiB block that TDH.SYS.TDMR.INIT has finished."""
        tdmr = self.tdmr_of(pa)
        return tdmr is not None and pa < tdmr.next & -PAGE_1G

    def pamt_entry(self, key: int) -> PamtEntry:
        """The PAMT entry named by ``page address | level``."""
        entry = self.pamt.get(key)
        if entry is not None:
            return entry
        return FREE_PAGE if key & 3 or not self.is_reserved(key) else RESERVED_PAGE

    def is_reserved(self, pa: int) -> bool:
        """Whether a page lies in a reserved area of its TDMR."""
        tdmr = self.tdmr_of(pa)
        return tdmr is not None and any(o <= pa - tdmr.base < o + size for o, size in tdmr.reserved)

    def is_2m_range_free(self, pa: int) -> bool:
        """``pamt_is_2mb_range_free``: all 512 entries of 4 KiB are free."""
        pages = range(pa, pa + PAGE_2M, PAGE_4K)
        if self._has_reserved(pa, PAGE_2M):
            return all(self.pamt_entry(page).page_type == PageType.NDA for page in pages)
        entries = map(self.pamt.get, pages)
        return all(entry is None or entry.page_type == PageType.NDA for entry in entries)

    def _has_reserved(self, pa: int, size: int) -> bool:
        """Whether a part of a range lies in a reserved area of its TDMR."""
        tdmr = self.tdmr_of(pa)
        return tdmr is not None and any(overlaps(pa - tdmr.base, size, *area) for area in tdmr.reserved)

    # -- the call --------------------------------------------------------------------------------------------------

    async def seamcall(self, lp: int, regs: Regs) -> Regs:
        """SEAMCALL on logical processor ``lp``; leaf and version in RAX. Changes and returns ``regs``.

        When TDH.VP.ENTER has entered the TD, ``lps[lp].running`` tells the VCPU and :meth:`td_exit` goes on from there.

        :raises ModuleHalt: when a sanity check fails, or the module has halted before.
        """
        if self.sys.halted:
            raise ModuleHalt(self.sys.halted)
        rax = regs.rax
        leaf, version = rax & leaves.LEAF_MASK, rax >> leaves.VERSION_SHIFT & leaves.VERSION_MASK
        caller = self.lps[lp]
        call = HostCall(self, caller, regs, leaf, version)
        caller.busy = True
        try:
            try:
                regs.rax = await self._dispatch(call, rax)
            except Fail as fail:
                regs.rax = fail.status
            await call.locks.drop()
        except ModuleHalt as halt:
            self.sys.halted = str(halt)
            raise
        if not caller.running:
            caller.busy = False
        return regs

    async def td_exit(self, lp: int, exit_: VmExit) -> Regs | None:
        """A VM exit of the guest that runs on ``lp``.

        Returns None when the guest goes on, with the registers in its ``Vp.tdvps.gprs``, and the host's registers when
        the TD was left.

        :raises ModuleHalt: when a sanity check fails, or the module has halted before.
        """
        if self.sys.halted:
            raise ModuleHalt(self.sys.halted)
        try:
            regs = await td_exit(self, self.lps[lp], exit_)
        except ModuleHalt as halt:
            self.sys.halted = str(halt)
            raise
        if regs is not None:
            self.lps[lp].busy = False
        return regs

    async def _dispatch(self, call: HostCall, rax: int) -> int:
        """The checks of ``tdx_vmm_dispatcher`` and the interface function itself."""
        handler = HANDLERS.get(call.leaf)
        reserved = rax & leaves.RESERVED_MASK or (call.version and call.leaf not in self.versioned)
        check(not reserved, Status.TDX_OPERAND_INVALID, Operand.RAX)
        state = self.sys.state
        if state != SysState.READY:
            check(state != SysState.SHUTDOWN or call.leaf == HostLeaf.TDH_SYS_LP_SHUTDOWN, Status.TDX_SYS_SHUTDOWN)
            check(call.leaf in leaves.ALLOWED_BEFORE_READY, Status.TDX_SYS_NOT_READY)
        if handler is None:
            raise Fail(Status.TDX_OPERAND_INVALID, Operand.RAX)
        return await handler(call)
