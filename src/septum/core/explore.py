"""The state explorer's kernel: every reachable state of a scenario, once.

Tasks are explored as automata. A task's coroutine is run only when something new can be learnt: from local state *L*,
in a shared state that differs from all earlier ones in some cell that the step reads. What it read, what it wrote
and the local state that followed are filed in *L*'s decision tree, whose inner nodes are cells and whose leaves are
effects. From then on a transition is a few dictionary look-ups: no coroutine runs, nothing is copied unless the
state is new.

A global state is a vector: one small integer per task (its local state) and one entry per cell that this scenario
has ever written. Cells that nobody has written yet are constants and take no room; when one is written for the first
time the vector grows and the trees are learnt anew. States are identified by an incremental 64-bit hash (xor of one
random number per cell value that differs from the initial one, as chess programs do): with ``n`` states the chance
that any two collide is below ``n * n / 2**65``. ``exact=True`` keeps whole vectors instead.

Coroutines can't be copied. To stand in local state *L* again, the explorer runs a fresh coroutine along the first path
that led to *L*, feeding it the cell values that it read on that path and dropping its writes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from septum.core.automata import Automata, Invariant, Observer
from septum.core.cells import World
from septum.core.checkpoint import Checkpoint
from septum.core.functions import StateFunction, first_violation
from septum.core.liveness import LocalGraph, StateGraph, takes_for_ever
from septum.core.preemption import PreemptionSearch
from septum.core.reduction import FOOTPRINT, LOCK_FREE, Reduction
from septum.core.search import Search
from septum.core.steps import CALLS, Program, Violation, ctx
from septum.core.symmetry import SYMMETRY, Check, renamings
from septum.core.verdict import Bounds, Verdict

__all__ = ["REDUCTIONS", "Bounds", "Checkpoint", "Explorer", "Progress", "Verdict"]

#: What can make fewer states do, without another verdict.
REDUCTIONS = (LOCK_FREE, FOOTPRINT, SYMMETRY)

#: Called now and then with states, transitions, depth and states that are still to be expanded.
Progress = Callable[[int, int, int, int], None]


class Explorer:
    """Exploration of all interleavings of ``programs`` over the cells of ``world``, once.

    :param invariants: checked in every state.
    :param observer: called at every end (nobody can go on, and all who must have finished) for ``Verdict.outcomes``.
    :param stop: a state where it holds is an end, though tasks could go on: the module has halted, say.
    :param exact: identify states by their whole vector instead of its hash.
    :param depth_first: go deep first, which takes less memory; counterexamples are then not the shortest.
    :param reductions: which of :data:`REDUCTIONS` may be used; with any of them counterexamples are not the shortest.
        Those of the order of steps are left out where they would not keep what is asked for: with a bound on depth or
        preemptions, or when ends by ``stop`` are observed. Symmetry needs hashes: it is left out in exact mode, and
        with a bound on preemptions.
    :param liveness: also check that no task takes for ever under a fair scheduler (:mod:`septum.core.liveness`), if the
        whole state space could be looked at otherwise; without reductions.
    :param check_merges: run each step from every history that led to a local state and compare (slow; for tests).
    """

    def __init__(
        self,
        world: World,
        programs: Sequence[Program],
        *,
        invariants: Sequence[Invariant] = (),
        observer: Observer | None = None,
        stop: Callable[[], bool] | None = None,
        level: int = CALLS,
        exact: bool = False,
        depth_first: bool = False,
        reductions: Collection[str] = (),
        liveness: bool = False,
        check_merges: bool = False,
    ) -> None:
        self.world = world
        self.programs = list(programs)
        self.level = level
        self.depth_first = depth_first
        self.exact = exact
        self.check_merges = check_merges
        self.reductions = frozenset() if liveness else frozenset(reductions)
        self.liveness = liveness
        self.invariants = invariants
        self.observer = observer
        self.stop = stop

    def explore(
        self, bounds: Bounds | None = None, progress: Progress | None = None, checkpoint: Checkpoint | None = None
    ) -> Verdict:
        """Looks at every state within ``bounds``. An interrupt (Ctrl-C) ends it with what was found so far.

        :raises ValueError: for a bound on the depth, or on preemptions, of a depth-first search, which cannot keep it.
        :raises UsageError: for tasks that are not as equal as declared, and for a checkpoint that cannot be used.
        """
        bounds = bounds or Bounds()
        if self.depth_first and (bounds.depth is not None or bounds.preemptions is not None):
            raise ValueError("a depth-first search takes no bound on depth or preemptions")
        start = time.perf_counter()
        verdict = Verdict("proved", reductions=self._usable(bounds))
        before = ctx.level, ctx.task, ctx.trace, ctx.cycles
        ctx.level, ctx.trace, ctx.lock_order, ctx.cycles = self.level, None, {}, []
        collecting = gc.isenabled()
        gc.disable()  # states are never garbage, and walking millions of them costs half of the time
        exchanges = renamings(self.world, self.programs) if SYMMETRY in verdict.reductions else ()
        automata = Automata(self.world, self.programs, exchanges=exchanges, check_merges=self.check_merges)
        if exchanges:
            automata.watchers.append(Check(exchanges, automata.vectors).watch)
        try:
            automata.start()
            _Course(self, automata, bounds, verdict, progress, checkpoint).run()
        finally:
            automata.to_initial()
            self.world.track(None)
            ctx.level, ctx.task, ctx.trace, ctx.cycles = before
            if collecting:
                gc.enable()
        verdict.seconds = time.perf_counter() - start
        verdict.runs = automata.runs
        verdict.cells = len(automata.vectors.cells)
        verdict.local_states = len(automata.locals)
        if not self.exact:
            verdict.collision_probability = (verdict.states * (1 + len(exchanges))) ** 2 / 2**65
        return verdict

    def _usable(self, bounds: Bounds) -> tuple[str, ...]:
        """The reductions that keep what is asked for."""
        usable = set(self.reductions)
        if bounds.depth is not None or bounds.preemptions is not None or (self.stop and self.observer):
            usable -= {LOCK_FREE, FOOTPRINT}
        if self.exact or bounds.preemptions is not None or not any(program.group for program in self.programs):
            usable -= {SYMMETRY}
        return tuple(name for name in REDUCTIONS if name in usable)


class _Course:
    """One exploration: what is searched, level after level, until it ends."""

    def __init__(
        self,
        explorer: Explorer,
        automata: Automata,
        bounds: Bounds,
        verdict: Verdict,
        progress: Progress | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.automata = automata
        self.bounds = bounds
        self.verdict = verdict
        self.progress = progress
        self.checkpoint = checkpoint
        self.exact = explorer.exact
        self.by_level = not explorer.depth_first and bounds.preemptions is None
        self.wrong = False
        """Whether a choice of the reduction was wrong. There is more to be learnt before the search begins again."""
        self.patience = 256
        self.start = time.perf_counter()
        self.stop = StateFunction(automata, explorer.stop) if explorer.stop else None
        self.graph = LocalGraph(automata) if explorer.liveness else None
        self.reduction: Reduction | None = None
        check = StateFunction(automata, first_violation(explorer.invariants)) if explorer.invariants else None
        if {LOCK_FREE, FOOTPRINT} & {*verdict.reductions}:
            self.reduction = Reduction(automata, verdict.reductions, [f for f in (check, self.stop) if f])
        self.parts: list[Any] = [self.graph] if self.graph else []
        if self.reduction:
            self.parts += [self.reduction, self.reduction.footprints]
        self.edges: dict[tuple[str, str], list[int]] = {}
        self.new_search = partial(
            Search if bounds.preemptions is None else PreemptionSearch,
            automata,
            verdict,
            self.edges,
            depth_first=explorer.depth_first,
            exact=explorer.exact,
            check=check,
            stop=self.stop,
            observer=explorer.observer,
            choose=self.reduction.choose if self.reduction else None,
            fold=automata.vectors.numbers.fold(),
        )

    def run(self) -> None:
        """Searches, again from the beginning when a choice of the reduction was wrong; sets the verdict."""
        verdict = self.verdict
        search = self.new_search()
        if self.checkpoint and self.checkpoint.resume:
            self.checkpoint.read(self.automata, search, self.parts)
            self._note_levels(search, search.level)
        else:
            self._begin(search)
        try:
            while not self._levels(search):
                search = self.new_search()
                self._begin(search)
            if self.graph and verdict.verdict == "proved":
                self._check_liveness(self.graph)
        except KeyboardInterrupt:
            verdict.verdict = "interrupted"
            if self.checkpoint and not self.wrong and not (self.reduction and self.reduction.stale()):
                self.checkpoint.write(self.automata, search, self.parts)
        if self.reduction:
            verdict.reductions = tuple(name for name in verdict.reductions if name not in self.reduction.given_up)
        verdict.states, verdict.transitions, verdict.unexpanded = search.states, search.transitions, search.left()
        if verdict.verdict in ("proved", "bounded") and ctx.cycles:
            cycle, message = ctx.cycles[0]
            *others, last = (self.edges[edge] for edge in cycle)
            verdict.violated(Violation("lock order", message), last)
            verdict.witnesses = others

    def _begin(self, search: Search) -> None:
        search.begin()
        self.wrong = False
        if self.reduction:
            self.reduction.stale()

    def _note_levels(self, search: Search, done: int) -> None:
        """Tells the verdict how many levels are done."""
        self.verdict.depth = done if self.by_level else search.deepest
        if self.bounds.preemptions is not None and done:
            self.verdict.preemptions = done - 1

    def _levels(self, search: Search) -> bool:
        """Expands level after level, to a violation, a bound or the end. False: a choice of the reduction was wrong."""
        verdict, bounds = self.verdict, self.bounds
        limit = bounds.preemptions if bounds.depth is None else bounds.depth - 1
        while verdict.verdict == "proved":
            full = bounds.states is not None and search.states >= bounds.states
            if full or (bounds.seconds is not None and time.perf_counter() - self.start > bounds.seconds):
                verdict.verdict = "bounded"
                break
            search.expand()
            if verdict.verdict == "violated":
                break
            if self.reduction and self.reduction.stale():
                self.wrong = True
            if self.wrong and search.states >= self.patience:
                self.patience = 2 * search.states
                return False
            level_done = search.todo in ([], [None])
            self._note_levels(search, search.level + level_done)
            if self.progress:
                self.progress(search.states, search.transitions, verdict.depth, search.left())
            if level_done:
                if search.level == limit and search.following:
                    verdict.verdict = "bounded"
                elif not search.next_level():
                    return not self.wrong
            if self.checkpoint and not self.wrong and self.checkpoint.due():
                self.checkpoint.write(self.automata, search, self.parts)
        return True

    def _check_liveness(self, graph: LocalGraph) -> None:
        self.verdict.liveness = True
        if not graph.all_runs_end():
            lasso = takes_for_ever(StateGraph(self.automata, self.stop, exact=self.exact), self.automata)
            if lasso:
                violation, schedule, self.verdict.loop = lasso
                self.verdict.violated(violation, schedule)
