"""Taking things back from the module: pages, and the KeyID of a TD.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from errno import EIO
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from septum.arch.status import Status
from septum.kvm.contention import contend
from septum.kvm.tdx.associate import tdx_flush_vp_on_cpu
from septum.kvm.vm import seamcall_bug_on
from septum.tdx.state.memory import ZERO_PAGE

if TYPE_CHECKING:
    from septum.core.interrupts import Cpu
    from septum.kvm.host import Host
    from septum.kvm.vm import Vm

TDX_SEAMCALL_RETRIES: Final = 10_000


async def tdx_reclaim_page_uncleared(kvm: Vm, page: int) -> int:
    """``__tdx_reclaim_page``: 0 or -EIO. Since 6.16 no retry: nobody can contend for a page of a TD without KeyID."""
    host = kvm.host
    regs = await contend("reclaim", kvm, lambda: host.seamcalls.tdh_phymem_page_reclaim(page))
    if host.log.warn_on(regs.rax, "TDH_PHYMEM_PAGE_RECLAIM failed"):
        host.log.seamcall_failed("TDH_PHYMEM_PAGE_RECLAIM", regs.rax, rcx=regs.rcx, rdx=regs.rdx, r8=regs.r8)
        return -EIO
    return 0


async def tdx_reclaim_page(kvm: Vm, page: int) -> int:
    """``tdx_reclaim_page``: the page, cleared, is the host's again. 0 or -EIO."""
    ret = await tdx_reclaim_page_uncleared(kvm, page)
    if not ret:
        kvm.host.module.memory.set_page(page, ZERO_PAGE)
    return ret


async def tdx_reclaim_control_page(kvm: Vm, page: int) -> None:
    """``tdx_reclaim_control_page``: reclaims and frees a page; leaks it when that fails."""
    if await tdx_reclaim_page(kvm, page):
        kvm.host.pages.leak(page, "TDH.PHYMEM.PAGE.RECLAIM failed")
    else:
        kvm.host.pages.free(page)


def tdx_hkid_free(kvm: Vm) -> None:
    """``tdx_hkid_free``."""
    kvm.host.tdx_guest_keyid_free(kvm.hkid)
    kvm.hkid = -1
    kvm.host.state.nr_configured_hkid -= 1


async def smp_func_do_phymem_cache_wb(host: Host, cpu: Cpu, argument: Any) -> int:
    """``smp_func_do_phymem_cache_wb``: on one CPU of each package; again while it is interrupted."""
    err = 0
    bounded = host.kernel.policies["cache-wb"] == "bounded"
    for _ in range(TDX_SEAMCALL_RETRIES) if bounded else count():
        err = (await host.seamcalls.tdh_phymem_cache_wb(resume=bool(err))).rax
        if err != Status.TDX_INTERRUPTED_RESUMABLE:
            break
    if err == Status.TDX_NO_HKID_READY_TO_WBCACHE:
        err = 0
    if host.log.warn_on(err, "TDH_PHYMEM_CACHE_WB failed"):
        host.log.seamcall_failed("TDH_PHYMEM_CACHE_WB", err)
    return 0


async def tdx_mmu_release_hkid(kvm: Vm) -> None:
    """``tdx_mmu_release_hkid``: flushes vCPUs and caches, and takes the KeyID from the TD.

    When the module does not agree, the KeyID stays taken for ever, and the TD's pages with it.
    """
    if not kvm.is_hkid_assigned:
        return
    host = kvm.host
    tdh = host.seamcalls
    async with host.cpu_hotplug_lock.read():
        for vcpu in kvm.vcpus:
            await tdx_flush_vp_on_cpu(vcpu)
        async with host.tdx_lock.locked():
            regs = await tdh.tdh_mng_vpflushdone(kvm.tdr_page)
            if regs.rax == Status.TDX_FLUSHVP_NOT_DONE:
                return
            if await seamcall_bug_on(kvm, "TDH_MNG_VPFLUSHDONE", regs):
                host.log.pr(f"tdh_mng_vpflushdone() failed. HKID {kvm.hkid} is leaked.")
                return
            await host.ipis.call_many(host.first_online_cpus(), "smp_func_do_phymem_cache_wb", local=True)
            regs = await tdh.tdh_mng_key_freeid(kvm.tdr_page)
            if await seamcall_bug_on(kvm, "TDH_MNG_KEY_FREEID", regs):
                host.log.pr(f"tdh_mng_key_freeid() failed. HKID {kvm.hkid} is leaked.")
            else:
                tdx_hkid_free(kvm)


async def tdx_reclaim_td_control_pages(kvm: Vm) -> None:
    """``tdx_reclaim_td_control_pages``: TDCS pages, then the TDR. A TD that kept its KeyID keeps them too."""
    host = kvm.host
    if kvm.is_hkid_assigned:
        for page in (*kvm.tdcs_pages, kvm.tdr_page):
            if page:
                host.pages.leak(page, f"KeyID {kvm.hkid} was not released")
        return
    for page in kvm.tdcs_pages:
        if page:
            await tdx_reclaim_control_page(kvm, page)
    kvm.tdcs_pages = ()
    if not kvm.tdr_page:
        return
    if await tdx_reclaim_page_uncleared(kvm, kvm.tdr_page):
        host.pages.leak(kvm.tdr_page, "TDH.PHYMEM.PAGE.RECLAIM failed")
        return
    # The module may have used the TDR, with its own KeyID, until now.
    regs = await host.seamcalls.tdh_phymem_page_wbinvd_hkid(host.platform.global_private_hkid, kvm.tdr_page)
    if await seamcall_bug_on(kvm, "TDH_PHYMEM_PAGE_WBINVD", regs):
        host.pages.leak(kvm.tdr_page, "TDH.PHYMEM.PAGE.WBINVD failed")
        return
    host.module.memory.set_page(kvm.tdr_page, ZERO_PAGE)
    host.pages.free(kvm.tdr_page)
    kvm.tdr_page = 0
