"""Scripted guests on the module alone: what they see, where they can be interrupted, and how they are found again."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch import vmcs
from septum.arch.exits import ExitReason
from septum.arch.pages import PAGE_2M, PAGE_4K
from septum.arch.status import CODE, Status
from septum.arch.structures import TdReport
from septum.core.cells import Journal, Tracking
from septum.core.explore import Explorer
from septum.core.run import Chooser, at_random, round_robin, run, solo_call
from septum.core.steps import CALLS
from septum.guest.instructions import FETCH, READ, WRITE
from septum.guest.scripted import Script
from septum.guest.vcpu import GuestFault, HostRefused, Vcpu
from septum.tdx.registers import Regs
from septum.tdx.state.vp import VeInfo
from tests.guest.hosts import GuestHost

VIOLATION, CALL = ExitReason.EPT_VIOLATION, ExitReason.TDCALL


def test_a_touch_is_made_again_until_the_page_is_there_and_accepted() -> None:
    async def script(vcpu: Vcpu) -> bytes:
        await vcpu.write(0x5008, b"hello")
        return await vcpu.read(0x5000, 16)

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result == b"\0" * 8 + b"hello" + b"\0" * 3
    assert host.faults == [0x5000]
    assert host.reasons == [VIOLATION]
    assert host.content(0x5008, 5) == b"hello"


def test_accepting_first_brings_no_virtualization_exception() -> None:
    events = []

    async def script(vcpu: Vcpu) -> tuple[int, int]:
        async def handler(vcpu: Vcpu, info: VeInfo) -> None:
            events.append(info)

        vcpu.on_ve = handler
        accepted = await vcpu.accept(0x1000, 0x4000)
        await vcpu.touch(0x3000)
        return accepted

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result == (3, 0)
    assert host.faults == [0x1000, 0x2000, 0x3000]
    assert not events


@pytest.mark.parametrize("right", [READ, WRITE, FETCH])
def test_the_handler_learns_what_was_touched(right: int) -> None:
    async def script(vcpu: Vcpu) -> VeInfo:
        seen: list[VeInfo] = []

        async def handler(vcpu: Vcpu, info: VeInfo) -> None:
            seen.append(info)
            assert await vcpu.accept_page(info.gpa & -PAGE_4K) == Status.TDX_SUCCESS

        vcpu.on_ve = handler
        await vcpu.touch(0x7123, right)
        (info,) = seen
        return info

    host = GuestHost(script)
    host.run()
    info = host.guests[0].result
    assert (info.exit_reason, info.gpa, info.gla) == (VIOLATION, 0x7123, 0x7123)
    assert info.exit_qualification & 7 == right


@pytest.mark.parametrize(("large", "accepted", "faults"), [(True, (0, 1), 1), (False, (512, 0), 512)])
def test_memory_is_accepted_as_the_host_maps_it(large: bool, accepted: tuple[int, int], faults: int) -> None:
    async def script(vcpu: Vcpu) -> tuple[int, int]:
        return await vcpu.accept(PAGE_2M, 2 * PAGE_2M)

    host = GuestHost(script, large=large)
    host.run()
    assert host.guests[0].result == accepted
    assert len(host.faults) == faults


def test_a_large_page_that_is_touched_is_accepted_whole() -> None:
    async def script(vcpu: Vcpu) -> bytes:
        await vcpu.write(PAGE_2M + 0x5000, b"there")
        return await vcpu.read(2 * PAGE_2M - 8, 8)

    host = GuestHost(script, large=True)
    host.run()
    assert host.guests[0].result == bytes(8)
    assert len(host.faults) == 1


def test_what_is_accepted_already_is_passed_over() -> None:
    async def script(vcpu: Vcpu) -> tuple[bytes, tuple[int, int], int]:
        await vcpu.write(0x2000, b"kept")
        accepted = await vcpu.accept(0x1000, 0x4000)
        return await vcpu.read(0x2000, 4), accepted, await vcpu.accept_page(0x3000)

    host = GuestHost(script)
    host.run()
    content, accepted, status = host.guests[0].result
    assert (content, accepted) == (b"kept", (2, 0))
    assert status & CODE == Status.TDX_PAGE_ALREADY_ACCEPTED


@given(st.lists(st.tuples(st.integers(0x1000, 0x9000), st.binary(min_size=1, max_size=9000)), min_size=1, max_size=4))
@settings(max_examples=15)
def test_memory_holds_what_was_written(writes: list[tuple[int, bytes]]) -> None:
    expected = bytearray(0xD000)
    for gpa, data in writes:
        expected[gpa : gpa + len(data)] = data

    async def script(vcpu: Vcpu) -> bytes:
        for gpa, data in writes:
            await vcpu.write(gpa, data)
        return await vcpu.read(0, 0xD000)

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result == expected


def test_vcpus_learn_who_they_are() -> None:
    async def script(vcpu: Vcpu) -> tuple[int, int, object]:
        return vcpu.index, vcpu.shared_bit, await vcpu.vp_info()

    host = GuestHost(script, script, script)
    for i in range(3):
        host.run(i)
        index, shared_bit, info = host.guests[i].result
        assert (index, shared_bit) == (i, 1 << 47)
        assert info == (48, 0, 3, 8, i, True)


# -- attestation -------------------------------------------------------------------------------------------------------


def test_a_report_shows_mrtd_report_data_and_extended_registers() -> None:
    digest = hashlib.sha384(b"event").digest()

    async def script(vcpu: Vcpu) -> bytes:
        assert await vcpu.rtmr_extend(2, digest, 0x3000) == Status.TDX_SUCCESS
        return (await vcpu.report(bytes(range(64)), 0x1000)).pack()

    host = GuestHost(script)
    host.run()
    report = TdReport.unpack(host.guests[0].result)
    assert report.hashes_match()
    assert report.mac.report_data == bytes(range(64))
    assert report.td_info.mr_td == host.td.tdcs.mrtd != bytes(48)
    assert report.td_info.rtmrs == (bytes(48), bytes(48), hashlib.sha384(bytes(48) + digest).digest(), bytes(48))


@pytest.mark.parametrize(("index", "buffer"), [(4, 0x3000), (0, 0x3008)])
def test_a_wrong_extension_is_refused(index: int, buffer: int) -> None:
    async def script(vcpu: Vcpu) -> int:
        return await vcpu.rtmr_extend(index, bytes(48), buffer)

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result & CODE == Status.TDX_OPERAND_INVALID
    assert host.td.tdcs.rtmr == (bytes(48),) * 4


# -- calls to the host -------------------------------------------------------------------------------------------------


def test_the_host_sees_the_registers_of_a_call_and_nothing_else() -> None:
    async def script(vcpu: Vcpu) -> tuple[int, ...]:
        await vcpu.io_write(0x604, 0x2000, 2)
        assert await vcpu.io_read(0x71, 1) == 0x34
        await vcpu.report_fatal_error(0xF0, "out of order")
        return (await vcpu.vmcall(0x10000, r12=1)).to_tuple()

    def io(regs: Regs) -> None:
        regs.r11 = 0x1234

    host = GuestHost(script)
    host.answers[ExitReason.IO_INSTRUCTION] = io
    host.run()
    write, read, fatal, info = host.calls
    assert (write.r11, write.r12, write.r13, write.r14, write.r15) == (30, 2, 1, 0x604, 0x2000)
    assert (read.r11, read.r12, read.r13, read.r14) == (30, 1, 0, 0x71)
    assert write.rcx == 0xFC00
    assert write.rdx == write.rbx == write.r8 == 0
    words = (fatal.r14, fatal.r15, fatal.rbx, fatal.rdi, fatal.rsi, fatal.r8, fatal.r9, fatal.rdx)
    assert b"".join(word.to_bytes(8, "little") for word in words).rstrip(b"\0") == b"out of order"
    assert (fatal.r11, fatal.r12) == (0x10003, 0xF0)
    assert (info.r11, info.r12) == (0x10000, 1)


def test_map_gpa_goes_on_where_the_host_stopped() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.map_gpa(0x20_0000, 0x60_0000, shared=True)

    def two_megabytes(regs: Regs) -> None:
        if regs.r13 > PAGE_2M:
            regs.r10, regs.r11 = 1, regs.r12 + PAGE_2M

    host = GuestHost(script)
    host.answers[0x10001] = two_megabytes
    host.run()
    shared = 1 << 47
    assert [(c.r12 - shared, c.r13) for c in host.calls] == [
        (0x20_0000, 0x60_0000),
        (0x40_0000, 0x40_0000),
        (0x60_0000, 0x20_0000),
    ]


@pytest.mark.parametrize(
    ("status", "reached", "calls"),
    [(1 << 63, 0x20_0000, 1), (1, 0x20_0000, 3), (1, 0x10_0000, 1), (1, 0x40_0000, 1)],
    ids=["refused", "stuck", "before the range", "behind the range"],
)
def test_map_gpa_gives_up_on_a_host_that_is_no_use(status: int, reached: int, calls: int) -> None:
    async def script(vcpu: Vcpu) -> int:
        try:
            await vcpu.map_gpa(0x20_0000, 0x20_0000, shared=False)
        except HostRefused as refused:
            return refused.status
        return 0

    def answer(regs: Regs) -> None:
        regs.r10, regs.r11 = status, reached

    host = GuestHost(script)
    host.answers[0x10001] = answer
    host.run()
    assert host.guests[0].result == status
    assert len(host.calls) == calls


def test_a_guest_whose_script_is_over_halts_for_ever() -> None:
    async def script(vcpu: Vcpu) -> int:
        return 7

    host = GuestHost(script)
    for _ in range(3):
        solo_call(host.enter(0))
    assert host.halts == 3
    assert host.guests[0].result == 7


def test_a_script_that_cannot_do_without_the_host_gives_up() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.io_write(0x70, 1, 1)

    def refuse(regs: Regs) -> None:
        regs.r10 = 1 << 63

    host = GuestHost(script)
    host.answers[ExitReason.IO_INSTRUCTION] = refuse
    with pytest.raises(AssertionError, match="does not come to its end"):
        host.run(exits=4)
    assert [call.r11 for call in host.calls] == [ExitReason.IO_INSTRUCTION, 0x10003]
    assert host.reasons[-1] == ExitReason.TRIPLE_FAULT


def test_a_diagram_tells_what_the_guest_does() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.accept(0x1000, 0x2000)
        await vcpu.accept_page(0x1000)
        await vcpu.write(0x1000, b"x")
        await vcpu.map_gpa(0x1000, 0x1000, shared=True)

    host = GuestHost(script)
    outcome = run(host.programs())
    shown = [event.text for event in outcome.trace.events if event.kind in ("tdcall", "access")]
    assert shown == [
        "TDG.MEM.PAGE.ACCEPT 0x1000 4K",
        "TDG.MEM.PAGE.ACCEPT 0x1000 4K",
        "TDG.MEM.PAGE.ACCEPT 0x1000 4K",
        "TDG.MEM.PAGE.ACCEPT -> TDX_PAGE_ALREADY_ACCEPTED",
        "writes 0x1000",
        "TDG.VP.VMCALL MapGPA R12=0x800000001000",
        "TDG.VP.VMCALL HLT_INSTRUCTION R12=0x1",
    ]


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_fault_that_nobody_handles_shuts_the_vcpu_down() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.touch(0x1_0000 | vcpu.shared_bit | 1 << 50)

    host = GuestHost(script)
    with pytest.raises(AssertionError, match="does not come to its end"):
        host.run(exits=3)
    assert ExitReason.TRIPLE_FAULT in host.reasons
    assert not host.guests[0].finished


def test_a_script_can_handle_a_fault() -> None:
    async def script(vcpu: Vcpu) -> tuple[int, int]:
        try:
            await vcpu.touch(0x1_0000 | 1 << 50)
        except GuestFault as fault:
            return fault.vector, fault.error_code
        return 0, 0

    host = GuestHost(script)
    host.run()
    assert host.guests[0].result[0] == vmcs.VECTOR_PF


# -- interruptions -----------------------------------------------------------------------------------------------------


async def varied(vcpu: Vcpu) -> tuple[object, ...]:
    """A bit of everything."""
    info = await vcpu.vp_info()
    await vcpu.write(0x5000, b"data")
    accepted = await vcpu.accept(0x4000, 0x8000)
    await vcpu.rtmr_extend(3, b"e" * 48, 0xA000)
    report = await vcpu.report(b"r" * 64, 0xB000)
    return info, accepted, await vcpu.read(0x5000, 4), report.td_info.pack(), (await vcpu.get_td_vm_call_info()).r10


def test_interrupts_of_the_host_change_nothing() -> None:
    plain, interrupted = GuestHost(varied), GuestHost(varied)
    interrupted.interrupt_everywhere = True
    plain.run()
    interrupted.run()
    assert plain.guests[0].result == interrupted.guests[0].result
    assert plain.faults == interrupted.faults


def test_a_pending_interrupt_stops_the_guest_at_an_instruction() -> None:
    async def script(vcpu: Vcpu) -> bytes:
        for gpa in range(0x1000, 0x3000, 8):
            await vcpu.write(gpa, b"12345678")
        return await vcpu.read(0x1000, 8)

    host = GuestHost(script)
    cpu = host.cpus[0].cpu
    cpu.pending = ((1, "nothing", None),)
    with pytest.raises(AssertionError, match="does not come to its end"):
        host.run(exits=5)
    assert set(host.reasons) == {ExitReason.INTERRUPT}
    cpu.pending = ()
    host.run()
    assert host.guests[0].result == b"12345678"


def test_instructions_have_their_own_addresses_and_a_loop_has_one() -> None:
    async def script(vcpu: Vcpu) -> None:
        for gpa in (0x1000, 0x2000, 0x3000):
            await vcpu.touch(gpa)
        await vcpu.touch(0x4000)

    host = GuestHost(script)
    seen: dict[int, int] = {}
    exit_, fields = host.module.td_exit, host.cpus[0].vp.vmcs

    async def noting(lp: int, vm_exit: object) -> Regs | None:
        left = await exit_(lp, vm_exit)  # type: ignore[arg-type]
        if left is not None and left.rax == VIOLATION:
            seen[left.r8] = fields[vmcs.GUEST_RIP]
        return left

    host.module.td_exit = noting  # type: ignore[method-assign,assignment]
    host.run()
    assert seen[0x1000] == seen[0x2000] == seen[0x3000] != seen[0x4000]


# -- time that goes back, schedules, exploration -----------------------------------------------------------------------


def test_a_guest_can_be_put_back_to_any_earlier_place() -> None:
    host = GuestHost(varied)
    journal = Journal(Tracking.world)
    marks: list[tuple[int, tuple[int, ...], int]] = []

    def play(answer: Regs | None) -> object:
        while not host.guests[0].finished:
            marks.append((journal.mark(), (answer or Regs()).to_tuple(), host.machine._next))
            answer = solo_call(host.enter(0, answer))
        return host.guests[0].result

    first = play(None)
    times = len(marks)
    assert times > 5
    for mark, answer, next_page in marks[:times][::-1]:
        journal.undo(mark)
        host.machine._next = next_page
        assert not host.guests[0].finished
        assert play(Regs.from_tuple(answer)) == first
    journal.close()


MAILBOX, DATA = 0x1000, 0x2000


async def sends(vcpu: Vcpu) -> None:
    await vcpu.write(DATA, b"data")
    await vcpu.write(MAILBOX, b"1")


async def waits(vcpu: Vcpu) -> bytes:
    await vcpu.wait_for(MAILBOX, b"1")
    return await vcpu.read(DATA, 4)


async def polls(vcpu: Vcpu) -> bytes:
    while await vcpu.read(MAILBOX, 1) != b"1":
        pass
    return await vcpu.read(DATA, 4)


@pytest.mark.parametrize("choose", [round_robin, at_random(1), at_random(2)], ids=["round robin", "seed 1", "seed 2"])
@pytest.mark.parametrize("receives", [waits, polls])
def test_vcpus_talk_through_memory_under_any_scheduler(choose: Chooser, receives: Script) -> None:
    host = GuestHost(receives, sends)
    outcome = run(host.programs(), choose, level=CALLS, max_steps=100_000)
    assert outcome.violation is None, outcome.message
    assert host.guests[0].result == b"data"


@pytest.mark.parametrize("receives", [waits, polls])
def test_every_interleaving_of_two_guests(receives: Script) -> None:
    host = GuestHost(receives, sends, added=(MAILBOX, DATA))
    host.module.hardware.inputs.tsc_step = 0
    explorer = Explorer(
        Tracking.world, host.programs(), observer=lambda results: host.guests[0].result, check_merges=True
    )
    verdict = explorer.explore()
    assert verdict.verdict == "proved", verdict.message
    assert set(verdict.outcomes) == {b"data"}
    assert verdict.states > 100


def test_exploration_finds_what_a_guest_can_see_too_early() -> None:
    async def sends_in_the_wrong_order(vcpu: Vcpu) -> None:
        await vcpu.write(MAILBOX, b"1")
        await vcpu.write(DATA, b"data")

    host = GuestHost(polls, sends_in_the_wrong_order, added=(MAILBOX, DATA))
    host.module.hardware.inputs.tsc_step = 0
    verdict = Explorer(Tracking.world, host.programs(), observer=lambda results: host.guests[0].result).explore()
    assert set(verdict.outcomes) == {b"data", bytes(4)}
