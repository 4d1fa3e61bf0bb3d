"""TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR: a guest takes pending pages, and says what its L2 VMs may do with pages.

They take only the lock of the Secure EPT entry, so they run beside host calls on other pages.
Source: TDX Module 1.5.01, ``src/td_dispatcher/vm_exits/tdg_mem_page_{accept,attr_rd,attr_wr}.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import sept, sept_l2
from septum.arch.leaves import GuestLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, PAGES_4K_IN_2M, Level, level_size
from septum.arch.sept import SeptState
from septum.arch.sept_l2 import L2State
from septum.arch.status import Status, with_details
from septum.core.trylocks import Mode
from septum.tdx import sept_l2 as l2
from septum.tdx.guest.call import (
    DATA_WRITE,
    ExtendedExit,
    GuestCall,
    check_guest_gpa,
    entry_violation,
    ept_violation,
)
from septum.tdx.outcome import Fail, check, sanity
from septum.tdx.secure_ept import SeptEntry, decode_page_info, walk_sept, write_entry
from septum.tdx.state.memory import ZERO_PAGE
from septum.tdx.vm_exit import Interrupted

if TYPE_CHECKING:
    from septum.tdx.guest import GuestHandler
    from septum.tdx.state.td import Td

_PENDING_FLAG: Final = 1 << 62
"""In RCX of ATTR.RD and ATTR.WR: the page is pending."""
_EPT_VIOLATION_ON_L2_WALK_FAILURE: Final = 1
"""In VM_CTLS of an L2 VM."""


async def tdg_mem_page_accept(call: GuestCall) -> int:
    """TDG.MEM.PAGE.ACCEPT: zeroes a pending page and makes it accessible.

    RCX: GPA and level (4 KiB or 2 MiB). With an interrupt pending, a 2 MiB page is left after 4 KiB more are done; the
    guest stays on the TDCALL, and the next attempt goes on from there.

    :raises TdExit: EPT violation, when only the host can make the page acceptable.
    :raises Interrupted: there is more to do.
    """
    info = decode_page_info(call.regs.rcx, Level.PT, Level.PD)
    check_guest_gpa(call, info.gpa, Operand.RCX, private=True)
    entry = walk_sept(call.module, call.td, info.gpa, info.level)
    if entry.level == info.level:
        is_leaf = sept.is_leaf(entry.value)
        await _lock(call, entry)
        if not sept.is_free(entry.value) and not is_leaf:
            raise Fail(with_details(Status.TDX_PAGE_SIZE_MISMATCH, entry.level))
    if sept.is_guest_accessible_leaf(entry.value):
        raise Fail(with_details(Status.TDX_PAGE_ALREADY_ACCEPTED, entry.level))
    if entry.level != info.level or not sept.guest_allowed(GuestLeaf.TDG_MEM_PAGE_ACCEPT, entry.value):
        raise entry_violation(info.gpa, info.level, entry.value, entry.level, ExtendedExit.ACCEPT)

    done, value = _zero(call, entry)
    if done:
        accepted = SeptState.MAPPED if sept.is_pending(value) else SeptState.EXPORTED_DIRTY
        value = sept.with_state(value, accepted) | sept.RWX
        for alias in l2.aliases(call, call.td, entry, value):
            await l2.write(call, alias, sept_l2.unblock(alias.value))
    await write_entry(call, entry, value)
    if not done:
        raise Interrupted
    return Status.TDX_SUCCESS


def _zero(call: GuestCall, entry: SeptEntry) -> tuple[bool, int]:
    """Zeroes what is left of the page. Returns whether all is done, and the entry with its count of finished 4 KiB."""
    memory, value = call.module.memory, entry.value
    if entry.level == Level.PT:
        memory.set_page(entry.page, ZERO_PAGE)
        return True, value
    count = (value & sept.ACCEPT_COUNTER_MASK) >> sept.ACCEPT_COUNTER_SHIFT
    done = count == PAGES_4K_IN_2M - 1 or not call.module.hardware.interrupt_pending(call.lp.index)
    last = PAGES_4K_IN_2M - 1 if done else count
    for chunk in range(count, last + 1):
        memory.set_page(entry.page + chunk * PAGE_4K, ZERO_PAGE)
    count = 0 if done else count + 1
    return done, value & ~sept.ACCEPT_COUNTER_MASK | count << sept.ACCEPT_COUNTER_SHIFT


async def _lock(call: GuestCall, entry: SeptEntry) -> None:
    """``sept_lock_acquire_guest``, then reads the entry again.

    :raises Fail: OPERAND_BUSY or OPERAND_BUSY_HOST_PRIORITY with RCX.
    """
    await call.locks.take(entry.lock, Mode.EXCLUSIVE, Operand.RCX)
    entry.value = call.module.sept[entry.pa]


async def tdg_mem_page_attr_rd(call: GuestCall) -> int:
    """TDG.MEM.PAGE.ATTR.RD: how a page is mapped, in RCX, and what each L2 VM may do with it, in RDX.

    RCX: GPA. On failure RCX and RDX are 0.

    :raises TdExit: EPT violation, when the page is not mapped, or blocked.
    """
    return await _zero_on_failure(call, _attr_rd)


async def _attr_rd(call: GuestCall) -> int:
    gpa = call.regs.rcx
    check_guest_gpa(call, gpa, Operand.RCX, private=True)
    entry = walk_sept(call.module, call.td, gpa, Level.PT)
    await _lock(call, entry)
    if not sept.guest_allowed(GuestLeaf.TDG_MEM_PAGE_ATTR_RD, entry.value):
        raise ept_violation(gpa, 0)
    call.regs.rcx = _mapping(gpa & -level_size(entry.level) | entry.level, entry)
    call.regs.rdx = l2.attributes_of_aliases(call, call.td, entry, guest=True)
    return Status.TDX_SUCCESS


async def _zero_on_failure(call: GuestCall, function: GuestHandler) -> int:
    try:
        return await function(call)
    except Fail:
        call.regs.rcx = call.regs.rdx = 0
        raise


def _mapping(gpa_and_level: int, entry: SeptEntry) -> int:
    """``gpa_mapping_and_flags_t``."""
    return gpa_and_level | (_PENDING_FLAG if sept.is_any_pending(entry.value) else 0)


async def tdg_mem_page_attr_wr(call: GuestCall) -> int:
    """TDG.MEM.PAGE.ATTR.WR: sets what each L2 VM may do with a page; an alias comes to be, changes or goes.

    RCX: GPA and level. RDX: attributes, 16 bits for each VM from L2 VM 1 on; a VM without VALID is left alone. R8:
    which attribute bits to change, in the same places. RCX and RDX return how the page is mapped now. On failure they
    are 0, but with PAGE_ATTR_INVALID RDX has the attributes as far as they could be merged.

    :raises TdExit: EPT violation, when only the host can do something about it.
    """
    return await _zero_on_failure(call, _attr_wr)


async def _attr_wr(call: GuestCall) -> int:
    regs = call.regs
    wanted, mask = l2.split_attributes(regs.rdx), l2.split_attributes(regs.r8)
    _check_attributes(call, wanted, mask)
    info = decode_page_info(regs.rcx, Level.PT, Level.PDPT)
    check_guest_gpa(call, info.gpa, Operand.RCX, private=True)
    entry = walk_sept(call.module, call.td, info.gpa, info.level)
    if entry.level == info.level:
        await _lock(call, entry)
        fits = sept.is_leaf(entry.value) or sept.is_free(entry.value)
        check(fits, Status.TDX_PAGE_SIZE_MISMATCH, entry.level)
    if entry.level != info.level or not sept.guest_allowed(GuestLeaf.TDG_MEM_PAGE_ATTR_WR, entry.value):
        raise entry_violation(info.gpa, info.level, entry.value, entry.level, ExtendedExit.ATTR_WR)

    legal, changes = _merge(call, entry, wanted, mask)
    if legal:
        regs.rcx = _mapping(regs.rcx, entry)
        for alias in changes:
            wanted[alias.vm] = await _apply(call, entry, alias, wanted[alias.vm])
    else:
        regs.rcx = 0
    regs.rdx = l2.join_attributes(wanted)
    return Status.TDX_SUCCESS if legal else Status.TDX_PAGE_ATTR_INVALID


def _check_attributes(call: GuestCall, wanted: list[int], mask: list[int]) -> None:
    """Attributes and masks only for L2 VMs that there are, and attributes only with VALID.

    :raises Fail: OPERAND_INVALID with RDX or R8.
    """
    for vm in range(l2.MAX_VMS):
        if 0 < vm <= call.td.tdcs.num_l2_vms:
            check(not wanted[vm] or wanted[vm] & l2.VALID, Status.TDX_OPERAND_INVALID, Operand.RDX)
        else:
            check(not wanted[vm], Status.TDX_OPERAND_INVALID, Operand.RDX)
            check(not mask[vm], Status.TDX_OPERAND_INVALID, Operand.R8)


def _merge(call: GuestCall, entry: SeptEntry, wanted: list[int], mask: list[int]) -> tuple[bool, list[l2.L2Entry]]:
    """``get_all_l2_sept_entries``: puts into ``wanted`` what the masked attributes come to for each L2 VM.

    Returns whether all are legal, and the L2 entries to change. Where they are not, the present attributes stand.

    :raises Fail: L2_SEPT_WALK_FAILED.
    :raises TdExit: EPT violation instead of that, if VM_CTLS of the L2 VM asks for it.
    """
    td, legal, changes = call.td, True, []
    blockedw = sept.is_any_blockedw(entry.value)
    for vm in range(1, td.tdcs.num_l2_vms + 1):
        bits = mask[vm] | l2.VALID
        asked = wanted[vm] & bits
        aliased = sept.is_aliased(entry.value, vm)
        if not asked & l2.VALID or not (aliased or l2.is_present(asked)):
            continue
        present = 0
        if aliased:
            alias = l2.walk(call.module, td, vm, entry.gpa, entry.level, guest=True)
            sanity(alias.level == entry.level, f"L2 VM {vm} does not map {entry.gpa:#x}, which has an alias there")
            changes.append(alias)
            present = l2.attributes_of(alias.value, blocked_for_writing=blockedw)
        wanted[vm] = present & ~bits | asked
        if l2.is_present(wanted[vm]) and not l2.is_legal(wanted[vm]):
            legal = False
            wanted[vm] = present
        elif not aliased:
            alias = l2.walk(call.module, td, vm, entry.gpa, entry.level, guest=True)
            if alias.level != entry.level:
                raise _walk_failure(td, entry.gpa, alias)
            changes.append(alias)
    return legal, changes


def _walk_failure(td: Td, gpa: int, found: l2.L2Entry) -> Exception:
    """What becomes of a call that cannot reach the entry of an L2 VM."""
    if not td.tdcs.vm_ctls[found.vm] & _EPT_VIOLATION_ON_L2_WALK_FAILURE:
        return Fail(l2.with_l2_details(Status.TDX_L2_SEPT_WALK_FAILED, found))
    rights = found.value & sept.RWX | (sept.RWX + 1 if found.value & sept_l2.XU else 0)
    info = found.level << 3 | found.vm << 20
    return ept_violation(gpa, DATA_WRITE | rights << 3, ExtendedExit.GPA_DETAILS | info << 32)


async def _apply(call: GuestCall, entry: SeptEntry, alias: l2.L2Entry, attributes: int) -> int:
    """Writes the L2 entry, and the alias bit of the L1 entry when that changes. Returns the attributes in force."""
    entries, vm = call.module.sept, alias.vm
    if not sept.is_aliased(entry.value, vm):
        leaf = l2.new_leaf(entry.value & PAGE_MASK, attributes, blocked=sept.is_any_pending(entry.value))
        await l2.write(call, alias, leaf)
        await write_entry(call, entry, l2.with_alias(entries[entry.pa], vm))
        return attributes
    if l2.is_present(attributes):
        await l2.write(call, alias, l2.with_attributes(alias.value, attributes))
        return attributes
    await l2.write(call, alias, L2State.FREE)
    await write_entry(call, entry, l2.without_alias(entries[entry.pa], vm))
    return l2.VALID


LEAVES: dict[int, GuestHandler] = {
    GuestLeaf.TDG_MEM_PAGE_ACCEPT: tdg_mem_page_accept,
    GuestLeaf.TDG_MEM_PAGE_ATTR_RD: tdg_mem_page_attr_rd,
    GuestLeaf.TDG_MEM_PAGE_ATTR_WR: tdg_mem_page_attr_wr,
}
