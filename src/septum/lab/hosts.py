"""A host with one TD on it, brought by ioctls to where a race can begin.

All that happens here runs solo, before the tasks of a scenario: what it leaves behind is their initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from errno import errorcode
from functools import partial
from typing import Any, Final

from septum.arch.pages import PAGE_2M, PAGE_4K
from septum.arch.platform import profile
from septum.core.automata import Invariant
from septum.core.cells import Fixed
from septum.core.run import run_solo
from septum.core.steps import Program, Step, Task, emit, step
from septum.core.trylocks import Mode, Sharex, Taken
from septum.guest.scripted import Script, ScriptedGuest
from septum.guest.vcpu import Vcpu
from septum.kvm import abi
from septum.kvm.abi import UserspaceMemoryRegion2
from septum.kvm.arguments import Capabilities, Region
from septum.kvm.host import Host
from septum.kvm.invariants import mirror_agrees, no_bug
from septum.kvm.kernel import Kernel
from septum.kvm.process import Process

MEMORY: Final = PAGE_2M
"""Bytes of guest memory, from 0: its pages share one table of the Secure EPT."""
DONE_PORT: Final = 0x80
"""A guest that is done writes to this I/O port, which takes its vCPU's thread to userspace."""
GPA_WIDTH: Final = 48
"""Four levels of tables."""

#: A system call, ready to be made.
Call = Callable[[], Coroutine[Step, None, Any]]


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of the VMM: its name, and the one system call that it makes."""

    name: str
    what: str
    call: Call

    async def run(self) -> Any:
        """Makes the call, and tells of it in the trace."""
        await step("call", self.what)
        emit("ioctl", self.what)
        result = await self.call()
        emit("return", f"{self.what} -> {'-' + errorcode[-result] if result < 0 else result}")
        return result


class OneFailure(Sharex):
    """A lock of the module that counts only the first of the shared attempts that fail while it is held exclusively.

    In the real word each of them leaves a reader too many. Nobody sees that: the holder's release stores 0, and until
    then attempts fail because of the exclusive bit, whatever the count (it wraps after 32,768). If they were counted, a
    vCPU that tries again and again would come to tens of thousands of states that do the same.
    """

    __slots__ = ()

    async def _attempt(self, mode: Mode, guest: bool) -> Taken:
        word = self._word()
        if mode is Mode.SHARED and word & self.EX and word != self.EX:
            return Taken.BUSY
        return await super()._attempt(mode, guest)


class TdHost(Fixed):
    """A small machine with a VMM (``vmm``) whose TD has :data:`MEMORY` bytes of private memory.

    vCPU n belongs to CPU n, where it was created. The first ``initialised`` of them are past KVM_TDX_INIT_VCPU.
    ``vm``, ``vcpus`` and ``gmem`` are file descriptors.
    """

    def __init__(self, kernel: Kernel, vcpus: int, *, initialised: int) -> None:
        self.host = Host(profile("small"), kernel)
        self.host.boot()
        self.vmm = Process(self.host)
        self.vm, self.gmem = self._alone(0, self._create)
        self.vcpus = [self._alone(cpu, partial(self.vmm.create_vcpu, self.vm, cpu)) for cpu in range(vcpus)]
        self.kvm = self.vmm.vcpu(self.vcpus[0]).kvm
        for index in range(initialised):
            self.make(self.init_vcpu(index), cpu=index)

    async def _create(self) -> tuple[int, int]:
        vmm = self.vmm
        vm = await vmm.create_vm()
        caps = await vmm.tdx_capabilities(vm)
        assert isinstance(caps, Capabilities)
        await vmm.enable_cap(vm, abi.KVM_CAP_SPLIT_IRQCHIP, 24)
        await vmm.tdx_init_vm(vm, caps.choose(self.host.module.hardware.cpu, gpa_width=GPA_WIDTH))
        gmem = await vmm.create_guest_memfd(vm, MEMORY)
        region = UserspaceMemoryRegion2(
            slot=0,
            flags=abi.KVM_MEM_GUEST_MEMFD,
            memory_size=MEMORY,
            userspace_addr=vmm.mmap(MEMORY),
            guest_memfd=gmem,
        )
        await vmm.set_user_memory_region2(vm, region)
        await vmm.set_memory_attributes(vm, 0, MEMORY, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        return vm, gmem

    def _alone(self, cpu: int, call: Call) -> Any:
        """What a system call made on ``cpu`` returns, while nothing else happens."""
        return run_solo([Program(Task("setup", cpu=cpu), call), *self.host.interrupt_contexts()])[0]

    def make(self, call: Call, cpu: int = 0) -> None:
        """Makes a system call on ``cpu``, alone, which must return 0.

        :raises RuntimeError: when it does not: the scenario is wrong.
        """
        if result := self._alone(cpu, call):
            raise RuntimeError(f"the scenario cannot begin: a system call before it returned {result}")

    # -- system calls ----------------------------------------------------------------------------------------------

    def init_vcpu(self, index: int) -> Call:
        """KVM_TDX_INIT_VCPU."""
        return lambda: self.vmm.tdx_init_vcpu(self.vcpus[index])

    def init_mem_region(self, gpa: int) -> Call:
        """KVM_TDX_INIT_MEM_REGION of one page, measured, through vCPU 0."""
        source = self.vmm.mmap(PAGE_4K)
        self.vmm.write(source, b"\x90" * PAGE_4K)
        flags = abi.KVM_TDX_MEASURE_MEMORY_REGION
        return lambda: self.vmm.tdx_init_mem_region(self.vcpus[0], Region(source, gpa, 1), flags)

    def finalize(self) -> Call:
        """KVM_TDX_FINALIZE_VM."""
        return lambda: self.vmm.tdx_finalize_vm(self.vm)

    def pre_fault(self, gpa: int, index: int = 0) -> Call:
        """KVM_PRE_FAULT_MEMORY of one page: it is mapped, pending, and the vCPU has the page tables of the VM."""
        return lambda: self.vmm.pre_fault_memory(self.vcpus[index], Region(0, gpa, 1))

    def punch_hole(self, gpa: int, pages: int = 1) -> Call:
        """``fallocate(FALLOC_FL_PUNCH_HOLE)`` of the pages behind ``gpa``."""
        mode = abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_KEEP_SIZE
        return lambda: self.vmm.fallocate(self.gmem, mode, gpa, pages * PAGE_4K)

    def run_vcpu(self, index: int, script: Script) -> Call:
        """KVM_RUN, until the vCPU has come to the end of its ``script``, or KVM returns an error."""

        async def life(vcpu: Vcpu) -> None:
            await script(vcpu)
            await vcpu.publish(True)
            await vcpu.io_write(DONE_PORT, 0, 1)

        guest = ScriptedGuest(life, f"guest{index}")
        self.vmm.attach_guest(self.vcpus[index], guest)

        async def until_done() -> int:
            result = 0
            while not guest.finished and not result:
                result = await self.vmm.run(self.vcpus[index])
            return result

        return until_done

    # -- the scenario ----------------------------------------------------------------------------------------------

    def thread(self, name: str, what: str, call: Call) -> Thread:
        """A thread that makes one system call, called ``what`` in diagrams."""
        return Thread(name, what, call)

    def setting(self, threads: Sequence[Thread], *, built: bool) -> tuple[list[Program], list[Invariant]]:
        """A task for each thread, thread n on CPU n, the interrupts of their CPUs, and what must hold in every state.

        That mirror and Secure EPT agree is asked only of a TD that is ``built``: before, a page is added in several
        steps without ``mmu_lock``. From here on time stands still: a TSC that moves would make every order of events a
        state of its own.
        """
        module, vms = self.host.module, lambda: [self.kvm]
        module.hardware.inputs.tsc_step = 0
        td = module.td(self.kvm.tdr_page)
        td.epoch_lock = OneFailure(module.locks, td.epoch_lock.key, td.epoch_lock.label)
        td.secure_ept_lock = OneFailure(module.locks, td.secure_ept_lock.key, td.secure_ept_lock.label)
        programs = [Program(Task(thread.name, cpu=cpu), thread.run) for cpu, thread in enumerate(threads)]
        invariants = [no_bug(self.host, vms), *([mirror_agrees(vms)] if built else [])]
        return programs + self.host.interrupt_contexts()[: len(threads)], invariants
