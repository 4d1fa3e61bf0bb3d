"""KVM_MEMORY_ENCRYPT_OP: the sub-commands and the locks they run under.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``, ``tdx_vm_ioctl`` and ``tdx_vcpu_ioctl``; for the fix "state-locks" Linux
6.19, ``tdx_acquire_vm_state_locks`` and ``tdx_vcpu_unlocked_ioctl``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING, Final

from septum.core.klocks import Mutex
from septum.core.steps import Step, step
from septum.kvm.abi import (
    KVM_TDX_CAPABILITIES,
    KVM_TDX_FINALIZE_VM,
    KVM_TDX_GET_CPUID,
    KVM_TDX_INIT_MEM_REGION,
    KVM_TDX_INIT_VCPU,
    KVM_TDX_INIT_VM,
)
from septum.kvm.lifetime import vcpu_load
from septum.kvm.tdx.build import tdx_vcpu_init_mem_region
from septum.kvm.tdx.cpuid import tdx_vcpu_get_cpuid
from septum.kvm.tdx.params import tdx_get_capabilities
from septum.kvm.tdx.td import tdx_td_finalize, tdx_td_init
from septum.kvm.tdx.vcpu import tdx_vcpu_init
from septum.kvm.vm import TdState

if TYPE_CHECKING:
    from septum.kvm.tdx.cmd import Cmd
    from septum.kvm.vcpu import Vcpu
    from septum.kvm.vm import Vm

STATE_LOCKS: Final = "state-locks"


async def _get_capabilities(kvm: Vm, cmd: Cmd) -> int:
    return tdx_get_capabilities(kvm.host, kvm.mm, cmd.flags, cmd.data)


VM_COMMANDS: Final[Mapping[int, Callable[[Vm, Cmd], Coroutine[Step, None, int]]]] = {
    KVM_TDX_CAPABILITIES: _get_capabilities,
    KVM_TDX_INIT_VM: tdx_td_init,
    KVM_TDX_FINALIZE_VM: tdx_td_finalize,
}
VCPU_COMMANDS: Final[Mapping[int, Callable[[Vcpu, Cmd], Coroutine[Step, None, int]]]] = {
    KVM_TDX_INIT_VCPU: tdx_vcpu_init,
    KVM_TDX_INIT_MEM_REGION: tdx_vcpu_init_mem_region,
    KVM_TDX_GET_CPUID: tdx_vcpu_get_cpuid,
}
CHANGES_STATE: Final = frozenset({KVM_TDX_INIT_VM, KVM_TDX_FINALIZE_VM, KVM_TDX_INIT_VCPU, KVM_TDX_INIT_MEM_REGION})


async def tdx_vm_ioctl(kvm: Vm, cmd: Cmd) -> int:
    """``tdx_vm_ioctl``: under ``kvm->lock``, or the locks that the kernel has for the command."""
    if cmd.hw_error:
        return -EINVAL
    command = VM_COMMANDS.get(cmd.id)
    if kvm.host.kernel.has(STATE_LOCKS):
        if command is None or cmd.id not in CHANGES_STATE:
            return await command(kvm, cmd) if command else -EINVAL
        return await _with_state_locks(kvm, lambda: command(kvm, cmd))
    async with kvm.lock.locked():
        return await command(kvm, cmd) if command else -EINVAL


async def tdx_vcpu_ioctl(vcpu: Vcpu, cmd: Cmd) -> int:
    """``tdx_vcpu_ioctl``: with ``vcpu->mutex`` held and the vCPU loaded."""
    kvm = vcpu.kvm
    await step("read", "TD state")
    if not kvm.is_hkid_assigned or kvm.state == TdState.RUNNABLE or cmd.hw_error:
        return -EINVAL
    command = VCPU_COMMANDS.get(cmd.id)
    return await command(vcpu, cmd) if command else -EINVAL


def is_unlocked_vcpu_ioctl(kvm: Vm, cmd: Cmd) -> bool:
    """Whether the command takes its locks itself, ``vcpu->mutex`` among them."""
    return kvm.host.kernel.has(STATE_LOCKS) and cmd.id in CHANGES_STATE


async def tdx_vcpu_unlocked_ioctl(vcpu: Vcpu, cmd: Cmd) -> int:
    """``tdx_vcpu_unlocked_ioctl`` (6.19)."""

    async def command() -> int:
        async with vcpu_load(vcpu):
            return await tdx_vcpu_ioctl(vcpu, cmd)

    return await _with_state_locks(vcpu.kvm, command)


async def _with_state_locks(kvm: Vm, command: Callable[[], Coroutine[Step, None, int]]) -> int:
    """``tdx_acquire_vm_state_locks`` (6.19): ``kvm->lock``, every ``vcpu->mutex`` in ascending order, ``slots_lock``.

    -EBUSY while a vCPU is being created.
    """
    async with kvm.lock.locked():
        if kvm.created_vcpus != len(kvm.vcpus):
            return -EBUSY
        held: list[Mutex] = []
        # The kernel takes them as the vCPUs were created; kvm->lock, which nests them, makes the order immaterial.
        vcpus = sorted(kvm.vcpus, key=lambda vcpu: vcpu.vcpu_id)
        for mutex in (*(vcpu.mutex for vcpu in vcpus), kvm.slots_lock):
            await mutex.take(shared=False)
            held.append(mutex)
        ret = await command()
        for mutex in reversed(held):
            mutex.let_go(shared=False)
        return ret
