"""A guest that is a script: a coroutine that asks for one instruction after the other."""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, NoReturn

from septum.arch import vmcs
from septum.core.cells import Fixed, Tracking
from septum.core.locality import local_state
from septum.guest.instructions import Begin, Fault, Instruction, Progress, Publish, TripleFault
from septum.guest.tlb import CachingCpu, Tlb
from septum.guest.vcpu import GuestFault, HostRefused, Vcpu
from septum.kvm.guest_protocol import external_interrupt
from septum.tdx.vm_exit import VmExit

if TYPE_CHECKING:
    from septum.kvm.guest_protocol import GuestCpu
    from septum.tdx.state.vp import Vp

Body = Coroutine[Instruction[Any], Any, Any]
Script = Callable[[Vcpu], Coroutine[Any, Any, Any]]
"""What a VCPU does. What it returns must be a value (:mod:`septum.core.cells`); after it the VCPU halts for ever."""

_PANIC: Final = 1
CODE_START: Final = 0x10_0000
_CODE_MASK: Final = (1 << 40) - 1
_NOT_BEGUN: Final = 0


class ScriptedGuest(Fixed):
    """Runs ``script`` on one VCPU; a :class:`~septum.kvm.guest_protocol.Guest`.

    Where the script stands is a number in a cell (``progress.place``). The coroutine that stands there is only kept as
    long as time goes forward: after a step back (an explorer, a journal) a fresh one is given the results that led
    there. In an exploration, places where the script is in the same local state have the same number, so that its loops
    close.

    An instruction's address is where the script is in its source, so what is in a loop is executed at one RIP.
    """

    __slots__ = ("_bodies", "_numbers", "_parents", "_results", "_script", "_tlb", "progress")

    def __init__(self, script: Script, name: str = "guest", tlb: Tlb | None = None) -> None:
        """:param tlb: what the CPUs may hold of the TD's translations; None: nothing."""
        self.progress = Progress(name)
        self._tlb = tlb
        self._script = script
        self._parents: list[int] = [_NOT_BEGUN]
        self._results: list[Any] = [None]
        self._numbers: dict[Any, int] = {}
        self._bodies: dict[int, tuple[Body, Instruction[Any], int]] = {}

    @property
    def finished(self) -> bool:
        """Whether the script has published a result, or returned."""
        return self.progress.finished

    @property
    def result(self) -> Any:
        """What the script published or returned last."""
        return self.progress.result

    async def run(self, cpu: GuestCpu) -> VmExit:
        """Executes the script's instructions until one causes a VM exit."""
        if self._tlb is not None:
            cpu = CachingCpu.of(cpu, self._tlb)
        self.deliver(cpu)
        place = self.progress.place
        body, instruction, address = self._stand(place)
        if place and cpu.vp.vmcs[vmcs.GUEST_RIP] != address:
            place, instruction = self._go_on(place, body, instruction.completed(cpu))
        while not cpu.interrupted():
            outcome = await instruction.execute(cpu)
            if isinstance(outcome, VmExit):
                break
            place, instruction = self._go_on(place, body, outcome)
        else:
            outcome = external_interrupt()
        self._save(cpu.vp, place, body, instruction)
        return outcome

    def deliver(self, cpu: GuestCpu) -> None:
        """The exception that VM entry injects, if any, is delivered; nothing else happens."""
        fields = cpu.vp.vmcs
        event = fields[vmcs.ENTRY_INTERRUPTION]
        if not event & vmcs.VALID:
            return
        fields[vmcs.ENTRY_INTERRUPTION] = event & ~vmcs.VALID
        if event & vmcs.TYPE_MASK == vmcs.TYPE_HARDWARE_EXCEPTION:
            code = fields[vmcs.ENTRY_ERROR_CODE] if event & vmcs.ERROR_CODE_VALID else 0
            place = self.progress.place
            body, *_ = self._stand(place)
            place, instruction = self._go_on(place, body, Fault(event & vmcs.VECTOR_MASK, code))
            self._save(cpu.vp, place, body, instruction)

    async def _life(self) -> None:
        """The script, and what comes before and after it."""
        start = await Begin()
        vcpu = Vcpu(start, self.progress)
        try:
            result = await self._script(vcpu)
        except HostRefused as refused:
            await vcpu.report_fatal_error(_PANIC, str(refused))
            await self._shut_down()
        except GuestFault:
            await self._shut_down()
        await Publish(self.progress, result)
        while True:
            await vcpu.halt()

    @staticmethod
    async def _shut_down() -> NoReturn:
        while True:
            await TripleFault()

    def _save(self, vp: Vp, place: int, body: Body, instruction: Instruction[Any]) -> None:
        """Notes where the guest is: about to execute ``instruction``."""
        vp.vmcs[vmcs.GUEST_RIP] = address = address_of(body)
        self._bodies[place] = body, instruction, address
        self.progress.place = place

    def _go_on(self, place: int, body: Body, result: Any) -> tuple[int, Instruction[Any]]:
        """Gives the script the result of its instruction: where it then stands, and what it asks for."""
        instruction = body.send(result)
        number = len(self._parents)
        if Tracking.recorder is not None:
            number = self._numbers.setdefault(local_state(body), number)
        if number == len(self._parents):
            self._parents.append(place)
            self._results.append(result)
        return number, instruction

    def _stand(self, place: int) -> tuple[Body, Instruction[Any], int]:
        """A coroutine that stands at ``place``, the instruction that it asks for there, and that one's address."""
        kept = self._bodies.pop(place, None)
        if kept is not None:
            return kept
        results = []
        while place:
            results.append(self._results[place])
            place = self._parents[place]
        body = self._life()
        instruction = body.send(None)
        for result in reversed(results):
            instruction = body.send(result)
        return body, instruction, address_of(body)


def address_of(body: Any) -> int:
    """RIP of a script: made from the source lines at which it and the functions that it is in are suspended."""
    address = 0
    while isinstance(body, types.CoroutineType) and body.cr_frame is not None:
        address = address << 10 ^ body.cr_frame.f_lineno
        body = body.cr_await
    return CODE_START + ((address & _CODE_MASK) << 4)
