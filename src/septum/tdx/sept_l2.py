"""Secure EPTs of the L2 virtual machines of a partitioned TD: walks, attributes, and the aliases of a TD's pages.

The TD's own ("L1") entry says in its ``TDAL`` bits which L2 VMs map the same page or table, and its lock covers those
aliases. Source: TDX Module 1.5.01, ``src/common/helpers/helpers.c``, ``src/common/memory_handlers/sept_manager.{h,c}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from septum.arch import sept, sept_l2
from septum.arch.pages import PAGE_MASK, level_index
from septum.arch.sept_l2 import L2State
from septum.arch.status import Status, with_details
from septum.core.steps import step
from septum.tdx.outcome import Fail, sanity
from septum.tdx.secure_ept import root_level
from septum.tdx.state.td import FIRST_L2_SEPT_ROOT_PAGE

if TYPE_CHECKING:
    from septum.tdx.call import Call, HostCall
    from septum.tdx.module import Module
    from septum.tdx.secure_ept import SeptEntry
    from septum.tdx.state.td import Td

MAX_VMS: Final = 4
"""VM 0 is the TD itself, 1 to 3 are L2 VMs."""


class L2Entry:
    """An L2 entry that a walk arrived at: its address, level, and the value read."""

    __slots__ = ("level", "pa", "value", "vm")

    def __init__(self, vm: int, pa: int, level: int, value: int) -> None:
        self.vm = vm
        self.pa = pa
        self.level = level
        self.value = value

    def __repr__(self) -> str:
        return f"L2_SEPT_ENTRY[{self.pa:#x}]"


def root(module: Module, td: Td, vm: int) -> int:
    """Physical address of the root of an L2 VM's Secure EPT."""
    return module.pa_format.address(td.tdr.tdcx_pa[FIRST_L2_SEPT_ROOT_PAGE + vm - 1])


def walk(module: Module, td: Td, vm: int, gpa: int, level: int, *, guest: bool = False) -> L2Entry:
    """``l2_sept_walk``: towards ``level``, as far as non-leaf entries are mapped.

    On the guest's side (``l2_sept_walk_guest_side``) the walk also goes on through blocked entries.
    """
    table, at = root(module, td, vm), root_level(td)
    while True:
        pa = table + 8 * level_index(gpa, at)
        value = module.sept_l2[pa]
        ends = sept_l2.state(value) == L2State.FREE if guest else not value & sept.RWX
        if at == level or ends or value & sept.PS:
            return L2Entry(vm, pa, at, value)
        table = value & PAGE_MASK
        at -= 1


def aliases(call: Call, td: Td, entry: SeptEntry, value: int, *, guest: bool = False) -> Iterator[L2Entry]:
    """The aliases that an L1 entry with ``value`` names.

    :raises ModuleHalt: when one of them is not there.
    """
    for vm in range(1, td.tdcs.num_l2_vms + 1):
        if sept.is_aliased(value, vm):
            alias = walk(call.module, td, vm, entry.gpa, entry.level, guest=guest)
            sanity(alias.level == entry.level, f"L2 VM {vm} does not map {entry.gpa:#x}, which has an alias there")
            yield alias


async def write(call: Call, entry: L2Entry, value: int) -> None:
    """A 64-bit write of an L2 entry."""
    await step("write", entry)
    call.module.sept_l2.store(entry.pa, value)
    await step("written", entry)


def check_has_table(alias: L2Entry) -> None:
    """Halts the module unless the entry points at a table."""
    table = not alias.value & sept.PS and sept_l2.state(alias.value) != L2State.FREE
    sanity(table, f"L2 VM {alias.vm} has no table behind {alias.pa:#x}")


def walk_to(call: HostCall, td: Td, vm: int, entry: SeptEntry) -> L2Entry:
    """The entry of an L2 VM at the GPA and level of an L1 entry.

    :raises Fail: L2_SEPT_WALK_FAILED, with the L2 entry that the walk met in RCX and RDX.
    """
    found = walk(call.module, td, vm, entry.gpa, entry.level)
    if found.level != entry.level:
        raise failure(call, td, Status.TDX_L2_SEPT_WALK_FAILED, found)
    return found


def failure(call: HostCall, td: Td, status: Status, entry: L2Entry) -> Fail:
    """The failure that an L2 entry is the reason of: RCX and RDX tell it, the status its VM and level.

    ``set_arch_l2_septe_details_in_vmm_regs``, ``api_error_with_l2_details``.
    """
    debug = bool(td.tdcs.attributes & 1)
    call.regs.rcx, call.regs.rdx = sept_l2.arch_details(entry.value, entry.level, entry.vm, debug=debug)
    return Fail(with_l2_details(status, entry))


def with_l2_details(status: Status, entry: L2Entry) -> int:
    """A status that names VM and level of an L2 entry."""
    return with_details(status, entry.level, 0, entry.vm, 0)


def with_alias(value: int, vm: int) -> int:
    """An L1 entry that also has an alias in an L2 VM."""
    return value | 1 << sept.TDAL_SHIFT + vm - 1


def without_alias(value: int, vm: int) -> int:
    """An L1 entry that has no alias in an L2 VM."""
    return value & ~(1 << sept.TDAL_SHIFT + vm - 1)


# -- attributes ------------------------------------------------------------------------------------------------------

R, W, XS, XU, VGP, PWA, SSS, SVE = (1 << bit for bit in range(8))
VALID: Final = 1 << 15
_PRESENT: Final = R | W | XS | XU
_RESERVED: Final = 0x7F00
_ENTRY_BITS: Final = (
    (R, sept.R), (W, sept.W), (XS, sept.X), (XU, sept_l2.XU), (VGP, sept_l2.VGP), (PWA, sept_l2.PWA),
    (SSS, sept_l2.SSS), (SVE, sept.SVE),
)  # fmt: skip
_ALL_BITS: Final = sum(bit for _, bit in _ENTRY_BITS)


def split_attributes(raw: int) -> list[int]:
    """``gpa_attr_t`` as 16 bits for each VM."""
    return [raw >> 16 * vm & 0xFFFF for vm in range(MAX_VMS)]


def join_attributes(attributes: list[int]) -> int:
    """The inverse of :func:`split_attributes`."""
    return sum(bits << 16 * vm for vm, bits in enumerate(attributes))


def is_present(attributes: int) -> bool:
    """``is_gpa_attr_present``: some access is allowed."""
    return attributes & _PRESENT != 0


def is_legal(attributes: int) -> bool:
    """``is_gpa_attr_legal``: valid, no reserved bit, no SVE, and neither W nor PWA without R."""
    if attributes and not attributes & VALID:
        return False
    readable = attributes & R or not attributes & (W | PWA)
    return bool(readable) and not attributes & (_RESERVED | SVE)


def _to_entry(attributes: int) -> int:
    return sum(bit for attribute, bit in _ENTRY_BITS if attributes & attribute)


def attributes_of(entry: int, *, blocked_for_writing: bool) -> int:
    """``l2_sept_get_gpa_attr``: the attributes that an L2 entry stands for, also while it is blocked.

    ``blocked_for_writing`` says that the L1 entry is.
    """
    state = sept_l2.state(entry)
    if state == L2State.FREE:
        return SVE if entry & sept.SVE else 0
    if not entry & sept.PS:
        return VALID | _PRESENT
    if state == L2State.BLOCKED:
        restored = sept_l2.unblock(entry)
        entry = entry & ~sept.W | restored & sept.W if blocked_for_writing else restored
    return VALID | sum(attribute for attribute, bit in _ENTRY_BITS if entry & bit)


def attributes_of_aliases(call: Call, td: Td, entry: SeptEntry, *, guest: bool = False) -> int:
    """``gpa_attr_t``: the attributes of a page in each L2 VM, 16 bits each from bit 16 on."""
    if sept.is_free(entry.value):
        return 0
    blockedw = sept.is_any_blockedw(entry.value)
    return sum(
        attributes_of(alias.value, blocked_for_writing=blockedw) << 16 * alias.vm
        for alias in aliases(call, td, entry, entry.value, guest=guest)
    )


def with_attributes(entry: int, attributes: int) -> int:
    """``l2_sept_update_gpa_attr``: the leaf entry with other attributes; blocked, if it was."""
    if sept_l2.state(entry) == L2State.BLOCKED:
        return sept_l2.block(sept_l2.unblock(entry) & ~_ALL_BITS | _to_entry(attributes))
    return entry & ~_ALL_BITS | _to_entry(attributes)


def new_leaf(pa: int, attributes: int, *, blocked: bool) -> int:
    """``sept_l2_set_leaf``: the entry of a new alias."""
    return sept_l2.leaf_entry(pa, _to_entry(attributes), blocked=blocked)
