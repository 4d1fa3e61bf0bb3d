"""``septum run``: sampled runs of a scenario, and the diagram of one."""

from __future__ import annotations

from typing import Annotated

import typer

from septum.cli.campaign import STATUS, diagrams, events_of, sample_runs, title, write_counterexample
from septum.cli.options import Json, Params, Quiet, Scenario, Seed, count
from septum.cli.output import Progress, show


def run(
    scenario: Scenario,
    params: Params,
    times: Annotated[
        int, typer.Option("--times", min=1, metavar="N", help="How many runs, each with a seed of its own.")
    ] = 1,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="pct|random|round-robin|solo", help="Who goes on when several can.")
    ] = "random",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run a scenario and draw what happened.

    The first run has the seed given, each other the next one. The diagram is that of the run that violates a property,
    or else of the last. Exit status 1 when a property is violated.
    """
    from septum.lab.recording import record as recording_of
    from septum.lab.scenario import find_scenario
    from septum.lab.strategies import sampler

    chosen = find_scenario(scenario)
    values = chosen.values(params)
    progress = Progress(quiet=quiet)
    choosers = sampler(chosen, values, strategy)
    found = sample_runs(chosen, values, choosers, times=times, seed=seed, progress=progress)
    progress.clear()
    shown = found.shown
    violation = shown.violation if shown else None
    path = write_counterexample(recording_of(chosen, values, shown)) if shown and violation else None
    record = {
        "scenario": chosen.name,
        "parameters": values,
        "kernel": None,
        "policy": None,
        "strategy": strategy,
        "verdict": found.verdict,
        "property": violation,
        "message": shown.message if shown else "",
        "executions": found.executions,
        "steps": found.steps,
        "seconds": found.seconds,
        "seed": found.seed,
        "counterexample": path,
        "events": events_of(shown) if shown else [],
    }
    words = ", ".join(
        [count(found.executions, "run"), count(found.steps, "step"), f"drawn is the one with seed {found.seed}"]
    )
    blocks = [f"{title(chosen, values)}\n{words}", *diagrams([shown] if shown else [])]
    if path:
        blocks.append(f"violated: {violation}\nseptum replay {path} shows this again")
    show(record, found.verdict, blocks, as_json=as_json, quiet=quiet)
    return STATUS[found.verdict]
