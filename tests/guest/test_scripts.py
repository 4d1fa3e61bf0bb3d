"""The ready scripts, on the module alone. (With a host that can share memory they run in tests/vmm.)"""

from __future__ import annotations

import pytest

from septum.arch.errors import UsageError
from septum.arch.exits import ExitReason
from septum.arch.structures import TdReport
from septum.core.run import Chooser, at_random, round_robin, run, solo, solo_call
from septum.core.steps import CALLS, SOLO
from septum.guest.hob import Memory
from septum.guest.scripts import POWER_OFF, POWER_OFF_PORT, SCRIPTS, Done, Job, script
from tests.guest.hosts import GuestHost

JOB = Job(eager=2 << 20, touches=5, converted=0, memory=(Memory(0x20_0000, 0x60_0000), Memory(0x100_0000, 0x140_0000)))


def host_of(name: str, vcpus: int, choose: Chooser, level: int, *, large: bool = False) -> GuestHost:
    guest = script(name, JOB)
    host = GuestHost(*[guest] * vcpus, large=large)
    outcome = run(host.programs(), choose, level=level, keep_events=False)
    assert outcome.violation is None, outcome.message
    return host


def results(host: GuestHost) -> list[Done]:
    return [guest.result for guest in host.guests]


@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_all_memory_is_accepted_once(vcpus: int) -> None:
    host = host_of("accept-all", vcpus, solo, SOLO)
    assert sum(done.accepted_4k + done.accepted_on_ve for done in results(host)) == len(host.faults) == 2048
    assert len(set(host.faults)) == 2048


def test_large_pages_are_accepted_where_the_host_has_them() -> None:
    (done,) = results(host_of("accept-all", 1, solo, SOLO, large=True))
    assert (done.accepted_4k, done.accepted_2m) == (0, 3)


def test_lazy_memory_is_accepted_when_it_is_touched() -> None:
    host = host_of("lazy", 2, solo, SOLO)
    assert [done.accepted_on_ve for done in results(host)] == [2 + 4, 2]
    assert [done.accepted_4k for done in results(host)] == [0, 0]


@pytest.mark.parametrize("name", ["boot", "lazy", "idle"])
@pytest.mark.parametrize("choose", [round_robin, at_random(7)], ids=["round robin", "seed 7"])
def test_scripts_come_to_their_end_under_any_scheduler(name: str, choose: Chooser) -> None:
    plain, other = host_of(name, 2, solo, SOLO), host_of(name, 2, choose, CALLS)
    for one, two in zip(results(plain), results(other), strict=True):
        assert one._replace(report=b"", accepted_on_ve=0) == two._replace(report=b"", accepted_on_ve=0)
    assert sum(d.accepted_on_ve for d in results(plain)) == sum(d.accepted_on_ve for d in results(other))
    assert set(plain.faults) == set(other.faults)


def test_the_first_vcpu_attests_and_switches_off() -> None:
    host = host_of("idle", 2, solo, SOLO)
    first, second = results(host)
    assert second == Done()
    report = TdReport.unpack(first.report)
    assert report.hashes_match()
    assert [bool(any(rtmr)) for rtmr in report.td_info.rtmrs] == [False, False, False, True]
    solo_call(host.enter(0))
    (call,) = host.calls
    assert (call.r11, call.r12, call.r13) == (ExitReason.IO_INSTRUCTION, 2, 1)
    assert (call.r14, call.r15) == (POWER_OFF_PORT, POWER_OFF)


def test_an_unknown_script_is_a_misuse() -> None:
    with pytest.raises(UsageError, match="there is no script 'idel'; there are: boot, "):
        script("idel")
    assert next(iter(SCRIPTS)) == "boot"
