"""A VMM that does what QEMU does: builds a TD through KVM's ioctls, runs its vCPUs, converts memory, ends.

The order of the calls is QEMU's. What fails ends the VM, as it ends QEMU, with a line that tells which call failed.

Sources: QEMU 10.1 target/i386/kvm/tdx.c (tdx_pre_create_vcpu, tdx_finalize_vm), accel/kvm/kvm-all.c (kvm_cpu_exec,
kvm_convert_memory), hw/acpi/core.c (acpi_pm1_cnt_write).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from septum.arch.pages import PAGE_4K
from septum.core.cells import Fixed, Shared
from septum.core.steps import Program, Task, emit, wait_until
from septum.guest.scripts import POWER_OFF, POWER_OFF_PORT
from septum.kvm import abi
from septum.kvm.abi import UserspaceMemoryRegion2
from septum.kvm.arguments import Region
from septum.kvm.process import Process
from septum.kvm.run_struct import (
    HypercallExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    TdxInfoExit,
    TdxNotifyExit,
    TdxQuoteExit,
)
from septum.vmm.hob import build_td_hob, td_hob_section
from septum.vmm.sections import Section, SectionType

if TYPE_CHECKING:
    from septum.kvm.guest_protocol import Guest
    from septum.kvm.host import Host
    from septum.kvm.run_struct import KvmRun
    from septum.tdx.state.td import Td
    from septum.vmm.layout import MemoryLayout, Range
    from septum.vmm.tdvf import TdvfImage

IRQCHIP_PINS: Final = 24
GPA_WIDTH: Final = 52
INIT_VM_ATTEMPTS: Final = 10
"""How often KVM_TDX_INIT_VM is called while it returns -EAGAIN (no entropy). QEMU's own number is unverified."""
_ALL_ONES: Final = (1 << 64) - 1


class Refused(Exception):
    """A system call that the VMM cannot do without failed."""

    def __init__(self, call: str, result: int) -> None:
        super().__init__(f"{call} returned {show_errno(result)}")


def show_errno(result: int) -> str:
    """What a system call returned: ``0``, a number, or ``-EBUSY``."""
    return f"-{errno.errorcode.get(-result, -result)}" if result < 0 else str(result)


@dataclass(frozen=True, slots=True)
class Slot:
    """A range of guest memory: its private pages in a guest_memfd, its shared ones in the VMM's memory."""

    memory: Range
    gmem: int
    userspace_addr: int


class VmState(Shared):
    """What the VMM's threads tell each other.

    ``vm``, ``vcpus`` and ``slots`` are there once the TD can run. ``reason`` is why the VM ends; it is empty while it
    does not. ``ended`` counts vCPU threads.
    """

    vm: int = -1
    vcpus: tuple[int, ...] = ()
    slots: tuple[Slot, ...] = ()
    reason: str = ""
    ended: int = 0


class Qemu(Fixed):
    """One VM: ``programs`` are its threads. ``phase`` is called at the beginning of each part of its life."""

    def __init__(
        self,
        host: Host,
        image: TdvfImage,
        layout: MemoryLayout,
        guests: Sequence[Guest],
        *,
        attributes: int = 0,
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.host = host
        self.process = Process(host, "qemu")
        self.state = VmState("qemu")
        self.td: Td | None = None
        """The TD, once it is built."""
        self._image = image
        self._layout = layout
        self._guests = guests
        self._attributes = attributes
        self._phase = phase

    def programs(self) -> list[Program]:
        """The main thread, and a thread for each vCPU, on a CPU of its own."""
        threads = [
            Program(Task(self._thread_name(i), cpu=i), partial(self._vcpu_thread, i)) for i in range(len(self._guests))
        ]
        return [Program(Task("qemu", cpu=0), self._main), *threads]

    @staticmethod
    def _thread_name(index: int) -> str:
        return f"CPU {index}/KVM"

    async def _main(self) -> None:
        try:
            await self._build()
        except Refused as refused:
            self._end(str(refused))
        state, threads = self.state, len(self._guests)
        await wait_until(lambda: state.ended == threads, "join the vCPU threads of", self.state)
        self._phase("destroy")
        await self.process.exit()

    def _end(self, reason: str) -> None:
        """The VM ends; the first reason counts."""
        if self.state.reason:
            return
        self.state.reason = reason
        emit("vmm", f"the VM ends: {reason}")
        for i in range(len(self._guests)):
            self.process.kill(self._thread_name(i), i)

    # -- building ----------------------------------------------------------------------------------------------------

    async def _build(self) -> None:
        """From an open ``/dev/kvm`` to a TD that can run."""
        self._phase("create")
        vm = await self._create_vm()
        self._phase("vcpus")
        vcpus = [_fd("KVM_CREATE_VCPU", await self.process.create_vcpu(vm, i)) for i in range(len(self._guests))]
        hob = td_hob_section(self._image.sections)
        for vcpu, guest in zip(vcpus, self._guests, strict=True):
            _ok("KVM_TDX_INIT_VCPU", await self.process.tdx_init_vcpu(vcpu, hob.memory_address if hob else 0))
            cpuid = await self.process.tdx_get_cpuid(vcpu)
            if isinstance(cpuid, int):
                raise Refused("KVM_TDX_GET_CPUID", cpuid)
            _ok("KVM_SET_CPUID2", await self.process.set_cpuid2(vcpu, cpuid))
            self.process.attach_guest(vcpu, guest)
        slots = await self._add_memory(vm)
        self._phase("measure")
        for section in self._image.sections:
            if section.added:
                await self._add_section(vcpus[0], section)
        self._phase("finalize")
        _ok("KVM_TDX_FINALIZE_VM", await self.process.tdx_finalize_vm(vm))
        self.td = self.host.module.td(self.process.vcpu(vcpus[0]).kvm.tdr_page)
        self._phase("run")
        self.state.vm, self.state.slots, self.state.vcpus = vm, slots, tuple(vcpus)

    async def _create_vm(self) -> int:
        qemu = self.process
        types = await qemu.check_extension(abi.KVM_CAP_VM_TYPES)
        if not types >> abi.KVM_X86_TDX_VM & 1:
            raise Refused("KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES)", types)
        vm = _fd("KVM_CREATE_VM", await qemu.create_vm(abi.KVM_X86_TDX_VM))
        caps = await qemu.tdx_capabilities(vm)
        if isinstance(caps, int):
            raise Refused("KVM_TDX_CAPABILITIES", caps)
        for cap, value in (
            (abi.KVM_CAP_MAX_VCPUS, len(self._guests)),
            (abi.KVM_CAP_SPLIT_IRQCHIP, IRQCHIP_PINS),
            (abi.KVM_CAP_EXIT_HYPERCALL, 1 << abi.KVM_HC_MAP_GPA_RANGE),
        ):
            _ok("KVM_ENABLE_CAP", await qemu.enable_cap(vm, cap, value))
        chosen = caps.choose(self.host.module.hardware.cpu, gpa_width=GPA_WIDTH)
        init = replace(chosen, attributes=chosen.attributes & self._attributes)
        result = -errno.EAGAIN
        for _ in range(INIT_VM_ATTEMPTS):
            result = await qemu.tdx_init_vm(vm, init)
            if result != -errno.EAGAIN:
                break
        _ok("KVM_TDX_INIT_VM", result)
        return vm

    async def _add_memory(self, vm: int) -> tuple[Slot, ...]:
        """A memslot for each part of the layout, all of it private at first."""
        slots = []
        for number, memory in enumerate((*self._layout.ram, self._layout.firmware)):
            size = memory.end - memory.start
            gmem = _fd("KVM_CREATE_GUEST_MEMFD", await self.process.create_guest_memfd(vm, size))
            address = self.process.mmap(size)
            region = UserspaceMemoryRegion2(
                slot=number,
                flags=abi.KVM_MEM_GUEST_MEMFD,
                guest_phys_addr=memory.start,
                memory_size=size,
                userspace_addr=address,
                guest_memfd=gmem,
            )
            _ok("KVM_SET_USER_MEMORY_REGION2", await self.process.set_user_memory_region2(vm, region))
            private = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE
            r = await self.process.set_memory_attributes(vm, memory.start, size, private)
            _ok("KVM_SET_MEMORY_ATTRIBUTES", r)
            slots.append(Slot(memory, gmem, address))
        return tuple(slots)

    async def _add_section(self, vcpu: int, section: Section) -> None:
        """Adds the pages of a section, from a copy that is thrown away afterwards."""
        size = section.memory_data_size
        source = self.process.mmap(size)
        data = self._image.raw(section)
        if section.type is SectionType.TD_HOB:
            ram = self._layout.ram
            data = build_td_hob(self._image.sections, sum(r.end - r.start for r in ram), self._image.name)
        _ok("writing to the VMM's own memory", self.process.write(source, data))
        region = Region(source, section.memory_address, size // PAGE_4K)
        flags = abi.KVM_TDX_MEASURE_MEMORY_REGION if section.measured else 0
        while (r := await self.process.tdx_init_mem_region(vcpu, region, flags)) in (-errno.EAGAIN, -errno.EINTR):
            pass
        _ok("KVM_TDX_INIT_MEM_REGION", r)
        await self.process.munmap(source, size)

    # -- running -------------------------------------------------------------------------------------------------------

    async def _vcpu_thread(self, index: int) -> None:
        """``kvm_vcpu_thread_fn``: KVM_RUN again and again, and what its exits ask for."""
        state = self.state
        await wait_until(lambda: bool(state.vcpus or state.reason), "run a vCPU of", state)
        while not state.reason:
            result = await self.process.run(state.vcpus[index])
            run = self.process.kvm_run(state.vcpus[index])
            if result in (-errno.EINTR, -errno.EAGAIN):
                self.process.take_signal(self._thread_name(index))
            elif run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT and result == -errno.EFAULT:
                fault = run.exit
                assert isinstance(fault, MemoryFaultExit)
                private = bool(fault.flags & abi.KVM_MEMORY_EXIT_FLAG_PRIVATE)
                if result := await self._convert(fault.gpa, fault.size_bytes, private=private):
                    self._end(f"memory fault at {fault.gpa:#x}: converting it returned {show_errno(result)}")
            elif result < 0:
                self._end(f"KVM_RUN returned {show_errno(result)}")
            else:
                await self._serve(index, run)
        state.ended += 1

    async def _serve(self, index: int, run: KvmRun) -> None:
        """Does what an exit asks for, so that the next KVM_RUN can go on."""
        details = run.exit
        if isinstance(details, HypercallExit) and details.nr == abi.KVM_HC_MAP_GPA_RANGE:
            private = bool(details.arg2 & abi.KVM_MAP_GPA_RANGE_ENCRYPTED)
            r = await self._convert(details.arg0, details.arg1 * PAGE_4K, private=private)
            run.exit = replace(details, ret=-r)
        elif isinstance(details, IoExit):
            if not details.direction:
                run.pio_data = _ALL_ONES
            elif details.port == POWER_OFF_PORT and run.pio_data & POWER_OFF:
                self._end("power off")
        elif isinstance(details, MmioExit):
            run.exit = replace(details, data=_ALL_ONES.to_bytes(8, "little"))
        elif isinstance(details, TdxInfoExit):
            run.exit = replace(details, ret=abi.TDVMCALL_STATUS_SUCCESS)
        elif isinstance(details, TdxQuoteExit | TdxNotifyExit):
            run.exit = replace(details, ret=abi.TDVMCALL_STATUS_SUBFUNC_UNSUPPORTED)
        else:
            self._end(f"vCPU {index}: {run.describe()}")

    async def _convert(self, gpa: int, size: int, *, private: bool) -> int:
        """``kvm_convert_memory``: makes memory private or shared, and gives back what it was before. 0, or an errno."""
        state = self.state
        slot = next((s for s in state.slots if s.memory.start <= gpa and gpa + size <= s.memory.end), None)
        if slot is None:
            return -errno.EINVAL
        attributes = abi.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        if r := await self.process.set_memory_attributes(state.vm, gpa, size, attributes):
            return r
        offset = gpa - slot.memory.start
        if private:
            return await self.process.madvise_dontneed(slot.userspace_addr + offset, size)
        mode = abi.FALLOC_FL_PUNCH_HOLE | abi.FALLOC_FL_KEEP_SIZE
        return await self.process.fallocate(slot.gmem, mode, offset, size)


def _ok(call: str, result: int) -> None:
    """:raises Refused: unless a system call returned 0."""
    if result:
        raise Refused(call, result)


def _fd(call: str, result: int) -> int:
    """The file descriptor that a system call returned.

    :raises Refused: when it returned an errno.
    """
    if result < 0:
        raise Refused(call, result)
    return result
