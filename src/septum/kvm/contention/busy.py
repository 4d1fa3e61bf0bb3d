"""Which statuses are contention.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from septum.arch.status import CODE, Status


def tdx_operand_busy(err: int) -> bool:
    """``tdx_operand_busy``: TDX_OPERAND_BUSY, whatever the operand. TDX_PREVIOUS_TLB_EPOCH_BUSY and TDX_SYS_BUSY are
    others."""
    return err & CODE == Status.TDX_OPERAND_BUSY
