"""What a guest is to KVM: something that acts between TD entry and the next VM exit.

Whoever builds a scenario attaches a :class:`Guest` to each vCPU. Between two exits KVM and the module know nothing of
the guest, so a guest is whatever code returns the next :class:`~septum.tdx.vm_exit.VmExit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from septum.core.interrupts import Cpu
from septum.core.steps import wait_until
from septum.tdx.vm_exit import VmExit

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td
    from septum.tdx.state.vp import Vp

CALL_FUNCTION_VECTOR: Final = 0xFB
"""Vector of the IPI that makes another CPU run a function (Linux, x86)."""


@dataclass(frozen=True, slots=True)
class GuestCpu:
    """The CPU as the guest on it sees it.

    ``vp.tdvps.gprs`` are its registers and ``vp.vmcs`` its other state, as the module left them; ``module`` and ``td``
    are there to translate addresses (:mod:`septum.tdx.ept`). ``posted`` takes the interrupt vectors that were posted
    to the vCPU since the last call, lowest first.
    """

    module: Module
    td: Td
    vp: Vp
    cpu: Cpu
    posted: Callable[[], tuple[int, ...]]

    def interrupted(self) -> bool:
        """Whether another CPU's interrupt waits: the guest must leave at its next instruction."""
        return bool(self.cpu.pending)

    async def idle(self) -> VmExit:
        """Runs without exits of its own, for as long as no interrupt comes."""
        await wait_until(self.interrupted, "be interrupted in the guest on", self.cpu)
        return external_interrupt()


class Guest(Protocol):
    """The code inside a TD, one object per vCPU.

    What it knows from one call to the next, and what several vCPUs share, is in cells. Accesses that others must be
    able to come between are steps (:func:`septum.core.steps.step`).
    """

    async def run(self, cpu: GuestCpu) -> VmExit:
        """Acts until the next VM exit and returns it: a TDCALL (``VmExit.tdcall(regs)``), an EPT violation, ...

        Called again when the guest goes on: at once when the module handled a TDCALL itself, after the next
        TDH.VP.ENTER otherwise. An interrupt that is pending at a call becomes an exit before the guest is asked.
        """

    def deliver(self, cpu: GuestCpu) -> None:
        """Takes the exception that VM entry injects, if any, and nothing more. For exits before the guest is asked to
        :meth:`run`, which does the same at its start."""


def external_interrupt(vector: int = CALL_FUNCTION_VECTOR) -> VmExit:
    """The exit that an interrupt of the host causes.

    It always counts as one that comes late enough after entry for the module not to suspect single-stepping: how long a
    guest computes is not modelled, and the few instructions that the module would step through change nothing for KVM.
    """
    return VmExit.interrupt(vector)
