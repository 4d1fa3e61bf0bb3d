"""The memory of the recordings: flat, without encryption, so that the host's view of it shows the module's own pages.

On real hardware the module reads with the KeyID it is told to, and lines that were written with another one are not
what they were. The recordings kept everything in one array of bytes. The only function that can tell is TDH.MNG.INIT,
which takes TD_PARAMS from whatever page the host names. The head of such a page decides what it answers: ATTRIBUTES
and XFAM come first, and what the module keeps is never right for both.
Source: TDX Module 1.5.01, ``td_control_structures.h``, ``tdx_tdvps.h``, ``pamt_manager.h``; measured against the
recorded answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.op_state import OpState, VcpuState
from septum.arch.pages import PAGE_MASK, level_size
from septum.arch.pamt import PAMT_ENTRY_SIZE, PageType
from septum.arch.platform_msrs import IA32_VMX_BASIC
from septum.tdx.call import PamtLock
from septum.tdx.state.memory import Memory
from septum.tdx.state.td import FIRST_L2_SEPT_ROOT_PAGE, SEPT_ROOT_PAGE

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td

_QWORD: Final = 8
_HEAD: Final = 16
"""Bytes of ATTRIBUTES and XFAM."""
_MSR_BITMAPS_PAGE: Final = 2
"""Index among the pages of TDCS."""
_VMCS_PAGES: Final = (1, 6, 9, 12)
"""Indexes among the pages of TDVPS: the TD's own VMCS and those of its L2 VMs."""
_XBUFF_PAGE: Final = 3
_REVISION: Final = 0x7FFF_FFFF


class FlatMemory(Memory):
    """Memory in which a read that begins in a page of the module's finds the page's first words there."""

    __slots__ = ("_module",)

    def __init__(self, module: Module) -> None:
        super().__init__()
        self._module = module

    def read(self, pa: int, size: int) -> bytes:
        """``size`` bytes from ``pa``, across pages."""
        content = super().read(pa, size)
        if size < _HEAD or any(content[:_HEAD]):
            return content
        words = (self._word(pa + offset) for offset in range(0, _HEAD, _QWORD))
        return b"".join(word.to_bytes(_QWORD, "little") for word in words) + content[_HEAD:]

    def _word(self, pa: int) -> int:
        """Eight bytes of the module's own."""
        module, page = self._module, pa & PAGE_MASK
        entry = module.pamt_entry(page)
        if module.tdmr_of(pa) is None or entry.page_type == PageType.RSVD:
            return self._pamt_word(pa)
        if entry.page_type == PageType.EPT:
            return module.sept[pa]
        if entry.page_type == PageType.TDR:
            return _tdr_word(module.td(page), pa - page)
        if entry.page_type == PageType.TDVPR:
            return self._tdvps_word(page, 0, pa - page)
        if entry.page_type == PageType.TDCX:
            return self._tdcx_word(module.td(entry.owner), page, pa - page)
        return 0

    def _pamt_word(self, pa: int) -> int:
        module = self._module
        for tdmr in module.tdmrs[: module.sys.num_tdmrs]:
            for level, (base, size) in enumerate(tdmr.pamt):
                if base <= pa < base + size:
                    number, word = divmod(pa - base, PAMT_ENTRY_SIZE)
                    key = tdmr.base + number * level_size(level) | level
                    entry = module.pamt_entry(key)
                    if word:
                        return entry.bepoch
                    lock = PamtLock(module.locks, key)
                    return lock.words.get(lock.key, 0) | entry.page_type << 16 | entry.owner >> 12 << 24
        return 0

    def _tdcx_word(self, td: Td, page: int, offset: int) -> int:
        """A further page of a TD or of one of its VCPUs."""
        module = self._module
        pages = [module.pa_format.address(pa) for pa in td.tdr.tdcx_pa]
        if page in pages[: td.tdr.num_tdcx]:
            return self._tdcs_word(td, pages.index(page), offset)
        for root, entry in module.pamt.items():
            if entry is not None and entry.page_type == PageType.TDVPR and entry.owner == td.pa:
                pages = [module.pa_format.address(pa) for pa in module.vp(root).tdvps.tdvps_page_pa]
                if page in pages:
                    return self._tdvps_word(root, pages.index(page), offset)
        return 0

    def _tdcs_word(self, td: Td, index: int, offset: int) -> int:
        tdcs, module = td.tdcs, self._module
        if index == 0 and offset == 0:
            return tdcs.num_vcpus | tdcs.num_assoc_vcpus << 32
        if tdcs.op_state == OpState.UNINITIALIZED:
            return 0
        if index == _MSR_BITMAPS_PAGE:
            return int.from_bytes(tdcs.msr_bitmaps[offset : offset + _QWORD], "little")
        pa = module.pa_format.address(td.tdr.tdcx_pa[index]) + offset
        if index == SEPT_ROOT_PAGE:
            return module.sept[pa]
        if FIRST_L2_SEPT_ROOT_PAGE <= index < FIRST_L2_SEPT_ROOT_PAGE + tdcs.num_l2_vms:
            return module.sept_l2[pa]
        return 0

    def _tdvps_word(self, root: int, index: int, offset: int) -> int:
        vp = self._module.vp(root)
        if vp.tdvps.vcpu_state == VcpuState.UNINITIALIZED or (offset and index != _XBUFF_PAGE):
            return 0
        if index == 0:
            return vp.tdvps.ve_info.exit_reason | vp.tdvps.ve_info.valid << 32
        if index in _VMCS_PAGES:
            return self._module.hardware.cpu.msr(IA32_VMX_BASIC) & _REVISION
        if index == _XBUFF_PAGE:
            return int(vp.fields["XBUFF", offset // _QWORD])
        return 0


def _tdr_word(td: Td, offset: int) -> int:
    tdr = td.tdr
    return {0: tdr.fatal | tdr.num_tdcx << 32, _QWORD: tdr.chldcnt}.get(offset, 0)
