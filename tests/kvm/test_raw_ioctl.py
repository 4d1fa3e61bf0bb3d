"""ioctls by number and in bytes: structures, sizes, what is written back."""

from __future__ import annotations

import struct
from errno import E2BIG, EFAULT, EINVAL, ENOTTY
from typing import Any

from septum.arch.records import Record
from septum.arch.status import Status
from septum.kvm import abi
from septum.kvm.arguments import Capabilities
from septum.kvm.raw_ioctl import ioctl
from tests.kvm.machines import BUILT, MEMORY, Vmm

PAGE = 4096


def test_a_td_is_built_with_bytes_alone() -> None:
    vmm = Vmm()
    process = vmm.process

    async def encrypt_op(fd: int, command: int, flags: int = 0, data: int = 0) -> tuple[int, int]:
        cmd = bytearray(struct.pack("<IIQQ", command, flags, data, 0))
        r = await ioctl(process, fd, abi.KVM_MEMORY_ENCRYPT_OP, cmd)
        return r, struct.unpack_from("<Q", cmd, 16)[0]

    async def main() -> list[Any]:
        vm = await ioctl(process, 2, abi.KVM_CREATE_VM, abi.KVM_X86_TDX_VM)
        found: list[Any] = [await ioctl(process, vm, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_VM_TYPES)]

        buffer = process.mmap(8 * PAGE)
        process.write(buffer, bytes(Capabilities.buffer(256)))
        assert (await encrypt_op(vm, abi.KVM_TDX_CAPABILITIES, data=buffer))[0] == 0
        caps = Capabilities.unpack(process.read(buffer, 8 * PAGE) or b"")

        for cap, arg in ((abi.KVM_CAP_SPLIT_IRQCHIP, 24), (abi.KVM_CAP_EXIT_HYPERCALL, 1 << 12)):
            assert await ioctl(process, vm, abi.KVM_ENABLE_CAP, bytearray(abi.EnableCap(cap, 0, arg).pack())) == 0
        init = caps.choose(vmm.host.module.hardware.cpu).pack()
        process.write(buffer, bytes(init))
        assert await encrypt_op(vm, abi.KVM_TDX_INIT_VM, data=buffer) == (0, 0)

        vcpu = await ioctl(process, vm, abi.KVM_CREATE_VCPU, 0)
        assert (await encrypt_op(vcpu, abi.KVM_TDX_INIT_VCPU, data=0x80_9000))[0] == 0
        gmem = await ioctl(process, vm, abi.KVM_CREATE_GUEST_MEMFD, bytearray(struct.pack("<QQ48x", MEMORY, 0)))
        slot = struct.pack("<IIQQQQII112x", 0, 4, 0, MEMORY, process.mmap(MEMORY), 0, gmem, 0)
        assert await ioctl(process, vm, abi.KVM_SET_USER_MEMORY_REGION2, bytearray(slot)) == 0
        attributes = bytearray(struct.pack("<QQQQ", 0, MEMORY, abi.KVM_MEMORY_ATTRIBUTE_PRIVATE, 0))
        assert await ioctl(process, vm, abi.KVM_SET_MEMORY_ATTRIBUTES, attributes) == 0

        source = process.mmap(2 * PAGE)
        process.write(buffer, struct.pack("<QQQ", source, BUILT, 2))
        assert (await encrypt_op(vcpu, abi.KVM_TDX_INIT_MEM_REGION, 1, buffer))[0] == 0
        found.append(struct.unpack("<QQQ", process.read(buffer, 24) or b""))
        assert found[-1] == (source + 2 * PAGE, BUILT + 2 * PAGE, 0)
        assert await encrypt_op(vm, abi.KVM_TDX_FINALIZE_VM) == (0, 0)

        memory = bytearray(struct.pack("<QQQ40x", 0x10_0000, 2 * PAGE, 0))
        assert await ioctl(process, vcpu, abi.KVM_PRE_FAULT_MEMORY, memory) == 0
        found.append(struct.unpack_from("<QQ", memory))
        assert await ioctl(process, vm, abi.KVM_SIGNAL_MSI, bytearray(abi.Msi(0, 0, 0x33).pack())) == 1
        process.kvm_run(vcpu).immediate_exit = True
        found.append(await ioctl(process, vcpu, abi.KVM_RUN))
        return found

    types, _, prefaulted, ran = vmm.solo(main)
    assert types == 1 << abi.KVM_X86_TDX_VM
    assert prefaulted == (0x10_2000, 0)
    assert ran == -4


def test_misuse() -> None:
    vmm = Vmm()
    process = vmm.process

    async def main() -> list[int]:
        assert await vmm.build() == 0
        short = bytearray(8)
        bad = bytearray(struct.pack("<QQQ40x", 0, 100, 0))
        return [
            await ioctl(process, vmm.vm, 0xAE99),
            await ioctl(process, vmm.vm, abi.KVM_ENABLE_CAP, 5),
            await ioctl(process, vmm.vm, abi.KVM_SET_MEMORY_ATTRIBUTES, short),
            await ioctl(process, vmm.vm, abi.KVM_MEMORY_ENCRYPT_OP, short),
            await ioctl(process, vmm.vcpus[0], abi.KVM_RUN, 1),
            await ioctl(process, vmm.vcpus[0], abi.KVM_PRE_FAULT_MEMORY, bad),
        ]

    assert vmm.solo(main) == [-ENOTTY, -EFAULT, -EFAULT, -EFAULT, -EINVAL, -EINVAL]


def test_hw_error_is_written_back() -> None:
    """And only by the commands of the VM; the number of entries that CAPABILITIES needs is not (6.16)."""
    vmm = Vmm()
    process = vmm.process

    async def main() -> tuple[int, int, int]:
        assert await vmm.init() == 0
        assert await vmm.add_vcpus(1) == 0
        buffer = process.mmap(PAGE)
        process.write(buffer, bytes(Capabilities.buffer(3)))
        cmd = bytearray(struct.pack("<IIQQ", abi.KVM_TDX_CAPABILITIES, 0, buffer, 0))
        too_small = await ioctl(process, vmm.vm, abi.KVM_MEMORY_ENCRYPT_OP, cmd)
        vmm.host.module.locks[vmm.kvm.tdr_page] = 4
        cmd = bytearray(struct.pack("<IIQQ", abi.KVM_TDX_FINALIZE_VM, 0, 0, 0))
        busy = await ioctl(process, vmm.vm, abi.KVM_MEMORY_ENCRYPT_OP, cmd)
        return too_small, busy, struct.unpack_from("<Q", cmd, 16)[0]

    too_small, busy, hw_error = vmm.solo(main)
    assert (too_small, busy) == (-E2BIG, -16)
    assert hw_error >> 32 == Status.TDX_OPERAND_BUSY >> 32


def test_sizes_are_those_of_the_interface() -> None:
    sizes: dict[type[Record], int] = {
        abi.TdxCmd: 24,
        abi.TdxCapabilities: 2056,
        abi.TdxInitVm: 264,
        abi.CpuidEntry2: 40,
        abi.TdxInitMemRegion: 24,
        abi.CreateGuestMemfd: 64,
        abi.UserspaceMemoryRegion2: 160,
        abi.MemoryAttributes: 32,
        abi.PreFaultMemory: 64,
        abi.EnableCap: 104,
        abi.Msi: 32,
    }
    assert {record: record.size() for record in sizes} == sizes
