"""Small random programs over shared cells, and a brute-force search to compare the explorer with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import strategies as st

from septum.core.cells import Fixed, Shared, SharedMap, Tracking, World
from septum.core.steps import Program, Task, step, wait_until

#: Cells, and per task the place in its text and its register.
State = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
#: An instruction: (operation, cell, operand).
Instruction = tuple[str, int, int]
#: Programs, one a task.
Texts = tuple[tuple[Instruction, ...], ...]
CELLS = 6
OPERATIONS = ("load", "store", "add", "set", "skip_if", "wait")


def texts(tasks: int = 3, length: int = 4, cells: int = CELLS) -> st.SearchStrategy[Texts]:
    """Programs for up to so many tasks."""
    instruction = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, cells - 1), st.integers(0, 2))
    return st.lists(st.lists(instruction, max_size=length).map(tuple), min_size=1, max_size=tasks).map(tuple)


def looping_texts() -> st.SearchStrategy[Texts]:
    """Programs of which some start over for ever."""
    again: Instruction = ("again", 0, 0)
    return st.tuples(texts(length=3), st.tuples(*[st.booleans()] * 3)).map(
        lambda drawn: tuple((*text, again) if loops else text for text, loops in zip(*drawn, strict=False))
    )


WAITS = ("wait", "both", "either")


class Cells(Shared):
    """A few named cells, beside those of a map."""

    a: int = 0
    b: int = 0


@dataclass(eq=False)
class Machine(Fixed):
    """A world with cells 0 and 1 in a record and all others in a map."""

    world: World
    record: Cells
    table: SharedMap[int, int]

    @classmethod
    def fresh(cls) -> Machine:
        world = Tracking.world = World()
        return cls(world, Cells("cells"), SharedMap("table", 0))

    def get(self, cell: int) -> int:
        return (self.record.a if cell == 0 else self.record.b) if cell < 2 else self.table.get(cell, 0)

    def put(self, cell: int, value: int) -> None:
        if cell == 0:
            self.record.a = value
        elif cell == 1:
            self.record.b = value
        else:
            self.table.store(cell, value)

    def values(self) -> tuple[int, ...]:
        return tuple(self.get(cell) for cell in range(CELLS))


def may_go_on(read: Callable[[int], int], operation: str, cell: int, operand: int) -> bool:
    """The guard of each wait; "both" and "either" look at a second cell only if they need to."""
    match operation:
        case "both":
            return read(cell) >= operand and read((cell + 1) % CELLS) >= 1
        case "either":
            return read(cell) >= operand or read((cell + 1) % CELLS) >= 2
        case "wait":
            return read(cell) >= operand
    return True


async def interpret(machine: Machine, instructions: tuple[Instruction, ...]) -> int:
    """Runs a program; each instruction is one step."""
    register = 0
    place = 0
    while place < len(instructions):
        operation, cell, operand = instructions[place]
        place += 1
        if operation in WAITS:
            await wait_until(partial(may_go_on, machine.get, operation, cell, operand), operation, cell)
            continue
        await step(operation, cell)
        match operation:
            case "again":
                place = 0
            case "load":
                register = machine.get(cell)
            case "store":
                machine.put(cell, (register + operand) % 3)
            case "add":
                machine.put(cell, (machine.get(cell) + operand) % 3)
            case "set":
                machine.put(cell, operand)
            case "skip_if":
                register = register if machine.get(cell) != operand else -1
    return register


def programs_of(machine: Machine, texts: Texts) -> list[Program]:
    """Tasks for the texts."""

    def body(text: tuple[Instruction, ...]) -> Callable[[], Any]:
        return lambda: interpret(machine, text)

    return [Program(Task(f"t{i}", cpu=i), body(text)) for i, text in enumerate(texts)]


def successors(texts: Texts, state: State) -> dict[int, State]:
    """What each task that can go on makes of a state."""
    cells, tasks = state
    found = {}
    for i, (place, register) in enumerate(tasks):
        if place == len(texts[i]):
            continue
        operation, cell, operand = texts[i][place]
        if not may_go_on(cells.__getitem__, operation, cell, operand):
            continue
        after, value = register, cells[cell]
        if operation == "load":
            after = cells[cell]
        elif operation == "store":
            value = (register + operand) % 3
        elif operation == "add":
            value = (value + operand) % 3
        elif operation == "set":
            value = operand
        elif operation == "skip_if" and value == operand:
            after = -1
        following = 0 if operation == "again" else place + 1
        found[i] = (
            (*cells[:cell], value, *cells[cell + 1 :]),
            (*tasks[:i], (following, after), *tasks[i + 1 :]),
        )
    return found


def initial(texts: Texts) -> State:
    """The initial state."""
    return (0,) * CELLS, tuple((0, 0) for _ in texts)


def end_of(texts: Texts, state: State) -> Any:
    """What an end is observed as, in a state where nobody can go on; ``None`` for a deadlock."""
    cells, tasks = state
    if all(place == len(text) for (place, _), text in zip(tasks, texts, strict=True)):
        return cells, tuple(register for _, register in tasks)
    return None


def brute_force(texts: Texts) -> tuple[set[State], set[Any], bool]:
    """All states, all ends and whether any state is a deadlock, by a search over tuples that shares no code."""
    seen, ends = {initial(texts)}, set[Any]()
    todo = [*seen]
    while todo:
        state = todo.pop()
        following = successors(texts, state)
        if not following:
            ends.add(end_of(texts, state))
        new = set(following.values()) - seen
        seen |= new
        todo += new
    return seen, ends - {None}, None in ends


def least_preemptions(texts: Texts) -> tuple[dict[Any, int], float]:
    """For each end, and for a deadlock, the least number of preemptions of a run that leads there."""
    best: dict[tuple[State, int], int] = {(initial(texts), -1): 0}
    todo = [*best]
    least: dict[Any, int] = {}
    while todo:
        state, last = todo.pop()
        count = best[state, last]
        following = successors(texts, state)
        if not following:
            end = end_of(texts, state)
            least[end] = min(count, least.get(end, count))
        for task, after in following.items():
            switched = count + (last in following and task != last)
            if switched < best.get((after, task), switched + 1):
                best[after, task] = switched
                todo.append((after, task))
    deadlock = least.pop(None, float("inf"))
    return least, deadlock
