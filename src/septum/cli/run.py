"""``septum run``: sampled runs of a scenario, what came of them, and the diagram of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from septum.cli.campaign import STATUS, diagrams, events_of, title, write_counterexample
from septum.cli.options import Json, Params, Quiet, Scenario, Seed, count
from septum.cli.output import Block, Progress, show
from septum.cli.scenario_options import Fixes, Kernel, Policies, Unfixed, chosen_scenario

if TYPE_CHECKING:
    from septum.lab.sampled import Ending, Sampled


def run(
    scenario: Scenario,
    params: Params,
    fixes: Fixes,
    without: Unfixed,
    policies: Policies,
    kernel: Kernel = None,
    times: Annotated[
        int, typer.Option("--times", min=1, metavar="N", help="How many runs, each with a seed of its own.")
    ] = 1,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="random|pct|round-robin|solo", help="Who goes on when several can.")
    ] = "random",
    max_steps: Annotated[
        int, typer.Option("--max-steps", min=1, metavar="N", help="A run that is longer is taken for endless.")
    ] = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Run a scenario N times, say what came of the runs, and draw one.

    The first run has the seed given, each other the next one. Drawn is the first run that violates a property, or else
    the last one. Exit status 1 when a property is violated.
    """
    from septum.lab.recording import record as recording_of
    from septum.lab.sampled import sample_runs
    from septum.lab.strategies import sampler

    chosen, values, names = chosen_scenario(scenario, params, kernel, fixes, without, policies)
    progress = Progress(quiet=quiet)
    choosers = sampler(chosen, values, strategy)
    found = sample_runs(
        chosen, values, choosers, times=times, seed=seed, max_steps=max_steps, stop=False, progress=progress
    )
    progress.clear()
    shown = found.shown
    violation = shown.violation if shown else None
    path = write_counterexample(recording_of(chosen, values, shown)) if shown and violation else None
    record = {
        "scenario": chosen.name,
        "parameters": values,
        **names,
        "strategy": strategy,
        "verdict": found.verdict,
        "property": violation,
        "message": shown.message if shown else "",
        "executions": found.executions,
        "steps": found.steps,
        "seconds": found.seconds,
        "seed": found.seed,
        "endings": [
            {**asdict(ending), "results": dict(ending.results), **asdict(tally)}
            for ending, tally in found.endings.items()
        ],
        "seamcalls": found.seamcalls,
        "counterexample": path,
        "events": events_of(shown) if shown else [],
    }
    blocks: list[Block] = [f"{title(chosen, values)}\n{_amount(found)}"]
    if times > 1:
        blocks += _tables(found)
        blocks.append(f"the run with seed {found.seed}:")
    blocks += diagrams([shown] if shown else [])
    if path:
        blocks.append(f"violated: {violation}\nseptum replay {path} shows this again")
    show(record, found.verdict, blocks, as_json=as_json, quiet=quiet)
    return STATUS[found.verdict]


def _amount(found: Sampled) -> str:
    each = f"{found.shortest:,} to {found.longest:,} each" if found.shortest < found.longest else ""
    return ", ".join(filter(None, [count(found.executions, "run"), count(found.steps, "step"), each]))


def _tables(found: Sampled) -> list[Block]:
    """How the runs ended, violations first; and which SEAMCALLs the module refused."""
    from septum.report.tables import Table

    endings = sorted(found.endings.items(), key=lambda item: (not item[0].violation, -item[1].runs))
    rows = tuple((_ending(ending), tally.runs, tally.first_seed) for ending, tally in endings)
    blocks: list[Block] = [Table(rows, ("what came of it", "runs", "first seed"))]
    refused = tuple(
        (leaf, sum(statuses.values()), status, number)
        for leaf, statuses in found.seamcalls.items()
        for status, number in statuses.items()
        if "BUSY" in status
    )
    if refused:
        blocks.append(Table(refused, ("SEAMCALL", "calls", "told", "times")))
    return blocks


def _ending(ending: Ending) -> str:
    from septum.lab.hosts import show_result

    if ending.violation:
        return f"violated: {ending.violation}: {ending.message}"
    results: dict[str, Any] = dict(ending.results)
    return "all ended: " + ", ".join(f"{name} -> {show_result(result)}" for name, result in results.items())
