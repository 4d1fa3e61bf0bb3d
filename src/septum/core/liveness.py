"""Liveness: under a fair scheduler no task takes for ever.

A task takes for ever in a run that never ends if from some point on it neither ends nor gets on
(:func:`septum.core.steps.progress`): it tries again and again, faults on one instruction, waits for what never comes.
The scheduler is fair: in such a run every task that can go on again and again does so again and again (strong
fairness). In a finite state graph, such a run exists if and only if there is a strongly connected set of states, the
task having ended in none of them, with an edge in the set for each task that can go on in any of its states, and no
need of an edge on which the task gets on. What breaks the property is told as a lasso: the way to such a set, and a
walk round in it that takes all these edges.

If no task can come back to a local state, every run ends, and there is nothing to look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from septum.core.automata import Automata, Effect, Local
from septum.core.functions import StateFunction
from septum.core.recorders import Recording
from septum.core.steps import Violation

PROGRESS = "progress"
#: A step from one state to another: task, state that follows, whether the task got on.
Edge = tuple[int, int, bool]


class LocalGraph:
    """Which local states follow which, as far as has been learnt."""

    SAVED = ("_before",)

    def __init__(self, automata: Automata) -> None:
        self._before: dict[int, set[int]] = {}
        automata.watchers.append(self._watch)

    def _watch(self, local: Local, recording: Recording, after: Local | None) -> None:
        if after is not None:
            self._before.setdefault(after.number, set()).add(local.number)

    def all_runs_end(self) -> bool:
        """Whether no task can come back to a local state."""
        try:
            TopologicalSorter(self._before).prepare()
        except CycleError:
            return False
        return True


class StateGraph:
    """All states, numbered as they are found breadth-first, with their edges and the edge that each was found by."""

    def __init__(self, automata: Automata, stop: StateFunction | None, *, exact: bool) -> None:
        self.edges: list[list[Edge]] = []
        self.found_by: list[tuple[int, int]] = [(-1, -1)]
        self.ended: list[int] = []
        """Per state, a bit mask of the tasks that have ended."""
        self._automata = automata
        tasks = range(len(automata.programs))
        initial = automata.vectors.initial[:]
        root: Any = automata.vectors.trimmed(initial) if exact else 0
        numbers = {root: 0}
        todo = [(root, initial)]
        for number, (name, vector) in enumerate(todo):
            edges: list[Edge] = []
            stopped = stop is not None and bool(stop(vector))
            for task in () if stopped else tasks:
                leaf = automata.leaf(task, vector)
                if not isinstance(leaf, Effect):
                    continue
                after = vector[:]
                for place, value in leaf.writes:
                    after[place] = value
                successor = automata.vectors.trimmed(after) if exact else name ^ leaf.hash
                target = numbers.setdefault(successor, len(numbers))
                if target == len(self.found_by):
                    self.found_by.append((number, task))
                    todo.append((successor, after))
                edges.append((task, target, leaf.progress))
            self.edges.append(edges)
            self.ended.append(sum(automata.locals[vector[task]].ended << task for task in tasks))
            todo[number] = name, []

    def path_to(self, state: int) -> list[int]:
        """A shortest schedule that leads to a state."""
        schedule = []
        while state:
            state, task = self.found_by[state]
            schedule.append(task)
        return schedule[::-1]

    def components(self, states: Iterable[int], without: int | None = None) -> Iterator[set[int]]:
        """The strongly connected sets that have an edge inside, among ``states``; edges on which ``without`` gets on do
        not count. (Tarjan's algorithm, with a stack of its own.)"""
        inside = states if isinstance(states, set) else set(states)
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        pending: list[int] = []
        waiting: set[int] = set()
        for root in sorted(inside):
            if root in index:
                continue
            walk = [(root, self._within(root, inside, without))]
            while walk:
                state, following = walk[-1]
                if state not in index:
                    index[state] = low[state] = len(index)
                    pending.append(state)
                    waiting.add(state)
                for _task, target in following:
                    if target not in index:
                        walk.append((target, self._within(target, inside, without)))
                        break
                    if target in waiting:
                        low[state] = min(low[state], low[target])
                else:
                    walk.pop()
                    if walk:
                        low[walk[-1][0]] = min(low[walk[-1][0]], low[state])
                    if low[state] == index[state]:
                        component: set[int] = set()
                        while state not in component:
                            component.add(pending.pop())
                        waiting -= component
                        if len(component) > 1 or any(t == state for _, t in self._within(state, component, without)):
                            yield component

    def _within(self, state: int, inside: set[int], without: int | None) -> Iterator[tuple[int, int]]:
        return (
            (task, target)
            for task, target, gets_on in self.edges[state]
            if target in inside and not (gets_on and task == without)
        )

    def endless(self, task: int) -> set[int] | None:
        """States in which a fair scheduler can stay for ever while ``task`` neither ends nor gets on, if any."""
        alive = {state for state, ended in enumerate(self.ended) if not ended >> task & 1}
        todo = [*self.components(alive, task)]
        while todo:
            component = todo.pop()
            can = {mover for state in component for mover, _, _ in self.edges[state]}
            does = {mover for state in component for mover, _ in self._within(state, component, task)}
            if can == does:
                return component
            # Who can go on but never does so here must not be able to: leave out the states where it is.
            unfair = can - does
            rest = {state for state in component if not any(mover in unfair for mover, _, _ in self.edges[state])}
            todo += self.components(rest, task)
        return None

    def round_trip(self, component: set[int], task: int) -> tuple[int, list[int]]:
        """A state of a component, and a walk back to it on which each task goes that can."""
        start = at = min(component)
        needed = {mover for state in component for mover, _ in self._within(state, component, task)}
        loop: list[int] = []
        while needed or at != start:
            came: dict[int, tuple[int, int]] = {}
            todo = [at]
            goal: tuple[int, int] | None = None
            for state in todo:
                for mover, target in self._within(state, component, task):
                    if mover in needed if needed else target == start:
                        goal = state, mover
                        after = target
                        break
                    if target not in came and target != at:
                        came[target] = state, mover
                        todo.append(target)
                if goal:
                    break
            assert goal is not None, "the set is strongly connected"
            state, mover = goal
            steps = [mover]
            while state != at:
                state, mover = came[state]
                steps.append(mover)
            loop += steps[::-1]
            needed -= {*steps}
            at = after
        return start, loop


def takes_for_ever(graph: StateGraph, automata: Automata) -> tuple[Violation, list[int], list[int]] | None:
    """A task that takes for ever under a fair scheduler, if any: the violation, the way there, and the loop."""
    for task, program in enumerate(automata.programs):
        if program.daemon:
            continue
        component = graph.endless(task)
        if component is not None:
            start, loop = graph.round_trip(component, task)
            does = "goes on for ever but never gets on" if task in loop else "waits for ever"
            who = ", ".join(automata.programs[i].task.name for i in sorted({*loop}))
            message = f"{program.task.name} {does}, in a loop of {len(loop)} steps in which all go that can: {who}"
            return Violation(PROGRESS, message), graph.path_to(start), loop
    return None
