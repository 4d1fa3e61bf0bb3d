"""Signals, as far as the kernel looks for them: whether one is pending for the current thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.core.steps import current_task

if TYPE_CHECKING:
    from septum.kvm.host import Host


def signal_pending(host: Host) -> bool:
    """``signal_pending(current)``."""
    return current_task().name in host.signals
