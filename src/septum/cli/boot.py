"""``septum boot``: a TD built from firmware, run, and destroyed, through the modelled KVM and TDX Module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from septum.arch.errors import UsageError
from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Memory, Quiet, count, show_size
from septum.cli.output import Block, Progress, fill, show

if TYPE_CHECKING:
    from septum.vmm.boot import BootResult


def boot(
    firmware: Annotated[
        Path | None, typer.Argument(metavar="[FIRMWARE]", help="A TDVF image.", show_default="a built-in payload")
    ] = None,
    memory: Memory = "2G",
    vcpus: Annotated[int, typer.Option("--vcpus", metavar="N", help="vCPUs, each on a CPU of its own.")] = 1,
    kernel: Annotated[str, typer.Option("--kernel", metavar="K", help="See septum list kernels.")] = "v6.16",
    guest: Annotated[
        str, typer.Option("--guest", metavar="scripted|machine", help="What runs in the TD; machine is to come.")
    ] = "scripted",
    script: Annotated[
        str,
        typer.Option("--script", metavar="NAME", help="What it does: boot, accept-all, lazy, convert-storm or idle."),
    ] = "boot",
    eager: Annotated[
        str, typer.Option("--eager", metavar="SIZE", help="Memory that the script boot accepts before it is touched.")
    ] = "16M",
    platform: Annotated[str, typer.Option("--platform", metavar="NAME", help="See septum list platforms.")] = "default",
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, metavar="N", help="Interleave threads at random.", show_default="one by one"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Build a TD through the modelled KVM ioctls, run it, destroy it.

    Shows the SEAMCALLs of each part of its life, what the vCPUs did, and MRTD. Exit status 1 when the TD could not be
    built, did not end well, reports another MRTD than that of the image, or left pages or KeyIDs behind.
    """
    from septum.core.run import at_random, solo
    from septum.guest.scripts import Job
    from septum.vmm.boot import boot as boot_td
    from septum.vmm.boot import builtin_image
    from septum.vmm.layout import parse_size
    from septum.vmm.tdvf import load_image

    _check_guest(guest)
    image = builtin_image() if firmware is None else load_image(firmware)
    size = parse_size(memory)
    progress = Progress(quiet=quiet)
    result = boot_td(
        image,
        size,
        vcpus,
        kernel,
        script,
        platform,
        job=Job(eager=parse_size(eager)),
        choose=solo if seed is None else at_random(seed),
        progress=progress,
    )
    progress.clear()
    facts = {
        "firmware": image.name,
        "memory": size,
        "vcpus": vcpus,
        "kernel": kernel,
        "platform": platform,
        "guest": guest,
        "script": script,
        "seed": seed,
    }
    show(_record(result, facts), result.mrtd.hex(), _blocks(result, facts), as_json=as_json, quiet=quiet)
    return BAD if result.problems else GOOD


def _check_guest(guest: str) -> None:
    """:raises UsageError: for a guest that is not there."""
    if guest == "machine":
        raise UsageError("--guest machine: guests of real machine code are not there yet; leave out --guest")
    if guest != "scripted":
        raise UsageError(f"--guest {guest}: there is no such guest; give scripted")


def _record(result: BootResult, facts: Mapping[str, object]) -> dict[str, Any]:
    """The answer as one JSON object."""
    return {
        "mrtd": result.mrtd.hex(),
        "seamcalls": result.seamcalls,
        "busy": result.busy,
        "leaked_pages": result.leaked_pages,
        "exit": result.exit,
        **facts,
        "problems": result.problems,
        "predicted_mrtd": result.predicted_mrtd.hex(),
        "rtmr": [rtmr.hex() for rtmr in result.rtmrs],
        "attributes": result.attributes,
        "xfam": result.xfam,
        "report": result.report.pack().hex() if result.report else None,
        "accepts": {"4K": result.accepted_4k, "2M": result.accepted_2m},
        "vcpu": [{**done._asdict(), "report": done.report.hex()} if done else None for done in result.done],
        "phases": [
            {"name": p.name, "seamcalls": p.seamcalls, "by_leaf": p.by_leaf, "seconds": p.seconds}
            for p in result.phases
        ],
        "by_leaf": result.counts,
        "peak_pages": result.peak_pages,
        "leaks": result.leaks,
        "leaked_keyids": result.leaked_keyids,
        "seconds": result.seconds,
    }


def _blocks(result: BootResult, facts: Mapping[str, Any]) -> list[Block]:
    from septum.report.tables import Table

    vm = f"{show_size(facts['memory'])}, {count(facts['vcpus'], 'vCPU')}"
    where = f"kernel {facts['kernel']}, platform {facts['platform']}, script {facts['script']}"
    phases = tuple((phase.name, phase.seamcalls, _leaves(phase.by_leaf)) for phase in result.phases)
    blocks: list[Block] = [
        fill(f"{facts['firmware']}: {vm}, {where}"),
        Table(phases, ("phase", "SEAMCALLs", "of these")),
    ]
    if any(result.done):
        rows = tuple(
            (i, done.accepted_4k, done.accepted_2m, done.accepted_on_ve, show_size(done.converted))
            for i, done in enumerate(result.done)
            if done
        )
        columns = ("vCPU", "accepted 4K", "accepted 2M", "accepted on #VE", "made shared and private again")
        blocks.append(Table(rows, columns))
        blocks.append(fill(_touched(result, facts["memory"])))
    blocks.append(_account(result))
    if result.mrtd:
        agree = "TDCS, TDREPORT and image agree" if result.report and not result.problems else "from the TDCS"
        blocks.append(f"MRTD ({agree})\n  {result.mrtd.hex()}")
    return [*blocks, "\n".join(map(fill, result.problems)) or f"exit: {result.exit}"]


LEAVES_SHOWN = 4


def _leaves(by_leaf: Mapping[str, int]) -> str:
    """The leaves that were called most."""
    most = sorted(by_leaf.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{n:,} {leaf.removeprefix('TDH.')}" for leaf, n in most[:LEAVES_SHOWN]]
    return ", ".join(shown) + (", ..." if len(most) > LEAVES_SHOWN else "")


def _touched(result: BootResult, memory: int) -> str:
    """How much of the memory the guest used."""
    accepted = result.accepted_4k * 4096 + (result.accepted_2m << 21)
    return f"{show_size(accepted)} of {show_size(memory)} accepted; the guest never touches the rest"


def _account(result: BootResult) -> str:
    """SEAMCALLs, pages and KeyIDs."""
    busy = f"{result.busy:,} of them found an operand busy" if result.busy else "none found an operand busy"
    leaked = f"{result.leaked_pages:,} leaked" if result.leaked_pages else "none leaked"
    keyids = f"leaked: {', '.join(map(str, result.leaked_keyids))}" if result.leaked_keyids else "none leaked"
    return "\n".join(
        [
            f"SEAMCALLs  {result.seamcalls:,}, {busy}",
            f"pages      {result.peak_pages:,} at most, {leaked}",
            f"KeyIDs     {keyids}",
        ]
    )
