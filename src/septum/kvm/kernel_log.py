"""What the kernel prints: messages with counts, WARN_ONs apart from ordinary ones.

A log never influences the model. Messages are kept as they would stand in dmesg, so that ``septum ingest`` reads them.
"""

from __future__ import annotations

from collections import Counter

from septum.core.cells import Fixed
from septum.core.steps import emit


class KernelLog(Fixed):
    """The kernel's ring buffer, condensed."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        """WARN_ON_ONCE conditions that were true. The kernel prints each once; here all are counted."""
        self.bugs: Counter[str] = Counter()
        """KVM_BUG_ON conditions that bugged a VM."""

    def pr(self, message: str) -> None:
        """``pr_warn_ratelimited``, ``pr_err_ratelimited``."""
        self.messages[message] += 1
        emit("dmesg", message)

    def warn_on(self, condition: object, what: str) -> bool:
        """``WARN_ON_ONCE(condition)``: returns whether it is true."""
        if condition:
            self.warnings[what] += 1
            emit("warn", f"WARN_ON_ONCE: {what}")
        return bool(condition)

    def seamcall_failed(self, leaf: str, status: int, **outputs: int) -> None:
        """``pr_tdx_error``: how Linux 6.16 reports a SEAMCALL that failed."""
        details = "".join(f", {name} {value:#x}" for name, value in outputs.items())
        self.pr(f"SEAMCALL {leaf} failed: {status:#x}{details}")
