"""A TD's life: created by KVM_TDX_INIT_VM, finalised, destroyed with the VM.

Source: Linux 6.16, ``arch/x86/kvm/vmx/tdx.c``.
"""

from __future__ import annotations

from errno import EAGAIN, EBUSY, EINVAL, EIO, ENOMEM
from typing import TYPE_CHECKING, Any

from septum.arch.metadata import field_table
from septum.arch.status import CODE, Status
from septum.arch.structures import ConfigFlags
from septum.core.steps import step
from septum.kvm.contention.busy import tdx_operand_busy
from septum.kvm.tdx.keys import tdx_hkid_free, tdx_mmu_release_hkid, tdx_reclaim_td_control_pages
from septum.kvm.tdx.params import read_init_vm, setup_tdparams, sysinfo
from septum.kvm.vm import TdState, kvm_bug_on, seamcall_bug_on, slots_lock

if TYPE_CHECKING:
    from septum.arch.structures import TdParams
    from septum.core.interrupts import Cpu
    from septum.kvm.host import Host
    from septum.kvm.tdx.cmd import Cmd
    from septum.kvm.vm import Vm


async def tdx_td_init(kvm: Vm, cmd: Cmd) -> int:
    """``tdx_td_init``: KVM_TDX_INIT_VM. After a failure it may be called again."""
    if kvm.state != TdState.UNINITIALIZED or cmd.flags:
        return -EINVAL
    given = read_init_vm(kvm.mm, cmd.data)
    if isinstance(given, int):
        return given
    params = setup_tdparams(kvm, *given)
    if isinstance(params, int):
        return params
    if ret := await __tdx_td_init(kvm, params, cmd):
        return ret
    table = field_table("td")
    for name in ("TSC_OFFSET", "TSC_MULTIPLIER"):
        regs = await kvm.host.seamcalls.tdh_mng_rd(kvm.tdr_page, table.named(name).id)
        if regs.rax:
            kvm.host.log.pr(f"TDH_MNG_RD[EXEC.{name}] failed: {regs.rax:#x}")
    kvm.attributes = params.attributes
    kvm.xfam = params.xfam
    wide = params.config_flags & ConfigFlags.GPAW
    kvm.gfn_direct_bits = 1 << (51 if wide else 47) >> 12
    await step("write", "TD state")
    kvm.state = TdState.INITIALIZED
    return 0


async def __tdx_td_init(kvm: Vm, params: TdParams, cmd: Cmd) -> int:
    """``__tdx_td_init``: a KeyID, pages, and the SEAMCALLs that make a TD of them.

    0, or: -ENOSPC without free KeyIDs, -ENOMEM, -EIO, -EAGAIN when the module has no entropy, -EINVAL when it does not
    like the parameters (then ``cmd.hw_error`` says which).
    """
    host = kvm.host
    keyid = host.tdx_guest_keyid_alloc()
    if keyid < 0:
        return keyid
    kvm.hkid = keyid
    host.state.nr_configured_hkid += 1
    nr_pages = sysinfo(host).tdcs_nr_pages
    if not host.pages.available(1 + nr_pages):
        tdx_hkid_free(kvm)
        return -ENOMEM
    tdr_page = host.pages.alloc()
    tdcs_pages = [host.pages.alloc() for _ in range(nr_pages)]
    ret, added = await _create(kvm, tdr_page, tdcs_pages, params, cmd)
    if ret and added < 0:
        # The module has none of the pages, nor the KeyID.
        for page in (*tdcs_pages, tdr_page):
            host.pages.free(page)
        kvm.tdcs_pages, kvm.tdr_page = (), 0
        tdx_hkid_free(kvm)
    elif ret:
        for page in tdcs_pages[added:]:
            host.pages.free(page)
        kvm.tdcs_pages = tuple(tdcs_pages[:added])
        await tdx_mmu_release_hkid(kvm)
        await tdx_reclaim_td_control_pages(kvm)
    return ret


async def _create(kvm: Vm, tdr_page: int, tdcs_pages: list[int], params: TdParams, cmd: Cmd) -> tuple[int, int]:
    """The SEAMCALLs of ``__tdx_td_init``: the result, and how many TDCS pages the module has (-1: not even the TDR)."""
    host, tdh = kvm.host, kvm.host.seamcalls
    async with host.cpu_hotplug_lock.read():
        if len(host.first_online_cpus()) < host.platform.num_packages:
            host.log.pr("All packages need to have online CPU to create TD. Online CPU and retry.")
            return -EIO, -1
        async with host.tdx_lock.locked():
            kvm.tdr_page = tdr_page
            regs = await tdh.tdh_mng_create(tdr_page, kvm.hkid)
        if regs.rax == Status.TDX_RND_NO_ENTROPY:
            return -EAGAIN, -1
        if host.log.warn_on(regs.rax, "TDH_MNG_CREATE failed"):
            host.log.seamcall_failed("TDH_MNG_CREATE", regs.rax)
            return -EIO, -1
        for index in host.first_online_cpus():
            err = await host.ipis.call_on_cpu(index, "tdx_do_tdh_mng_key_config", kvm)
            if await kvm_bug_on(err, kvm, "TDH_MNG_KEY_CONFIG failed"):
                host.log.seamcall_failed("TDH_MNG_KEY_CONFIG", err)
                return -EIO, 0
    kvm.tdcs_pages = tuple(tdcs_pages)
    for added, page in enumerate(tdcs_pages):
        regs = await tdh.tdh_mng_addcx(tdr_page, page)
        if regs.rax == Status.TDX_RND_NO_ENTROPY:
            return -EAGAIN, added
        if host.log.warn_on(regs.rax, "TDH_MNG_ADDCX failed"):
            host.log.seamcall_failed("TDH_MNG_ADDCX", regs.rax)
            return -EIO, added
    return await _init(kvm, params, cmd), len(tdcs_pages)


async def _init(kvm: Vm, params: TdParams, cmd: Cmd) -> int:
    """TDH.MNG.INIT with the parameters in a page of the kernel."""
    host = kvm.host
    page = host.pages.alloc()
    if not page:
        return -ENOMEM
    host.module.memory.write(page, params.pack())
    regs = await host.seamcalls.tdh_mng_init(kvm.tdr_page, page)
    host.pages.free(page)
    if regs.rax & CODE == Status.TDX_OPERAND_INVALID:
        cmd.hw_error = regs.rax
        return -EINVAL
    if host.log.warn_on(regs.rax, "TDH_MNG_INIT failed"):
        host.log.seamcall_failed("TDH_MNG_INIT", regs.rax, rcx=regs.rcx)
        return -EIO
    return 0


async def tdx_do_tdh_mng_key_config(host: Host, cpu: Cpu, kvm: Any) -> int:
    """``tdx_do_tdh_mng_key_config``: on one CPU of each package. Returns the status, which the caller judges.

    v11 tries on as long as no key can be generated.
    """
    while True:
        err = (await host.seamcalls.tdh_mng_key_config(kvm.tdr_page)).rax
        if err & CODE != Status.TDX_KEY_GENERATION_FAILED or host.kernel.policies["key-config"] != "try-on":
            return err


async def tdx_td_finalize(kvm: Vm, cmd: Cmd) -> int:
    """``tdx_td_finalize``: KVM_TDX_FINALIZE_VM. The build is over; what is in memory now is what was measured."""
    async with slots_lock(kvm):
        if not kvm.is_hkid_assigned or kvm.state == TdState.RUNNABLE or kvm.nr_premapped:
            return -EINVAL
        regs = await kvm.host.seamcalls.tdh_mr_finalize(kvm.tdr_page)
        cmd.hw_error = regs.rax
        if tdx_operand_busy(regs.rax):
            return -EBUSY
        if await seamcall_bug_on(kvm, "TDH_MR_FINALIZE", regs):
            return -EIO
        await step("write", "TD state")
        kvm.state = TdState.RUNNABLE
        await step("write", "pre_fault_allowed")
        kvm.pre_fault_allowed = True
        return 0


async def tdx_vm_destroy(kvm: Vm) -> None:
    """``tdx_vm_destroy``."""
    await tdx_reclaim_td_control_pages(kvm)
    kvm.state = TdState.UNINITIALIZED
