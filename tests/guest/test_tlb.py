"""CPUs that use translations as long as they may, and a module that must not take pages away before."""

from __future__ import annotations

import pytest

from septum.arch.leaves import HostLeaf
from septum.core.cells import Shared, Tracking
from septum.core.explore import Explorer, Verdict
from septum.core.run import solo_call
from septum.core.steps import Program, Task
from septum.guest.scripted import Script
from septum.guest.vcpu import Vcpu
from septum.tdx import secure_ept
from septum.tdx.registers import Regs
from tests.guest.hosts import GuestHost

PAGE = 0x1000


async def reads_twice(vcpu: Vcpu) -> None:
    await vcpu.read(PAGE)
    await vcpu.read(PAGE)


class Faulted(Shared):
    """Whether a VCPU has met a page that is not there."""

    it_has: bool = False


class PoorHost(GuestHost):
    """Lets a VCPU be after its first EPT violation."""

    def __init__(self, script: Script) -> None:
        super().__init__(script, added=(PAGE,), caching=True)
        self.module.hardware.inputs.tsc_step = 0
        self.faulted = Faulted("faulted")

    async def thread(self, vcpu: int, exits: int | None = None) -> None:
        while not self.guests[vcpu].finished and not self.faulted.it_has:
            await self.enter(vcpu)

    async def _fault(self, vcpu: int, left: Regs) -> None:
        self.faulted.it_has = True


def explore(script: Script, *, kick: bool) -> Verdict:
    """A VCPU beside a host that takes a page from it."""
    host = PoorHost(script)
    zap = Program(Task("zap", cpu=1), lambda: host.zap(1, PAGE, kick=kick))
    return Explorer(Tracking.world, [*host.programs(), zap]).explore()


@pytest.mark.parametrize("kick", [True, False])
def test_no_page_goes_before_every_cpu_has_forgotten_it(kick: bool) -> None:
    verdict = explore(reads_twice, kick=kick)
    assert verdict.verdict == "proved", verdict.message
    assert verdict.states > 200


def test_a_module_that_does_not_track_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure_ept, "is_tlb_tracked", lambda td, bepoch: True)
    verdict = explore(reads_twice, kick=False)
    assert (verdict.verdict, verdict.property) == ("violated", "no stale translation is ever used")
    assert "0x1000" in verdict.message


def test_a_translation_is_used_without_a_walk_until_the_next_epoch() -> None:
    async def script(vcpu: Vcpu) -> list[bytes]:
        await vcpu.write(PAGE, b"first")
        await vcpu.halt()
        same = await vcpu.read(PAGE, 5)  # the page is blocked, but this LP still has it
        await vcpu.halt()
        return [same, await vcpu.read(PAGE, 5)]

    host = GuestHost(script, added=(PAGE,), caching=True)
    solo_call(host.enter(0))
    assert host.faults == []
    solo_call(host.insist(1, HostLeaf.TDH_MEM_RANGE_BLOCK, PAGE))
    solo_call(host.enter(0))
    assert host.faults == []
    solo_call(host.insist(1, HostLeaf.TDH_MEM_TRACK, host.tdr))
    solo_call(host.insist(1, HostLeaf.TDH_MEM_PAGE_REMOVE, PAGE))
    host.run()
    assert host.guests[0].result == [b"first", bytes(5)]
    assert host.faults == [PAGE]
