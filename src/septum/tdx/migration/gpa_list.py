"""GPA lists: the pages that a function is to block for writing, restore, export or import.

Source: TDX Module 1.5.01, ``gpa_list_info_t`` and ``gpa_list_entry_t`` in ``include/tdx_api_defs.h``,
``src/common/helpers/migration.{h,c}``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch import sept
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK, Level, is_valid_gpa
from septum.arch.status import Status, with_operand
from septum.core.trylocks import Mode
from septum.tdx.call import check_shared_hpa, lock_td
from septum.tdx.outcome import Fail, check
from septum.tdx.secure_ept import SeptEntry, walk_sept

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td

ENTRY_SIZE: Final = 8
_INDEX: Final = 0x1FF
_FIRST_SHIFT: Final = 3
_LAST_SHIFT: Final = 55
_NO_ENTRY: Final = 0b111 | 0b111 << 52
"""Format and reserved bits of a list operand; the only format is 0."""

_LEVEL: Final = 0b11
_RESERVED: Final = 0b1111 << 3 | 0b11 << 54 | 0b111 << 61
PENDING: Final = 1 << 2
L2_MAP: Final = 0b111 << 7
_OPERATION_SHIFT: Final = 52
_OPERATION: Final = 0b11 << _OPERATION_SHIFT
_STATUS_SHIFT: Final = 56
_STATUS: Final = 0b11111 << _STATUS_SHIFT
INVALID_PAGE: Final = 1 << 63
"""In an entry of a list of pages: there is none."""


class Operation(IntEnum):
    """What an entry asks for. TDH.EXPORT.BLOCKW and TDH.EXPORT.RESTORE look only at its lowest bit."""

    NOP = 0
    MIGRATE = 1
    CANCEL = 2
    REMIGRATE = 3


class EntryStatus(IntEnum):
    """What became of an entry."""

    SUCCESS = 0
    SKIPPED = 1
    SEPT_WALK_FAILED = 2
    SEPT_ENTRY_BUSY_HOST_PRIORITY = 3
    SEPT_ENTRY_STATE_INCORRECT = 4
    TLB_TRACKING_NOT_DONE = 5
    OP_STATE_INCORRECT = 6
    MIGRATED_IN_CURRENT_EPOCH = 7
    MIG_BUFFER_NOT_AVAILABLE = 8
    NEW_PAGE_NOT_AVAILABLE = 9
    INVALID_PAGE_MAC = 10
    DISALLOWED_IMPORT_OVER_REMOVED = 11
    TD_PAGE_BUSY_HOST_PRIORITY = 12
    L2_SEPT_WALK_FAILED = 13
    ATTR_LIST_ENTRY_INVALID = 14
    GPA_LIST_ENTRY_INVALID = 15


DONE: Final = (EntryStatus.SUCCESS, EntryStatus.SKIPPED)
"""What is no problem."""


class GpaList(NamedTuple):
    """``gpa_list_info_t``, operand RCX: a page of up to 512 entries, and which of them are still to be done."""

    raw: int
    first: int
    last: int
    pa: int

    @classmethod
    def decode(cls, raw: int) -> GpaList:
        """Takes the operand apart; nothing is checked."""
        return cls(raw, raw >> _FIRST_SHIFT & _INDEX, raw >> _LAST_SHIFT, raw & PAGE_MASK)

    def check(self, call: HostCall) -> None:
        """``check_and_map_gpa_list``: format, order and address.

        :raises Fail: OPERAND_INVALID with RCX.
        """
        check(not self.raw & _NO_ENTRY and self.first <= self.last, Status.TDX_OPERAND_INVALID, Operand.RCX)
        check_shared_hpa(call, self.pa, PAGE_4K, Operand.RCX)

    def at(self, number: int) -> int:
        """The operand with another first entry. After entry 511 comes 0."""
        return self.raw & ~(_INDEX << _FIRST_SHIFT) | (number & _INDEX) << _FIRST_SHIFT


def read_slot(module: Module, table: int, number: int) -> int:
    """An eight-byte entry of a list in the host's memory."""
    return int.from_bytes(
        module.memory.read(module.pa_format.address(table) + ENTRY_SIZE * number, ENTRY_SIZE), "little"
    )


def write_slot(module: Module, table: int, number: int, value: int) -> None:
    """Writes such an entry."""
    module.memory.write(module.pa_format.address(table) + ENTRY_SIZE * number, value.to_bytes(ENTRY_SIZE, "little"))


# -- entries ---------------------------------------------------------------------------------------------------------


def operation(item: int) -> Operation:
    """What an entry asks for."""
    return Operation(item >> _OPERATION_SHIFT & 0b11)


def with_operation(item: int, wanted: Operation) -> int:
    """An entry that asks for something else."""
    return item & ~_OPERATION | wanted << _OPERATION_SHIFT


def with_status(item: int, status: EntryStatus) -> int:
    """An entry after its turn; one that failed or was skipped asks for nothing any more."""
    if status is not EntryStatus.SUCCESS:
        item = with_operation(item, Operation.NOP)
    return item & ~_STATUS | status << _STATUS_SHIFT


def is_valid(item: int) -> bool:
    """``gpa_list_entry_is_valid``: no reserved bit, and level 4 KiB."""
    return not item & (_RESERVED | _LEVEL)


def gpa_of(td: Td, item: int) -> int | None:
    """``check_and_get_gpa_from_entry``: the private GPA that an entry names, or None if it is not valid."""
    gpa = item & PAGE_MASK
    return gpa if is_valid(item) and is_valid_gpa(gpa, td.tdcs.gpaw, private=True) else None


async def find_entry(call: HostCall, td: Td, gpa: int) -> tuple[SeptEntry | None, EntryStatus]:
    """Walks to the Secure EPT entry of a page, locks it, and checks that its state allows this leaf.

    Returns the entry if it is locked now, and what failed.
    """
    entry = walk_sept(call.module, td, gpa, Level.PT)
    if entry.level != Level.PT:
        return None, EntryStatus.SEPT_WALK_FAILED
    try:
        await call.locks.take(entry.lock, Mode.EXCLUSIVE, Operand.GPA_LIST_ENTRY)
    except Fail:
        return None, EntryStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
    entry.value = call.module.sept[entry.pa]
    if entry.value & sept.STATE_MASK not in sept.HOST_ALLOWED[call.leaf]:
        return entry, EntryStatus.SEPT_ENTRY_STATE_INCORRECT
    return entry, EntryStatus.SUCCESS


async def find_listed(
    call: HostCall, td: Td, gpas: GpaList, number: int, item: int, skip: frozenset[Operation]
) -> tuple[SeptEntry | None, EntryStatus]:
    """:func:`find_entry` for an entry of a list, unless it asks for one of ``skip``.

    :raises Fail: OPERAND_INVALID with GPA_LIST_ENTRY; the list says so too.
    """
    skipped = operation(item) in skip
    gpa = gpa_of(td, item)
    if gpa is None and not (skipped and is_valid(item)):
        write_slot(call.module, gpas.pa, number, with_status(item, EntryStatus.GPA_LIST_ENTRY_INVALID))
        raise Fail(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY)
    if skipped or gpa is None:
        return None, EntryStatus.SKIPPED
    return await find_entry(call, td, gpa)


_NOT_MIGRATED: Final = frozenset((Operation.NOP, Operation.CANCEL))
Change = Callable[["HostCall", "Td", SeptEntry], Awaitable[None]]
"""Writes an entry that is locked and keeps its lock."""


async def change_listed(call: HostCall, change: Change) -> int:
    """TDH.EXPORT.BLOCKW and TDH.EXPORT.RESTORE: changes the entry of each page in the list.

    RCX: GPA list; it returns the entry to go on with, which is where an error was found, or where a pending interrupt
    of the host stopped the function. RDX: TDR. The status of a list that was done carries the number of problems.
    """
    module, regs = call.module, call.regs
    gpas = GpaList.decode(regs.rcx)
    td = await lock_td(call, regs.rdx)
    await call.locks.take(td.secure_ept_lock, Mode.SHARED, Operand.SEPT_TREE)
    gpas.check(call)
    problems = 0
    for number in range(gpas.first, gpas.last + 1):
        regs.rcx = gpas.at(number)
        item = read_slot(module, gpas.pa, number)
        entry, status = await find_listed(call, td, gpas, number, item, _NOT_MIGRATED)
        if entry is not None and status is EntryStatus.SUCCESS:
            await change(call, td, entry)
        problems += status not in DONE
        write_slot(module, gpas.pa, number, with_status(item, status))
        if entry is not None:
            await call.locks.release(entry.lock)
        regs.rcx = gpas.at(number + 1)
        if number < gpas.last and module.hardware.interrupt_pending(call.lp.index):
            return Status.TDX_INTERRUPTED_RESUMABLE
    return with_operand(Status.TDX_SUCCESS, problems)
