"""A userspace process that uses KVM: file descriptors, ioctls and its own memory.

Every call returns what the system call would: a file descriptor, 0, or a negative errno. The same calls with numbers
and structures in bytes: :mod:`septum.kvm.raw_ioctl`.
Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/x86.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from errno import EBADF, EFAULT, EIO, ENODEV, ENOMEM, ENOTTY
from typing import TYPE_CHECKING, Any, Final

from septum.core.cells import Fixed
from septum.core.klocks import AtomicSection
from septum.core.steps import Step, Task, current_task, step
from septum.kvm import abi
from septum.kvm.abi import CpuidEntry2, CreateGuestMemfd, MemoryAttributes, UserspaceMemoryRegion2
from septum.kvm.arguments import Capabilities, InitVm, Region
from septum.kvm.attributes import kvm_vm_ioctl_set_mem_attributes
from septum.kvm.cpuid import kvm_vcpu_ioctl_set_cpuid2
from septum.kvm.files import File, FileTable, fput, task_work_run
from septum.kvm.gmem import kvm_gmem_create, kvm_gmem_fallocate
from septum.kvm.lifetime import kvm_create_vm, kvm_vm_ioctl_create_vcpu, vcpu_load
from septum.kvm.memslots import kvm_vm_ioctl_set_memory_region
from septum.kvm.mmu.notifier import (
    kvm_mmu_notifier_invalidate_range_end,
    kvm_mmu_notifier_invalidate_range_start,
    kvm_mmu_notifier_release,
)
from septum.kvm.posted import kvm_send_userspace_msi
from septum.kvm.prefault import kvm_vcpu_pre_fault_memory
from septum.kvm.run import kvm_arch_vcpu_ioctl_run
from septum.kvm.tdx.cmd import Cmd
from septum.kvm.tdx.ioctl import is_unlocked_vcpu_ioctl, tdx_vcpu_ioctl, tdx_vcpu_unlocked_ioctl, tdx_vm_ioctl
from septum.kvm.user_memory import UserMemory
from septum.kvm.vm_caps import kvm_vm_ioctl_check_extension, kvm_vm_ioctl_enable_cap

if TYPE_CHECKING:
    from septum.kvm.guest_protocol import Guest
    from septum.kvm.host import Host
    from septum.kvm.run_struct import KvmRun
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm

KVM_FD: Final = 2
"""Stands for the process's open ``/dev/kvm``."""

#: An ioctl on what a file stands for.
Ioctl = Callable[[Any], Coroutine[Step, None, int]]


class Process(Fixed):
    """A process with ``/dev/kvm`` open. Its threads are the tasks that call these methods."""

    def __init__(self, host: Host, name: str = "vmm") -> None:
        self.host = host
        self.name = name
        self.mm = UserMemory(host, name)
        self.files = FileTable(name)

    # -- memory ------------------------------------------------------------------------------------------------------

    def mmap(self, size: int) -> int:
        """``mmap`` of anonymous memory: its address."""
        return self.mm.mmap(size)

    def write(self, address: int, data: bytes) -> int:
        """Stores into the process's memory: 0, or -EFAULT."""
        return 0 if self.mm.write(address, data) else -EFAULT

    def read(self, address: int, size: int) -> bytes | None:
        """Loads from the process's memory; None where nothing is mapped."""
        return self.mm.read(address, size)

    async def munmap(self, address: int, size: int) -> int:
        """``munmap`` of whole mappings. VMs that have the pages as shared memory let go of them first."""
        async with self.mm.mmap_lock.write():
            return await self._take_pages(address, size, self.mm.unmap)

    async def madvise_dontneed(self, address: int, size: int) -> int:
        """``madvise(MADV_DONTNEED)``: the pages go, the mapping stays."""
        if not self.mm.is_mapped(address, size):
            return -ENOMEM
        async with self.mm.mmap_lock.read():
            return await self._take_pages(address, size, self.mm.discard)

    async def oom_reap(self, address: int, size: int) -> int:
        """``__oom_reap_task_mm``: pages are taken by a thread that may not sleep while mmu notifiers run."""
        if not self.mm.is_mapped(address, size):
            return -ENOMEM
        async with self.mm.mmap_lock.read(), AtomicSection("non_block section"):
            return await self._take_pages(address, size, self.mm.discard, may_block=False)

    async def _take_pages(
        self, address: int, size: int, take: Callable[[int, int], None], *, may_block: bool = True
    ) -> int:
        vms = self.mm.space.vms
        for kvm in vms:
            await kvm_mmu_notifier_invalidate_range_start(kvm, address, address + size, may_block=may_block)
        take(address, address + size)
        for kvm in vms:
            await kvm_mmu_notifier_invalidate_range_end(kvm)
        return 0

    # -- VMs ---------------------------------------------------------------------------------------------------------

    async def create_vm(self, vm_type: int = abi.KVM_X86_TDX_VM) -> int:
        """KVM_CREATE_VM. Only TDX VMs are modelled: other types give -EINVAL."""
        return self._install(kvm_create_vm(self.host, self.mm, vm_type))

    async def check_extension(self, cap: int, fd: int = KVM_FD) -> int:
        """KVM_CHECK_EXTENSION on ``/dev/kvm`` or a VM."""
        if fd == KVM_FD:
            return kvm_vm_ioctl_check_extension(self.host, None, cap)

        async def check(kvm: Vm) -> int:
            return kvm_vm_ioctl_check_extension(self.host, kvm, cap)

        return await self._on_vm(fd, check)

    async def enable_cap(self, vm: int, cap: int, arg0: int = 0, *, flags: int = 0) -> int:
        """KVM_ENABLE_CAP on a VM."""
        return await self._on_vm(vm, lambda kvm: kvm_vm_ioctl_enable_cap(kvm, cap, flags, arg0))

    async def create_vcpu(self, vm: int, vcpu_id: int) -> int:
        """KVM_CREATE_VCPU."""

        async def create(kvm: Vm) -> int:
            return self._install(await kvm_vm_ioctl_create_vcpu(kvm, vcpu_id))

        return await self._on_vm(vm, create)

    async def create_guest_memfd(self, vm: int, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD."""

        async def create(kvm: Vm) -> int:
            return self._install(kvm_gmem_create(kvm, CreateGuestMemfd(size, flags)))

        return await self._on_vm(vm, create)

    async def set_user_memory_region2(self, vm: int, region: UserspaceMemoryRegion2) -> int:
        """KVM_SET_USER_MEMORY_REGION2."""
        lookup = lambda: self.files.get(region.guest_memfd)  # noqa: E731 -- fget, when the time comes
        return await self._on_vm(vm, lambda kvm: kvm_vm_ioctl_set_memory_region(kvm, region, lookup))

    async def set_memory_attributes(self, vm: int, address: int, size: int, attributes: int, *, flags: int = 0) -> int:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        attrs = MemoryAttributes(address, size, attributes, flags)
        return await self._on_vm(vm, lambda kvm: kvm_vm_ioctl_set_mem_attributes(kvm, attrs))

    async def signal_msi(self, vm: int, vcpu_id: int, vector: int) -> int:
        """KVM_SIGNAL_MSI: an interrupt for a vCPU; 1 when it was delivered."""
        return await self._on_vm(vm, lambda kvm: kvm_send_userspace_msi(kvm, vcpu_id, vector))

    # -- TDX ---------------------------------------------------------------------------------------------------------

    async def memory_encrypt_op(self, fd: int, cmd: Cmd) -> int:
        """KVM_MEMORY_ENCRYPT_OP on a VM or a vCPU. ``cmd.hw_error`` is an output."""

        async def on_vcpu(vcpu: Vcpu) -> int:
            if is_unlocked_vcpu_ioctl(vcpu.kvm, cmd):
                return await tdx_vcpu_unlocked_ioctl(vcpu, cmd)
            async with vcpu.mutex.locked(), vcpu_load(vcpu):
                return await tdx_vcpu_ioctl(vcpu, cmd)

        return await self._on_file(fd, {"vm": lambda kvm: tdx_vm_ioctl(kvm, cmd), "vcpu": on_vcpu})

    async def tdx_capabilities(self, vm: int, nent: int = abi.KVM_MAX_CPUID_ENTRIES) -> Capabilities | int:
        """KVM_TDX_CAPABILITIES: what it tells, or a negative errno."""
        buffer = Capabilities.buffer(nent)
        r = await self.memory_encrypt_op(vm, Cmd(abi.KVM_TDX_CAPABILITIES, data=buffer))
        return r if r < 0 else Capabilities.unpack(bytes(buffer))

    async def tdx_init_vm(self, vm: int, init: InitVm, cmd: Cmd | None = None) -> int:
        """KVM_TDX_INIT_VM. Give a command to learn its ``hw_error``."""
        cmd = cmd or Cmd(abi.KVM_TDX_INIT_VM)
        cmd.id, cmd.data = abi.KVM_TDX_INIT_VM, init.pack()
        return await self.memory_encrypt_op(vm, cmd)

    async def tdx_init_vcpu(self, vcpu: int, initial_rcx: int = 0) -> int:
        """KVM_TDX_INIT_VCPU. The guest finds ``initial_rcx`` in RCX and R8: the address of the TD HOB."""
        return await self.memory_encrypt_op(vcpu, Cmd(abi.KVM_TDX_INIT_VCPU, data=initial_rcx))

    async def tdx_init_mem_region(self, vcpu: int, region: Region, flags: int = 0) -> int:
        """KVM_TDX_INIT_MEM_REGION. ``region`` is advanced past what is done, also when it fails."""
        buffer = region.pack()
        r = await self.memory_encrypt_op(vcpu, Cmd(abi.KVM_TDX_INIT_MEM_REGION, flags, buffer))
        region.update(buffer)
        return r

    async def tdx_finalize_vm(self, vm: int, cmd: Cmd | None = None) -> int:
        """KVM_TDX_FINALIZE_VM. Give a command to learn its ``hw_error``."""
        return await self.memory_encrypt_op(vm, cmd or Cmd(abi.KVM_TDX_FINALIZE_VM))

    async def tdx_get_cpuid(self, vcpu: int, nent: int = abi.KVM_MAX_CPUID_ENTRIES) -> tuple[CpuidEntry2, ...] | int:
        """KVM_TDX_GET_CPUID: what the guest will see, or a negative errno."""
        buffer = abi.cpuid2_buffer(nent)
        r = await self.memory_encrypt_op(vcpu, Cmd(abi.KVM_TDX_GET_CPUID, data=buffer))
        return r if r < 0 else abi.unpack_cpuid2(bytes(buffer))

    # -- vCPUs -------------------------------------------------------------------------------------------------------

    async def run(self, vcpu: int) -> int:
        """KVM_RUN: 0 with an exit in :meth:`kvm_run`, or a negative errno."""
        return await self._on_vcpu(vcpu, kvm_arch_vcpu_ioctl_run)

    async def pre_fault_memory(self, vcpu: int, region: Region) -> int:
        """KVM_PRE_FAULT_MEMORY of ``region`` (its source counts for nothing), which is advanced past what is done."""
        return await self._on_vcpu(vcpu, lambda v: kvm_vcpu_pre_fault_memory(v, region))

    async def set_cpuid2(self, vcpu: int, entries: tuple[CpuidEntry2, ...]) -> int:
        """KVM_SET_CPUID2: what KVM answers to TDVMCALL<CPUID>."""
        return await self._on_vcpu(vcpu, lambda v: kvm_vcpu_ioctl_set_cpuid2(v, entries))

    def kvm_run(self, vcpu: int) -> KvmRun:
        """The vCPU's ``struct kvm_run``.

        :raises KeyError: when the descriptor is not a vCPU's.
        """
        return self.vcpu(vcpu).run

    def vcpu(self, fd: int) -> Vcpu:
        """The vCPU behind a descriptor, for reports.

        :raises KeyError: when there is none.
        """
        file = self.files.peek(fd)
        if file is None or file.kind != "vcpu":
            raise KeyError(f"file descriptor {fd} is no vCPU")
        vcpu: Vcpu = file.private_data
        return vcpu

    def attach_guest(self, vcpu: int, guest: Guest) -> None:
        """From now on the vCPU runs this guest. (In reality it is what the memory holds.)"""
        self.vcpu(vcpu).guest = guest

    # -- files -------------------------------------------------------------------------------------------------------

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        """``fallocate`` on a guest_memfd file."""
        return await self._on_file(fd, {"gmem": lambda gmem: kvm_gmem_fallocate(gmem, mode, offset, length)}, -ENODEV)

    async def close(self, fd: int) -> int:
        """``close``. What nobody holds any more is released before it returns."""
        r = self.files.close(self.host, fd)
        await task_work_run(self.host)
        return r

    async def exit(self) -> None:
        """The process ends: its memory goes, then its files, lowest descriptor first."""
        for kvm in self.mm.space.vms:
            await kvm_mmu_notifier_release(kvm)
        for start, end in self.mm.space.areas:
            self.mm.unmap(start, end)
        for fd in self.files.open_fds():
            await self.close(fd)

    def kill(self, task: Task | str, cpu: int = -1) -> None:
        """A signal becomes pending for one of the process's threads, given as a task or by its name.

        It wakes the thread if its vCPU is halted; if it runs on another CPU (of a task that is known, else ``cpu``), it
        leaves the guest (``kick_process``).
        """
        if isinstance(task, Task):
            cpu = task.cpu
            task = task.name
        self.host.signals[task] = True
        if cpu not in (-1, current_task().cpu):
            self.host.ipis.send(self.host.cpus[cpu], "ack_kick")

    def take_signal(self, task: Task | str) -> None:
        """The thread handles its signal."""
        self.host.signals.pop(task.name if isinstance(task, Task) else task, None)

    # -- system calls ------------------------------------------------------------------------------------------------

    def _install(self, file: File | int) -> int:
        return file if isinstance(file, int) else self.files.install(file)

    async def _on_file(self, fd: int, by_kind: dict[str, Ioctl], otherwise: int = -ENOTTY) -> int:
        """A system call on a descriptor, which cannot be closed under it. VMs that died answer -EIO."""
        file = self.files.get(fd)
        if file is None:
            return -EBADF
        call = by_kind.get(file.kind)
        r = otherwise if call is None else await self._guarded(file, call)
        fput(self.host, file)
        await task_work_run(self.host)
        return r

    async def _guarded(self, file: File, call: Ioctl) -> int:
        if file.kind in ("vm", "vcpu"):
            kvm: Vm = file.private_data if file.kind == "vm" else file.private_data.kvm
            await step("read", "vm_dead")
            if kvm.mm is not self.mm or kvm.vm_dead:
                return -EIO
        return await call(file.private_data)

    async def _on_vm(self, fd: int, call: Callable[[Vm], Coroutine[Step, None, int]]) -> int:
        return await self._on_file(fd, {"vm": call})

    async def _on_vcpu(self, fd: int, call: Callable[[Vcpu], Coroutine[Step, None, int]]) -> int:
        async def locked(vcpu: Vcpu) -> int:
            async with vcpu.mutex.locked():
                return await call(vcpu)

        return await self._on_file(fd, {"vcpu": locked})
