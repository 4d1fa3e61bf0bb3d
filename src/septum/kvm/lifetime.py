"""VMs and vCPUs: creation, loading a vCPU on a CPU, destruction when the last reference goes.

Source: Linux 6.16, ``virt/kvm/kvm_main.c``, ``arch/x86/kvm/x86.c``.
"""

from __future__ import annotations

from errno import EEXIST, EINVAL
from typing import TYPE_CHECKING, Final

from septum.core.klocks import Section
from septum.core.steps import current_task, emit, step
from septum.kvm.abi import KVM_X86_TDX_VM
from septum.kvm.files import File
from septum.kvm.mmu.roots import kvm_mmu_unload
from septum.kvm.mmu.zap import kvm_mmu_uninit_tdp_mmu, kvm_mmu_zap_all
from septum.kvm.tdx.associate import tdx_vcpu_load
from septum.kvm.tdx.keys import tdx_mmu_release_hkid
from septum.kvm.tdx.td import tdx_vm_destroy
from septum.kvm.tdx.vcpu import tdx_vcpu_create, tdx_vcpu_free
from septum.kvm.vcpu import MpState, Vcpu
from septum.kvm.vm import Vm

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.user_memory import UserMemory

KVM_MAX_VCPU_IDS: Final = 4096
BSP_VCPU_ID: Final = 0


class VcpuLoad(Section):
    """``vcpu_load`` to ``vcpu_put``."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    async def enter(self) -> None:
        """``kvm_arch_vcpu_load`` on the caller's CPU."""
        vcpu, cpu = self.vcpu, current_task().cpu
        await tdx_vcpu_load(vcpu, cpu)
        await step("write", "vcpu->cpu")
        vcpu.cpu = cpu

    def leave(self) -> None:
        """``vcpu_put``: the vCPU stays associated with the CPU."""


def vcpu_load(vcpu: Vcpu) -> VcpuLoad:
    """The vCPU is on the caller's CPU."""
    return VcpuLoad(vcpu)


# -- VMs ---------------------------------------------------------------------------------------------------------------


def kvm_create_vm(host: Host, mm: UserMemory, vm_type: int) -> File | int:
    """``kvm_create_vm`` and ``tdx_vm_init``: -EINVAL for a type that is not supported. Only TDX VMs are modelled."""
    if vm_type != KVM_X86_TDX_VM or host.sysinfo is None:
        return -EINVAL
    number = host.state.num_vms
    host.state.num_vms += 1
    key = ("vm", number, vm_type, mm.name)
    file = host.once(key, lambda: _vm_file(Vm.create(host, mm, number, vm_type)))
    mm.register(file.private_data)
    return file


def _vm_file(kvm: Vm) -> File:
    return File(f"{kvm}.file", kind="vm", private_data=kvm, release=kvm_put_kvm)


async def kvm_put_kvm(kvm: Vm) -> None:
    """``kvm_put_kvm``: the last reference destroys the VM. ``kvm_vm_release`` is this too."""
    await step("put", kvm)
    kvm.users_count -= 1
    if not kvm.users_count:
        await kvm_destroy_vm(kvm)


async def kvm_destroy_vm(kvm: Vm) -> None:
    """``kvm_destroy_vm`` and ``kvm_arch_destroy_vm``."""
    emit("vm", f"{kvm} is destroyed")
    if kvm.host.kernel.has("hkid-outlives-mm") or not kvm.shadow_flushed:
        await tdx_mmu_release_hkid(kvm)
    kvm.mm.unregister(kvm)
    await kvm_mmu_zap_all(kvm)
    for vcpu in kvm.vcpus:
        kvm_mmu_unload(vcpu)
        await tdx_vcpu_free(vcpu)
    kvm.vcpus = ()
    await kvm_mmu_uninit_tdp_mmu(kvm)
    await tdx_vm_destroy(kvm)
    kvm.memslots = ()


# -- vCPUs -------------------------------------------------------------------------------------------------------------


async def kvm_vm_ioctl_create_vcpu(kvm: Vm, vcpu_id: int) -> File | int:
    """``kvm_vm_ioctl_create_vcpu``: the vCPU's file, or a negative errno."""
    if not 0 <= vcpu_id < KVM_MAX_VCPU_IDS:
        return -EINVAL
    async with kvm.lock.locked():
        if kvm.created_vcpus >= kvm.max_vcpus:
            return -EINVAL
        kvm.created_vcpus += 1
        allocation = kvm.vcpu_allocations
        kvm.vcpu_allocations += 1
    key = ("vcpu", kvm.number, allocation, vcpu_id)
    vcpu: Vcpu = kvm.host.once(key, lambda: Vcpu.create(kvm, vcpu_id))
    r = await kvm_arch_vcpu_create(vcpu)
    if not r:
        file = await _install(kvm, vcpu, key)
        if isinstance(file, File):
            return file
        r = file
        await tdx_vcpu_free(vcpu)
    async with kvm.lock.locked():
        kvm.created_vcpus -= 1
    return r


async def _install(kvm: Vm, vcpu: Vcpu, key: tuple[object, ...]) -> File | int:
    """The vCPU becomes one of the VM's; -EEXIST when its id is taken."""
    async with kvm.lock.locked():
        if any(other.vcpu_id == vcpu.vcpu_id for other in kvm.vcpus):
            return -EEXIST
        async with vcpu.mutex.locked():
            kvm.users_count += 1
            file = kvm.host.once((*key, "file"), lambda: _vcpu_file(vcpu))
            await step("write", "online_vcpus")
            kvm.vcpus = (*kvm.vcpus, vcpu)
        return file


def _vcpu_file(vcpu: Vcpu) -> File:
    return File(f"{vcpu}.file", kind="vcpu", private_data=vcpu, release=kvm_vcpu_release)


async def kvm_arch_vcpu_create(vcpu: Vcpu) -> int:
    """``kvm_arch_vcpu_create``: also loads the vCPU, which puts it on its CPU's list."""
    await step("read", "TD state")
    if r := tdx_vcpu_create(vcpu):
        return r
    async with vcpu_load(vcpu):
        if vcpu.vcpu_id == BSP_VCPU_ID:
            vcpu.mp_state = MpState.RUNNABLE
    return 0


async def kvm_vcpu_release(vcpu: Vcpu) -> None:
    """``kvm_vcpu_release``: the vCPU lives on until its VM ends."""
    await kvm_put_kvm(vcpu.kvm)
