"""CPUs go offline and come back.

Source: Linux 6.16, ``kernel/cpu.c``, ``arch/x86/kvm/vmx/tdx.c`` (``tdx_online_cpu``, ``tdx_offline_cpu``).
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING

from septum.kvm.tdx.associate import tdx_disable_virtualization_cpu

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.host import Host


async def cpu_down(host: Host, index: int) -> int:
    """``cpu_down``: takes a CPU offline, by a thread on another. 0, or -EBUSY when TDs need it."""
    async with host.cpu_hotplug_lock.write():
        if tdx_offline_cpu(host, index):
            return -EBUSY
        await host.ipis.call_on_cpu(index, "take_cpu_down")
    return 0


async def cpu_up(host: Host, index: int) -> int:
    """``cpu_up``: brings it back. The module knows the CPU since boot."""
    async with host.cpu_hotplug_lock.write():
        host.cpus[index].online = True
    return 0


def tdx_offline_cpu(host: Host, index: int) -> int:
    """``tdx_offline_cpu``: the last CPU of a package stays as long as a TD has a KeyID. 0 or -EBUSY."""
    if not host.state.nr_configured_hkid:
        return 0
    package = host.platform.lp_package
    if any(other != index and package[other] == package[index] for other in host.online_cpus()):
        return 0
    host.log.pr(
        "TDX requires all packages to have an online CPU. Delete all TDs in order to offline all CPUs of a package."
    )
    return -EBUSY


async def take_cpu_down(host: Host, cpu: Cpu, argument: object) -> int:
    """``kvm_offline_cpu``: on the CPU itself. vCPUs leave it; from now on it answers no interrupt of others."""
    await tdx_disable_virtualization_cpu(host, cpu)
    cpu.online = False
    return 0
