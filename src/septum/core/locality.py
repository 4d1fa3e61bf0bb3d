"""Which local state a suspended task is in.

Two suspended runs of a task are in the same local state when nothing that they will ever do can differ: same code
position in every frame of the await chain, same values on the frames' evaluation stacks, and same values of the local
variables that are still *live* there (a variable that is overwritten before it is read again does not count, so retry
loops close). :func:`local_state` turns that into a hashable key.

Mutable objects that belong to the task are compared by content, shared and fixed ones (:mod:`septum.core.cells`) by
identity.
Written for CPython 3.11 and later: liveness from the bytecode, stack contents from ``gc.get_referents``.
"""

from __future__ import annotations

import dis
import gc
import types
from collections.abc import Coroutine
from enum import Enum
from functools import cache, partial
from typing import Any

from septum.core.cells import Fixed, Shared, SharedMap

_PLAIN = (
    int,
    str,
    bytes,
    float,
    type(None),
    type,
    Enum,
    range,
    types.CodeType,
    types.ModuleType,
    types.BuiltinFunctionType,
)
_EXAMPLES: tuple[Any, ...] = ((), [], range(0), "", b"", {}, {}.values(), {}.items(), set())
_ITERATORS = tuple(type(iter(example)) for example in _EXAMPLES)
_NO_FALLTHROUGH = {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD",
                   "JUMP_BACKWARD_NO_INTERRUPT", "INTERPRETER_EXIT"}  # fmt: skip


def local_state(body: Coroutine[Any, Any, Any]) -> tuple[Any, ...]:
    """The key of the local state in which ``body`` is suspended."""
    return _suspended(body, set())


def _suspended(body: Any, seen: set[int]) -> tuple[Any, ...]:
    key: list[Any] = []
    while body is not None:
        if isinstance(body, types.CoroutineType):
            frame, inner = body.cr_frame, body.cr_await
        elif isinstance(body, types.GeneratorType):
            frame, inner = body.gi_frame, body.gi_yieldfrom
        else:
            key.append(freeze(body, seen))
            break
        if frame is None:
            key.append("ended")
            break
        key.append(_frame(body, frame, inner, seen))
        body = inner
    return tuple(key)


def _frame(body: Any, frame: types.FrameType, inner: Any, seen: set[int]) -> tuple[Any, ...]:
    code = frame.f_code
    live = live_variables(code)[frame.f_lasti]
    values = frame.f_locals
    named = tuple((name, freeze(values[name], seen)) for name in live if name in values)
    # What follows the bound variables among the referents is the evaluation stack: loop iterators, pending operands.
    referents = gc.get_referents(body)
    start = len(referents) - 1 - referents[::-1].index(code) + 1
    bound = sum(name in values for name in code.co_varnames) + len(code.co_cellvars) + len(code.co_freevars)
    overlap = len(set(code.co_varnames) & set(code.co_cellvars))
    stack = referents[start + bound - overlap :]
    if stack and stack[-1] is None:
        # Not on the stack: what a coroutine keeps of an exception that something it called has handled.
        stack.pop()
    return (code, frame.f_lasti, named, tuple(freeze(value, seen) for value in stack if value is not inner))


def freeze(value: Any, seen: set[int] | None = None) -> Any:
    """A hashable stand-in for ``value``: equal stand-ins mean values that model code cannot tell apart."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (Shared, SharedMap)):
        return ("shared", value.name)
    if isinstance(value, Fixed):
        return value
    seen = set() if seen is None else seen
    if id(value) in seen:
        return ("again", type(value))
    seen = seen | {id(value)}
    if isinstance(value, (tuple, list)):
        return (type(value), *(freeze(item, seen) for item in value))
    if isinstance(value, dict):
        return ("dict", tuple((freeze(k, seen), freeze(v, seen)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return ("set", frozenset(freeze(item, seen) for item in value))
    if isinstance(value, bytearray):
        return ("bytearray", bytes(value))
    if isinstance(value, _ITERATORS):
        return ("iterator", freeze(value.__reduce__(), seen))
    if isinstance(value, (types.CoroutineType, types.GeneratorType)):
        return ("suspended", _suspended(value, seen))
    if isinstance(value, types.MethodType):
        return ("method", value.__func__, freeze(value.__self__, seen))
    if isinstance(value, types.FunctionType):
        cells = tuple(freeze(cell.cell_contents, seen) for cell in value.__closure__ or ())
        defaults = freeze((value.__defaults__, value.__kwdefaults__), seen)
        return ("function", value.__code__, cells, defaults)
    if isinstance(value, partial):
        return ("partial", *(freeze(part, seen) for part in (value.func, value.args, value.keywords)))
    if isinstance(value, types.CellType):
        return ("cell", freeze(value.cell_contents, seen))
    return ("object", type(value), tuple((name, freeze(field, seen)) for name, field in _fields(value)))


def _fields(value: Any) -> list[tuple[str, Any]]:
    fields = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                fields[name] = getattr(value, name)
    return sorted(fields.items())


@cache
def live_variables(code: types.CodeType) -> dict[int, tuple[str, ...]]:
    """For each instruction offset: the local variables whose values may still be read after it, in sorted order.

    A backward data-flow analysis over the bytecode, with an edge from every instruction of a ``try`` range to its
    handler. Variables shared with inner functions always count.
    """
    instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    offsets = [i.offset for i in instructions]
    follow = dict(zip(offsets, [*offsets[1:], None], strict=True))
    handlers = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    jumps = {*dis.hasjrel, *dis.hasjabs}
    successors: dict[int, list[int]] = {}
    for i in instructions:
        edges = [entry.target for entry in handlers if entry.start <= i.offset < entry.end]
        after = follow[i.offset]
        if i.opname not in _NO_FALLTHROUGH and after is not None:
            edges.append(after)
        if i.opcode in jumps:
            edges.append(i.argval)
        successors[i.offset] = edges
    shared = {*code.co_cellvars, *code.co_freevars}
    live_in: dict[int, frozenset[str]] = dict.fromkeys(offsets, frozenset(shared))
    live_out = dict(live_in)
    changed = True
    while changed:
        changed = False
        for i in reversed(instructions):
            out = frozenset(shared).union(*(live_in[s] for s in successors[i.offset]))
            into = _before(i, out) | shared
            if out != live_out[i.offset] or into != live_in[i.offset]:
                live_out[i.offset], live_in[i.offset] = out, into
                changed = True
    return {offset: tuple(sorted(names)) for offset, names in live_out.items()}


def _before(instruction: dis.Instruction, out: frozenset[str]) -> frozenset[str]:
    """Liveness before an instruction, given liveness after it. Paired instructions name two variables."""
    name = instruction.opname
    if "_FAST" not in name:
        return out
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    kinds = ["STORE" if part in ("STORE", "DELETE") else "LOAD" for part in name.split("_") if part in _FAST_KINDS]
    for variable, kind in reversed(list(zip(names, kinds, strict=False))):
        out = out - {variable} if kind == "STORE" else out | {variable}
    return out


_FAST_KINDS = {"LOAD", "STORE", "DELETE"}
