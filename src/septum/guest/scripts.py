"""Ready scripts: what a TD can be made to do without writing one.

All of them do their part on every VCPU of a TD and then come together: the first VCPU waits until the others are done
and switches the machine off. They learn from the TD HOB which memory there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple

from septum.arch import vmcs
from septum.arch.errors import UsageError
from septum.arch.pages import PAGE_2M, PAGE_4K, align_down, align_up
from septum.arch.structures import TdAttributes, TdReport
from septum.guest.hob import Memory, hob_digest, read_hob, unaccepted_memory
from septum.guest.instructions import WRITE
from septum.guest.scripted import Script
from septum.guest.vcpu import GuestFault, Vcpu, accept_on_ve
from septum.tdx.measurement import extend_rtmr
from septum.tdx.state.vp import VeInfo

POWER_OFF_PORT: Final = 0x604
POWER_OFF: Final = 0x2000
"""SLP_EN in the PM1a control register: switches QEMU's q35 off (hw/acpi/core.c, ``acpi_pm1_cnt_write``)."""
_GO: Final = (1).to_bytes(8, "little")
_BUFFER_PAGES: Final = 3
_RTMR_OF_SCRIPT: Final = 3


@dataclass(frozen=True, slots=True)
class Job:
    """How much a script does. Sizes are in bytes, for the whole TD unless told otherwise."""

    eager: int = 16 << 20
    """Memory that is accepted before it is touched."""
    touches: int = 64
    """Pages that each VCPU touches, spread over the memory, and accepts when a #VE tells it to."""
    converted: int = 16 * PAGE_4K
    """Memory that each VCPU makes shared, and private again."""
    rounds: int = 8
    """How often it does so in a storm."""
    memory: tuple[Memory, ...] = ()
    """Memory that nobody has accepted, for a TD without a HOB."""


class Done(NamedTuple):
    """What a VCPU did; the first one also has the TDREPORT that it asked for last, as bytes."""

    accepted_4k: int = 0
    accepted_2m: int = 0
    accepted_on_ve: int = 0
    """Pages that were accepted when they were touched."""
    converted: int = 0
    report: bytes = b""


class Place(NamedTuple):
    """What a VCPU knows of the TD once it has looked around."""

    num_vcpus: int
    memory: tuple[Memory, ...]
    mailbox: int
    """A page where the VCPUs tell each other how far they are."""
    buffers: int
    """Three pages of the first VCPU, for attestation."""
    hob: bytes
    ve_disabled: bool
    """An access to a page that is not accepted kills the TD, instead of bringing a #VE."""


Part = Callable[[Vcpu, Place, Job], Coroutine[Any, Any, Done]]


async def look_around(vcpu: Vcpu, job: Job) -> Place:
    """Reads the HOB, and sets some pages at the start of the memory aside (accepted, if no #VE would tell to do it).

    :raises GuestFault: when there is not enough memory.
    """
    info = await vcpu.vp_info()
    hob = await read_hob(vcpu)
    memory = unaccepted_memory(hob) or job.memory
    needed = (1 + _BUFFER_PAGES) * PAGE_4K
    for i, part in enumerate(memory):
        if part.end - part.start > needed:
            rest = (*memory[:i], Memory(part.start + needed, part.end), *memory[i + 1 :])
            ve_disabled = bool(info.attributes & TdAttributes.SEPT_VE_DISABLE)
            if ve_disabled:
                await vcpu.accept(part.start, part.start + needed)
            return Place(info.num_vcpus, rest, part.start, part.start + PAGE_4K, hob, ve_disabled)
    raise GuestFault(vmcs.VECTOR_GP, why="no memory to work with")


async def _together(part: Part, job: Job, vcpu: Vcpu) -> Done | None:
    """Does a part on this VCPU; the first one goes ahead, and switches off when all are done."""
    count = 0

    async def counting(vcpu: Vcpu, info: VeInfo) -> None:
        nonlocal count
        count += await accept_on_ve(vcpu, info)

    vcpu.on_ve = counting
    place = await look_around(vcpu, job)
    if vcpu.index:
        await vcpu.wait_for(place.mailbox, _GO)
        done = await part(vcpu, place, job)
        await vcpu.write(place.mailbox + 8 * vcpu.index, _GO)
        return done._replace(accepted_on_ve=count)
    if place.hob:
        await vcpu.rtmr_extend(0, hob_digest(place.hob), place.buffers)
    await vcpu.write(place.mailbox, _GO)
    done = await part(vcpu, place, job)
    for index in range(1, place.num_vcpus):
        await vcpu.wait_for(place.mailbox + 8 * index, _GO)
    report = await _attest(vcpu, place)
    await vcpu.publish(done._replace(accepted_on_ve=count, report=report.pack()))
    await vcpu.io_write(POWER_OFF_PORT, POWER_OFF, 2)
    return None


async def _attest(vcpu: Vcpu, place: Place) -> TdReport:
    """A report, an extended RTMR, and a report that must show it."""
    digest = hashlib.sha384(b"septum").digest()
    before = await vcpu.report(hashlib.sha512(b"before").digest(), place.buffers)
    await vcpu.rtmr_extend(_RTMR_OF_SCRIPT, digest, place.buffers + 2 * PAGE_4K)
    after = await vcpu.report(hashlib.sha512(b"after").digest(), place.buffers)
    if after.td_info.rtmrs[_RTMR_OF_SCRIPT] != extend_rtmr(before.td_info.rtmrs[_RTMR_OF_SCRIPT], digest):
        raise GuestFault(vmcs.VECTOR_GP, why="the TD report does not show the RTMR")
    return after


def _blocks(memory: tuple[Memory, ...]) -> Iterator[Memory]:
    """Memory in blocks that lie in 2 MiB each."""
    for part in memory:
        start = part.start
        while start < part.end:
            end = min(align_down(start, PAGE_2M) + PAGE_2M, part.end)
            yield Memory(start, end)
            start = end


def _share(vcpu: Vcpu, place: Place, blocks: int) -> Iterator[Memory]:
    """Which of the first ``blocks`` blocks are this VCPU's: they go round."""
    return islice(_blocks(place.memory), vcpu.index, blocks, place.num_vcpus)


# -- the parts ---------------------------------------------------------------------------------------------------------


async def _accept(vcpu: Vcpu, place: Place, blocks: int) -> Done:
    small = large = 0
    for block in _share(vcpu, place, blocks):
        pages = await vcpu.accept(block.start, block.end)
        small += pages[0]
        large += pages[1]
    return Done(small, large)


async def accept_all(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Accepts all memory, as the host maps it."""
    return await _accept(vcpu, place, sum(1 for _ in _blocks(place.memory)))


async def touch_lazily(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Touches pages all over the memory; what is not accepted yet is accepted in the handler for #VE."""
    await _touch(vcpu, place, job.touches, 0)
    return Done()


async def _touch(vcpu: Vcpu, place: Place, touches: int, first_block: int) -> None:
    """Touches pages in blocks from ``first_block`` on, spread over the rest of the memory."""
    blocks = sum(1 for _ in _blocks(place.memory))
    all_touches = touches * place.num_vcpus
    stride = max((blocks - first_block) // all_touches, 1)
    mine = islice(_blocks(place.memory), first_block + vcpu.index * stride, None, stride * place.num_vcpus)
    for block in islice(mine, touches):
        if place.ve_disabled:
            await vcpu.accept(block.start, block.start + PAGE_4K)
        await vcpu.touch(block.start, WRITE)


async def convert(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Makes memory shared, uses it, and makes it private again, in one of this VCPU's blocks."""
    block = next(_share(vcpu, place, place.num_vcpus), None)
    if block is None or not job.converted:
        return Done()
    start = align_up(block.start, PAGE_4K)
    end = min(start + job.converted, block.end)
    await vcpu.map_gpa(start, end - start, shared=True)
    await vcpu.write(start | vcpu.shared_bit, _GO)
    await vcpu.map_gpa(start, end - start, shared=False)
    small, large = await vcpu.accept(start, end)
    if await vcpu.read(start) == _GO:
        raise GuestFault(vmcs.VECTOR_GP, why=f"accepted memory at {start:#x} is not clear")
    return Done(small, large, converted=end - start)


async def convert_storm(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Converts memory again and again."""
    done = Done()
    for _ in range(job.rounds):
        done = _sum(done, await convert(vcpu, place, job))
    return done


async def boot(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Some memory accepted at once, more when touched, some converted: what a guest does while it boots."""
    eager = min(-(-job.eager // PAGE_2M), sum(1 for _ in _blocks(place.memory)))
    accepted = await _accept(vcpu, place, eager)
    await _touch(vcpu, place, job.touches, eager)
    return _sum(accepted, await convert(vcpu, place, job))


async def idle(vcpu: Vcpu, place: Place, job: Job) -> Done:
    """Nothing."""
    return Done()


def _sum(one: Done, other: Done) -> Done:
    return Done(
        one.accepted_4k + other.accepted_4k,
        one.accepted_2m + other.accepted_2m,
        converted=one.converted + other.converted,
    )


SCRIPTS: Final[Mapping[str, Part]] = {
    "boot": boot,
    "accept-all": accept_all,
    "lazy": touch_lazily,
    "convert-storm": convert_storm,
    "idle": idle,
}


def script(name: str, job: Job | None = None) -> Script:
    """A ready script, for every VCPU of a TD.

    :raises UsageError: when there is none of that name.
    """
    if name not in SCRIPTS:
        raise UsageError(f"there is no script {name!r}; there are: {', '.join(SCRIPTS)}")
    return partial(_together, SCRIPTS[name], job or Job())
