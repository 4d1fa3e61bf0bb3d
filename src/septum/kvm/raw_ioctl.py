"""``ioctl(2)`` with numbers and bytes, for programs that already speak the real interface.

The argument is the structure, as a bytearray that the kernel may write to, or a number where the real call takes one.
Pointers inside structures are addresses in the process's memory.
Source: ``include/uapi/linux/kvm.h`` of Linux 6.16.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from errno import EFAULT, EINVAL, ENOTTY
from typing import Final, TypeVar

from septum.arch.records import Record
from septum.core.steps import Step
from septum.kvm import abi
from septum.kvm.arguments import Region
from septum.kvm.process import Process
from septum.kvm.tdx.cmd import Cmd
from septum.kvm.tdx.ioctl import VM_COMMANDS

PAGE: Final = 4096
R = TypeVar("R", bound=Record)

Argument = int | bytearray
Handler = Callable[[Process, int, Argument], Coroutine[Step, None, int]]


async def ioctl(process: Process, fd: int, request: int, arg: Argument = 0) -> int:
    """``ioctl``: what the call returns; -ENOTTY for a request that is not modelled, -EFAULT for a short structure."""
    handler = _REQUESTS.get(request)
    if handler is None:
        return -ENOTTY
    size = request >> 16 & 0x3FFF
    if size and (isinstance(arg, int) or len(arg) < size):
        return -EFAULT
    return await handler(process, fd, arg)


def _get(record: type[R], arg: Argument) -> R:
    assert isinstance(arg, bytearray)
    return record.unpack(bytes(arg))


def _number(arg: Argument) -> int:
    return arg if isinstance(arg, int) else 0


async def _create_vm(process: Process, fd: int, arg: Argument) -> int:
    return await process.create_vm(_number(arg))


async def _check_extension(process: Process, fd: int, arg: Argument) -> int:
    return await process.check_extension(_number(arg), fd)


async def _create_vcpu(process: Process, fd: int, arg: Argument) -> int:
    return await process.create_vcpu(fd, _number(arg))


async def _run(process: Process, fd: int, arg: Argument) -> int:
    return -EINVAL if _number(arg) else await process.run(fd)


async def _enable_cap(process: Process, fd: int, arg: Argument) -> int:
    cap = _get(abi.EnableCap, arg)
    return await process.enable_cap(fd, cap.cap, cap.arg0, flags=cap.flags)


async def _set_user_memory_region2(process: Process, fd: int, arg: Argument) -> int:
    return await process.set_user_memory_region2(fd, _get(abi.UserspaceMemoryRegion2, arg))


async def _set_memory_attributes(process: Process, fd: int, arg: Argument) -> int:
    attrs = _get(abi.MemoryAttributes, arg)
    return await process.set_memory_attributes(fd, attrs.address, attrs.size_bytes, attrs.attributes, flags=attrs.flags)


async def _create_guest_memfd(process: Process, fd: int, arg: Argument) -> int:
    args = _get(abi.CreateGuestMemfd, arg)
    return await process.create_guest_memfd(fd, args.size_bytes, args.flags)


async def _signal_msi(process: Process, fd: int, arg: Argument) -> int:
    """The vCPU is the destination (bits 19:12) of the address, the vector the low byte of the data."""
    msi = _get(abi.Msi, arg)
    return await process.signal_msi(fd, msi.address_lo >> 12 & 0xFF, msi.data & 0xFF)


async def _pre_fault_memory(process: Process, fd: int, arg: Argument) -> int:
    """Address and size are advanced past what was done."""
    memory = _get(abi.PreFaultMemory, arg)
    assert isinstance(arg, bytearray)
    if memory.flags or memory.size_bytes % PAGE:
        return -EINVAL
    region = Region(0, memory.gpa, memory.size_bytes // PAGE)
    r = await process.pre_fault_memory(fd, region)
    arg[:] = abi.PreFaultMemory(region.gpa, region.nr_pages * PAGE, padding=memory.padding).pack()
    return r


async def _memory_encrypt_op(process: Process, fd: int, arg: Argument) -> int:
    """The command itself is larger than the size in the request's number. VM commands write it back."""
    assert isinstance(arg, bytearray)
    if len(arg) < abi.TdxCmd.size():
        return -EFAULT
    given = _get(abi.TdxCmd, arg)
    cmd = Cmd(given.id, given.flags, given.data, given.hw_error)
    r = await process.memory_encrypt_op(fd, cmd)
    if cmd.id in VM_COMMANDS:
        arg[: abi.TdxCmd.size()] = abi.TdxCmd(given.id, given.flags, given.data, cmd.hw_error).pack()
    return r


_REQUESTS: Final[Mapping[int, Handler]] = {
    abi.KVM_CREATE_VM: _create_vm,
    abi.KVM_CHECK_EXTENSION: _check_extension,
    abi.KVM_CREATE_VCPU: _create_vcpu,
    abi.KVM_RUN: _run,
    abi.KVM_ENABLE_CAP: _enable_cap,
    abi.KVM_SIGNAL_MSI: _signal_msi,
    abi.KVM_SET_USER_MEMORY_REGION2: _set_user_memory_region2,
    abi.KVM_SET_MEMORY_ATTRIBUTES: _set_memory_attributes,
    abi.KVM_CREATE_GUEST_MEMFD: _create_guest_memfd,
    abi.KVM_PRE_FAULT_MEMORY: _pre_fault_memory,
    abi.KVM_MEMORY_ENCRYPT_OP: _memory_encrypt_op,
}
