"""What every ioctl answers to wrong use: the table of KVM's userspace interface for Linux 6.16."""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from errno import (
    E2BIG,
    EAGAIN,
    EBADF,
    EBUSY,
    EEXIST,
    EFAULT,
    EINTR,
    EINVAL,
    EIO,
    ENODEV,
    ENOENT,
    ENOSPC,
    ENOTTY,
    EOPNOTSUPP,
)
from typing import Any

import pytest

from septum.arch.status import Status
from septum.core.steps import Violation
from septum.kvm import abi
from septum.kvm.abi import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, CpuidEntry2
from septum.kvm.arguments import Capabilities, InitVm, Region
from septum.kvm.kernel import Kernel
from septum.kvm.process import Process
from septum.kvm.run_struct import MemoryFaultExit
from septum.kvm.tdx.cmd import Cmd
from tests.kvm.machines import BUILT, MEMORY, Vmm

PAGE = 4096
Call = Callable[[Vmm], Coroutine[Any, Any, int]]


def check(kernel: Kernel | None, state: str, call: Call) -> int:
    """The answer of ``call`` on a TD in some state of its life."""
    vmm = Vmm(kernel)

    async def main() -> int:
        stages: dict[str, Call] = {
            "nothing": _zero,
            "created": _create,
            "initialised": lambda v: v.init(),
            "with vcpu": lambda v: _then(v.init(), lambda: v.add_vcpus(1)),
            "with memory": lambda v: _then(v.init(), lambda: v.add_vcpus(1), v.add_memory),
            "runnable": lambda v: v.build(),
        }
        assert await stages[state](vmm) == 0
        return await call(vmm)

    result = vmm.solo(main)
    assert isinstance(result, int)
    return result


async def _zero(vmm: Vmm) -> int:
    return 0


async def _create(vmm: Vmm) -> int:
    vmm.vm = await vmm.process.create_vm()
    return min(vmm.vm, 0)


async def _then(first: Coroutine[Any, Any, int], *more: Callable[[], Coroutine[Any, Any, int]]) -> int:
    r = await first
    for call in more:
        r = r or await call()
    return r


async def _vcpu_only(vmm: Vmm) -> int:
    """KVM_CREATE_VCPU without KVM_TDX_INIT_VCPU."""
    vmm.vcpus.append(await vmm.process.create_vcpu(vmm.vm, 0))
    return vmm.vcpus[0]


# -- VM ----------------------------------------------------------------------------------------------------------------


async def init_vm(vmm: Vmm, **changes: Any) -> int:
    """KVM_TDX_INIT_VM with some fields changed."""
    return await vmm.process.tdx_init_vm(vmm.vm, replace(await vmm.default(), **changes))


async def init_vm_raw(vmm: Vmm, offset: int, value: int, *, size: int = 0) -> int:
    """KVM_TDX_INIT_VM with a byte changed, or the structure cut."""
    data = (await vmm.default()).pack()
    data[offset] = value
    return await vmm.process.memory_encrypt_op(vmm.vm, Cmd(abi.KVM_TDX_INIT_VM, data=data[: size or len(data)]))


async def init_vm_width(vmm: Vmm, width: int) -> int:
    caps = await vmm.process.tdx_capabilities(vmm.vm)
    assert isinstance(caps, Capabilities)
    return await vmm.process.tdx_init_vm(vmm.vm, caps.choose(vmm.host.module.hardware.cpu, gpa_width=width))


async def op(fd: int, vmm: Vmm, cmd: Cmd) -> int:
    return await vmm.process.memory_encrypt_op(fd, cmd)


async def init_vm_without_cpus(vmm: Vmm) -> int:
    """One package has no CPU online."""
    vmm.host.cpus[2].online = vmm.host.cpus[3].online = False
    return await init_vm(vmm)


async def init_vm_without_keyids(vmm: Vmm) -> int:
    vmm.host.state.keyids = (1 << 64) - 1
    return await init_vm(vmm)


async def init_vm_without_entropy(vmm: Vmm) -> int:
    """-EAGAIN, and the same call succeeds when there is entropy again."""
    inputs = vmm.host.module.hardware.inputs
    inputs.entropy_exhausted = True
    r = await init_vm(vmm)
    inputs.entropy_exhausted = False
    assert await init_vm(vmm) == 0
    return r


VM_CALLS: dict[str, tuple[str, Call, int]] = {
    "CAPABILITIES with flags": ("created", lambda v: op(v.vm, v, Cmd(0, 1, Capabilities.buffer(20))), -EINVAL),
    "CAPABILITIES without room": ("created", lambda v: op(v.vm, v, Cmd(0, 0, Capabilities.buffer(11))), -E2BIG),
    "CAPABILITIES at a bad address": ("created", lambda v: op(v.vm, v, Cmd(0, 0, 0x1000)), -EFAULT),
    "CAPABILITIES": ("created", lambda v: op(v.vm, v, Cmd(0, 0, Capabilities.buffer(12))), 0),
    "hw_error is given": ("created", lambda v: op(v.vm, v, Cmd(0, 0, Capabilities.buffer(20), 1)), -EINVAL),
    "unknown sub-command": ("created", lambda v: op(v.vm, v, Cmd(99)), -EINVAL),
    "vCPU's sub-command on the VM": ("created", lambda v: op(v.vm, v, Cmd(abi.KVM_TDX_INIT_VCPU)), -EINVAL),
    "INIT_VM": ("created", init_vm, 0),
    "INIT_VM twice": ("initialised", init_vm, -EINVAL),
    "INIT_VM with flags": ("created", lambda v: op(v.vm, v, Cmd(abi.KVM_TDX_INIT_VM, 1, InitVm().pack())), -EINVAL),
    "INIT_VM at a bad address": ("created", lambda v: op(v.vm, v, Cmd(abi.KVM_TDX_INIT_VM, 0, 0x5000)), -EFAULT),
    "INIT_VM cut in the entries": ("created", lambda v: init_vm_raw(v, 0, 0, size=300), -EFAULT),
    "INIT_VM with reserved bytes": ("created", lambda v: init_vm_raw(v, 160, 1), -EINVAL),
    "INIT_VM with padding": ("created", lambda v: init_vm_raw(v, 260, 1), -EINVAL),
    "INIT_VM with 65,000 entries": ("created", lambda v: init_vm_raw(v, 258, 1), -E2BIG),
    "INIT_VM with an attribute": ("created", lambda v: init_vm(v, attributes=1 << 30), -EINVAL),
    "INIT_VM with a feature": ("created", lambda v: init_vm(v, xfam=1 << 62), -EINVAL),
    "INIT_VM with a fixed feature only": ("created", lambda v: init_vm(v, xfam=3), 0),
    "INIT_VM with 48 bits": ("created", lambda v: init_vm_width(v, 48), 0),
    "INIT_VM with 49 bits": ("created", lambda v: init_vm_width(v, 49), -EINVAL),
    "INIT_VM without a width": ("created", lambda v: init_vm(v, cpuid=()), -EINVAL),
    "INIT_VM with an unknown leaf": ("created", lambda v: _extra_leaf(v, CpuidEntry2(0x4000_0000)), -EINVAL),
    "INIT_VM with TSX": ("created", lambda v: _extra_leaf(v, CpuidEntry2(7, 0, 1, 0, 1 << 4)), -EINVAL),
    "INIT_VM without CPUs": ("created", init_vm_without_cpus, -EIO),
    "INIT_VM without KeyIDs": ("created", init_vm_without_keyids, -ENOSPC),
    "INIT_VM without entropy": ("created", init_vm_without_entropy, -EAGAIN),
    "FINALIZE before INIT_VM": ("created", lambda v: v.process.tdx_finalize_vm(v.vm), -EINVAL),
    "FINALIZE twice": ("runnable", lambda v: v.process.tdx_finalize_vm(v.vm), -EINVAL),
    "CREATE_VCPU before INIT_VM": ("created", lambda v: v.process.create_vcpu(v.vm, 0), -EIO),
    "CREATE_VCPU after FINALIZE": ("runnable", lambda v: v.process.create_vcpu(v.vm, 1), -EIO),
    "CREATE_VCPU with a wild id": ("initialised", lambda v: v.process.create_vcpu(v.vm, 5000), -EINVAL),
    "ENABLE_CAP with flags": ("created", lambda v: v.process.enable_cap(v.vm, 121, 24, flags=1), -EINVAL),
    "ENABLE_CAP of another": ("created", lambda v: v.process.enable_cap(v.vm, 1), -EINVAL),
    "ENABLE_CAP of other hypercalls": ("created", lambda v: v.process.enable_cap(v.vm, 201, 1 << 5), -EINVAL),
    "SPLIT_IRQCHIP twice": ("initialised", lambda v: v.process.enable_cap(v.vm, 121, 24), -EEXIST),
    "SPLIT_IRQCHIP with many pins": ("created", lambda v: v.process.enable_cap(v.vm, 121, 5000), -EINVAL),
    "MAX_VCPUS": ("created", lambda v: v.process.enable_cap(v.vm, 66, 2), 0),
    "MAX_VCPUS of more than the host has": ("created", lambda v: v.process.enable_cap(v.vm, 66, 5), -EINVAL),
    "other VM types": ("nothing", lambda v: v.process.create_vm(0), -EINVAL),
    "no such descriptor": ("nothing", lambda v: v.process.create_vcpu(77, 0), -EBADF),
    "close of no descriptor": ("nothing", lambda v: v.process.close(77), -EBADF),
    "VM's ioctl on a vCPU": ("with vcpu", lambda v: v.process.create_vcpu(v.vcpus[0], 1), -ENOTTY),
    "vCPU's ioctl on a VM": ("with vcpu", lambda v: v.process.run(v.vm), -ENOTTY),
    "ENCRYPT_OP on guest_memfd": ("with memory", lambda v: op(v.gmem, v, Cmd(0)), -ENOTTY),
    "fallocate on a VM": ("created", lambda v: v.process.fallocate(v.vm, 3, 0, PAGE), -ENODEV),
    "MSI without a vector": ("with vcpu", lambda v: v.process.signal_msi(v.vm, 0, 3), -EINVAL),
    "MSI to nobody": ("with vcpu", lambda v: v.process.signal_msi(v.vm, 9, 32), 0),
    "MSI": ("with vcpu", lambda v: v.process.signal_msi(v.vm, 0, 32), 1),
}


async def _extra_leaf(vmm: Vmm, entry: CpuidEntry2) -> int:
    """One leaf more, or, where it is configurable, another value of it."""
    cpuid = (await vmm.default()).cpuid
    kept = tuple(e for e in cpuid if (e.function, e.index) != (entry.function, entry.index))
    return await init_vm(vmm, cpuid=(*kept, entry))


@pytest.mark.parametrize("case", VM_CALLS)
def test_vm_ioctls(case: str) -> None:
    state, call, expected = VM_CALLS[case]
    assert check(None, state, call) == expected


# -- vCPU --------------------------------------------------------------------------------------------------------------


async def init_vcpu(vmm: Vmm, flags: int = 0) -> int:
    return await op(vmm.vcpus[0], vmm, Cmd(abi.KVM_TDX_INIT_VCPU, flags))


async def on_new_vcpu(vmm: Vmm, call: Callable[[int], Coroutine[Any, Any, int]]) -> int:
    return await call(await _vcpu_only(vmm))


async def get_cpuid(vmm: Vmm, nent: int) -> int:
    return await op(vmm.vcpus[0], vmm, Cmd(abi.KVM_TDX_GET_CPUID, data=abi.cpuid2_buffer(nent)))


async def prefault(vmm: Vmm, gpa: int, pages: int = 1) -> int:
    return await vmm.process.pre_fault_memory(vmm.vcpus[0], Region(0, gpa, pages))


async def interrupted(vmm: Vmm, call: Coroutine[Any, Any, int]) -> int:
    vmm.process.kill("vmm")
    r = await call
    vmm.process.take_signal("vmm")
    return r


async def immediate_exit(vmm: Vmm) -> int:
    vmm.process.kvm_run(vmm.vcpus[0]).immediate_exit = True
    return await vmm.process.run(vmm.vcpus[0])


VCPU_CALLS: dict[str, tuple[str, Call, int]] = {
    "INIT_VCPU": ("initialised", lambda v: on_new_vcpu(v, lambda fd: init_vcpu(v)), 0),
    "INIT_VCPU with flags": ("initialised", lambda v: on_new_vcpu(v, lambda fd: init_vcpu(v, 1)), -EINVAL),
    "INIT_VCPU twice": ("with vcpu", init_vcpu, -EINVAL),
    "INIT_VCPU after FINALIZE": ("runnable", init_vcpu, -EINVAL),
    "unknown sub-command": ("with vcpu", lambda v: op(v.vcpus[0], v, Cmd(99)), -EINVAL),
    "hw_error is given": ("with vcpu", lambda v: op(v.vcpus[0], v, Cmd(2, hw_error=1)), -EINVAL),
    "GET_CPUID": ("with vcpu", lambda v: get_cpuid(v, 256), 0),
    "GET_CPUID without room": ("with vcpu", lambda v: get_cpuid(v, 3), -E2BIG),
    "GET_CPUID at a bad address": ("with vcpu", lambda v: op(v.vcpus[0], v, Cmd(5, data=0x1000)), -EFAULT),
    "GET_CPUID after FINALIZE": ("runnable", lambda v: get_cpuid(v, 256), -EINVAL),
    "RUN before INIT_VCPU": ("initialised", lambda v: on_new_vcpu(v, v.process.run), -EINVAL),
    "RUN before FINALIZE": ("with vcpu", lambda v: v.process.run(v.vcpus[0]), -EINVAL),
    "RUN with immediate_exit": ("runnable", immediate_exit, -EINTR),
    "PRE_FAULT before FINALIZE": ("with memory", lambda v: prefault(v, 0), -EOPNOTSUPP),
    "PRE_FAULT": ("runnable", lambda v: prefault(v, 0x10_0000, 3), 0),
    "PRE_FAULT of what is there": ("runnable", lambda v: prefault(v, BUILT), 0),
    "PRE_FAULT at an odd address": ("runnable", lambda v: prefault(v, 1), -EINVAL),
    "PRE_FAULT of nothing": ("runnable", lambda v: prefault(v, 0, 0), -EINVAL),
    "PRE_FAULT of a shared address": ("runnable", lambda v: prefault(v, 1 << 51), -EINVAL),
    "PRE_FAULT where no slot is": ("runnable", lambda v: prefault(v, MEMORY), -ENOENT),
    "PRE_FAULT beyond the slot": ("runnable", lambda v: prefault(v, MEMORY - PAGE, 2), 0),
    "PRE_FAULT with a signal": ("runnable", lambda v: interrupted(v, prefault(v, 0)), -EINTR),
    "SET_CPUID2": ("with vcpu", lambda v: v.process.set_cpuid2(v.vcpus[0], (CpuidEntry2(1),)), 0),
    "SET_CPUID2 of too many": (
        "with vcpu",
        lambda v: v.process.set_cpuid2(v.vcpus[0], (CpuidEntry2(1),) * 257),
        -E2BIG,
    ),
}


@pytest.mark.parametrize("case", VCPU_CALLS)
def test_vcpu_ioctls(case: str) -> None:
    state, call, expected = VCPU_CALLS[case]
    assert check(None, state, call) == expected


def test_create_vcpu_without_split_irqchip() -> None:
    vmm = Vmm()

    async def main() -> int:
        vmm.vm = await vmm.process.create_vm()
        assert await init_vm(vmm) == 0
        return await vmm.process.create_vcpu(vmm.vm, 0)

    assert vmm.solo(main) == -EINVAL


def test_more_vcpus_than_allowed() -> None:
    async def call(vmm: Vmm) -> int:
        assert await vmm.add_vcpus(4) == 0
        return await vmm.process.create_vcpu(vmm.vm, 4)

    assert check(None, "initialised", call) == -EINVAL


async def same_id_twice(vmm: Vmm) -> int:
    return await vmm.process.create_vcpu(vmm.vm, 0)


def test_a_vcpu_id_is_unique() -> None:
    """With the fix of 6.19. In 6.16 the vCPU that is given up stays on its CPU's list."""
    assert check(Kernel().with_("flush-on-vcpu-free"), "with vcpu", same_id_twice) == -EEXIST
    with pytest.raises(Violation, match="freed while it is on the list of CPU 0") as violation:
        check(None, "with vcpu", same_id_twice)
    assert violation.value.property == "no list corruption"


# -- initial memory ----------------------------------------------------------------------------------------------------


async def region(vmm: Vmm, gpa: int = BUILT, pages: int = 1, *, flags: int = 0, source: int = -1) -> int:
    if source < 0:
        source = vmm.process.mmap(max(pages, 1) << 12)
        vmm.process.write(source, bytes(max(pages, 1) << 12))
    return await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(source, gpa, pages), flags)


async def region_of_shared_memory(vmm: Vmm) -> int:
    assert await vmm.process.set_memory_attributes(vmm.vm, BUILT, PAGE, 0) == 0
    return await region(vmm)


async def region_without_gmem(vmm: Vmm) -> int:
    slot = vmm.slot(slot=1, flags=0, guest_phys_addr=MEMORY)
    assert await vmm.process.set_user_memory_region2(vmm.vm, slot) == 0
    return await region(vmm, MEMORY)


async def region_of_closed_gmem(vmm: Vmm) -> int:
    assert await vmm.process.close(vmm.gmem) == 0
    return await region(vmm)


async def region_twice(vmm: Vmm) -> int:
    assert await region(vmm) == 0
    return await region(vmm)


async def region_busy(vmm: Vmm) -> int:
    """-EBUSY with the progress kept. Mapping the page has prepared its folio: the call goes on only after a hole."""
    source = vmm.process.mmap(3 << 12)
    left = Region(source, BUILT, 3)
    key = _hold_tdr(vmm)
    r = await vmm.process.tdx_init_mem_region(vmm.vcpus[0], left, 0)
    vmm.host.module.locks.pop(key)
    assert (left.nr_pages, vmm.kvm.nr_premapped) == (3, 1)
    assert await vmm.process.tdx_init_mem_region(vmm.vcpus[0], left, 0) == -EEXIST
    assert await vmm.punch(BUILT, PAGE) == 0
    assert vmm.kvm.nr_premapped == 0
    assert await vmm.process.tdx_init_mem_region(vmm.vcpus[0], left, 0) == 0
    assert (left.nr_pages, left.gpa, left.source_addr) == (0, BUILT + 3 * PAGE, source + 3 * PAGE)
    return r


def _hold_tdr(vmm: Vmm) -> int:
    """Somebody else holds the TDR shared."""
    key = vmm.kvm.tdr_page
    vmm.host.module.locks[key] = 4
    return key


async def region_interrupted(vmm: Vmm) -> int:
    return await interrupted(vmm, region(vmm))


async def finalize_busy(vmm: Vmm) -> int:
    key = _hold_tdr(vmm)
    cmd = Cmd(abi.KVM_TDX_FINALIZE_VM)
    r = await vmm.process.tdx_finalize_vm(vmm.vm, cmd)
    vmm.host.module.locks.pop(key)
    assert cmd.hw_error >> 32 << 32 == Status.TDX_OPERAND_BUSY
    assert await vmm.process.tdx_finalize_vm(vmm.vm) == 0
    return r


async def finalize_with_a_page_missing(vmm: Vmm) -> int:
    """TDH.MEM.PAGE.ADD failed, so that a page is in the mirror only."""
    key = _hold_tdr(vmm)
    assert await region(vmm) == -EBUSY
    vmm.host.module.locks.pop(key)
    assert vmm.kvm.nr_premapped == 1
    return await vmm.process.tdx_finalize_vm(vmm.vm)


MEMORY_CALLS: dict[str, tuple[str, Call, int]] = {
    "region": ("with memory", region, 0),
    "region of an uninitialised vCPU": ("initialised", lambda v: on_new_vcpu(v, lambda fd: region(v)), -EINVAL),
    "region after FINALIZE": ("runnable", region, -EINVAL),
    "region with flags": ("with memory", lambda v: region(v, flags=2), -EINVAL),
    "region at an odd address": ("with memory", lambda v: region(v, BUILT + 1), -EINVAL),
    "region from an odd address": ("with memory", lambda v: region(v, source=0x1001), -EINVAL),
    "region of nothing": ("with memory", lambda v: region(v, pages=0), -EINVAL),
    "region that wraps": ("with memory", lambda v: region(v, (1 << 64) - PAGE, 2), -EINVAL),
    "region of a shared address": ("with memory", lambda v: region(v, 1 << 51), -EINVAL),
    "region with a bad structure": ("with memory", lambda v: op(v.vcpus[0], v, Cmd(3, 0, 0x9000)), -EFAULT),
    "region from nowhere": ("with memory", lambda v: region(v, source=0x7000), -EFAULT),
    "region of shared memory": ("with memory", region_of_shared_memory, -EINVAL),
    "region where no slot is": ("with memory", lambda v: region(v, MEMORY), -EINVAL),
    "region in a slot without gmem": ("with memory", region_without_gmem, -EINVAL),
    "region of a closed file": ("with memory", region_of_closed_gmem, -EFAULT),
    "region twice": ("with memory", region_twice, -EEXIST),
    "region with a signal": ("with memory", region_interrupted, -EINTR),
    "region while the TDR is busy": ("with memory", region_busy, -EBUSY),
    "FINALIZE while the TDR is busy": ("with memory", finalize_busy, -EBUSY),
    "FINALIZE with a page missing": ("with memory", finalize_with_a_page_missing, -EINVAL),
}


@pytest.mark.parametrize("case", MEMORY_CALLS)
def test_initial_memory(case: str) -> None:
    state, call, expected = MEMORY_CALLS[case]
    assert check(None, state, call) == expected


# -- slots, attributes, guest_memfd ------------------------------------------------------------------------------------


async def set_slot(vmm: Vmm, **changes: Any) -> int:
    return await vmm.process.set_user_memory_region2(vmm.vm, vmm.slot(**changes))


async def second_binding(vmm: Vmm) -> int:
    """The part of the file is in another slot already."""
    return await set_slot(vmm, slot=1, guest_phys_addr=MEMORY, memory_size=PAGE)


async def another_file(vmm: Vmm, size: int, **changes: Any) -> int:
    fd = await vmm.process.create_guest_memfd(vmm.vm, size)
    return await set_slot(vmm, slot=1, guest_phys_addr=MEMORY, guest_memfd=fd, **changes)


async def gmem_of_another_vm(vmm: Vmm) -> int:
    other = await vmm.process.create_vm()
    fd = await vmm.process.create_guest_memfd(other, MEMORY)
    return await set_slot(vmm, slot=1, guest_phys_addr=MEMORY, guest_memfd=fd)


async def move_shared_slot(vmm: Vmm) -> int:
    shared = {"slot": 1, "flags": 0, "memory_size": PAGE}
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared) == 0
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared) == 0
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared | {"flags": abi.KVM_MEM_LOG_DIRTY_PAGES}) == 0
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared | {"memory_size": 2 * PAGE}) == -EINVAL
    return await set_slot(vmm, guest_phys_addr=2 * MEMORY, **shared)


async def move_onto_the_other(vmm: Vmm) -> int:
    shared = {"slot": 1, "flags": 0, "memory_size": PAGE}
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared) == 0
    return await set_slot(vmm, guest_phys_addr=0, **shared)


async def move_under_the_shared_bit(vmm: Vmm) -> int:
    """The new place is refused after the slot was invalidated, which is taken back."""
    shared = {"slot": 1, "flags": 0, "memory_size": PAGE}
    assert await set_slot(vmm, guest_phys_addr=MEMORY, **shared) == 0
    before = vmm.kvm.memslots
    r = await set_slot(vmm, guest_phys_addr=1 << 51, **shared)
    assert vmm.kvm.memslots == before
    return r


async def attributes(vmm: Vmm, address: int, size: int, value: int = 8, flags: int = 0) -> int:
    return await vmm.process.set_memory_attributes(vmm.vm, address, size, value, flags=flags)


SLOT_CALLS: dict[str, tuple[str, Call, int]] = {
    "slot changed": ("with memory", lambda v: set_slot(v, guest_phys_addr=MEMORY), -EINVAL),
    "slot deleted": ("with memory", lambda v: set_slot(v, memory_size=0), 0),
    "slot deleted that is not there": ("with memory", lambda v: set_slot(v, slot=3, memory_size=0), -EINVAL),
    "slot of an odd size": ("initialised", lambda v: set_slot(v, memory_size=100), -EINVAL),
    "slot at an odd address": ("initialised", lambda v: set_slot(v, guest_phys_addr=1), -EINVAL),
    "slot of odd memory": ("initialised", lambda v: set_slot(v, userspace_addr=1), -EINVAL),
    "slot of the kernel's memory": ("initialised", lambda v: set_slot(v, userspace_addr=1 << 47), -EINVAL),
    "slot that wraps": ("initialised", lambda v: set_slot(v, guest_phys_addr=(1 << 64) - PAGE), -EINVAL),
    "slot of another address space": ("initialised", lambda v: set_slot(v, slot=1 << 16), -EINVAL),
    "slot with a wild number": ("initialised", lambda v: set_slot(v, slot=0x7FFF), -EINVAL),
    "slot with unknown flags": ("initialised", lambda v: set_slot(v, flags=1 << 9), -EINVAL),
    "slot that is read-only": ("initialised", lambda v: set_slot(v, flags=abi.KVM_MEM_READONLY), -EINVAL),
    "private slot with a dirty log": ("initialised", lambda v: set_slot(v, flags=KVM_MEM_GUEST_MEMFD | 1), -EINVAL),
    "slot of a huge size": (
        "initialised",
        lambda v: set_slot(v, memory_size=1 << 46, flags=0, userspace_addr=0),
        -EINVAL,
    ),
    "slot above physical memory": ("initialised", lambda v: set_slot(v, flags=0, guest_phys_addr=1 << 52), -EINVAL),
    "slot under the SHARED bit": ("initialised", lambda v: set_slot(v, flags=0, guest_phys_addr=1 << 51), -EINVAL),
    "slot with a bad descriptor": ("initialised", lambda v: set_slot(v, guest_memfd=99), -EBADF),
    "slot with a VM's descriptor": ("initialised", lambda v: set_slot(v, guest_memfd=v.vm), -EINVAL),
    "slot with a bad offset": ("initialised", lambda v: set_slot(v, guest_memfd_offset=5), -EINVAL),
    "slot over another": ("with memory", lambda v: set_slot(v, slot=1, flags=0), -EEXIST),
    "slot with a file that is in use": ("with memory", second_binding, -EINVAL),
    "slot with the file of another VM": ("with memory", gmem_of_another_vm, -EINVAL),
    "slot larger than the file": ("with memory", lambda v: another_file(v, PAGE), -EINVAL),
    "slot with a second file": ("with memory", lambda v: another_file(v, MEMORY), 0),
    "slot moved": ("with memory", move_shared_slot, 0),
    "slot moved onto another": ("with memory", move_onto_the_other, -EEXIST),
    "slot moved under the SHARED bit": ("with memory", move_under_the_shared_bit, -EINVAL),
    "attributes with flags": ("initialised", lambda v: attributes(v, 0, PAGE, flags=1), -EINVAL),
    "attributes that are unknown": ("initialised", lambda v: attributes(v, 0, PAGE, 1), -EINVAL),
    "attributes of nothing": ("initialised", lambda v: attributes(v, 0, 0), -EINVAL),
    "attributes at an odd address": ("initialised", lambda v: attributes(v, 1, PAGE), -EINVAL),
    "attributes of an odd size": ("initialised", lambda v: attributes(v, 0, 1), -EINVAL),
    "attributes that wrap": ("initialised", lambda v: attributes(v, (1 << 64) - PAGE, 2 * PAGE), -EINVAL),
    "attributes where no slot is": ("initialised", lambda v: attributes(v, 0, PAGE), 0),
    "guest_memfd with flags": ("created", lambda v: v.process.create_guest_memfd(v.vm, PAGE, 1), -EINVAL),
    "guest_memfd of nothing": ("created", lambda v: v.process.create_guest_memfd(v.vm, 0), -EINVAL),
    "guest_memfd of an odd size": ("created", lambda v: v.process.create_guest_memfd(v.vm, 5), -EINVAL),
    "hole without KEEP_SIZE": ("with memory", lambda v: v.process.fallocate(v.gmem, 2, 0, PAGE), -EOPNOTSUPP),
    "hole of another kind": ("with memory", lambda v: v.process.fallocate(v.gmem, 1 | 16, 0, PAGE), -EOPNOTSUPP),
    "hole at an odd place": ("with memory", lambda v: v.punch(1, PAGE), -EINVAL),
    "hole beyond the end": ("with memory", lambda v: v.punch(MEMORY, PAGE), 0),
    "allocation": ("with memory", lambda v: v.process.fallocate(v.gmem, 1, 0, 4 * PAGE), 0),
    "allocation beyond the end": ("with memory", lambda v: v.process.fallocate(v.gmem, 1, MEMORY, PAGE), -EINVAL),
    "allocation with a signal": (
        "with memory",
        lambda v: interrupted(v, v.process.fallocate(v.gmem, 1, 0, PAGE)),
        -EINTR,
    ),
}


@pytest.mark.parametrize("case", SLOT_CALLS)
def test_guest_memory(case: str) -> None:
    state, call, expected = SLOT_CALLS[case]
    assert check(None, state, call) == expected


# -- whole VM ----------------------------------------------------------------------------------------------------------


def test_a_dead_vm_answers_nothing() -> None:
    """After a KVM_BUG_ON every ioctl on the VM and its vCPUs is -EIO; what is outside KVM goes on."""
    vmm = Vmm()

    async def main() -> list[int]:
        assert await vmm.build() == 0
        vmm.kvm.vm_dead = True
        process = vmm.process
        return [
            await process.create_vcpu(vmm.vm, 1),
            await process.run(vmm.vcpus[0]),
            await process.tdx_finalize_vm(vmm.vm),
            await process.check_extension(abi.KVM_CAP_MAX_VCPUS, vmm.vm),
            await vmm.punch(0, PAGE),
        ]

    assert vmm.solo(main) == [-EIO, -EIO, -EIO, -EIO, 0]


def test_check_extension() -> None:
    vmm = Vmm()

    async def main() -> dict[int, int]:
        assert await vmm.init() == 0
        process = vmm.process
        assert await process.check_extension(abi.KVM_CAP_MAX_VCPUS, vmm.vm) == 4
        assert await process.check_extension(12345, vmm.vm) == 0
        caps = [n for name, n in vars(abi).items() if name.startswith("KVM_CAP_")]
        return {cap: await process.check_extension(cap) for cap in caps}

    found = vmm.solo(main)
    assert found[abi.KVM_CAP_VM_TYPES] == 1 << 5
    assert found[abi.KVM_CAP_MEMORY_ATTRIBUTES] == KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert found[abi.KVM_CAP_NR_VCPUS] == 4
    assert all(found.values())


def test_capabilities_are_those_of_module_and_kernel() -> None:
    vmm = Vmm()

    async def main() -> Capabilities | int:
        vmm.vm = await vmm.process.create_vm()
        return await vmm.process.tdx_capabilities(vmm.vm)

    caps = vmm.solo(main)
    assert caps.supported_attrs == 1 << 28
    assert caps.supported_xfam & 3 == 3
    assert caps.user_tdvmcallinfo_1_r11 == abi.TDVMCALLINFO_SETUP_EVENT_NOTIFY_INTERRUPT
    assert len(caps.cpuid) == 12
    leaf_7 = next(e for e in caps.cpuid if (e.function, e.index) == (7, 0))
    assert not leaf_7.ebx & (1 << 4 | 1 << 11)
    assert not leaf_7.ecx & 1 << 5


def test_what_the_guest_will_see_is_told() -> None:
    vmm = Vmm()

    async def main() -> Any:
        assert await vmm.init() == 0
        assert await vmm.add_vcpus(1) == 0
        return await vmm.process.tdx_get_cpuid(vmm.vcpus[0])

    entries = {(e.function, e.index): e for e in vmm.solo(main)}
    assert entries[0, 0].eax >= 0x1F
    assert entries[0x8000_0008, 0].eax >> 16 & 0xFF == 52
    assert {index for function, index in entries if function == 4} >= {0, 1, 2, 3}


def test_invalid_parameters_are_told_apart() -> None:
    """The module refuses a CPUID value: -EINVAL, with its status in hw_error, and the VM can be initialised again."""
    vmm = Vmm()

    async def main() -> tuple[int, int, int]:
        vmm.vm = await vmm.process.create_vm()
        init = await vmm.default()
        bad = tuple(replace(e, ebx=1 << 31) if e.function == 0x1C else e for e in init.cpuid)
        cmd = Cmd(abi.KVM_TDX_INIT_VM)
        r = await vmm.process.tdx_init_vm(vmm.vm, replace(init, cpuid=bad), cmd)
        return r, cmd.hw_error, await vmm.process.tdx_init_vm(vmm.vm, init)

    r, hw_error, again = vmm.solo(main)
    assert r == -EINVAL
    assert hw_error >> 32 == Status.TDX_OPERAND_INVALID >> 32
    assert again == 0


def test_private_and_shared_do_not_match() -> None:
    """-EFAULT with KVM_EXIT_MEMORY_FAULT, which tells what the guest wanted."""
    for private in (True, False):
        vmm = Vmm()

        async def touch(vcpu: Any, private: bool = private) -> int:
            await vcpu.touch(0x20_0000 if private else 0x20_0000 | vcpu.shared_bit)
            return 0

        async def main(vmm: Vmm = vmm, touch: Any = touch, private: bool = private) -> int:
            assert await vmm.build() == 0
            vmm.attach(touch)
            value = 0 if private else KVM_MEMORY_ATTRIBUTE_PRIVATE
            assert await attributes(vmm, 0x20_0000, PAGE, value) == 0
            return await vmm.process.run(vmm.vcpus[0])

        assert vmm.solo(main) == -EFAULT
        run = vmm.process.kvm_run(vmm.vcpus[0])
        assert run.exit_reason == abi.KVM_EXIT_MEMORY_FAULT
        flags = abi.KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
        assert run.exit == MemoryFaultExit(flags, 0x20_0000, PAGE)
        packed = run.pack()
        assert struct.unpack_from("<I", packed, 8) == (39,)
        assert struct.unpack_from("<3Q", packed, 32) == (flags, 0x20_0000, PAGE)


def test_a_vcpu_fd_is_needed_for_a_guest() -> None:
    process = Process(Vmm().host)
    with pytest.raises(KeyError):
        process.kvm_run(3)
