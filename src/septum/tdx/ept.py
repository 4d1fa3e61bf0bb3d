"""EPT walks that the module does for a guest's address, as the CPU would.

Source: TDX Module 1.5.01, ``gpa_translate`` in ``src/common/memory_handlers/sept_manager.c``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch import sept, vmcs
from septum.arch.pages import PAGE_4K, PAGE_MASK, Level, level_index, level_size
from septum.tdx.outcome import sanity

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

_RESERVED_MEMORY_TYPES: Final = frozenset({2, 3, 7})


class Walk(Enum):
    """How a walk ended."""

    SUCCESS = 0
    VIOLATION = 1
    CONVERTIBLE = 2
    """A violation that the CPU would turn into a #VE: the entry does not suppress it."""
    MISCONFIGURED = 3


class Translation(NamedTuple):
    """The end of a walk: the page's physical address when it succeeded, the last entry, the rights of all together."""

    walk: Walk
    pa: int
    entry: int
    rights: int


def translate_private(module: Module, td: Td, gpa: int, rights: int) -> Translation:
    """Walks the Secure EPT for an access with ``rights`` (bits as in an entry).

    :raises ModuleHalt: when an entry is one that the module never writes.
    """
    return _translate(module, td.tdcs.eptp, gpa, rights, private=True)


def translate_shared(module: Module, td: Td, vp: Vp, gpa: int, rights: int) -> Translation:
    """Walks the host's EPT, whose root is in the TD VMCS, with the walk length of the TD."""
    root = vp.vmcs[vmcs.SHARED_EPTP] & PAGE_MASK
    return _translate(module, root | td.tdcs.eptp & ~PAGE_MASK, gpa, rights, private=False)


def _translate(module: Module, eptp: int, gpa: int, rights: int, *, private: bool) -> Translation:
    table, level = eptp & PAGE_MASK, eptp >> 3 & 7
    together = sept.RWX
    while True:
        pa = table + 8 * level_index(gpa, level)
        entry = module.sept[pa] if private else int.from_bytes(module.memory.read(pa, 8), "little")
        present = entry & sept.RWX
        together &= present
        if not private and _is_misconfigured(module, entry, level):
            return Translation(Walk.MISCONFIGURED, 0, entry, together)
        is_leaf = level == Level.PT or bool(entry & sept.PS)
        if not present or rights & present != rights:
            suppressed = entry & sept.SVE or (present and not is_leaf)
            return Translation(Walk.VIOLATION if suppressed else Walk.CONVERTIBLE, 0, entry, together)
        if is_leaf:
            break
        sanity(level > Level.PT, "EPT walk below the last level")
        table = entry & PAGE_MASK
        level -= 1
    size = level_size(level)
    page = (entry & PAGE_MASK & -size) | (gpa & (size - 1))
    if not private and not module.is_shared_hpa(page, PAGE_4K):
        return Translation(Walk.MISCONFIGURED, 0, entry, together)
    return Translation(Walk.SUCCESS, page, entry, together)


def _is_misconfigured(module: Module, entry: int, level: int) -> bool:
    """``is_shared_ept_entry_misconfigured`` on a CPU that knows execute-only translations."""
    if entry & (sept.R | sept.W) == sept.W:
        return True
    if not entry & sept.RWX:
        return False
    is_leaf = level == Level.PT or (level <= Level.PDPT and bool(entry & sept.PS))
    if is_leaf:
        reserved = PAGE_MASK & (level_size(level) - 1)
        return bool(entry & reserved) or (entry >> sept.MT_SHIFT & 7) in _RESERVED_MEMORY_TYPES
    return bool(entry & 0xF8) or not module.is_shared_hpa(entry & PAGE_MASK, PAGE_4K)
