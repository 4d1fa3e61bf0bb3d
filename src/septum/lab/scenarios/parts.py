"""What scenarios of a TD that runs are made of: the TD, and threads for it."""

from __future__ import annotations

from functools import partial
from typing import Final

from septum.arch.pages import PAGE_4K
from septum.arch.status import CODE, Status
from septum.guest.vcpu import Vcpu
from septum.lab.hosts import TdHost, Thread

ELSEWHERE: Final = 256 * PAGE_4K
"""A page that no vCPU asks for, under the same table."""
_TRY_AGAIN: Final = (
    Status.TDX_OPERAND_BUSY,
    Status.TDX_OPERAND_BUSY_HOST_PRIORITY,
    Status.TDX_PAGE_SIZE_MISMATCH,
)
REST_PORT: Final = 0x81
"""An I/O port that nobody listens at."""


def running_td(kernel: str, vcpus: int, *, tables: bool = True) -> TdHost:
    """A TD that can run. With ``tables``, the Secure EPT has all tables and every vCPU has entered the page tables."""
    td = TdHost(kernel, vcpus, initialised=vcpus)
    td.make(td.finalize())
    for index in range(vcpus if tables else 0):
        td.make(td.pre_fault(ELSEWHERE + index * PAGE_4K, index), cpu=index)
    return td


async def accept(gpa: int, pages: int, vcpu: Vcpu) -> None:
    """Accepts pages from ``gpa`` on, which fault first if they are not mapped.

    The guest is patient: also when the module tells it that the size does not fit, which it may do to a guest that
    comes while TDH.MEM.PAGE.AUG maps the page, it tries again.
    """
    for page in range(gpa, gpa + pages * PAGE_4K, PAGE_4K):
        while await vcpu.accept_page(page) & CODE in _TRY_AGAIN:
            pass


async def accept_as_linux_does(gpa: int, vcpu: Vcpu) -> None:
    """Accepts a page; dies when the module tells anything but that it is, or was, accepted, or is busy."""
    await vcpu.accept(gpa, gpa + PAGE_4K)


async def accept_and_rest(rounds: int, vcpu: Vcpu) -> None:
    """Accepts a page, then the next, and goes to userspace in between."""
    for index in range(rounds):
        if index:
            await vcpu.io_write(REST_PORT, 0, 1)
        await vcpu.accept(index * PAGE_4K, (index + 1) * PAGE_4K)


async def leave(times: int, vcpu: Vcpu) -> None:
    """Leaves the guest for KVM, and no further, again and again: each time the vCPU enters anew."""
    for _ in range(times):
        await vcpu.get_td_vm_call_info()


async def convert(gpa: int, rounds: int, vcpu: Vcpu) -> None:
    """Makes a page shared, uses it, makes it private again and accepts it."""
    for _ in range(rounds):
        await vcpu.map_gpa(gpa, PAGE_4K, shared=True)
        await vcpu.touch(gpa | vcpu.shared_bit)
        await vcpu.map_gpa(gpa, PAGE_4K, shared=False)
        await vcpu.accept(gpa, gpa + PAGE_4K)


def accepts(td: TdHost, index: int, gpa: int, pages: int = 1, *, returns: tuple[int, ...] = (0,)) -> Thread:
    """A vCPU whose guest accepts pages."""
    return td.thread(
        f"vCPU {index}", f"KVM_RUN of vCPU {index}", td.run_vcpu(index, partial(accept, gpa, pages)), returns=returns
    )


def punches(td: TdHost, gpa: int, pages: int = 1) -> Thread:
    """A thread that punches a hole."""
    return td.thread("main", "fallocate(PUNCH_HOLE)", td.punch_hole(gpa, pages), returns=(0,))
