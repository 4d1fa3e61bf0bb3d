"""The kernel's SEAMCALL wrappers: one for each leaf that KVM uses, counted, traced, and open to fault injection.

Wrappers have the kernel's names and return the registers as the module left them: ``regs.rax`` is the completion
status (the kernel's ``err``), the others are outputs.
Source: Linux 6.16, ``arch/x86/virt/vmx/tdx/tdx.c``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from septum.arch import status
from septum.arch.exits import ExitReason, exit_reason_name
from septum.arch.leaves import HostLeaf
from septum.arch.pages import NULL_PA
from septum.arch.status import Status
from septum.core.cells import Fixed, SharedMap
from septum.core.steps import Violation, ctx, current_task, emit, step
from septum.kvm.guest_protocol import external_interrupt
from septum.kvm.module_faults import ModuleFault
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import VmExit

if TYPE_CHECKING:
    from septum.kvm.guest_protocol import Guest, GuestCpu
    from septum.kvm.returns import SeamcallReturns
    from septum.tdx.module import Module
    from septum.tdx.state.platform import Lp

RDRAND_RETRY_LOOPS: Final = 10
"""How often ``sc_retry`` calls before it hands TDX_RND_NO_ENTROPY on."""
_VERSION_1: Final = 1 << 16
_ADDRESSED_BY_GPA: Final = frozenset(
    {
        HostLeaf.TDH_MEM_PAGE_ADD,
        HostLeaf.TDH_MEM_PAGE_AUG,
        HostLeaf.TDH_MEM_PAGE_DEMOTE,
        HostLeaf.TDH_MEM_PAGE_REMOVE,
        HostLeaf.TDH_MEM_RANGE_BLOCK,
        HostLeaf.TDH_MEM_RANGE_UNBLOCK,
        HostLeaf.TDH_MEM_SEPT_ADD,
        HostLeaf.TDH_MR_EXTEND,
    }
)
_OUTPUTS_OVERWRITE_INPUTS: Final = frozenset(
    {
        HostLeaf.TDH_MEM_PAGE_ADD,
        HostLeaf.TDH_MEM_PAGE_AUG,
        HostLeaf.TDH_MEM_PAGE_DEMOTE,
        HostLeaf.TDH_MEM_PAGE_REMOVE,
        HostLeaf.TDH_MEM_RANGE_BLOCK,
        HostLeaf.TDH_MEM_RANGE_UNBLOCK,
        HostLeaf.TDH_MEM_SEPT_ADD,
        HostLeaf.TDH_MNG_INIT,
        HostLeaf.TDH_MNG_RD,
        HostLeaf.TDH_MR_EXTEND,
        HostLeaf.TDH_PHYMEM_PAGE_RECLAIM,
        HostLeaf.TDH_SYS_RD,
        HostLeaf.TDH_SYS_TDMR_INIT,
        HostLeaf.TDH_VP_RD,
        HostLeaf.TDH_VP_WR,
    }
)
"""Called through ``seamcall_ret``: a retry for want of entropy starts from the registers that the first call left."""


@dataclass(frozen=True, slots=True)
class Injection:
    """The ``occurrence``-th call of ``leaf`` (from 1, retries counted) returns ``status``.

    It does not reach the module, unless ``reaches``: then the module does its work and only the answer is another.
    """

    leaf: HostLeaf
    occurrence: int
    status: int
    reaches: bool = False


class Seamcalls(Fixed):
    """SEAMCALLs of a host. The CPU is the one of the task that calls.

    Counts and calls are for reports; the model reads only ``_made``, and only when there are injections.
    """

    def __init__(
        self, module: Module, injections: Iterable[Injection] = (), returns: SeamcallReturns | None = None
    ) -> None:
        """:param returns: who is to be woken when a SEAMCALL returns; None: nobody ever waits for that."""
        self._module = module
        self._returns = returns
        self._counts: Counter[tuple[int, int]] = Counter()
        self._injections = {(i.leaf, i.occurrence): i for i in injections}
        self._made: SharedMap[int, int] = SharedMap("SEAMCALLs made", 0)
        self.broken: tuple[ModuleFault, ...] = ()
        """What the module gets wrong, from now on and for ever."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Calls made so far: ABI name of the leaf to name of the status (operands left out) to number."""
        out: dict[str, dict[str, int]] = {}
        for (leaf, code), number in sorted(self._counts.items()):
            known = ExitReason(code & 0xFFFF).name if leaf == HostLeaf.TDH_VP_ENTER and not code >> 32 else ""
            by_status = out.setdefault(HostLeaf(leaf).abi_name, {})
            by_status[known or status.name(code)] = number
        return out

    def inject(self, *injections: Injection) -> None:
        """Adds injections; their occurrences count from now."""
        for leaf in {i.leaf for i in injections}:
            self._made.store(leaf, 0)
        self._injections |= {(i.leaf, i.occurrence): i for i in injections}

    async def __call__(self, leaf: HostLeaf, regs: Regs) -> Regs:
        """``seamcall`` and ``seamcall_ret``: one call, and again while the module lacks entropy (``sc_retry``)."""
        before = regs.to_tuple()
        await self._once(leaf, regs)
        for _ in range(RDRAND_RETRY_LOOPS - 1):
            if regs.rax != Status.TDX_RND_NO_ENTROPY:
                break
            if leaf in _OUTPUTS_OVERWRITE_INPUTS:
                regs.rax = before[0]
            else:
                regs = Regs.from_tuple(before)
            await self._once(leaf, regs)
        return regs

    async def _once(self, leaf: HostLeaf, regs: Regs) -> None:
        """``__seamcall_ret``: one call, without regard to entropy.

        :raises Violation: when the module halts.
        """
        text = _describe(leaf, regs) if ctx.trace is not None else ""
        if text:
            emit("call", text)
        injection = self._changed(leaf)
        if not injection or injection.reaches:
            try:
                await self._module.seamcall(current_task().cpu, regs)
            except ModuleHalt as halt:
                raise Violation("the module never halts", f"{leaf.abi_name}: {halt}") from None
        if injection:
            regs.rax = injection.status
        if self._returns is not None:
            self._returns.wake()
        self._counts[leaf, regs.rax & status.CODE] += 1
        if text:
            emit("seamcall", f"{text} -> {_answer(regs.rax)}", leaf=leaf.abi_name, status=regs.rax)

    def _changed(self, leaf: HostLeaf) -> Injection | ModuleFault | None:
        """What is to come back instead of the module's answer."""
        for fault in self.broken:
            if fault.leaf == leaf and fault.cpu in (None, current_task().cpu):
                return fault
        return self._injected(leaf) if self._injections else None

    def _injected(self, leaf: HostLeaf) -> Injection | None:
        number = self._made[leaf] + 1
        self._made[leaf] = number
        return self._injections.get((leaf, number))

    # -- running a guest -------------------------------------------------------------------------------------------

    async def tdh_vp_enter(self, tdvpr: int, regs: Regs, guest: Guest, cpu: GuestCpu) -> Regs:
        """TDH.VP.ENTER: returns when the TD is left, with what it was left for.

        An interrupt of the host that waits when the guest could go on makes it exit. While the module steps through the
        guest, every instruction ends in a monitor trap.
        """
        leaf, module = HostLeaf.TDH_VP_ENTER, self._module
        regs.rax, regs.rcx = leaf, tdvpr
        text = f"TDH.VP.ENTER {cpu.vp}" if ctx.trace is not None else ""
        if text:
            emit("call", text)
        injection = self._changed(leaf)
        if injection and not injection.reaches:
            regs.rax = injection.status
        else:
            lp = module.lps[cpu.cpu.index]
            try:
                left: Regs | None = await module.seamcall(lp.index, regs)
                if lp.running:
                    left = None
                while left is None:
                    left = await module.td_exit(lp.index, await self._next_exit(lp, guest, cpu))
            except ModuleHalt as halt:
                raise Violation("the module never halts", f"{cpu.vp}: {halt}") from None
            regs = left
            if injection:
                regs.rax = injection.status
        if self._returns is not None:
            self._returns.wake()
        self._counts[leaf, _reason_or_code(regs.rax)] += 1
        if text:
            emit("seamcall", f"{text} -> {_answer(regs.rax)}", leaf=leaf.abi_name, status=regs.rax)
        return regs

    async def _next_exit(self, lp: Lp, guest: Guest, cpu: GuestCpu) -> VmExit:
        """What ends the guest's run on a CPU: a monitor trap, an interrupt of the host, or the guest itself."""
        if lp.is_single_stepping:
            guest.deliver(cpu)
            return VmExit(ExitReason.MTF)
        await step("run guest", cpu.vp)
        if cpu.interrupted():
            guest.deliver(cpu)
            return external_interrupt()
        return await guest.run(cpu)

    # -- one wrapper for each leaf ---------------------------------------------------------------------------------

    async def tdh_mng_create(self, tdr: int, hkid: int) -> Regs:
        """A new TD with a KeyID."""
        return await self(HostLeaf.TDH_MNG_CREATE, Regs(HostLeaf.TDH_MNG_CREATE, tdr, hkid))

    async def tdh_mng_key_config(self, tdr: int) -> Regs:
        """Programs the TD's key in the caller's package."""
        return await self(HostLeaf.TDH_MNG_KEY_CONFIG, Regs(HostLeaf.TDH_MNG_KEY_CONFIG, tdr))

    async def tdh_mng_addcx(self, tdr: int, page: int) -> Regs:
        """Gives the TD a page for its control structure."""
        return await self(HostLeaf.TDH_MNG_ADDCX, Regs(HostLeaf.TDH_MNG_ADDCX, page, tdr))

    async def tdh_mng_init(self, tdr: int, td_params: int) -> Regs:
        """Initialises the TD. RCX tells what was wrong with the parameters."""
        return await self(HostLeaf.TDH_MNG_INIT, Regs(HostLeaf.TDH_MNG_INIT, tdr, td_params))

    async def tdh_mng_rd(self, tdr: int, field: int) -> Regs:
        """Reads a field of the TD into R8."""
        return await self(HostLeaf.TDH_MNG_RD, Regs(HostLeaf.TDH_MNG_RD, tdr, field))

    async def tdh_mng_vpflushdone(self, tdr: int) -> Regs:
        """Says that no vCPU of the TD is associated with a CPU any more."""
        return await self(HostLeaf.TDH_MNG_VPFLUSHDONE, Regs(HostLeaf.TDH_MNG_VPFLUSHDONE, tdr))

    async def tdh_mng_key_freeid(self, tdr: int) -> Regs:
        """Takes the KeyID from the TD."""
        return await self(HostLeaf.TDH_MNG_KEY_FREEID, Regs(HostLeaf.TDH_MNG_KEY_FREEID, tdr))

    async def tdh_vp_create(self, tdr: int, tdvpr: int) -> Regs:
        """A new vCPU of the TD."""
        return await self(HostLeaf.TDH_VP_CREATE, Regs(HostLeaf.TDH_VP_CREATE, tdvpr, tdr))

    async def tdh_vp_addcx(self, tdvpr: int, page: int) -> Regs:
        """Gives the vCPU a page for its control structure."""
        return await self(HostLeaf.TDH_VP_ADDCX, Regs(HostLeaf.TDH_VP_ADDCX, page, tdvpr))

    async def tdh_vp_init(self, tdvpr: int, initial_rcx: int, x2apicid: int | None) -> Regs:
        """Initialises the vCPU (version 1: with its x2APIC id; version 0, without, takes the TDR shared)."""
        if x2apicid is None:
            return await self(HostLeaf.TDH_VP_INIT, Regs(HostLeaf.TDH_VP_INIT, tdvpr, initial_rcx))
        rax = HostLeaf.TDH_VP_INIT | _VERSION_1
        return await self(HostLeaf.TDH_VP_INIT, Regs(rax, tdvpr, initial_rcx, x2apicid))

    async def tdh_vp_flush(self, tdvpr: int) -> Regs:
        """Ends the vCPU's association with the caller's CPU."""
        return await self(HostLeaf.TDH_VP_FLUSH, Regs(HostLeaf.TDH_VP_FLUSH, tdvpr))

    async def tdh_vp_rd(self, tdvpr: int, field: int) -> Regs:
        """Reads a field of the vCPU into R8."""
        return await self(HostLeaf.TDH_VP_RD, Regs(HostLeaf.TDH_VP_RD, tdvpr, field))

    async def tdh_vp_wr(self, tdvpr: int, field: int, value: int, mask: int) -> Regs:
        """Writes the bits of ``mask`` of a field of the vCPU."""
        return await self(HostLeaf.TDH_VP_WR, Regs(HostLeaf.TDH_VP_WR, tdvpr, field, value, mask))

    async def tdh_mem_sept_add(self, tdr: int, gpa: int, level: int, page: int) -> Regs:
        """Links a new Secure EPT table. RCX and RDX: the entry met, on failure."""
        return await self(HostLeaf.TDH_MEM_SEPT_ADD, Regs(HostLeaf.TDH_MEM_SEPT_ADD, gpa | level, tdr, page))

    async def tdh_mem_page_add(self, tdr: int, gpa: int, page: int, source: int) -> Regs:
        """Adds a page with a content, before the TD runs."""
        return await self(HostLeaf.TDH_MEM_PAGE_ADD, Regs(HostLeaf.TDH_MEM_PAGE_ADD, gpa, tdr, page, source))

    async def tdh_mem_page_aug(self, tdr: int, gpa: int, level: int, page: int) -> Regs:
        """Maps a page, pending until the guest accepts it."""
        return await self(HostLeaf.TDH_MEM_PAGE_AUG, Regs(HostLeaf.TDH_MEM_PAGE_AUG, gpa | level, tdr, page))

    async def tdh_mem_range_block(self, tdr: int, gpa: int, level: int) -> Regs:
        """Blocks a range against new translations."""
        return await self(HostLeaf.TDH_MEM_RANGE_BLOCK, Regs(HostLeaf.TDH_MEM_RANGE_BLOCK, gpa | level, tdr))

    async def tdh_mem_range_unblock(self, tdr: int, gpa: int, level: int) -> Regs:
        """Takes that back."""
        return await self(HostLeaf.TDH_MEM_RANGE_UNBLOCK, Regs(HostLeaf.TDH_MEM_RANGE_UNBLOCK, gpa | level, tdr))

    async def tdh_mem_page_demote(self, tdr: int, gpa: int, level: int, page: int) -> Regs:
        """Splits a blocked mapping; ``page`` becomes the new table. RCX and RDX: the entry met, on failure."""
        regs = Regs(HostLeaf.TDH_MEM_PAGE_DEMOTE, gpa | level, tdr, page)
        regs.r9 = regs.r10 = regs.r11 = NULL_PA
        return await self(HostLeaf.TDH_MEM_PAGE_DEMOTE, regs)

    async def tdh_mem_track(self, tdr: int) -> Regs:
        """Begins a new TLB epoch."""
        return await self(HostLeaf.TDH_MEM_TRACK, Regs(HostLeaf.TDH_MEM_TRACK, tdr))

    async def tdh_mem_page_remove(self, tdr: int, gpa: int, level: int) -> Regs:
        """Takes a blocked page out of the Secure EPT."""
        return await self(HostLeaf.TDH_MEM_PAGE_REMOVE, Regs(HostLeaf.TDH_MEM_PAGE_REMOVE, gpa | level, tdr))

    async def tdh_mr_extend(self, tdr: int, gpa: int) -> Regs:
        """Measures 256 bytes of an added page."""
        return await self(HostLeaf.TDH_MR_EXTEND, Regs(HostLeaf.TDH_MR_EXTEND, gpa, tdr))

    async def tdh_mr_finalize(self, tdr: int) -> Regs:
        """Ends the build: the TD can run."""
        return await self(HostLeaf.TDH_MR_FINALIZE, Regs(HostLeaf.TDH_MR_FINALIZE, tdr))

    async def tdh_phymem_page_reclaim(self, page: int) -> Regs:
        """Gives a page of a TD without KeyID back to the host."""
        return await self(HostLeaf.TDH_PHYMEM_PAGE_RECLAIM, Regs(HostLeaf.TDH_PHYMEM_PAGE_RECLAIM, page))

    async def tdh_phymem_page_wbinvd_hkid(self, hkid: int, page: int) -> Regs:
        """Writes back the page's cache lines that have a KeyID."""
        pa = self._module.pa_format.with_hkid(page, hkid)
        return await self(HostLeaf.TDH_PHYMEM_PAGE_WBINVD, Regs(HostLeaf.TDH_PHYMEM_PAGE_WBINVD, pa))

    async def tdh_phymem_cache_wb(self, resume: bool) -> Regs:
        """Writes back all cache lines with private KeyIDs on the caller's package."""
        return await self(HostLeaf.TDH_PHYMEM_CACHE_WB, Regs(HostLeaf.TDH_PHYMEM_CACHE_WB, int(resume)))


def _describe(leaf: HostLeaf, regs: Regs) -> str:
    """A call as diagrams show it."""
    if leaf in _ADDRESSED_BY_GPA:
        return f"{leaf.abi_name} gpa={regs.rcx & ~7:#x}"
    return f"{leaf.abi_name} {regs.rcx:#x}" if regs.rcx else leaf.abi_name


def _answer(rax: int) -> str:
    """A completion status as diagrams show it: ``TDX_OPERAND_BUSY(SEPT_TREE)``."""
    decoded = status.decode(rax)
    detail = decoded.operand or (exit_reason_name(decoded.details) if decoded.details else "")
    return f"{decoded.name}({detail})" if detail else decoded.name


def _reason_or_code(rax: int) -> int:
    """What TDH.VP.ENTER is counted under: the exit reason of a successful entry, else the status."""
    return rax if not rax >> 32 else rax & status.CODE
