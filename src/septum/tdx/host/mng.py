"""TDH.MNG.*: creating, configuring and taking down a TD, and its keys.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_mng_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from septum.arch import op_state
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState, Lifecycle, OpState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.pamt import PageType
from septum.arch.platform_msrs import BOOT_NT4, IA32_MISC_ENABLE
from septum.arch.status import Status
from septum.arch.structures import TD_PARAMS_ALIGNMENT, TdParams
from septum.tdx.call import (
    EXCLUSIVE,
    MIN_TDCS_PAGES,
    HostCall,
    check_shared_hpa,
    lock_free_page,
    lock_op_state,
    lock_tdr,
)
from septum.tdx.measurement import Sha384
from septum.tdx.migration.streams import new_encryption_key
from septum.tdx.outcome import Fail, ModuleHalt, check
from septum.tdx.state.hardware import PconfigStatus
from septum.tdx.state.memory import PamtEntry
from septum.tdx.state.td import FIRST_L2_SEPT_ROOT_PAGE, MAX_TDCS_PAGES, SEPT_ROOT_PAGE
from septum.tdx.td_params import configure_td

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td

SEAMDB_INDEX: Final = 1
"""Where SEAMDB has the entry of this instance of the module: the first one since power-on."""
PAMT_LOCKS_OF_4K_PAGE: Final = 3


async def tdh_mng_create(call: HostCall) -> int:
    """TDH.MNG.CREATE: makes a page the TDR of a new TD and gives it an HKID. RCX: the page. RDX: the HKID."""
    module, regs = call.module, call.regs
    hkid = regs.rdx
    check(hkid in module.platform.private_hkids, Status.TDX_OPERAND_INVALID, Operand.RDX)
    page = await lock_free_page(call, regs.rcx, Operand.RCX)
    await call.locks.take(module.kot_lock, EXCLUSIVE, Operand.KOT)
    check(module.kot[hkid].state == KotState.HKID_FREE, Status.TDX_HKID_NOT_FREE)
    uuid = module.hardware.random_256()
    if uuid is None:
        raise Fail(Status.TDX_RND_NO_ENTROPY)

    module.kot[hkid].state = KotState.HKID_ASSIGNED
    tdr = module.new_td(page.pa).tdr
    tdr.hkid = hkid
    tdr.td_uuid = uuid
    tdr.seamdb_index = SEAMDB_INDEX
    module.pamt[page.key] = PamtEntry(PageType.TDR, 0, 0)
    return Status.TDX_SUCCESS


async def tdh_mng_key_config(call: HostCall) -> int:
    """TDH.MNG.KEY.CONFIG: makes a random key for the TD's HKID on the package of the calling LP. RCX: TDR.

    When all packages have one, the TD's keys are configured.
    """
    module = call.module
    tdr = (await lock_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)).tdr
    check(not tdr.fatal, Status.TDX_TD_FATAL)
    check(tdr.lifecycle_state == Lifecycle.HKID_ASSIGNED, Status.TDX_LIFECYCLE_STATE_INCORRECT)
    package = 1 << call.lp.package
    check(not tdr.pkg_config_bitmap & package, Status.TDX_KEY_CONFIGURED)
    program_key(module)

    tdr.pkg_config_bitmap |= package
    if tdr.pkg_config_bitmap == module.sys.packages_with_key:
        tdr.lifecycle_state = Lifecycle.KEYS_CONFIGURED
    return Status.TDX_SUCCESS


def program_key(module: Module) -> None:
    """``program_mktme_keys``: PCONFIG, with the outcome that the hardware inputs say.

    :raises Fail: KEY_GENERATION_FAILED without entropy, OPERAND_BUSY(KET) when the key table is in use.
    :raises ModuleHalt: for every other error.
    """
    status = module.hardware.inputs.pconfig_error
    check(status != PconfigStatus.DEVICE_BUSY, Status.TDX_OPERAND_BUSY, Operand.KET)
    check(status != PconfigStatus.ENTROPY_ERROR, Status.TDX_KEY_GENERATION_FAILED)
    if status != PconfigStatus.SUCCESS:
        raise ModuleHalt(f"PCONFIG failed with error {status}")


async def tdh_mng_addcx(call: HostCall) -> int:
    """TDH.MNG.ADDCX: adds a page to the TDCS. RCX: the page. RDX: TDR."""
    module, regs = call.module, call.regs
    td = await lock_tdr(call, regs.rdx, Operand.RDX, EXCLUSIVE)
    tdr = td.tdr
    check(not tdr.fatal, Status.TDX_TD_FATAL)
    check(tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED, Status.TDX_TD_KEYS_NOT_CONFIGURED)
    index = tdr.num_tdcx
    check(index < MAX_TDCS_PAGES, Status.TDX_TDCX_NUM_INCORRECT)
    page = await lock_free_page(call, regs.rcx, Operand.RCX)
    # At the end the TDR is unlocked before the new page.
    held = call.locks.hand_over()
    call.locks.adopt(held[PAMT_LOCKS_OF_4K_PAGE:] + held[:PAMT_LOCKS_OF_4K_PAGE])

    _fill_tdcx(module, td, index, page.pa)
    if index + 1 == MIN_TDCS_PAGES:
        new_encryption_key(module, td)
    elif index >= MIN_TDCS_PAGES:
        check(td.tdcs.op_state in op_state.HOST_ALLOWED[call.leaf], Status.TDX_OP_STATE_INCORRECT)

    hpa = module.pa_format.with_hkid(page.pa, tdr.hkid)
    tdr.tdcx_pa = (*tdr.tdcx_pa[:index], hpa, *tdr.tdcx_pa[index + 1 :])
    tdr.num_tdcx = index + 1
    tdr.chldcnt += 1
    module.pamt[page.key] = PamtEntry(PageType.TDCX, td.pa, 0)
    return Status.TDX_SUCCESS


def _fill_tdcx(module: Module, td: Td, index: int, pa: int) -> None:
    """The new page's first content: free entries where it is the root of a Secure EPT, else what a new TDCS holds."""
    if index == 0:
        td.clear_locks()
    elif index == SEPT_ROOT_PAGE or index >= FIRST_L2_SEPT_ROOT_PAGE:
        entries = module.sept if index == SEPT_ROOT_PAGE else module.sept_l2
        for entry in range(pa, pa + PAGE_4K, 8):
            entries.pop(entry, None)


async def tdh_mng_init(call: HostCall) -> int:
    """TDH.MNG.INIT: sets up the TDCS from TD_PARAMS. RCX: TDR. RDX: TD_PARAMS, in the host's memory.

    For a wrong CPUID configuration RCX tells sub-leaf and leaf; else it is 0 afterwards.
    """
    module, regs = call.module, call.regs
    tdr_pa, params_pa = regs.rcx, regs.rdx
    regs.rcx = 0
    boot_nt4 = module.hardware.rdmsr(call.lp.index, IA32_MISC_ENABLE) & BOOT_NT4
    check(not boot_nt4, Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    td = await lock_tdr(call, tdr_pa, Operand.RCX, EXCLUSIVE)
    await lock_op_state(call, td, None)
    check_shared_hpa(call, params_pa, TD_PARAMS_ALIGNMENT, Operand.RDX)
    raw = module.memory.read(module.pa_format.address(params_pa), TdParams.size())
    configure_td(call, td, TdParams.unpack(raw))

    td.tdcs.mrtd_hash = Sha384()
    td.tdcs.rtmr = (bytes(48),) * 4
    td.tdcs.op_state = OpState.INITIALIZED
    return Status.TDX_SUCCESS


async def tdh_mng_vpflushdone(call: HostCall) -> int:
    """TDH.MNG.VPFLUSHDONE: no VCPU of the TD is associated with an LP any more, and none will be. RCX: TDR.

    From here on, the cache lines of its HKID are to be written back.
    """
    module = call.module
    td = await lock_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    await call.locks.take(module.kot_lock, EXCLUSIVE, Operand.KOT)
    alive = (Lifecycle.HKID_ASSIGNED, Lifecycle.KEYS_CONFIGURED)
    check(td.tdr.lifecycle_state in alive, Status.TDX_LIFECYCLE_STATE_INCORRECT)
    initialised = td.tdr.num_tdcx >= MIN_TDCS_PAGES and td.tdcs.op_state in op_state.ANY_INITIALIZED
    check(not (initialised and td.tdcs.num_assoc_vcpus), Status.TDX_FLUSHVP_NOT_DONE)

    entry = module.kot[td.tdr.hkid]
    entry.wbinvd_bitmap = module.sys.packages_with_key
    entry.state = KotState.HKID_FLUSHED
    td.tdr.lifecycle_state = Lifecycle.BLOCKED
    return Status.TDX_SUCCESS


async def tdh_mng_key_freeid(call: HostCall) -> int:
    """TDH.MNG.KEY.FREEID: the TD's HKID can be given to another TD; the TD's pages can be reclaimed. RCX: TDR."""
    module = call.module
    tdr = (await lock_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)).tdr
    check(tdr.lifecycle_state == Lifecycle.BLOCKED, Status.TDX_LIFECYCLE_STATE_INCORRECT)
    await call.locks.take(module.kot_lock, EXCLUSIVE, Operand.KOT)
    entry = module.kot[tdr.hkid]
    check(not entry.wbinvd_bitmap, Status.TDX_WBCACHE_NOT_COMPLETE)

    entry.state = KotState.HKID_FREE
    tdr.lifecycle_state = Lifecycle.TEARDOWN
    return Status.TDX_SUCCESS


async def tdh_mng_key_reclaimid(call: HostCall) -> int:
    """TDH.MNG.KEY.RECLAIMID: does nothing; kept from module 1.0."""
    return Status.TDX_SUCCESS


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_MNG_ADDCX: tdh_mng_addcx,
    HostLeaf.TDH_MNG_CREATE: tdh_mng_create,
    HostLeaf.TDH_MNG_INIT: tdh_mng_init,
    HostLeaf.TDH_MNG_KEY_CONFIG: tdh_mng_key_config,
    HostLeaf.TDH_MNG_KEY_FREEID: tdh_mng_key_freeid,
    HostLeaf.TDH_MNG_KEY_RECLAIMID: tdh_mng_key_reclaimid,
    HostLeaf.TDH_MNG_VPFLUSHDONE: tdh_mng_vpflushdone,
}
