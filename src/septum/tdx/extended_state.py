"""The guest's extended state (XMM and further) across TD exit and entry: the header of XBUFF.

What the registers hold is not modelled; whether the module can load them again is, because a header that the CPU would
refuse costs the TD its life.
Source: TDX Module 1.5.01, ``restore_guest_td_extended_state`` and ``save_xmms_by_mask`` (``tdh_vp_enter.c``),
``save_guest_td_extended_state`` (``td_exit.c``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.exits import ExitReason
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.vm_exit import TdExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

XBUFF: Final = "XBUFF"
XSTATE_BV: Final = 64
XCOMP_BV: Final = 65
"""Elements of XBUFF in the XSAVE header. Bit 63 of XCOMP_BV says that the format is compact."""
_RESERVED: Final = range(66, 72)
_COMPACT: Final = 1 << 63
_SSE: Final = 1 << 1
_XMM_SELECT: Final = 0xFFFF << 16
_XSTATE_LOAD_FAILURE: Final = 4
"""Type of an extended exit qualification."""


def reset(vp: Vp) -> None:
    """TDH.VP.INIT: no component is in use."""
    vp.fields[XBUFF, XCOMP_BV] = _COMPACT


def save(module: Module, vp: Vp) -> None:
    """TD exit: XSAVES of all components that XFAM allows.

    Which of them it finds in use is up to the guest, and not modelled: XSTATE_BV stays.
    """
    if module.hardware.inputs.xsaves_writes_header:
        vp.fields[XBUFF, XCOMP_BV] = _COMPACT | vp.tdvps.xfam


def take_xmms(vp: Vp, mask: int) -> None:
    """TDH.VP.ENTER after TDG.VP.VMCALL: the host's XMM registers that the guest's RCX selects replace the guest's."""
    if mask & _XMM_SELECT:
        vp.fields[XBUFF, XSTATE_BV] = vp.fields[XBUFF, XSTATE_BV] | _SSE


def restore(td: Td, vp: Vp) -> None:
    """TDH.VP.ENTER: XRSTORS.

    :raises TdExit: for a header with which XRSTORS would fault; a TD that is not a debug TD dies of it.
    """
    fields = vp.fields
    in_use, format_ = fields[XBUFF, XSTATE_BV], fields[XBUFF, XCOMP_BV]
    good = (
        format_ & _COMPACT
        and not format_ & ~_COMPACT & ~vp.tdvps.xfam
        and not in_use & ~format_
        and not any(fields[XBUFF, element] for element in _RESERVED)
    )
    if not good:
        status = Status.TDX_SUCCESS if td.tdcs.attributes & TdAttributes.DEBUG else Status.TDX_NON_RECOVERABLE_TD
        raise TdExit(status, ExitReason.FAILED_VMENTER_GS, extended=_XSTATE_LOAD_FAILURE)
