"""Two calls into the TDX Module at the same time, on a TD that is ready for both.

The machine is that of the recorded start state ``prefix/all_states``; the operations are those of the contention
matrix. With ``same=yes`` the second call is made for the first one's GPA, whatever its own would be, and with a page
of its own.
"""

from __future__ import annotations

from typing import Any

from septum.arch.pages import PAGE_4K
from septum.core.automata import Invariant
from septum.core.run import solo_call
from septum.core.steps import PRIMITIVES, Program, Task, Violation, emit, step
from septum.lab.contention import call_of
from septum.lab.operations import FREE_PAGE, OPERATIONS, entering, on
from septum.lab.scenario import Parameter, Scenario
from septum.lab.starts import runner_for
from septum.tdx.module import Module

_NAMES = tuple(OPERATIONS["run"])


def build(a: str, b: str, same: str) -> tuple[list[Program], list[Invariant]]:
    """The two calls as tasks."""
    machine = runner_for().machine_at("prefix/all_states")
    machine.journal.close()
    module = machine.module
    (a_leaf, a_operands), (b_leaf, b_operands) = OPERATIONS["run"][a], OPERATIONS["run"][b]
    if same == "yes":
        b_operands = {**b_operands, "rcx": a_operands["rcx"]}
        if b_operands.get("r8") == a_operands.get("r8") == FREE_PAGE:
            b_operands["r8"] = FREE_PAGE + PAGE_4K
    calls = [on(0, a_leaf, a_operands), on(1, b_leaf, b_operands)]
    for lp, call in enumerate(calls):
        if "tdcall" in call:
            solo_call(call_of(module, entering(lp)))

    def program(lp: int) -> Program:
        return Program(Task(f"LP {lp}", cpu=lp), lambda: _call(module, calls[lp]))

    return [program(lp) for lp in range(2)], []


async def _call(module: Module, call: dict[str, Any]) -> str:
    name = call.get("leaf") or call["tdcall"]
    operands = ", ".join(f"{r}={v}" for r, v in (call.get("in_regs") or call["guest_regs"]).items())
    await step("call", name)
    emit("seamcall", f"{name} {operands}")
    _rax, answer = await call_of(module, call)
    if answer.startswith("HALT"):
        raise Violation("the module never halts", f"{name}: {answer.removeprefix('HALT: ')}")
    emit("answer", f"-> {answer}")
    return answer


SCENARIOS = (
    Scenario(
        "seamcalls",
        "two calls into the TDX Module at the same time",
        build,
        (
            Parameter("a", "PAGE.AUG/4K", "the call on LP 0", choices=_NAMES),
            Parameter("b", "RANGE.BLOCK/4K", "the call on LP 1", choices=_NAMES),
            Parameter("same", "no", "the second call takes the first one's GPA", choices=("no", "yes")),
        ),
        level=PRIMITIVES,
    ),
)
