"""A host with one TD on it, brought by ioctls to where a race can begin.

All that happens here runs solo, before the tasks of a scenario: what it leaves behind is their initial state.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from errno import EINVAL, errorcode
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from septum.arch.pages import PAGE_2M, PAGE_4K, Level, level_size
from septum.arch.platform import Platform, profile
from septum.core.automata import Invariant
from septum.core.cells import Fixed, Shared
from septum.core.run import run_solo
from septum.core.steps import Program, Step, Task, current_task, emit, require, step
from septum.core.trylocks import Mode, Sharex, Taken, declare_always_shared
from septum.guest.scripted import Script, ScriptedGuest
from septum.guest.vcpu import Vcpu
from septum.kvm import abi
from septum.kvm.abi import UserspaceMemoryRegion2
from septum.kvm.arguments import Capabilities, InitVm, Region
from septum.kvm.host import Host
from septum.kvm.hotplug import cpu_down
from septum.kvm.invariants import mirror_agrees, no_bug
from septum.kvm.kernel import Kernel
from septum.kvm.process import Process
from septum.kvm.run_struct import HypercallExit, IoExit
from septum.kvm.sysinfo import KVM_SUPPORTED_TD_ATTRS as SEPT_VE_DISABLE
from septum.lab.kernels import DEFAULT, read_kernel
from septum.lab.scenario import Built, Parameter
from septum.tdx.module import Module

if TYPE_CHECKING:
    from septum.kvm.run_struct import KvmRun
    from septum.kvm.vm import Vm
    from septum.tdx.state.td import Td

MEMORY: Final = PAGE_2M
"""Bytes of guest memory, from 0: its pages share one table of the Secure EPT."""
DONE_PORT: Final = 0x80
"""A guest that is done writes to this I/O port, which takes its vCPU's thread to userspace."""
GPA_WIDTH: Final = 48
"""Four levels of tables."""

KERNEL: Final = Parameter("kernel", DEFAULT, "which kernel, with changes", check=read_kernel)
"""The parameter that nearly every scenario has; ``--kernel``, ``--with``, ``--without`` and ``--policy`` set it."""
VCPUS: Final = Parameter("vcpus", 1, "vCPUs that run", 1, 3)

#: A system call, ready to be made.
Call = Callable[[], Coroutine[Step, None, Any]]


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread of the VMM: its name, the system call that it makes, and on which CPU (-1: one of its own).

    ``returns`` are the results that the call may have; None: any.
    """

    name: str
    what: str
    call: Call
    cpu: int = -1
    returns: tuple[int, ...] | None = None

    async def run(self) -> Any:
        """Makes the call, and tells of it in the trace."""
        await step("call", self.what)
        emit("ioctl", self.what)
        result = await self.call()
        emit("return", f"{self.what} -> {show_result(result)}")
        expected = self.returns is None or result in self.returns
        require(expected, "no unexpected errno", f"{self.what} returns {show_result(result)}")
        return result


def show_result(result: object) -> str:
    """What a system call returned, as in strace."""
    return f"-{errorcode[-result]}" if isinstance(result, int) and -result in errorcode else f"{result}"


class Ends(Shared):
    """How many threads have come to their end."""

    count: int = 0


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
    """A machine, a small one unless told otherwise, with a VMM (``vmm``) whose TD has ``memory`` bytes, all private.

    ``kernel`` may be a text (:mod:`septum.lab.kernels`). vCPU n belongs to CPU n, where it was created. The first
    ``initialised`` of them are past KVM_TDX_INIT_VCPU. ``vm``, ``vcpus`` and ``gmem`` are file descriptors.
    """

    def __init__(
        self,
        kernel: Kernel | str,
        vcpus: int,
        *,
        initialised: int,
        memory: int = MEMORY,
        platform: Platform | None = None,
        features: frozenset[str] | None = None,
        sept_ve_disable: bool = True,
    ) -> None:
        """:param features: what the module can do beyond 1.5.01; None: what the kernel needs.
        :param sept_ve_disable: the TD's attribute: whether touching a page that is not accepted is no #VE, but the end.
        """
        self._attributes = SEPT_VE_DISABLE if sept_ve_disable else 0
        platform = platform or profile("small")
        module = None if features is None else Module(platform, features=features)
        self.host = Host(platform, read_kernel(kernel) if isinstance(kernel, str) else kernel, module=module)
        self.host.boot()
        self.pages_before = self.host.pages.in_use
        self.vmm = Process(self.host)
        self.memory = memory
        self.userspace_addr = self.vmm.mmap(memory)
        self.kvms: list[Vm] = []
        self.vm, init = self.new_vm()
        self.make(lambda: self.vmm.tdx_init_vm(self.vm, init))
        self.gmem = self._alone(0, self._add_memory)
        self.vcpus = [self._alone(cpu, self.create_vcpu(cpu)) for cpu in range(vcpus)]
        self.kvm = self.kvms[0]
        for index in range(initialised):
            self.make(self.init_vcpu(index), cpu=index)

    def new_vm(self) -> tuple[int, InitVm]:
        """A VM that is ready for KVM_TDX_INIT_VM, and what to tell that."""
        vm: int = self._alone(0, self.vmm.create_vm)
        file = self.vmm.files.peek(vm)
        assert file is not None
        self.kvms.append(file.private_data)
        self.make(lambda: self.vmm.enable_cap(vm, abi.KVM_CAP_SPLIT_IRQCHIP, 24))
        self.make(lambda: self.vmm.enable_cap(vm, abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_MAP_GPA_RANGE))
        caps = self._alone(0, lambda: self.vmm.tdx_capabilities(vm))
        assert isinstance(caps, Capabilities)
        init = caps.choose(self.host.module.hardware.cpu, gpa_width=GPA_WIDTH)
        return vm, replace(init, attributes=self._attributes)

    async def _add_memory(self) -> int:
        gmem = await self.vmm.create_guest_memfd(self.vm, self.memory)
        await self.vmm.set_user_memory_region2(self.vm, self._slot(gmem, self.memory))
        await self.vmm.set_memory_attributes(self.vm, 0, self.memory, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        return gmem

    def _slot(self, gmem: int, size: int) -> UserspaceMemoryRegion2:
        return UserspaceMemoryRegion2(
            slot=0,
            flags=abi.KVM_MEM_GUEST_MEMFD,
            memory_size=size,
            userspace_addr=self.userspace_addr,
            guest_memfd=gmem,
        )

    def script(self, index: int, script: Script) -> ScriptedGuest:
        """Gives a vCPU what it is to do; then it does I/O, which takes its thread to userspace."""

        async def life(vcpu: Vcpu) -> None:
            await script(vcpu)
            await vcpu.publish(True)
            await vcpu.io_write(DONE_PORT, 0, 1)

        guest = ScriptedGuest(life, f"guest{index}")
        self.vmm.attach_guest(self.vcpus[index], guest)
        return guest

    def _alone(self, cpu: int, call: Call) -> Any:
        """What a system call made on ``cpu`` returns, while nothing else happens."""
        return run_solo([Program(Task("setup", cpu=cpu), call), *self.host.interrupt_contexts()])[0]

    def make(self, call: Call, cpu: int = 0, *, fails: int = 0) -> None:
        """Makes a system call on ``cpu``, alone, which must return 0, or the errno that it ``fails`` with.

        :raises RuntimeError: when it does not: the scenario is wrong.
        """
        if (result := self._alone(cpu, call)) != fails:
            raise RuntimeError(f"the scenario cannot begin: a system call before it returned {result}")

    # -- system calls of the build -----------------------------------------------------------------------------------

    def init_vm(self) -> Call:
        """KVM_TDX_INIT_VM of another VM."""
        vm, init = self.new_vm()
        return lambda: self.vmm.tdx_init_vm(vm, init)

    def create_vcpu(self, vcpu_id: int) -> Call:
        """KVM_CREATE_VCPU: returns a file descriptor."""
        return lambda: self.vmm.create_vcpu(self.vm, vcpu_id)

    def create_and_init_vcpu(self, vcpu_id: int) -> Call:
        """KVM_CREATE_VCPU, and KVM_TDX_INIT_VCPU of what it made."""

        async def calls() -> int:
            vcpu = await self.vmm.create_vcpu(self.vm, vcpu_id)
            return vcpu if vcpu < 0 else await self.vmm.tdx_init_vcpu(vcpu)

        return calls

    def init_vcpu(self, index: int) -> Call:
        """KVM_TDX_INIT_VCPU."""
        return lambda: self.vmm.tdx_init_vcpu(self.vcpus[index])

    def init_mem_region(self, gpa: int, index: int = 0) -> Call:
        """KVM_TDX_INIT_MEM_REGION of one page, measured, through a vCPU."""
        source = self.vmm.mmap(PAGE_4K)
        self.vmm.write(source, b"\x90" * PAGE_4K)
        flags = abi.KVM_TDX_MEASURE_MEMORY_REGION
        return lambda: self.vmm.tdx_init_mem_region(self.vcpus[index], Region(source, gpa, 1), flags)

    def finalize(self) -> Call:
        """KVM_TDX_FINALIZE_VM."""
        return lambda: self.vmm.tdx_finalize_vm(self.vm)

    # -- system calls of a TD that runs ------------------------------------------------------------------------------

    def pre_fault(self, gpa: int, index: int = 0) -> Call:
        """KVM_PRE_FAULT_MEMORY of one page: it is mapped, pending, and the vCPU has the page tables of the VM."""
        return lambda: self.vmm.pre_fault_memory(self.vcpus[index], Region(0, gpa, 1))

    def punch_hole(self, gpa: int, pages: int = 1) -> Call:
        """``fallocate(FALLOC_FL_PUNCH_HOLE)`` of the pages behind ``gpa``."""
        mode = abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_KEEP_SIZE
        return lambda: self.vmm.fallocate(self.gmem, mode, gpa, pages * PAGE_4K)

    def allocate(self, gpa: int, pages: int = 1) -> Call:
        """``fallocate`` of the pages behind ``gpa``."""
        return lambda: self.vmm.fallocate(self.gmem, abi.FALLOC_FL_KEEP_SIZE, gpa, pages * PAGE_4K)

    def set_shared(self, gpa: int, pages: int = 1) -> Call:
        """KVM_SET_MEMORY_ATTRIBUTES of pages to shared."""
        return lambda: self.vmm.set_memory_attributes(self.vm, gpa, pages * PAGE_4K, 0)

    def convert(self, gpa: int, pages: int = 1, *, private: bool) -> Call:
        """KVM_SET_MEMORY_ATTRIBUTES, and what the pages were before is given back, as QEMU does it."""

        async def calls() -> int:
            attributes = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
            if r := await self.vmm.set_memory_attributes(self.vm, gpa, pages * PAGE_4K, attributes):
                return r
            give_back = self.drop_shared if private else self.punch_hole
            result: int = await give_back(gpa, pages)()
            return result

        return calls

    def drop_shared(self, gpa: int, pages: int = 1) -> Call:
        """``madvise(MADV_DONTNEED)`` of the shared pages behind ``gpa``: mmu notifiers tell KVM."""
        return lambda: self.vmm.madvise_dontneed(self.userspace_addr + gpa, pages * PAGE_4K)

    def delete_memslot(self) -> Call:
        """KVM_SET_USER_MEMORY_REGION2 with size 0."""
        return lambda: self.vmm.set_user_memory_region2(self.vm, self._slot(0, 0))

    def close(self, *fds: int) -> Call:
        """``close`` of file descriptors, one after the other."""

        async def calls() -> int:
            results = [await self.vmm.close(fd) for fd in fds]
            return next(filter(None, results), 0)

        return calls

    def cpu_down(self, cpu: int) -> Call:
        """A CPU goes offline (``/sys/devices/system/cpu/cpuN/online``)."""
        return lambda: cpu_down(self.host, cpu)

    def run_vcpu(self, index: int, script: Script, *, moves_to: Sequence[int] = ()) -> Call:
        """KVM_RUN, until the vCPU has come to the end of its ``script``, or KVM returns an error.

        Memory that the guest wants converted is converted. Each time that it does I/O, the thread moves to the next of
        the CPUs ``moves_to``. Any other exit to userspace means that the guest died.
        """
        guest, run = self.script(index, script), self.vmm.kvm_run(self.vcpus[index])

        async def until_done() -> int:
            result, cpus = 0, iter(moves_to)
            while not guest.finished:
                result = await self.vmm.run(self.vcpus[index])
                if result:
                    break
                if isinstance(run.exit, HypercallExit):
                    await self._map_gpa_range(run, run.exit)
                    continue
                alive = isinstance(run.exit, IoExit)
                require(alive, "the guest goes on", f"vCPU {index} left for userspace: {run.describe()}")
                if not guest.finished and (cpu := next(cpus, -1)) >= 0:
                    await step("move to CPU", cpu)
                    current_task().cpu = cpu
            return result

        return until_done

    async def _map_gpa_range(self, run: KvmRun, asked: HypercallExit) -> None:
        """KVM_HC_MAP_GPA_RANGE."""
        private = bool(asked.arg2 & abi.KVM_MAP_GPA_RANGE_ENCRYPTED)
        result = await self.convert(asked.arg0, asked.arg1, private=private)()
        run.exit = replace(asked, ret=EINVAL if result else 0)

    # -- the scenario ------------------------------------------------------------------------------------------------

    def thread(
        self, name: str, what: str, call: Call, *, cpu: int = -1, returns: tuple[int, ...] | None = None
    ) -> Thread:
        """A thread that makes one system call, called ``what`` in diagrams."""
        return Thread(name, what, call, cpu, returns)

    def nothing_left(self) -> None:
        """Every KeyID and every page is free again, for ``at_end`` of scenarios whose VMs all end."""
        keyids, pages = self.host.keyids_in_use(), self.host.pages.in_use - self.pages_before
        require(not keyids, "no KeyID is lost", f"all VMs have ended, but KeyIDs {keyids} are in use")
        require(not pages, "no page is lost", f"all VMs have ended, but {pages} pages are in use")

    def setting(
        self,
        threads: Sequence[Thread],
        *,
        built: bool,
        stays: bool = False,
        at_end: Invariant | None = None,
        cpus: Iterable[int] = (),
    ) -> Built:
        """A task for each thread, thread n on CPU n unless it says otherwise, the interrupts of their CPUs, of those
        where vCPUs are and of ``cpus``, and what must hold in every state, or (``at_end``) when all threads have ended.

        That mirror and Secure EPT agree is asked only of a TD that is ``built``: before, a page is added in several
        steps without ``mmu_lock``. From here on time stands still: a TSC that moves would make every order of events a
        state of its own.

        :param stays: whether TD and vCPUs are what they are: no SEAMCALL locks a TDR or TDVPR exclusively. The fewer
            locks can be busy, the fewer states there are; a wrong claim is a violation.
        """
        module, vms = self.host.module, lambda: self.kvms
        module.hardware.inputs.tsc_step = 0
        td = module.td(self.kvm.tdr_page)
        td.epoch_lock = OneFailure(module.locks, td.epoch_lock.key, td.epoch_lock.label)
        declare_always_shared(module.locks, self._always_shared(td, stays=stays))
        td.secure_ept_lock = OneFailure(module.locks, td.secure_ept_lock.key, td.secure_ept_lock.label)
        invariants = [no_bug(self.host, vms), *([mirror_agrees(vms)] if built else [])]
        places = [place if thread.cpu < 0 else thread.cpu for place, thread in enumerate(threads)]
        bodies: list[Call] = [thread.run for thread in threads]
        if at_end is not None:
            ends = Ends("ends")
            bodies = [partial(_counted, ends, body) for body in bodies]
            invariants.append(lambda: at_end() if ends.count == len(threads) else None)
        programs = [
            Program(Task(thread.name, cpu=cpu), body) for thread, cpu, body in zip(threads, places, bodies, strict=True)
        ]
        used = {*places, *cpus, *(vcpu.cpu for kvm in self.kvms for vcpu in kvm.vcpus)}
        contexts = self.host.interrupt_contexts()
        return Built(programs + [contexts[cpu] for cpu in sorted(used)], invariants, self.host)

    def _always_shared(self, td: Td, *, stays: bool) -> set[Any]:
        """The locks that only leaves for migration take exclusively, or for large pages, or for the life of the TD."""
        found: set[Any] = {td.op_state_lock.key}
        if not self.host.kernel.has("huge-pages"):
            found |= {
                pa | level
                for tdmr in self.host.platform.tdmrs
                for level in (Level.PD, Level.PDPT)
                for pa in range(tdmr.base, tdmr.base + tdmr.size, level_size(level))
            }
        if stays:
            found |= {td.pa, *(vcpu.tdvpr_page for vcpu in self.kvm.vcpus)}
        return found


async def _counted(ends: Ends, body: Call) -> Any:
    result = await body()
    ends.count += 1
    return result
