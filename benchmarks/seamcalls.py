"""How fast the model of the TDX Module is, and how much room a page of a TD takes in it.

    python benchmarks/seamcalls.py [--pages N] [--repeat N] [--profile]

A guest runs on one logical processor; from another the host maps 4 KiB pages with TDH.MEM.PAGE.AUG, and the guest
accepts each with TDG.MEM.PAGE.ACCEPT: straight-line calls without a scheduler, through the doors that everybody uses.
Memory is what Python has allocated for the mapped pages, contents aside: accepted pages are zero and have none.
"""

import argparse
import sys
import time
import tracemalloc
from pathlib import Path

from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.pages import PAGE_2M, PAGE_4K, PAGES_4K_IN_2M
from septum.core.run import solo_call
from septum.lab.playback import in_64_bit_mode
from septum.tdx.registers import Regs
from septum.tdx.vm_exit import VmExit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.tdx.machines import Machine

TARGET_CALLS, TARGET_BYTES = 25_000, 400
GUEST_LP, HOST_LP = 0, 1


class Growing:
    """A TD whose guest runs, and which gets page after page."""

    def __init__(self, pages: int) -> None:
        self.machine = Machine()
        self.tdr, self.vp = self.machine.finalized_td()
        for gpa in range(PAGE_2M, pages * PAGE_4K, PAGE_2M):
            self.machine.ok(HostLeaf.TDH_MEM_SEPT_ADD, rcx=gpa | 1, rdx=self.tdr, r8=self.machine.page())
        self.machine.call(HostLeaf.TDH_VP_ENTER, lp=GUEST_LP, rcx=self.vp)
        vcpu = self.machine.module.vp(self.vp)
        for field, value in in_64_bit_mode(vcpu).items():
            vcpu.vmcs[field] = value

    def map_and_accept(self, pages: int) -> None:
        """Maps and accepts that many pages from GPA 0."""
        module, page = self.machine.module, self.machine.page
        for gpa in range(0, pages * PAGE_4K, PAGE_4K):
            regs = Regs(HostLeaf.TDH_MEM_PAGE_AUG, gpa, self.tdr, page())
            solo_call(module.seamcall(HOST_LP, regs))
            assert not regs.rax, f"{regs}"
            guest = Regs(GuestLeaf.TDG_MEM_PAGE_ACCEPT, gpa)
            host = solo_call(module.td_exit(GUEST_LP, VmExit.tdcall(guest)))
            assert host is None, f"{host}"
            assert not module.vp(self.vp).tdvps.gprs[0]


def calls_per_second(pages: int) -> float:
    """Two calls for each page."""
    td = Growing(pages)
    start = time.perf_counter()
    td.map_and_accept(pages)
    return 2 * pages / (time.perf_counter() - start)


def bytes_per_page(pages: int) -> float:
    """What is allocated for a mapped page."""
    td = Growing(pages)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    td.map_and_accept(pages)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / pages


def main() -> int:
    """Prints both figures; exit status 1 when one misses its target."""
    parser = argparse.ArgumentParser(description="speed and memory of the model of the TDX Module")
    parser.add_argument("--pages", type=int, default=64 * PAGES_4K_IN_2M)
    parser.add_argument("--repeat", type=int, default=3, help="the best run counts")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    if options.profile:
        import cProfile  # noqa: PLC0415

        td = Growing(options.pages)
        cProfile.runctx("td.map_and_accept(pages)", {}, {"td": td, "pages": options.pages}, sort="tottime")
        return 0
    speed = max(calls_per_second(options.pages) for _ in range(options.repeat))
    room = bytes_per_page(options.pages)
    print(f"AUG and ACCEPT of {options.pages} pages: {speed:,.0f} calls a second (target {TARGET_CALLS:,})")
    print(f"memory: {room:.0f} bytes a mapped page (target {TARGET_BYTES})")
    return int(speed < TARGET_CALLS or room > TARGET_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
