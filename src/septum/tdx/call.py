"""A SEAMCALL in progress, and the checks and locks that most interface functions begin with.

The functions here are the module's own building blocks, under the names of what they do: each checks an operand, takes
locks in the real order, and fails the call with the real status. What they lock is dropped by the dispatcher on
every way out, last taken first.

Source: TDX Module 1.5.01, ``src/common/helpers/helpers.c``, ``src/common/memory_handlers/{pamt,sept}_manager.c``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from septum.arch import op_state
from septum.arch.op_state import Lifecycle
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_MASK, Level, level_size
from septum.arch.pamt import PageType
from septum.arch.status import Status
from septum.core.steps import ATOMICS, ctx, step
from septum.core.trylocks import Mode, SharexHp
from septum.tdx.held import HeldLocks
from septum.tdx.outcome import Fail, check, sanity
from septum.tdx.state.memory import PamtEntry

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.registers import Regs
    from septum.tdx.state.platform import Lp
    from septum.tdx.state.td import Td

SHARED, EXCLUSIVE = Mode.SHARED, Mode.EXCLUSIVE
MIN_TDCS_PAGES = 6
_PAMT_ABOVE_4K = tuple((int(level), PAGE_MASK & -level_size(level)) for level in (Level.PDPT, Level.PD))
"""Levels of PAMT entries, and the address bits that name one."""
PAGE_NOT_USED = 1 << 63
"""Set in R8 to R11 on return when a Secure EPT page that was offered there was not needed."""


class Call(Protocol):
    """A function of the module in progress, on the host's or the guest's side."""

    module: Module
    lp: Lp
    regs: Regs
    locks: HeldLocks


class HostCall:
    """One SEAMCALL: who calls, with which registers (changed in place), and the locks that it holds."""

    __slots__ = ("leaf", "locks", "lp", "module", "regs", "version")

    def __init__(self, module: Module, lp: Lp, regs: Regs, leaf: int, version: int) -> None:
        self.module = module
        self.lp = lp
        self.regs = regs
        self.leaf = leaf
        self.version = version
        self.locks = HeldLocks()


class PamtLock(SharexHp):
    """The lock in a PAMT entry. Its key is the entry's: page address | level."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"PAMT_{('4K', '2M', '1G')[self.key & 3]}[{self.key & ~0xFFF:#x}]"


class LockedPage:
    """A physical page whose PAMT entry is locked. ``key`` names the entry in ``Module.pamt``."""

    __slots__ = ("key", "locks", "pa")

    def __init__(self, pa: int, key: int, locks: tuple[PamtLock, ...]) -> None:
        self.pa = pa
        self.key = key
        self.locks = locks


def check_no_interrupt(call: HostCall, operands: tuple[int, int]) -> None:
    """Fails with INTERRUPTED_RESTARTABLE, RCX and RDX restored, when an interrupt is pending for the host."""
    if call.module.hardware.interrupt_pending(call.lp.index):
        call.regs.rcx, call.regs.rdx = operands
        raise Fail(Status.TDX_INTERRUPTED_RESTARTABLE)


# -- physical pages --------------------------------------------------------------------------------------------------


def check_hpa(call: Call, pa: int, alignment: int, operand: int) -> None:
    """``hpa_check_with_pwr_2_alignment``: aligned, no HKID bits, below MAX_PA; else OPERAND_INVALID."""
    check(not pa & (alignment - 1 | call.module.reserved_in_private_pa), Status.TDX_OPERAND_INVALID, operand)


def check_shared_hpa(call: HostCall, pa: int, size: int, operand: int, alignment: int | None = None) -> None:
    """``shared_hpa_check_with_pwr_2_alignment``: memory of the host, outside SEAMRR, with a shared HKID."""
    ok = not pa & ((alignment or size) - 1) and call.module.is_shared_hpa(pa, size)
    check(ok, Status.TDX_OPERAND_INVALID, operand)


async def lock_page(
    call: Call, pa: int, operand: int, mode: Mode, expected: PageType, size: int = Level.PT
) -> LockedPage:
    """Checks the address, walks the PAMT to an entry of ``size``, locks it, and checks its page type.

    :raises Fail: OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY or PAGE_METADATA_INCORRECT with ``operand``.
    """
    check_hpa(call, pa, level_size(size), operand)
    page = await walk_pamt(call, pa, operand, mode, size)
    check(page.key & 3 == size, Status.TDX_PAGE_METADATA_INCORRECT, operand)
    check(call.module.pamt_entry(page.key).page_type == expected, Status.TDX_PAGE_METADATA_INCORRECT, operand)
    return page


async def walk_pamt(call: Call, pa: int, operand: int, mode: Mode, size: int = Level.PT) -> LockedPage:
    """``pamt_walk``: locks the entries from 1 GiB down, shared, and the one that maps the page in ``mode``."""
    module, locks = call.module, call.locks
    check(module.is_covered_by_pamt(pa), Status.TDX_OPERAND_ADDR_RANGE_ERROR, operand)
    taken: list[PamtLock] = []
    for level, mask in _PAMT_ABOVE_4K:
        key = pa & mask | level
        lock = PamtLock(module.locks, key)
        await locks.take(lock, SHARED, operand)
        taken.append(lock)
        if level == size or module.pamt_entry(key).page_type == PageType.REG:
            if mode is EXCLUSIVE:
                await locks.promote(lock, operand)
            return LockedPage(pa, key, tuple(taken))
    key = pa & PAGE_MASK
    lock = PamtLock(module.locks, key)
    await locks.take(lock, mode, operand)
    taken.append(lock)
    return LockedPage(pa, key, tuple(taken))


async def lock_free_page(call: HostCall, pa: int, operand: int, size: int = Level.PT) -> LockedPage:
    """``check_and_lock_free_range_hpa``: a page that belongs to nobody, locked exclusively.

    For 2 MiB, all 512 entries below must be free too.
    """
    page = await lock_page(call, pa, operand, EXCLUSIVE, PageType.NDA, size)
    check(size != Level.PD or call.module.is_2m_range_free(pa), Status.TDX_PAGE_METADATA_INCORRECT, operand)
    return page


async def unlock_page(call: Call, page: LockedPage) -> None:
    """``pamt_unwalk`` before the end of the call."""
    for lock in reversed(page.locks):
        await call.locks.release(lock)


@lru_cache(maxsize=1024)
def page_of(td_pa: int, page_type: PageType) -> PamtEntry:
    """The PAMT entry of a page that a TD has just got."""
    return PamtEntry(page_type, td_pa, 0)


def owned_entry(call: Call, pa: int, level: int) -> tuple[int, PamtEntry]:
    """``pamt_implicit_get``: key and value of the PAMT entry of a page that the module knows to be in use.

    :raises ModuleHalt: when the PAMT says that it is not.
    """
    module = call.module
    sanity(module.is_covered_by_pamt(pa), f"no PAMT for page {pa:#x}")
    key = pa & -level_size(level) & PAGE_MASK | level
    entry = module.pamt_entry(key)
    sanity(entry.page_type not in (PageType.NDA, PageType.RSVD), f"page {pa:#x} should be in use")
    return key, entry


async def lock_owned_page(call: Call, pa: int, level: int, operand: int = Operand.RCX) -> tuple[int, PamtEntry]:
    """``pamt_implicit_get_and_lock``: :func:`owned_entry`, then its lock alone, exclusively. Returns key and value.

    :raises Fail: OPERAND_BUSY with ``operand``.
    :raises ModuleHalt: as :func:`owned_entry`, which looks before it locks.
    """
    key, _ = owned_entry(call, pa, level)
    await call.locks.take(PamtLock(call.module.locks, key), EXCLUSIVE, operand)
    return key, call.module.pamt_entry(key)


def set_page_type(call: Call, key: int, page_type: PageType, owner: Td | None = None) -> None:
    """Writes the page type, and the owner if there is a new one, of a PAMT entry. The rest stays as it was, also in the
    entry of a page that is free now."""
    entry = call.module.pamt_entry(key)
    call.module.pamt[key] = PamtEntry(page_type, entry.owner if owner is None else owner.pa, entry.bepoch)


# -- TDs -------------------------------------------------------------------------------------------------------------


async def lock_tdr(call: Call, pa: int, operand: Operand, mode: Mode) -> Td:
    """``check_lock_and_map_explicit_tdr``: the TD whose TDR is at ``pa``."""
    await lock_page(call, pa, operand, mode, PageType.TDR)
    return call.module.td(pa)


def check_build_state(td: Td) -> None:
    """``check_td_in_correct_build_state``: not fatal, keys configured, TDCS pages added."""
    check(not td.tdr.fatal, Status.TDX_TD_FATAL)
    check(td.tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED, Status.TDX_TD_KEYS_NOT_CONFIGURED)
    check(td.tdr.num_tdcx >= MIN_TDCS_PAGES, Status.TDX_TDCS_NOT_ALLOCATED)


async def add_children(td: Td, count: int) -> None:
    """Adds to TDR.CHLDCNT, the number of 4 KiB pages that a TD has, in one atomic instruction."""
    if ctx.level >= ATOMICS:
        await step("xadd", f"{td}.CHLDCNT")
    td.tdr.chldcnt += count


async def lock_op_state(call: HostCall, td: Td, mode: Mode | None = SHARED) -> None:
    """``check_state_map_tdcs_and_lock``: build state, the OP_STATE lock (unless ``mode`` is None), and whether the TD's
    operation state allows this leaf."""
    check_build_state(td)
    if mode is not None:
        await call.locks.take(td.op_state_lock, mode, Operand.OP_STATE)
    if td.tdcs.op_state not in op_state.HOST_ALLOWED[call.leaf]:
        if mode is not None:
            await call.locks.release(td.op_state_lock)
        raise Fail(Status.TDX_OP_STATE_INCORRECT)


async def lock_td(call: HostCall, pa: int, operand: Operand = Operand.RDX) -> Td:
    """The TD whose TDR is at ``pa``: TDR and OP_STATE locked shared, in a state that allows this leaf."""
    td = await lock_tdr(call, pa, operand, SHARED)
    await lock_op_state(call, td)
    return td


def decode_tdr_and_flag(raw: int) -> tuple[int, bool]:
    """``td_handle_and_flags_t``: a TDR's address with a flag in bit 0.

    :raises Fail: OPERAND_INVALID with RDX when another bit outside the address is set.
    """
    check(not raw & ~(PAGE_MASK | 1), Status.TDX_OPERAND_INVALID, Operand.RDX)
    return raw & PAGE_MASK, bool(raw & 1)
