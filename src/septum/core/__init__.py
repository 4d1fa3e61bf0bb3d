"""What everything runs on: cells of shared state, steps, locks, schedulers, the explorer and the trace.

Start with :mod:`septum.core.cells` (shared state) and :mod:`septum.core.steps` (what an ``await`` means);
:mod:`septum.core.explore` is where the two pay off.
"""
