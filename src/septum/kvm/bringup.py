"""Enabling TDX when KVM is loaded.

Source: Linux 6.16, ``arch/x86/virt/vmx/tdx/tdx.c`` (``tdx_cpu_enable``, ``tdx_enable``) and ``arch/x86/kvm/vmx/tdx.c``
(``tdx_bringup``). The kernel also asks the module for TOPOLOGY_ENUM among its features; the modelled module stands for
one that has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch.leaves import HostLeaf
from septum.arch.metadata import field_table
from septum.arch.pages import PAGE_4K
from septum.arch.status import Status
from septum.arch.structures import TDMR_INFO_POINTERS_ALIGNMENT
from septum.core.steps import Violation
from septum.kvm.sysinfo import SysInfo, td_init_cpuid_entry2
from septum.tdx.registers import Regs

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.host import Host

_TDMR_INFOS_IN_PAGE: Final = PAGE_4K // TDMR_INFO_POINTERS_ALIGNMENT


async def tdx_bringup(host: Host) -> SysInfo:
    """``tdx_bringup``: initialises every CPU, gives the module its memory and its key, and reads what it can do.

    :raises Violation: when the module refuses; the kernel prints why and KVM goes on without TDX.
    """
    for index in host.online_cpus():
        await _expect(host, "tdx_cpu_enable", await host.ipis.call_single(index, "tdx_cpu_enable"))
    info = await get_tdx_sys_info(host)
    await config_tdx_module(host)
    for index in host.first_online_cpus():
        answer = await host.ipis.call_single(index, "do_global_key_config")
        await _expect(host, "config_global_keyid", answer)
    await init_tdmrs(host)
    return info


async def tdx_cpu_enable(host: Host, cpu: Cpu, argument: object) -> int:
    """``tdx_cpu_enable``: TDH.SYS.INIT on the first CPU, then TDH.SYS.LP.INIT on each. Returns the status."""
    if not host.module.sys.num_initialised_lps:
        regs = await host.seamcalls(HostLeaf.TDH_SYS_INIT, Regs(HostLeaf.TDH_SYS_INIT))
        if regs.rax:
            return regs.rax
    return (await host.seamcalls(HostLeaf.TDH_SYS_LP_INIT, Regs(HostLeaf.TDH_SYS_LP_INIT))).rax


async def do_global_key_config(host: Host, cpu: Cpu, argument: object) -> int:
    """``do_global_key_config``: once on each package. Returns the status."""
    return (await host.seamcalls(HostLeaf.TDH_SYS_KEY_CONFIG, Regs(HostLeaf.TDH_SYS_KEY_CONFIG))).rax


async def _expect(host: Host, step: str, answer: int) -> None:
    if answer != Status.TDX_SUCCESS:
        host.log.pr(f"virt/tdx: module initialization failed (-5): {step}: {answer:#x}")
        raise Violation("TDX is enabled", f"{step} failed with {answer:#x}")


async def get_tdx_sys_info(host: Host) -> SysInfo:
    """``get_tdx_sys_info``: reads global metadata, field by field, with TDH.SYS.RD."""
    table = field_table("sys")

    async def read(name: str, element: int = 0) -> int:
        regs = Regs(HostLeaf.TDH_SYS_RD, rdx=table.named(name).id + element)
        regs = await host.seamcalls(HostLeaf.TDH_SYS_RD, regs)
        await _expect(host, f"reading {name}", regs.rax)
        return regs.r8

    cpuid = []
    for i in range(await read("NUM_CPUID_CONFIG")):
        leaf = await read("CPUID_CONFIG_LEAVES", i)
        values = [await read("CPUID_CONFIG_VALUES", 2 * i + half) for half in (0, 1)]
        cpuid.append(td_init_cpuid_entry2(leaf, *values))
    return SysInfo(
        features0=await read("TDX_FEATURES0"),
        tdcs_base_size=await read("TDCS_BASE_SIZE"),
        tdvps_base_size=await read("TDVPS_BASE_SIZE"),
        attributes_fixed0=await read("ATTRIBUTES_FIXED0"),
        attributes_fixed1=await read("ATTRIBUTES_FIXED1"),
        xfam_fixed0=await read("XFAM_FIXED0"),
        xfam_fixed1=await read("XFAM_FIXED1"),
        cpuid_config=tuple(cpuid),
    )


async def config_tdx_module(host: Host) -> None:
    """``config_tdx_module``: TDH.SYS.CONFIG with the TDMRs and the KeyID of the module."""
    tdmrs, memory = host.platform.tdmrs, host.module.memory
    pages = [host.pages.alloc() for _ in range(1 + (len(tdmrs) - 1) // _TDMR_INFOS_IN_PAGE + 1)]
    array, *infos = pages
    for i, tdmr in enumerate(tdmrs):
        pa = infos[i // _TDMR_INFOS_IN_PAGE] + TDMR_INFO_POINTERS_ALIGNMENT * (i % _TDMR_INFOS_IN_PAGE)
        memory.write(pa, tdmr.info().pack())
        memory.write(array + 8 * i, pa.to_bytes(8, "little"))
    regs = Regs(HostLeaf.TDH_SYS_CONFIG, array, len(tdmrs), host.platform.global_private_hkid)
    regs = await host.seamcalls(HostLeaf.TDH_SYS_CONFIG, regs)
    await _expect(host, "TDH.SYS.CONFIG", regs.rax)
    for page in pages:
        host.pages.free(page)


async def init_tdmrs(host: Host) -> None:
    """``init_tdmrs``: TDH.SYS.TDMR.INIT on each TDMR until it says that the end is reached."""
    for tdmr in host.platform.tdmrs:
        upto = 0
        while upto < tdmr.end:
            regs = Regs(HostLeaf.TDH_SYS_TDMR_INIT, tdmr.base)
            regs = await host.seamcalls(HostLeaf.TDH_SYS_TDMR_INIT, regs)
            await _expect(host, "TDH.SYS.TDMR.INIT", regs.rax)
            upto = regs.rdx
