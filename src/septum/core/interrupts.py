"""CPUs, interrupts off and on, and inter-processor interrupts that wait for their answer.

Each CPU has an interrupt context: a task of its own that runs what other CPUs ask of it, whenever the CPU has
interrupts on. What is asked is data (a kind and an argument); the handlers are given by whoever builds the host.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from septum.core.cells import Shared
from septum.core.klocks import Section, allow_sleep, forbid_sleep
from septum.core.steps import Program, Step, Task, current_task, emit, require, wait_until

Handler = Callable[["Cpu", Any], Coroutine[Step, None, None]]


class Cpu(Shared):
    """A CPU of the host.

    ``pending`` are requests of other CPUs: (number, kind, argument); ``done`` is the number of the last one served.
    """

    index: int
    online: bool = True
    irqs_off: bool = False
    pending: tuple[tuple[int, str, Any], ...] = ()
    asked: int = 0
    done: int = 0


class IrqsOff(Section):
    """``local_irq_disable`` to ``local_irq_enable``: the CPU serves no interrupt, and its task may not sleep."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu

    async def enter(self) -> None:
        """Disables interrupts."""
        self.cpu.irqs_off = True
        forbid_sleep("interrupts off")

    def leave(self) -> None:
        """Enables them."""
        self.cpu.irqs_off = False
        allow_sleep("interrupts off")


async def smp_call(cpu: Cpu, kind: str, argument: Any = None) -> None:
    """``smp_call_function_single(..., wait=1)``: has ``cpu`` run a handler and waits for its end.

    Waits by spinning: allowed with spinning locks held, but not with interrupts off (the two CPUs could wait for each
    other), which is reported.
    """
    task = current_task()
    require(
        "interrupts off" not in task.atomic,
        "no IPI with interrupts off",
        f"{task.name} waits for CPU {cpu.index} with interrupts off",
    )
    cpu.asked += 1
    number = cpu.asked
    cpu.pending = (*cpu.pending, (number, kind, argument))
    emit("ipi", f"IPI {kind} -> CPU {cpu.index}")
    await wait_until(lambda: cpu.done >= number, f"IPI {kind} answered by", cpu)


def interrupt_context(cpu: Cpu, handlers: Mapping[str, Handler]) -> Program:
    """The task that serves the requests of other CPUs, in order, while interrupts are on."""
    task = Task(f"irq{cpu.index}", cpu=cpu.index)

    async def serve() -> None:
        while True:
            await wait_until(lambda: bool(cpu.pending) and not cpu.irqs_off, "serve interrupts of", cpu)
            number, kind, argument = cpu.pending[0]
            forbid_sleep("interrupt context")
            await handlers[kind](cpu, argument)
            allow_sleep("interrupt context")
            cpu.pending = cpu.pending[1:]
            cpu.done = number

    return Program(task, serve, daemon=True)
