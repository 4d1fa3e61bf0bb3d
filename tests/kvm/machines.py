"""Machines for the tests: a host that has booted, a VMM on it, and TDs built through its ioctls."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any

from septum.arch.platform import profile
from septum.core import run as runs
from septum.core.cells import Shared, Tracking, World
from septum.core.run import Chooser, Outcome, run, run_solo
from septum.core.steps import CALLS, SOLO, Program, Task, wait_until
from septum.guest.scripted import Script, ScriptedGuest
from septum.kvm.abi import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTR,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_TDX_MEASURE_MEMORY_REGION,
    UserspaceMemoryRegion2,
)
from septum.kvm.arguments import Capabilities, InitVm, Region
from septum.kvm.host import Host
from septum.kvm.kernel import Kernel
from septum.kvm.process import Process
from septum.kvm.run_struct import HypercallExit
from septum.kvm.seamcall import Injection
from septum.kvm.vm import Vm

MEMORY = 4 << 20
"""Guest memory of a TD, all in one memslot and one guest_memfd file."""
BUILT = 0x1000
"""Address of the pages that are added at build."""
SMALL = replace(profile("small"), name="test")


class Progress(Shared):
    """How far a VMM is: whether vCPUs may run, how many of their threads are done, and how many other threads."""

    ready: bool = False
    ended: int = 0
    others: int = 0


class Vmm:
    """A host in a world of its own, with a process that has one TD."""

    def __init__(
        self,
        kernel: Kernel | None = None,
        *,
        injections: Iterable[Injection] = (),
        host: Host | None = None,
        name: str = "vmm",
    ) -> None:
        """:param host: to start another process on that host, in the same world."""
        if host is None:
            Tracking.world = World()
            host = Host(SMALL, kernel)
            host.boot()
            host.seamcalls.inject(*injections)
        self.host = host
        self.process = Process(host, name)
        self.progress = Progress(f"{name} progress")
        self.shared_memory = 0
        self.vm = self.gmem = -1
        self.vcpus: list[int] = []
        self.guests: list[ScriptedGuest] = []
        self.errors: list[tuple[str, int]] = []

    @property
    def kvm(self) -> Vm:
        """The TD's VM."""
        file = self.process.files.peek(self.vm)
        assert file is not None
        kvm: Vm = file.private_data
        return kvm

    def solo(self, body: Callable[[], Coroutine[Any, Any, Any]], *, cpu: int = 0) -> Any:
        """Runs one coroutine as a thread of the process, with nobody else, and returns its result."""
        return run_solo([Program(Task("vmm", cpu=cpu), body), *self.host.interrupt_contexts()])[0]

    def threads(self, *bodies: Callable[[], Coroutine[Any, Any, Any]]) -> list[Program]:
        """Programs of threads, on a CPU each, with the interrupt contexts."""
        programs = [Program(Task(f"thread{i}", cpu=i), body) for i, body in enumerate(bodies)]
        return [*programs, *self.host.interrupt_contexts()]

    # -- building ------------------------------------------------------------------------------------------------------

    async def init(self, init: InitVm | None = None) -> int:
        """Up to KVM_TDX_INIT_VM; returns the first error."""
        process = self.process
        self.vm = await process.create_vm()
        if self.vm < 0:
            return self.vm
        await process.enable_cap(self.vm, KVM_CAP_SPLIT_IRQCHIP, 24)
        await process.enable_cap(self.vm, KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        return await process.tdx_init_vm(self.vm, init or await self.default())

    async def default(self) -> InitVm:
        """A TD with all that can be had."""
        caps = await self.process.tdx_capabilities(self.vm)
        assert isinstance(caps, Capabilities)
        return caps.choose(self.host.module.hardware.cpu)

    async def add_vcpus(self, count: int) -> int:
        """KVM_CREATE_VCPU and KVM_TDX_INIT_VCPU; returns the first error."""
        for i in range(len(self.vcpus), len(self.vcpus) + count):
            vcpu = await self.process.create_vcpu(self.vm, i)
            if vcpu < 0:
                return vcpu
            self.vcpus.append(vcpu)
            if r := await self.process.tdx_init_vcpu(vcpu, 0):
                return r
        return 0

    async def add_memory(self) -> int:
        """A guest_memfd file in a memslot, all private; returns the first error."""
        process = self.process
        self.gmem = await process.create_guest_memfd(self.vm, MEMORY)
        if self.gmem < 0:
            return self.gmem
        return await process.set_user_memory_region2(self.vm, self.slot()) or await process.set_memory_attributes(
            self.vm, 0, MEMORY, KVM_MEMORY_ATTRIBUTE_PRIVATE
        )

    def slot(self, **changes: Any) -> UserspaceMemoryRegion2:
        """The memslot of :meth:`add_memory`, with changes."""
        if not self.shared_memory:
            self.shared_memory = self.process.mmap(MEMORY)
        slot = UserspaceMemoryRegion2(
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD,
            memory_size=MEMORY,
            userspace_addr=self.shared_memory,
            guest_memfd=max(self.gmem, 0),
        )
        return replace(slot, **changes)

    async def add_pages(self, count: int = 2, *, gpa: int = BUILT) -> int:
        """KVM_TDX_INIT_MEM_REGION with measurement; returns its result."""
        source = self.process.mmap(count << 12)
        self.process.write(source, b"\x90" * (count << 12))
        return await self.process.tdx_init_mem_region(
            self.vcpus[0], Region(source, gpa, count), KVM_TDX_MEASURE_MEMORY_REGION
        )

    async def build(self, vcpus: int = 1, pages: int = 2) -> int:
        """A TD that can run; returns the first error."""
        return (
            await self.init()
            or await self.add_vcpus(vcpus)
            or await self.add_memory()
            or (await self.add_pages(pages) if pages else 0)
            or await self.process.tdx_finalize_vm(self.vm)
        )

    # -- running -------------------------------------------------------------------------------------------------------

    def attach(self, *scripts: Script) -> None:
        """Gives each vCPU its guest."""
        self.guests = [ScriptedGuest(script, f"guest{i}") for i, script in enumerate(scripts)]
        for vcpu, guest in zip(self.vcpus, self.guests, strict=True):
            self.process.attach_guest(vcpu, guest)

    async def loop(self, index: int) -> int:
        """A vCPU's thread: KVM_RUN until a signal or an error; conversions of memory are done as asked."""
        process, vcpu = self.process, self.vcpus[index]
        run_page = process.kvm_run(vcpu)
        while True:
            r = await process.run(vcpu)
            if r or run_page.exit_reason != KVM_EXIT_HYPERCALL:
                return 0 if run_page.exit_reason == KVM_EXIT_INTR else r
            assert isinstance(run_page.exit, HypercallExit)
            await self.convert(run_page.exit)

    async def convert(self, asked: HypercallExit) -> None:
        """KVM_HC_MAP_GPA_RANGE as a VMM does it."""
        gpa, size = asked.arg0, asked.arg1 << 12
        private = bool(asked.arg2 & KVM_MAP_GPA_RANGE_ENCRYPTED)
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        assert await self.process.set_memory_attributes(self.vm, gpa, size, attributes) == 0
        if not private:
            assert await self.punch(gpa, size) == 0

    async def punch(self, gpa: int, size: int) -> int:
        """Punches a hole into the guest_memfd file."""
        return await self.process.fallocate(self.gmem, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, gpa, size)

    def run(
        self,
        *scripts: Script,
        choose: Chooser = runs.solo,
        level: int | None = None,
        others: Sequence[Callable[[], Coroutine[Any, Any, Any]]] = (),
        **options: Any,
    ) -> Outcome:
        """Builds a TD with a vCPU for each script, runs it until all scripts have ended, and ends the process.

        ``others`` are threads that run beside it; they are waited for too. Every thread has a CPU of its own.
        """
        count = len(scripts)

        def done() -> bool:
            ended = all(g.finished for g in self.guests) and self.progress.others == len(others)
            return ended or self.progress.ended > 0

        async def main() -> int:
            r = await self.build(count)
            if not r:
                self.attach(*scripts)
            self.progress.ready = True
            if not r:
                await wait_until(done, "guests")
                for i in range(count):
                    self.process.kill(f"vcpu{i}", (i + 1) % 4)
            await wait_until(lambda: self.progress.ended == count, "end of threads")
            await self.process.exit()
            return r

        def thread(index: int) -> Callable[[], Coroutine[Any, Any, int]]:
            async def body() -> int:
                await wait_until(lambda: self.progress.ready, "the TD is built")
                r = await self.loop(index) if self.guests else 0
                self.progress.ended += 1
                return r

            return body

        def other(body: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], Coroutine[Any, Any, Any]]:
            async def then_done() -> Any:
                r = await body()
                self.progress.others += 1
                return r

            return then_done

        programs = [Program(Task("main", cpu=0), main)]
        programs += [Program(Task(f"vcpu{i}", cpu=(i + 1) % 4), thread(i)) for i in range(count)]
        programs += [Program(Task(f"other{i}", cpu=(count + 1 + i) % 4), other(body)) for i, body in enumerate(others)]
        programs += self.host.interrupt_contexts()
        if level is None:
            level = SOLO if choose is runs.solo else CALLS
        return run(programs, choose, level=level, keep_events=False, **options)

    def assert_clean(self) -> None:
        """Nothing is lost, and the kernel had nothing to complain about."""
        assert self.host.pages.in_use == 0
        assert not self.host.pages.leaks
        assert not self.host.keyids_in_use()
        assert not self.host.log.bugs
        assert not self.host.log.warnings
