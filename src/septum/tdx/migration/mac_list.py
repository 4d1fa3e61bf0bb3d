"""The MACs of the pages in a GPA list: two pages of the host, 256 MACs in each, of which only the needed ones count.

Source: TDX Module 1.5.01, ``tdh_{export,import}_mem.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.tdx.call import check_shared_hpa
from septum.tdx.migration.aes_gcm import TAG_SIZE

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.migration.gpa_list import GpaList
    from septum.tdx.module import Module

PER_PAGE: Final = PAGE_4K // TAG_SIZE


class MacLists(NamedTuple):
    """Operands R11 and R12: the addresses of both pages, and how many are used."""

    pages: tuple[int, int]
    used: int

    @classmethod
    def check(cls, call: HostCall, gpas: GpaList) -> MacLists:
        """Checks the pages that the entries of a list need.

        :raises Fail: OPERAND_INVALID with R11 or R12.
        """
        regs, low, high = call.regs, gpas.first < PER_PAGE, gpas.last >= PER_PAGE
        if low:
            check_shared_hpa(call, regs.r11, PAGE_4K, Operand.R11)
        if high:
            check_shared_hpa(call, regs.r12, PAGE_4K, Operand.R12)
        return cls((regs.r11, regs.r12), low + high)

    def _address(self, module: Module, number: int) -> int:
        page, place = divmod(number, PER_PAGE)
        return module.pa_format.address(self.pages[page]) + TAG_SIZE * place

    def read(self, module: Module, number: int) -> bytes:
        """The MAC of an entry."""
        return module.memory.read(self._address(module, number), TAG_SIZE)

    def write(self, module: Module, number: int, mac: bytes) -> None:
        """Writes the MAC of an entry."""
        module.memory.write(self._address(module, number), mac)
