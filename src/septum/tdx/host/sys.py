"""TDH.SYS.*: bringing the module up on a platform, and shutting it down.

Source: TDX Module 1.5.01, ``src/vmm_dispatcher/api_calls/tdh_sys_*.c``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septum.arch.cpuid import configurable
from septum.arch.leaves import HostLeaf
from septum.arch.metadata import sys_constants
from septum.arch.op_state import KotState, SysState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_1G, PAGE_4K
from septum.arch.pamt import PAMT_ENTRY_SIZE
from septum.arch.status import Status
from septum.arch.structures import (
    MAX_CMRS,
    MAX_RESERVED_AREAS,
    MAX_TDMRS,
    NUM_CPUID_CONFIG,
    TDMR_INFO_POINTERS_ALIGNMENT,
    CmrInfo,
    CpuidConfig,
    CpuidValues,
    TdmrInfo,
    TdSysInfo,
    pack_cmrs,
)
from septum.arch.tdmr import Tdmr
from septum.core.trylocks import Mode
from septum.tdx.call import EXCLUSIVE, SHARED, HostCall, check_hpa, check_shared_hpa
from septum.tdx.host.mng import program_key
from septum.tdx.outcome import Fail, check
from septum.tdx.platform_checks import check_platform, compare_with_platform
from septum.tdx.tdmr_checks import check_tdmr

if TYPE_CHECKING:
    from septum.tdx.host import Handler
    from septum.tdx.module import Module

TDMR_INIT_SIZE = 1024 * PAGE_4K
"""Memory whose PAMT entries one TDH.SYS.TDMR.INIT initialises."""
CMR_TABLE_SIZE = 512
HKID_MASK = 0xFFFF


async def _lock_module(call: HostCall, mode: Mode) -> None:
    """The lock of the module as a whole.

    :raises Fail: SYS_BUSY.
    """
    try:
        await call.locks.take(call.module.sys_lock, mode, Operand.SYS)
    except Fail:
        raise Fail(Status.TDX_SYS_BUSY) from None


async def tdh_sys_init(call: HostCall) -> int:
    """TDH.SYS.INIT: checks the platform, once.

    RCX: attributes, must be 0. Out: RCX, RDX, R8, R9, R10 tell which CPUID value is wrong and how, else 0.
    """
    module, regs = call.module, call.regs
    attributes = regs.rcx
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
    await _lock_module(call, EXCLUSIVE)
    check(not attributes, Status.TDX_OPERAND_INVALID, Operand.RCX)
    check(module.sys.state == SysState.SYSINIT_PENDING, Status.TDX_SYS_INIT_NOT_PENDING)
    sampled = check_platform(module, call.lp, regs)
    # A stack canary: the one random number that the module needs for itself.
    check(module.hardware.random() is not None, Status.TDX_RND_NO_ENTROPY)
    module.sys.sampled = sampled
    module.sys.state = SysState.SYSINIT_DONE
    return Status.TDX_SUCCESS


async def tdh_sys_lp_init(call: HostCall) -> int:
    """TDH.SYS.LP.INIT: initialises this LP and compares it with the one that ran TDH.SYS.INIT."""
    module, lp, regs = call.module, call.lp, call.regs
    regs.rcx = regs.rdx = regs.r8 = 0
    await _lock_module(call, SHARED)
    check(module.sys.state == SysState.SYSINIT_DONE, Status.TDX_SYS_LP_INIT_NOT_PENDING)
    check(not lp.initialised, Status.TDX_SYS_LP_INIT_DONE)
    seed = (module.hardware.random() or 0) & 0xFFFF_FFFF
    check(seed, Status.TDX_RND_NO_ENTROPY)
    lp.lfsr = seed
    compare_with_platform(module, lp)
    lp.initialised = True
    module.sys.num_initialised_lps += 1
    return Status.TDX_SUCCESS


async def tdh_sys_config(call: HostCall) -> int:
    """TDH.SYS.CONFIG: gives the module its TDMRs and its own HKID.

    RCX: array of the addresses of TDMR_INFO structures. RDX: how many. R8: a private HKID.
    """
    module, regs = call.module, call.regs
    state = module.sys
    array, count, hkid = regs.rcx, regs.rdx, regs.r8
    await _lock_module(call, EXCLUSIVE)
    all_lps = state.num_initialised_lps >= module.platform.num_lps
    check(state.state == SysState.SYSINIT_DONE and all_lps, Status.TDX_SYS_CONFIG_NOT_PENDING)
    check_shared_hpa(call, array, TDMR_INFO_POINTERS_ALIGNMENT, Operand.RCX)
    check(1 <= count <= MAX_TDMRS, Status.TDX_OPERAND_INVALID, Operand.RDX)
    check(hkid <= HKID_MASK and hkid in module.platform.private_hkids, Status.TDX_OPERAND_INVALID, Operand.R8)
    # These two stay as they are when a TDMR turns out to be bad.
    module.kot[hkid].state = KotState.HKID_RESERVED
    state.hkid = hkid

    tdmrs: list[Tdmr] = []
    address = module.pa_format.address
    for index in range(count):
        pa = int.from_bytes(module.memory.read(address(array) + 8 * index, 8), "little")
        check_shared_hpa(call, pa, TDMR_INFO_POINTERS_ALIGNMENT, Operand.RCX)
        info = TdmrInfo.unpack(module.memory.read(address(pa), TdmrInfo.size()))
        tdmr = check_tdmr(module.pa_format, module.platform.cmrs, tdmrs, info)
        tdmrs.append(tdmr)
        kept = module.tdmrs[index]
        kept.base = kept.next = tdmr.base
        kept.size = tdmr.size
        kept.pamt = tdmr.pamt_4k, tdmr.pamt_2m, tdmr.pamt_1g
        kept.reserved = tdmr.reserved
    state.num_tdmrs = count
    state.packages_with_key = 0
    state.state = SysState.SYSCONFIG_DONE
    return Status.TDX_SUCCESS


async def tdh_sys_key_config(call: HostCall) -> int:
    """TDH.SYS.KEY.CONFIG: gives the module's HKID a key on this package. After the last package the module is ready."""
    module, state, package = call.module, call.module.sys, 1 << call.lp.package
    await _lock_module(call, EXCLUSIVE)
    check(state.state == SysState.SYSCONFIG_DONE, Status.TDX_SYS_KEY_CONFIG_NOT_PENDING)
    check(not state.packages_with_key & package, Status.TDX_KEY_CONFIGURED)
    program_key(module)
    state.packages_with_key |= package
    if state.packages_with_key.bit_count() == module.platform.num_packages:
        state.state = SysState.READY
    return Status.TDX_SUCCESS


async def tdh_sys_tdmr_init(call: HostCall) -> int:
    """TDH.SYS.TDMR.INIT: initialises the PAMT entries of a few more MiB of a TDMR.

    RCX: base of the TDMR. Out RDX: up to here, in whole GiB, its memory can be used now.
    """
    module, regs = call.module, call.regs
    regs.rdx = 0
    check_hpa(call, regs.rcx, PAGE_1G, Operand.RCX)
    index = next((i for i in range(module.sys.num_tdmrs) if module.tdmrs[i].base == regs.rcx), None)
    if index is None:
        raise Fail(Status.TDX_OPERAND_INVALID, Operand.RCX)
    tdmr = module.tdmrs[index]
    await call.locks.take(module.tdmr_locks[index], EXCLUSIVE, Operand.RCX)
    check(tdmr.next < tdmr.base + tdmr.size, Status.TDX_TDMR_ALREADY_INITIALIZED)
    tdmr.next += TDMR_INIT_SIZE
    regs.rdx = tdmr.next & -PAGE_1G
    return Status.TDX_SUCCESS


async def tdh_sys_info(call: HostCall) -> int:
    """TDH.SYS.INFO: writes TDSYSINFO_STRUCT and the table of CMRs.

    RCX: buffer for the first, RDX: its size. R8: buffer for the second, R9: entries it has room for. Out: RDX bytes and
    R9 entries written. A bad R8 or R9 leaves the first buffer zeroed.
    """
    module, regs = call.module, call.regs
    info_pa, info_size, cmrs_pa, num_cmrs = regs.rcx, regs.rdx, regs.r8, regs.r9
    regs.rdx = regs.r9 = 0
    check(call.lp.initialised, Status.TDX_SYS_LP_INIT_NOT_DONE)
    check_shared_hpa(call, info_pa, TdSysInfo.size(), Operand.RCX)
    check(info_size >= TdSysInfo.size(), Status.TDX_OPERAND_INVALID, Operand.RDX)
    address = module.pa_format.address
    module.memory.write(address(info_pa), bytes(TdSysInfo.size()))
    check_shared_hpa(call, cmrs_pa, CMR_TABLE_SIZE, Operand.R8)
    check(num_cmrs >= MAX_CMRS, Status.TDX_OPERAND_INVALID, Operand.R9)
    module.memory.write(address(info_pa), _sys_info(module).pack())
    cmrs = tuple(CmrInfo(cmr.base, cmr.size) for cmr in module.platform.cmrs)
    module.memory.write(address(cmrs_pa), pack_cmrs(cmrs))
    regs.rdx, regs.r9 = TdSysInfo.size(), MAX_CMRS
    return Status.TDX_SUCCESS


def _sys_info(module: Module) -> TdSysInfo:
    constants = sys_constants()
    values = module.native_cpu.cpuid_values
    config = []
    for entry in configurable():
        bits = entry.config_direct | (entry.allow_direct & values[entry.index])
        config.append(CpuidConfig(entry.leaf, entry.subleaf, CpuidValues(*bits)))
    return TdSysInfo(
        vendor_id=constants["VENDOR_ID"],
        build_date=constants["BUILD_DATE"],
        build_num=constants["BUILD_NUM"],
        minor_version=constants["MINOR_VERSION"],
        major_version=constants["MAJOR_VERSION"],
        sys_rd=1,
        max_tdmrs=MAX_TDMRS,
        max_reserved_per_tdmr=MAX_RESERVED_AREAS,
        pamt_entry_size=PAMT_ENTRY_SIZE,
        tdcs_base_size=constants["TDCS_BASE_SIZE"],
        tdvps_base_size=constants["TDVPS_BASE_SIZE"],
        attributes_fixed0=constants["ATTRIBUTES_FIXED0"],
        attributes_fixed1=constants["ATTRIBUTES_FIXED1"],
        xfam_fixed0=module.native_cpu.xfam_fixed0,
        xfam_fixed1=constants["XFAM_FIXED1"],
        num_cpuid_config=NUM_CPUID_CONFIG,
        cpuid_config=tuple(config),
    )


async def tdh_sys_shutdown(call: HostCall) -> int:
    """TDH.SYS.SHUTDOWN: from now on no function works. RCX: version of the hand-off data for the next module.

    An LP that is in the module, or runs a guest, makes it fail with SYS_BUSY. The hand-off data are not modelled.
    """
    module, constants = call.module, sys_constants()
    version = call.regs.rcx
    newest = constants["MODULE_HV"]
    oldest = newest if constants["NO_DOWNGRADE"] else constants["MIN_UPDATE_HV"]
    check(oldest <= version <= newest, Status.TDX_OPERAND_INVALID, Operand.RCX)
    await _lock_module(call, EXCLUSIVE)
    check(not any(lp.busy for lp in module.lps if lp is not call.lp), Status.TDX_SYS_BUSY)
    module.sys.state = SysState.SHUTDOWN
    return Status.TDX_SUCCESS


async def tdh_sys_lp_shutdown(call: HostCall) -> int:
    """TDH.SYS.LP.SHUTDOWN: does nothing; kept for hosts that know older modules."""
    return Status.TDX_SUCCESS


async def tdh_sys_update(call: HostCall) -> int:
    """TDH.SYS.UPDATE: takes over the TDs of the module that was there before. Here there never was one."""
    module = call.module
    await _lock_module(call, EXCLUSIVE)
    all_lps = module.sys.num_initialised_lps >= module.platform.num_lps
    check(module.sys.state == SysState.SYSINIT_DONE and all_lps, Status.TDX_SYS_STATE_INCORRECT)
    raise Fail(Status.TDX_SYS_INVALID_HANDOFF)


LEAVES: dict[int, Handler] = {
    HostLeaf.TDH_SYS_INIT: tdh_sys_init,
    HostLeaf.TDH_SYS_LP_INIT: tdh_sys_lp_init,
    HostLeaf.TDH_SYS_CONFIG: tdh_sys_config,
    HostLeaf.TDH_SYS_KEY_CONFIG: tdh_sys_key_config,
    HostLeaf.TDH_SYS_TDMR_INIT: tdh_sys_tdmr_init,
    HostLeaf.TDH_SYS_INFO: tdh_sys_info,
    HostLeaf.TDH_SYS_SHUTDOWN: tdh_sys_shutdown,
    HostLeaf.TDH_SYS_LP_SHUTDOWN: tdh_sys_lp_shutdown,
    HostLeaf.TDH_SYS_UPDATE: tdh_sys_update,
}
