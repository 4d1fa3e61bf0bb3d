"""What goes into the module when a guest stops, and the ways in which handling it ends.

A guest runs between two points of the module: TDH.VP.ENTER leaves it running, a VM exit comes back. :class:`VmExit` is
what the CPU tells the module; :class:`TdExit` and :class:`ResumeGuest` end the handling early, from any depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.status import Status
from septum.tdx.registers import Regs

TDCALL_LENGTH = 4


@dataclass(frozen=True, slots=True)
class VmExit:
    """A VM exit of the guest that runs on an LP.

    ``reason`` is the 32-bit exit reason, ``interruption`` the VM-exit interruption information. ``gprs`` are the
    guest's registers at the exit (None: as the module left them), ``vmcs`` other fields that the CPU or the guest
    changed before it, by encoding: guest state such as RIP, IDT-vectoring information. ``ran_long`` says that the guest
    ran too long for a single step, however little the TSC has moved: for harnesses in which time stands still.
    """

    reason: int
    qualification: int = 0
    gpa: int = 0
    gla: int = 0
    interruption: int = 0
    instruction_length: int = 0
    gprs: Regs | None = None
    vmcs: Mapping[int, int] | None = None
    ran_long: bool = False

    @classmethod
    def interrupt(cls, vector: int) -> VmExit:
        """An interrupt for the host stopped the guest, which had run for a while."""
        return cls(ExitReason.INTERRUPT, interruption=vmcs.VALID | vector, ran_long=True)

    @classmethod
    def tdcall(cls, gprs: Regs) -> VmExit:
        """The guest executed TDCALL, with the leaf and version in RAX."""
        return cls(ExitReason.TDCALL, instruction_length=TDCALL_LENGTH, gprs=gprs)


class TdExit(Exception):
    """Ends the handling of a VM exit with an asynchronous TD exit: TDH.VP.ENTER returns to the host.

    ``status`` becomes the upper half of RAX, ``reason`` its lower half. Source: ``async_tdexit_to_vmm``.
    """

    def __init__(
        self,
        status: Status,
        reason: int = 0,
        qualification: int = 0,
        extended: int = 0,
        gpa: int = 0,
        interruption: int = 0,
        *,
        report_bus_lock: bool = True,
    ) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
        self.qualification = qualification
        self.extended = extended
        self.gpa = gpa
        self.interruption = interruption
        self.report_bus_lock = report_bus_lock


class TdVmcall(Exception):
    """Ends TDG.VP.VMCALL with a synchronous TD exit that hands registers to the host."""


class ResumeGuest(Exception):
    """Ends a TDCALL at once: the guest goes on without a completion status, at the same RIP or at an injected event."""


class Interrupted(ResumeGuest):
    """A long TDCALL stopped to let an interrupt in; RIP and RAX stay as they were, so that the guest calls again."""
