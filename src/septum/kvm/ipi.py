"""Running functions on other CPUs: ``smp_call_function_single``, ``smp_call_function_many``, ``on_each_cpu_mask``.

Handlers are named, and what they are asked and answer is data, so that a request can wait in a CPU's cell.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from septum.arch.errors import UsageError
from septum.core.cells import Fixed, SharedMap
from septum.core.interrupts import Cpu, IrqsOff, interrupt_context
from septum.core.klocks import might_sleep
from septum.core.steps import Program, Step, current_task, emit, require, wait_until

if TYPE_CHECKING:
    from septum.core.interrupts import Handler

#: Runs in interrupt context on a CPU; what it returns goes to the caller.
Function = Callable[[Cpu, Any], Coroutine[Step, None, int]]


def check_alone(cpu: Cpu) -> None:
    """Whether the current task has its CPU to itself.

    :raises UsageError: when another task that is pinned to it has it with interrupts off, in the guest for example.
    """
    if cpu.irqs_off:
        raise UsageError(
            f"task {current_task().name} runs on CPU {cpu.index} while another has it with interrupts off;"
            " give each thread that runs a vCPU a CPU of its own"
        )


class Ipis(Fixed):
    """The functions that CPUs can be asked to run."""

    def __init__(self, cpus: list[Cpu]) -> None:
        self.cpus = cpus
        self._functions: dict[str, Function] = {}
        self._answers: SharedMap[tuple[int, int], int] = SharedMap("IPI answers", 0)
        self._contexts: list[Program] = []

    def register(self, name: str, function: Function) -> None:
        """Gives a function its name."""
        self._functions[name] = function

    def interrupt_contexts(self) -> list[Program]:
        """One daemon for each CPU that serves what is asked of it: the same in every run."""
        if not self._contexts:
            handlers: Mapping[str, Handler] = {name: self._serving(name) for name in self._functions}
            self._contexts = [interrupt_context(cpu, handlers) for cpu in self.cpus]
        return list(self._contexts)

    def _serving(self, name: str) -> Handler:
        async def serve(cpu: Cpu, argument: Any) -> None:
            number = cpu.pending[0][0]
            self._answers.store((cpu.index, number), await self._functions[name](cpu, argument))

        return serve

    async def call_single(self, cpu_index: int, name: str, argument: Any = None) -> int:
        """``smp_call_function_single(cpu, ..., wait=1)``. On the caller's own CPU it is a call with interrupts off.

        A CPU that is offline does nothing, and the answer is 0.
        """
        return next(iter(await self.call_many((cpu_index,), name, argument, local=True)), 0)

    async def call_many(
        self, cpu_indices: Iterable[int], name: str, argument: Any = None, *, wait: bool = True, local: bool = False
    ) -> list[int]:
        """``smp_call_function_many``: asks all at once, then waits for all answers, unless ``wait`` is false.

        The caller's own CPU is left out, or, with ``local``, runs the function itself (``on_each_cpu_mask``).
        Waiting is spinning: spinning locks may be held, but interrupts must be on.
        """
        task = current_task()
        require(
            "interrupts off" not in task.atomic,
            "no IPI with interrupts off",
            f"{task.name} has other CPUs run {name}, with interrupts off",
        )
        asked: list[tuple[Cpu, int]] = []
        own: Cpu | None = None
        for index in cpu_indices:
            cpu = self.cpus[index]
            if index == task.cpu:
                check_alone(cpu)
                own = cpu if local else None
            elif cpu.online:
                asked.append((cpu, self.send(cpu, name, argument)))
        answers = []
        if own is not None:
            async with IrqsOff(own):
                answers.append(await self._functions[name](own, argument))
        for cpu, number in asked if wait else ():
            answers.append(await self._answer(cpu, number, name))
        return answers

    @staticmethod
    def send(cpu: Cpu, name: str, argument: Any = None) -> int:
        """Asks another CPU, without waiting; returns the number of the request."""
        cpu.asked += 1
        cpu.pending = (*cpu.pending, (cpu.asked, name, argument))
        emit("ipi", f"IPI {name} -> CPU {cpu.index}")
        return cpu.asked

    async def _answer(self, cpu: Cpu, number: int, name: str) -> int:
        await wait_until(lambda: cpu.done >= number, f"IPI {name} answered by", cpu)
        return self._answers.pop((cpu.index, number), 0)

    async def call_on_cpu(self, cpu_index: int, name: str, argument: Any = None) -> int:
        """``smp_call_on_cpu``: has a worker thread of that CPU run the function, and sleeps until it has.

        The worker is modelled by the CPU's interrupt context: both can run only while no guest does.
        """
        might_sleep(f"smp_call_on_cpu({name})")
        return await self.call_single(cpu_index, name, argument)
