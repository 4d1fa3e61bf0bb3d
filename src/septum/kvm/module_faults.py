"""Modules that answer what they should not: by name, for scenarios and tests.

A fault is a rule: each call of a leaf, or each one that a CPU makes, is answered with a status. Unlike an
:class:`~septum.kvm.seamcall.Injection` it holds for ever and counts nothing, so that loops close under the explorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import SeamcallFailure, Status, with_operand

L = HostLeaf
_BUSY: Final = with_operand(Status.TDX_OPERAND_BUSY, Operand.SEPT_TREE)
_WRONG_STATE: Final = with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
UNKNOWN_STATUS: Final = 0x8000_7777_0000_0000
"""An error that no module has."""


@dataclass(frozen=True, slots=True)
class ModuleFault:
    """Calls of ``leaf`` on ``cpu`` (None: on any) return ``status``; they do their work only if ``reaches``."""

    leaf: HostLeaf
    status: int
    cpu: int | None = None
    reaches: bool = False


MODULE_FAULTS: Final[Mapping[str, ModuleFault]] = {
    "aug-busy": ModuleFault(L.TDH_MEM_PAGE_AUG, _BUSY),
    "aug-busy-on-cpu-0": ModuleFault(L.TDH_MEM_PAGE_AUG, _BUSY, cpu=0),
    "aug-busy-but-done": ModuleFault(L.TDH_MEM_PAGE_AUG, _BUSY, reaches=True),
    "aug-not-done": ModuleFault(L.TDH_MEM_PAGE_AUG, Status.TDX_SUCCESS),
    "aug-wrong-state": ModuleFault(L.TDH_MEM_PAGE_AUG, _WRONG_STATE),
    "aug-unknown-status": ModuleFault(L.TDH_MEM_PAGE_AUG, UNKNOWN_STATUS),
    "sept-add-busy": ModuleFault(L.TDH_MEM_SEPT_ADD, _BUSY),
    "sept-add-wrong-state": ModuleFault(L.TDH_MEM_SEPT_ADD, _WRONG_STATE),
    "page-add-busy": ModuleFault(L.TDH_MEM_PAGE_ADD, _BUSY),
    "enter-busy": ModuleFault(L.TDH_VP_ENTER, with_operand(Status.TDX_OPERAND_BUSY, Operand.TD_EPOCH)),
    "enter-busy-on-cpu-0": ModuleFault(L.TDH_VP_ENTER, with_operand(Status.TDX_OPERAND_BUSY, Operand.TD_EPOCH), cpu=0),
    "enter-unknown-status": ModuleFault(L.TDH_VP_ENTER, UNKNOWN_STATUS),
    "enter-not-done": ModuleFault(L.TDH_VP_ENTER, Status.TDX_SUCCESS),
    "enter-faults": ModuleFault(L.TDH_VP_ENTER, SeamcallFailure.TDX_SEAMCALL_UD),
    "block-busy": ModuleFault(L.TDH_MEM_RANGE_BLOCK, _BUSY),
    "block-not-done": ModuleFault(L.TDH_MEM_RANGE_BLOCK, Status.TDX_SUCCESS),
    "track-busy": ModuleFault(L.TDH_MEM_TRACK, with_operand(Status.TDX_OPERAND_BUSY, Operand.TD_EPOCH)),
    "track-previous-epoch-busy": ModuleFault(L.TDH_MEM_TRACK, Status.TDX_PREVIOUS_TLB_EPOCH_BUSY),
    "track-not-done": ModuleFault(L.TDH_MEM_TRACK, Status.TDX_SUCCESS),
    "remove-busy": ModuleFault(L.TDH_MEM_PAGE_REMOVE, _BUSY),
    "remove-not-done": ModuleFault(L.TDH_MEM_PAGE_REMOVE, Status.TDX_SUCCESS),
    "wbinvd-busy": ModuleFault(L.TDH_PHYMEM_PAGE_WBINVD, with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)),
    "demote-interrupted": ModuleFault(L.TDH_MEM_PAGE_DEMOTE, Status.TDX_INTERRUPTED_RESTARTABLE),
    "finalize-busy": ModuleFault(L.TDH_MR_FINALIZE, with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)),
    "vp-flush-busy": ModuleFault(L.TDH_VP_FLUSH, with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)),
    "vpflushdone-not-done": ModuleFault(L.TDH_MNG_VPFLUSHDONE, Status.TDX_FLUSHVP_NOT_DONE),
    "cache-wb-interrupted": ModuleFault(L.TDH_PHYMEM_CACHE_WB, Status.TDX_INTERRUPTED_RESUMABLE),
    "freeid-busy": ModuleFault(L.TDH_MNG_KEY_FREEID, with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)),
    "reclaim-busy": ModuleFault(L.TDH_PHYMEM_PAGE_RECLAIM, with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)),
    "no-entropy": ModuleFault(L.TDH_MNG_CREATE, Status.TDX_RND_NO_ENTROPY),
}
"""``-busy`` and ``-interrupted`` never do their work, whatever they are asked; ``-not-done`` says that it did."""
