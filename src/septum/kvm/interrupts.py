"""What KVM has other CPUs do, by name: the handlers of the host's inter-processor interrupts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from septum.kvm.bringup import do_global_key_config, tdx_cpu_enable
from septum.kvm.hotplug import take_cpu_down
from septum.kvm.tdx.associate import tdx_flush_vp
from septum.kvm.tdx.keys import smp_func_do_phymem_cache_wb
from septum.kvm.tdx.td import tdx_do_tdh_mng_key_config

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.host import Host


async def ack_kick(host: Host, cpu: Cpu, argument: Any) -> int:
    """``ack_kick``: nothing to do but to answer."""
    return 0


def register_functions(host: Host) -> None:
    """Gives every function its name on this host."""
    for function in (
        ack_kick,
        do_global_key_config,
        smp_func_do_phymem_cache_wb,
        take_cpu_down,
        tdx_cpu_enable,
        tdx_do_tdh_mng_key_config,
        tdx_flush_vp,
    ):
        host.ipis.register(function.__name__, partial(function, host))
