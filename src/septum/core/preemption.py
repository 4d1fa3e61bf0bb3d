"""Search by preemptions: first all runs without one, then all with one, and so on.

A preemption is a switch away from a task that could have gone on. Most bugs need few of them, and there are far fewer
runs with few. What can follow with how many preemptions depends on the task that went last, so the states searched are
pairs of a state and that task.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from septum.core.automata import BLOCKED, ENDED
from septum.core.search import CHUNK, Search, State, schedule_of


class PreemptionSearch(Search):
    """A level is what can be reached with one preemption more than the level before. Ends may be looked at again."""

    SAVED = (*Search.SAVED, "expanded")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.following = []
        self.expanded: set[tuple[Any, int]] = set()

    def expand(self) -> None:
        """Expands the next states; what needs no preemption is expanded in the same level."""
        begun: State | None = None
        try:
            for state in islice(iter(self.todo.pop, None), CHUNK):
                assert state is not None
                begun = state
                self._expand(state)
                if self.verdict.verdict == "violated":
                    return
                begun = None
        except KeyboardInterrupt:
            if begun is not None:
                self.expanded.discard(self._pair(begun))
                self.todo.append(begun)
            raise

    @staticmethod
    def _pair(state: State) -> tuple[Any, int]:
        name, _vector, link = state
        return name, -1 if link is None else link[1]

    def _expand(self, state: State) -> None:
        name, vector, link = state
        pair = self._pair(state)
        if pair in self.expanded:
            return
        self.expanded.add(pair)
        depth = 1 if link is None else link[2] + 1
        leaves = {}
        blocked = False
        for task in range(len(self.automata.programs)):
            leaf = self.automata.leaf(task, vector)
            self.note_order(link, task)
            blocked |= leaf is BLOCKED
            if leaf is not BLOCKED and leaf is not ENDED:
                leaves[task] = leaf
        if not leaves:
            self.end(vector, link, blocked)
        for task, leaf in leaves.items():
            if leaf.violation is not None:
                self.verdict.violated(leaf.violation, schedule_of(link, task))
                return
            after = vector[:]
            for place, value in leaf.writes:
                after[place] = value
            chain = (link, task, depth)
            successor = self.automata.vectors.trimmed(after) if self.exact else name ^ leaf.hash
            if successor not in self.visited:
                if self.ends(after, chain):
                    self.visited.add(successor)
                    continue
                self.visited.add(successor)
            elif self.stop and self.stop(after):
                continue
            preempts = pair[1] in leaves and task != pair[1]
            (self.following if preempts else self.todo).append((successor, after, chain))
        self.transitions += len(leaves)
        self.deepest = max(self.deepest, depth if leaves else 0)
