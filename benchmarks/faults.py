"""How fast private page faults go through the whole model, and how much room a mapped page takes.

    python benchmarks/faults.py [--pages N] [--vcpus N] [--random] [--profile]

The guests of one TD accept page after page, each vCPU in a part of the memory of its own. No page is there when it is
asked for, so each makes the whole way: TDG.MEM.PAGE.ACCEPT, EPT violation, TD exit, KVM's fault path, mirror page
tables, TDH.MEM.PAGE.AUG, TDH.VP.ENTER, and TDG.MEM.PAGE.ACCEPT again. Tables come as they are needed
(TDH.MEM.SEPT.ADD).
Memory is the growth of what Python has allocated, page tables and all, for some numbers of pages: it is to grow with
them and no faster.
"""

import argparse
import resource
import time
import tracemalloc
from functools import partial

from septum.arch.pages import PAGE_2M, PAGE_4K, align_up
from septum.arch.platform import profile
from septum.core.run import Chooser, at_random, run, solo
from septum.core.steps import CALLS, SOLO, Program, Task
from septum.guest.vcpu import Vcpu
from septum.lab.hosts import TdHost

TARGET_SECONDS, TARGET_PAGES, TARGET_BYTES = 60, 1_000_000, 600


async def accept_all(start: int, end: int, vcpu: Vcpu) -> None:
    """Accepts pages one by one."""
    for gpa in range(start, end, PAGE_4K):
        await vcpu.accept_page(gpa)


def faults(pages: int, vcpus: int, choose: Chooser, level: int) -> tuple[float, TdHost]:
    """The seconds that so many faults take."""
    share = pages // vcpus * PAGE_4K
    td = TdHost("v6.16", vcpus, initialised=vcpus, memory=align_up(share * vcpus, PAGE_2M), platform=profile("default"))
    td.make(td.finalize())
    calls = [td.run_vcpu(i, partial(accept_all, i * share, (i + 1) * share)) for i in range(vcpus)]
    programs = [Program(Task(f"vCPU {i}", cpu=i), call) for i, call in enumerate(calls)]
    start = time.perf_counter()
    outcome = run([*programs, *td.host.interrupt_contexts()[:vcpus]], choose, level=level, keep_events=False)
    seconds = time.perf_counter() - start
    assert not outcome.violation, outcome.message
    assert outcome.results[:vcpus] == [0] * vcpus, outcome.results
    assert td.host.counts["TDH.MEM.PAGE.AUG"]["TDX_SUCCESS"] == share // PAGE_4K * vcpus
    return seconds, td


def bytes_allocated(pages: int, vcpus: int) -> int:
    """What is allocated when so many pages are mapped, the machine that they are in included."""
    tracemalloc.start()
    _, td = faults(pages, vcpus, solo, SOLO)
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert td.kvm.mirror_root
    return allocated


def main() -> int:
    """Prints the figures; exit status 1 when one misses its target."""
    parser = argparse.ArgumentParser(description="speed and memory of private page faults")
    parser.add_argument("--pages", type=int, default=TARGET_PAGES)
    parser.add_argument("--vcpus", type=int, default=8)
    parser.add_argument("--random", action="store_true", help="a random schedule instead of one vCPU after the other")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    choose, level = (at_random(0), CALLS) if options.random else (solo, SOLO)
    pages, vcpus = options.pages, options.vcpus
    if options.profile:
        import cProfile  # noqa: PLC0415

        cProfile.runctx("faults(pages, vcpus, choose, level)", globals(), locals(), sort="tottime")
        return 0
    seconds, _ = faults(pages, vcpus, choose, level)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{pages:,} faults of {vcpus} vCPUs: {seconds:.1f} s, {pages / seconds:,.0f} a second, {resident} MiB resident"
    )
    sizes = [pages // part for part in (32, 16, 8)]
    amounts = [bytes_allocated(size, vcpus) for size in sizes]
    rooms = [
        (more - less) / (size - smaller)
        for less, more, smaller, size in zip(amounts, amounts[1:], sizes, sizes[1:], strict=False)
    ]
    for smaller, size, room in zip(sizes, sizes[1:], rooms, strict=False):
        print(f"from {smaller:,} to {size:,} pages: {room:.0f} bytes more for each (target {TARGET_BYTES})")
    return int(seconds * TARGET_PAGES > TARGET_SECONDS * pages or max(rooms) > TARGET_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
