"""The inner loop of the explorer: states from a list, their successors into a list.

Breadth-first and depth-first search differ only in where new states go: to the list for the next level, or back to the
list that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar, TypeAlias

from septum.core.automata import BLOCKED, ENDED, Automata, Effect, Observer
from septum.core.functions import StateFunction
from septum.core.steps import ctx
from septum.core.vectors import Vector
from septum.core.verdict import Verdict

#: How a state was reached: from where, by which task, in how many steps. Only what leads to states that are still to be
#: expanded is kept alive.
Link: TypeAlias = "tuple[Link, int, int] | None"
#: A state to expand: its name (hash, or trimmed vector in exact mode), its vector, and how it was reached.
State = tuple[Any, Vector, Link]
#: States between two looks at the bounds.
CHUNK = 1024


def schedule_of(link: Link, *tasks: int) -> list[int]:
    """The choices along a link, and then ``tasks``."""
    schedule = [*reversed(tasks)]
    while link is not None:
        link, task, _depth = link
        schedule.append(task)
    return schedule[::-1]


class Search:
    """What has been found so far, and what is still to be expanded.

    ``todo`` are the states to expand, from its end, above a ``None``; ``following`` gets their new successors.
    ``choose`` gives the tasks whose steps are to be looked at in a state, if not all are; ``fold`` the name under which
    states that count as one are known. ``edges`` gets a schedule for each pair of the lock order.
    """

    #: What a checkpoint keeps of it, beside states and outcomes.
    SAVED: ClassVar[tuple[str, ...]] = ("transitions", "deepest", "level", "edges")

    def __init__(
        self,
        automata: Automata,
        verdict: Verdict,
        edges: dict[tuple[str, str], list[int]],
        *,
        depth_first: bool = False,
        exact: bool = False,
        check: StateFunction | None = None,
        stop: StateFunction | None = None,
        observer: Observer | None = None,
        choose: Callable[[Search, Vector, Link], Iterable[int]] | None = None,
        fold: Callable[[Any], Any] | None = None,
    ) -> None:
        self.automata = automata
        self.verdict = verdict
        self.exact = exact
        self.check = check
        self.stop = stop
        self.observer = observer
        self.choose = choose
        self.fold = fold
        self.visited: set[Any] = set()
        self.todo: list[State | None] = []
        self.following: list[State | None] = self.todo if depth_first else []
        self.level = 0
        self.transitions = 0
        self.deepest = 0
        self.edges = edges

    @property
    def states(self) -> int:
        """How many there are so far."""
        return len(self.visited)

    def begin(self) -> None:
        """Starts at the initial state."""
        initial = self.automata.vectors.initial[:]
        name: Any = tuple(initial) if self.exact else 0
        if self.check and (violation := self.check(initial)):
            self.verdict.violated(violation, [])
        self.visited.add(self._key(name))
        self.todo[:] = [None, (name, initial, None)]

    def expand(self) -> None:
        """Expands the next states. An interrupt leaves everything as if the state that it hit had not been begun."""
        following, visited, exact = self.following, self.visited, self.exact
        trees, initial, trimmed = self.automata.trees, self.automata.vectors.initial, self.automata.vectors.trimmed
        tasks, check, stop, choose, fold = (
            range(len(self.automata.programs)),
            self.check,
            self.stop,
            self.choose,
            self.fold,
        )
        state: State | None = None
        begun: State | None = None
        transitions = 0
        try:
            for state in islice(iter(self.todo.pop, None), CHUNK):
                assert state is not None
                begun = state
                name, vector, link = state
                if len(vector) < len(initial):
                    vector.extend(initial[len(vector) :])
                depth = 1 if link is None else link[2] + 1
                moves = blocked = 0
                for task in tasks if choose is None else choose(self, vector, link):
                    node = trees[vector[task]]
                    while node.__class__ is list:
                        node = node[1].get(vector[node[0]])
                    if node.__class__ is not Effect:
                        if node is None:
                            node = self.learn(task, vector, link)
                        if node is ENDED:
                            continue
                        if node is BLOCKED:
                            blocked += 1
                            continue
                    moves += 1
                    if node.violation is not None:
                        self.verdict.violated(node.violation, schedule_of(link, task))
                        return
                    if exact:
                        after = vector[:]
                        for place, value in node.writes:
                            after[place] = value
                        successor = key = trimmed(after)
                    else:
                        successor = key = name ^ node.hash
                        if fold is not None:
                            key = fold(successor)
                    if key in visited:
                        continue
                    if not exact:
                        after = vector[:]
                        for place, value in node.writes:
                            after[place] = value
                    chain = (link, task, depth)
                    if (check or stop) and self.ends(after, chain):
                        if self.verdict.verdict == "violated":
                            return
                    else:
                        following.append((successor, after, chain))
                    visited.add(key)
                if not moves:
                    self.end(vector, link, blocked > 0)
                transitions += moves
                if depth > self.deepest and moves:
                    self.deepest = depth
                begun = None
        except KeyboardInterrupt:
            if following and (last := following[-1]) is not None:
                visited.add(self._key(last[0]))
            if begun is not None:
                self.todo.append(begun)
            raise
        finally:
            self.transitions += transitions

    def leaf(self, task: int, vector: Vector, link: Link) -> Any:
        """What the step of ``task`` does in a state (a vector of full length)."""
        node = self.automata.trees[vector[task]]
        while node.__class__ is list:
            node = node[1].get(vector[node[0]])
        return self.learn(task, vector, link) if node is None else node

    def learn(self, task: int, vector: Vector, link: Link) -> Any:
        """What a step does that was never taken with these values; and the lock order that it shows."""
        leaf = self.automata.learn(task, vector)
        self.note_order(link, task)
        return leaf

    def note_order(self, link: Link, task: int) -> None:
        """Files the step that has just been learnt under the pairs of the lock order that it shows."""
        if len(ctx.lock_order) > len(self.edges):
            for edge in ctx.lock_order.keys() - self.edges.keys():
                self.edges[edge] = schedule_of(link, task)

    def ends(self, vector: Vector, link: Link) -> bool:
        """Checks a new state; whether nothing is to follow it."""
        if self.check and (violation := self.check(vector)):
            self.verdict.violated(violation, schedule_of(link))
            return True
        if self.stop and self.stop(vector):
            self.end(vector, link, False)
            return True
        return False

    def end(self, vector: Vector, link: Link, blocked: bool) -> None:
        """A state in which nobody can go on: a deadlock, or an end to observe."""
        if blocked and (deadlock := self.automata.deadlock(vector)):
            self.verdict.violated(deadlock, schedule_of(link))
        elif self.observer is not None:
            outcome = self.automata.observe(vector, self.observer)
            if outcome not in self.verdict.outcomes:
                self.verdict.outcomes[outcome] = schedule_of(link)

    def next_level(self) -> bool:
        """Turns to the states that followed those of this level; whether there are any."""
        if self.following is self.todo or not self.following:
            return False
        self.following.append(None)
        self.following.reverse()
        self.todo, self.following = self.following, []
        self.level += 1
        return True

    def left(self) -> int:
        """How many states are to be expanded."""
        lists = [self.todo] if self.following is self.todo else [self.todo, self.following]
        return sum(len(states) - (None in states[:1]) for states in lists)

    def _key(self, name: Any) -> Any:
        return name if self.fold is None else self.fold(name)
