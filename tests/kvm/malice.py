"""A VMM that means ill: threads that make any system call, in any order, with any arguments, on several VMs."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from septum.arch.pamt import PageType
from septum.core.steps import Program, Task, require, wait_until
from septum.guest.scripted import ScriptedGuest
from septum.guest.vcpu import Vcpu
from septum.kvm import abi
from septum.kvm.raw_ioctl import ioctl
from tests.kvm.machines import MEMORY, Vmm

PAGE = 4096
ADDRESSES = (0, PAGE, 0x1_0000, MEMORY - PAGE, MEMORY, 2 << 20, 1 << 47, 1 << 51, 1 << 52, 123, (1 << 64) - PAGE)
SIZES = (0, 1, PAGE, 2 * PAGE, 2 << 20, MEMORY, 1 << 40, (1 << 64) - PAGE)
THREADS = 3


async def restless(vcpu: Vcpu) -> None:
    """A guest that takes memory, gives it back, and goes to userspace, without end."""
    while True:
        for gpa in (0x10_0000, 0x20_0000):
            await vcpu.accept_page(gpa)
            await vcpu.io_write(0x80, 0, 1)
            await vcpu.map_gpa(gpa, PAGE, shared=True)
            await vcpu.map_gpa(gpa, PAGE, shared=False)


class Malice:
    """Threads of one process, each with its own dice."""

    def __init__(self, vmm: Vmm, seed: int, calls: int) -> None:
        self.vmm = vmm
        self.process = vmm.process
        self.buffer = self.process.mmap(16 * PAGE)
        self.spare = self.process.mmap(MEMORY)
        self.calls = calls
        self.dice = [random.Random(seed * THREADS + n) for n in range(THREADS)]
        self.init = bytes(vmm.solo(vmm.default).pack()) if vmm.vm >= 0 else bytes(256)
        self.vcpus = [self.process.vcpu(fd) for fd in vmm.vcpus]
        """All that there ever were."""
        self.results: Counter[tuple[str, bool]] = Counter()
        """How many calls were made, by name and whether they succeeded."""

    def programs(self) -> list[Program]:
        """Threads on CPUs of their own, one that sends signals to those that sleep, and the interrupts."""
        threads = [Program(Task(f"thread{n}", cpu=n), partial(self._thread, n)) for n in range(THREADS)]
        alarm = Program(Task("alarm", cpu=3), self._alarm, daemon=True)
        return [*threads, alarm, *self.vmm.host.interrupt_contexts()]

    async def _thread(self, number: int) -> None:
        dice, name = self.dice[number], f"thread{number}"
        for _ in range(self.calls):
            operation = dice.choice(OPERATIONS)
            result = await operation(self, dice)
            self.no_page_has_two_owners()
            self.results[operation.__name__.lstrip("_"), isinstance(result, int) and result >= 0] += 1
            self.process.take_signal(name)

    async def _alarm(self) -> None:
        """KVM_RUN of a halted vCPU, or of one that nobody has started, ends with a signal."""
        names = [f"thread{n}" for n in range(THREADS)]
        signals = self.vmm.host.signals
        while True:
            await wait_until(lambda: self._sleeping() and not all(name in signals for name in names), "someone sleeps")
            for name in names:
                self.process.kill(name)

    def _sleeping(self) -> bool:
        return any(vcpu.blocking for vcpu in self.vcpus)

    def fd(self, dice: random.Random) -> int:
        """Mostly one that is open."""
        fds = self.process.files.open_fds()
        return dice.choice(fds) if fds and dice.random() < 0.95 else dice.choice((-1, 0, 2, 77))

    def of(self, dice: random.Random, kind: str) -> int:
        """Mostly a descriptor of some kind."""
        fds = [fd for fd in self.process.files.open_fds() if (f := self.process.files.peek(fd)) and f.kind == kind]
        return dice.choice(fds) if fds and dice.random() < 0.9 else self.fd(dice)

    def no_page_has_two_owners(self) -> None:
        """What the module uses is not free in the host."""
        module, pages = self.vmm.host.module, self.vmm.host.pages
        for key, entry in dict.items(module.pamt):
            kind = PageType(entry.page_type)
            if kind not in (PageType.NDA, PageType.RSVD):
                used = pages.is_allocated(key & -PAGE)
                require(used, "no page has two owners", f"page {key:#x} is free, and {kind.name}")


Operation = Callable[["Malice", random.Random], Coroutine[Any, Any, object]]


async def _create_vm(m: Malice, dice: random.Random) -> object:
    return await ioctl(m.process, 2, abi.KVM_CREATE_VM, dice.choice((abi.KVM_X86_TDX_VM, 0, 99)))


async def _create_vcpu(m: Malice, dice: random.Random) -> object:
    fd = await ioctl(m.process, m.of(dice, "vm"), abi.KVM_CREATE_VCPU, dice.choice((0, 1, 2, 3, 4095, 4096, 1 << 31)))
    if fd >= 0:
        m.process.attach_guest(fd, ScriptedGuest(restless, f"guest of {fd}"))
        m.vcpus.append(m.process.vcpu(fd))
    return fd


async def _run(m: Malice, dice: random.Random) -> object:
    return await ioctl(m.process, m.of(dice, "vcpu"), abi.KVM_RUN, dice.choice((0, 0, 0, 1)))


async def _enable_cap(m: Malice, dice: random.Random) -> object:
    number = dice.choice((abi.KVM_CAP_SPLIT_IRQCHIP, abi.KVM_CAP_EXIT_HYPERCALL, 0))
    cap = abi.EnableCap(number, dice.choice((0, 1)), dice.choice((24, 1 << 12)))
    return await ioctl(m.process, m.of(dice, "vm"), abi.KVM_ENABLE_CAP, bytearray(cap.pack()))


async def _set_user_memory_region2(m: Malice, dice: random.Random) -> object:
    flags, size = dice.choice((0, 4, 4, 1, 2, 0xFFFF_FFFF)), dice.choice(SIZES)
    where = dice.choice((m.vmm.shared_memory, m.spare, 0, 123, 1 << 47))
    gmem = m.of(dice, "gmem") & 0xFFFF_FFFF
    slot = struct.pack(
        "<IIQQQQII112x", dice.choice((0, 1, 70_000)), flags, dice.choice(ADDRESSES), size, where, 0, gmem, 0
    )
    return await ioctl(m.process, m.of(dice, "vm"), abi.KVM_SET_USER_MEMORY_REGION2, bytearray(slot))


async def _set_attributes(m: Malice, dice: random.Random) -> object:
    size = dice.choice([size for size in SIZES if size < 1 << 30])
    attributes = struct.pack("<QQQQ", dice.choice(ADDRESSES), size, dice.choice((0, 8, 8, 1)), dice.choice((0, 0, 1)))
    return await ioctl(m.process, m.of(dice, "vm"), abi.KVM_SET_MEMORY_ATTRIBUTES, bytearray(attributes))


async def _create_gmem(m: Malice, dice: random.Random) -> object:
    args = bytearray(struct.pack("<QQ48x", dice.choice(SIZES), dice.choice((0, 0, 1))))
    return await ioctl(m.process, m.of(dice, "vm"), abi.KVM_CREATE_GUEST_MEMFD, args)


async def _pre_fault(m: Malice, dice: random.Random) -> object:
    size = dice.choice((0, 1, PAGE, 4 * PAGE, 2 << 20))
    memory = bytearray(struct.pack("<QQQ40x", dice.choice(ADDRESSES), size, dice.choice((0, 0, 1))))
    return await ioctl(m.process, m.of(dice, "vcpu"), abi.KVM_PRE_FAULT_MEMORY, memory)


async def _encrypt_op(m: Malice, dice: random.Random) -> object:
    pages = dice.choice((0, 1, 3, 1 << 52))
    region = struct.pack("<QQQ", dice.choice((m.spare, 123, 0)), dice.choice(ADDRESSES), pages)
    m.process.write(m.buffer, dice.choice((region, region, m.init, m.init, dice.randbytes(64), bytes(256))))
    command = dice.choice((0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 99))
    data, hw_error = dice.choice((m.buffer, m.buffer, 0, 123)), dice.choice((0, 0, 0, 0, 1))
    cmd = struct.pack("<IIQQ", command, dice.choice((0, 0, 0, 1, 7)), data, hw_error)
    fd = m.of(dice, dice.choice(("vm", "vcpu")))
    return await ioctl(m.process, fd, abi.KVM_MEMORY_ENCRYPT_OP, bytearray(cmd))


async def _fallocate(m: Malice, dice: random.Random) -> object:
    mode = dice.choice((1, 3, 3, 3, 0, 7))
    length = dice.choice((0, 1, PAGE, 8 * PAGE, 2 << 20) if mode == 1 else SIZES)
    return await m.process.fallocate(m.of(dice, "gmem"), mode, dice.choice((*ADDRESSES, -PAGE)), length)


async def _signal(m: Malice, dice: random.Random) -> object:
    msi = abi.Msi(address_lo=dice.choice((0, 1 << 12, 5 << 12)), data=dice.choice((0, 0x30, 0xFF)))
    return await ioctl(m.process, m.of(dice, "vm"), abi.KVM_SIGNAL_MSI, bytearray(msi.pack()))


async def _close(m: Malice, dice: random.Random) -> object:
    return await m.process.close(m.fd(dice)) if dice.random() < 0.3 else 0


async def _unmap(m: Malice, dice: random.Random) -> object:
    return await m.process.madvise_dontneed(dice.choice((m.vmm.shared_memory, m.spare, 0)), dice.choice((PAGE, MEMORY)))


async def _nonsense(m: Malice, dice: random.Random) -> object:
    request = dice.choice((0, 0xAE99, 0xC008_AEBA, abi.KVM_MEMORY_ENCRYPT_OP, abi.KVM_SET_USER_MEMORY_REGION2))
    return await ioctl(m.process, m.fd(dice), request, dice.choice((0, bytearray(), bytearray(dice.randbytes(300)))))


OPERATIONS: list[Operation] = [
    _create_vm,
    _create_vcpu,
    *[_run] * 4,
    _enable_cap,
    *[_set_user_memory_region2] * 2,
    *[_set_attributes] * 3,
    _create_gmem,
    *[_pre_fault] * 3,
    *[_encrypt_op] * 4,
    *[_fallocate] * 3,
    _signal,
    _close,
    _unmap,
    _nonsense,
]
