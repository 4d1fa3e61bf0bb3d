"""``septum explore``: every state of a scenario, or samples of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from septum.arch.errors import UsageError
from septum.cli.campaign import STATUS, diagrams, title, write_shrunk
from septum.cli.options import Json, Params, Quiet, Scenario, Seed, count
from septum.cli.output import Progress, fill, show
from septum.cli.scenario_options import Fixes, Kernel, Policies, Unfixed, chosen_scenario

if TYPE_CHECKING:
    from septum.core.run import Outcome
    from septum.lab import scenario as lab

SAMPLES = 1000
"""Runs of ``--strategy pct`` or ``random`` unless ``--bound executions=N`` says otherwise."""


def explore(
    scenario: Scenario,
    params: Params,
    fixes: Fixes,
    without: Unfixed,
    policies: Policies,
    bound: Annotated[
        list[str],
        typer.Option(
            "--bound",
            metavar="NAME=N",
            help="Stop at N states, depth, preemptions, seconds or executions; repeatable.",
            default_factory=list,
            show_default=False,
        ),
    ],
    no_reduction: Annotated[
        list[str],
        typer.Option(
            "--no-reduction",
            metavar="NAME",
            help="Switch a reduction off: lock-free, footprint or symmetry; repeatable.",
            default_factory=list,
            show_default=False,
        ),
    ],
    kernel: Kernel = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            metavar="states|dpor|pct|random",
            help="Every state once, every order of conflicting steps, or seeded runs.",
        ),
    ] = "states",
    depth_first: Annotated[bool, typer.Option("--depth-first", help="Go deep first: less memory.")] = False,
    liveness: Annotated[
        bool, typer.Option("--liveness", help="Also check that no task takes for ever; without reductions.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="Go on from a checkpoint of the same exploration.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Look at every interleaving of a scenario.

    The verdict is proved (the whole state space), bounded (nothing found within the bounds), sampled (nothing found in
    N executions), interrupted, or violated: then the schedule that breaks the property is written to a file for septum
    replay, and drawn. Exit status 1 when violated.
    """
    chosen, values, names = chosen_scenario(scenario, params, kernel, fixes, without, policies)
    bounds = read_bounds(bound, strategy)
    progress = Progress(quiet=quiet)
    if strategy == "states":
        from septum.cli.every_state import Ways, every_state

        ways = Ways(depth_first, liveness, tuple(no_reduction), resume)
        record, outcomes = every_state(chosen, values, bounds, ways, progress)
    elif no_reduction or depth_first or liveness or resume:
        raise UsageError("--no-reduction, --depth-first, --liveness and --resume are for --strategy states")
    elif strategy == "dpor":
        record, outcomes = _every_order(chosen, values, bounds, progress)
    else:
        record, outcomes = _samples(chosen, values, strategy, bounds, seed, progress)
    progress.clear()
    record = {
        "scenario": chosen.name,
        "parameters": values,
        **names,
        "strategy": strategy,
        "bounds": bounds,
    } | record
    blocks = [title(chosen, values), summary(record), *diagrams(outcomes)]
    if record["counterexample"]:
        blocks.append(f"septum replay {record['counterexample']} shows this again")
    if record["verdict"] == "interrupted" and record.get("checkpoint"):
        blocks.append(f"--resume {record['checkpoint']} goes on from here")
    show(record, record["verdict"], blocks, as_json=as_json, quiet=quiet)
    return STATUS[record["verdict"]]


KNOWN_BOUNDS = {
    "states": ("states", "depth", "preemptions", "seconds"),
    "dpor": ("executions", "depth", "seconds"),
    "pct": ("executions",),
    "random": ("executions",),
}
"""Which bounds each strategy has."""


def read_bounds(bounds: list[str], strategy: str) -> dict[str, int]:
    """The ``--bound NAME=N`` options. Raises ``UsageError``, also for an unknown strategy."""
    if strategy not in KNOWN_BOUNDS:
        raise UsageError(f"there is no strategy {strategy!r}: give one of {', '.join(KNOWN_BOUNDS)}")
    read = {}
    for text in bounds:
        name, _, number = text.partition("=")
        least = 0 if name == "preemptions" else 1
        if name not in KNOWN_BOUNDS[strategy] or not number.isdecimal() or not least <= int(number) < 1 << 63:
            known = ", ".join(f"{known}=N" for known in KNOWN_BOUNDS[strategy])
            raise UsageError(f"--bound {text!r} is no bound of strategy {strategy}: give {known}, with N above 0")
        read[name] = int(number)
    return read


def summary(record: dict[str, Any]) -> str:
    """The verdict as a sentence, with what it is based on."""
    within = " and ".join(f"{name}={number:,}" for name, number in record["bounds"].items())
    words = {
        "proved": f"proved: every reachable state was looked at{', and no task can take for ever' * record['liveness']}"
        if record["states"] is not None
        else "proved: every order of steps that have anything to do with each other was run",
        "bounded": f"bounded: nothing found within {within}",
        "sampled": "sampled: nothing found in these runs, which are not all",
        "interrupted": "interrupted: nothing found up to here",
        "violated": f"violated: {record['property']}: {record['message']}",
    }
    if record["states"] is None:
        work = [count(record["executions"], "run"), count(record["steps"], "step")]
    else:
        work = [
            count(record["states"], "state"),
            count(record["transitions"], "transition"),
            f"depth {record['depth']:,}",
        ]
        if record["reductions"]:
            work.append(f"reduced by {' and '.join(record['reductions'])}")
        if record["verdict"] == "bounded":
            work.append(f"{count(record['unexpanded'], 'state')} left to go on from")
    work.append(f"{record['seconds']:.2f} s")
    return f"{fill(words[record['verdict']])}\n{', '.join(work)}"


def _every_order(
    scenario: lab.Scenario, values: dict[str, lab.Value], bounds: dict[str, int], progress: Progress
) -> tuple[dict[str, Any], list[Outcome]]:
    """Runs every order of conflicting steps; the runs are those of the counterexample, shrunk."""
    from septum.core.dpor import RunBounds
    from septum.lab.recording import counterexample
    from septum.lab.strategies import reduce

    def tell(executions: int, steps: int, depth: int) -> None:
        progress(f"{executions:,} runs, {steps:,} steps, the last one different from step {depth:,} on")

    limits = RunBounds(**bounds)
    bounds["depth"] = limits.depth
    verdict = reduce(scenario, values, limits, tell)
    path: str | None = None
    outcomes: list[Outcome] = []
    if verdict.verdict == "violated":
        path, outcomes = write_shrunk(counterexample(scenario, values, verdict)[0])
    return {
        "verdict": verdict.verdict,
        "property": verdict.property,
        "message": outcomes[-1].message if outcomes else verdict.message,
        "executions": verdict.executions,
        "steps": verdict.steps,
        "states": None,
        "transitions": None,
        "pruned": verdict.pruned,
        "seconds": verdict.seconds,
        "counterexample": path,
    }, outcomes


def _samples(
    scenario: lab.Scenario,
    values: dict[str, lab.Value],
    strategy: str,
    bounds: dict[str, int],
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Samples seeded runs; the run that violates a property, if any, is the counterexample, shrunk."""
    from septum.lab.recording import record
    from septum.lab.sampled import sample_runs
    from septum.lab.strategies import sampler

    times = bounds.get("executions", SAMPLES)
    choosers = sampler(scenario, values, strategy)
    found = sample_runs(scenario, values, choosers, times=times, seed=seed, progress=progress)
    path: str | None = None
    outcomes: list[Outcome] = []
    if found.verdict == "violated" and found.shown:
        path, outcomes = write_shrunk(record(scenario, values, found.shown))
    return {
        "verdict": found.verdict,
        "property": outcomes[-1].violation if outcomes else None,
        "message": outcomes[-1].message if outcomes else "",
        "executions": found.executions,
        "steps": found.steps,
        "states": None,
        "transitions": None,
        "seconds": found.seconds,
        "seed": found.seed,
        "counterexample": path,
    }, outcomes
