"""TDH.SYS.*: the order of initialisation, what the module wants of the platform and of TDMRs, and shutting down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import platform_msrs as msrs
from septum.arch.exits import ExitReason
from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState, SysState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_1G, PAGE_2M, PAGE_4K
from septum.arch.platform import Platform, profile, profile_names
from septum.arch.status import Status, with_details, with_operand
from septum.arch.structures import TdmrInfo, TdSysInfo
from septum.arch.tdmr import MemoryRange
from septum.core.cells import Tracking, World
from septum.core.run import solo_call
from septum.core.trylocks import Mode
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import Regs
from septum.tdx.state.hardware import PconfigStatus
from septum.tdx.vm_exit import VmExit
from tests.tdx.machines import BUFFER, Machine

H = HostLeaf
INFOS = BUFFER + PAGE_4K


class Bare:
    """A module at power-on, and the next step of its initialisation whenever asked."""

    def __init__(self, platform: Platform | None = None) -> None:
        Tracking.world = World()
        self.platform = platform or profile("small")
        self.module = Module(self.platform)
        self.infos = [tdmr.info() for tdmr in self.platform.tdmrs]

    def call(self, leaf: HostLeaf, *operands: int, lp: int = 0) -> Regs:
        return solo_call(self.module.seamcall(lp, Regs(leaf, *operands)))

    def init(self) -> int:
        return self.call(H.TDH_SYS_INIT).rax

    def init_lps(self) -> set[int]:
        return {self.call(H.TDH_SYS_LP_INIT, lp=lp).rax for lp in range(self.platform.num_lps)}

    def config(self, hkid: int | None = None) -> int:
        write = self.module.memory.write
        for i, info in enumerate(self.infos):
            write(BUFFER + 8 * i, (INFOS + 512 * i).to_bytes(8, "little"))
            write(INFOS + 512 * i, info.pack())
        hkid = self.platform.global_private_hkid if hkid is None else hkid
        return self.call(H.TDH_SYS_CONFIG, BUFFER, len(self.infos), hkid).rax

    def set_msr(self, address: int, value: int, *lps: int) -> None:
        for lp in lps or range(self.platform.num_lps):
            self.module.hardware.msrs[lp, address] = value


@pytest.mark.parametrize("name", profile_names())
def test_every_platform_can_be_initialised(name: str) -> None:
    bare = Bare(profile(name))
    assert bare.init() == Status.TDX_SUCCESS
    assert bare.init_lps() == {Status.TDX_SUCCESS}
    assert bare.config() == Status.TDX_SUCCESS
    assert bare.module.sys.state == SysState.SYSCONFIG_DONE


def test_steps_in_the_wrong_order() -> None:
    bare = Bare()
    assert bare.call(H.TDH_SYS_LP_INIT).rax == Status.TDX_SYS_LP_INIT_NOT_PENDING
    assert bare.call(H.TDH_SYS_INFO, BUFFER, 1024, INFOS, 32).rax == Status.TDX_SYS_LP_INIT_NOT_DONE
    assert bare.config() == Status.TDX_SYS_CONFIG_NOT_PENDING
    assert bare.call(H.TDH_SYS_INIT, 1).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    assert bare.init() == Status.TDX_SUCCESS
    assert bare.init() == Status.TDX_SYS_INIT_NOT_PENDING
    assert bare.call(H.TDH_SYS_LP_INIT, lp=1).rax == Status.TDX_SUCCESS
    assert bare.call(H.TDH_SYS_LP_INIT, lp=1).rax == Status.TDX_SYS_LP_INIT_DONE
    assert bare.config() == Status.TDX_SYS_CONFIG_NOT_PENDING  # LPs are missing
    assert bare.call(H.TDH_SYS_UPDATE).rax == Status.TDX_SYS_STATE_INCORRECT
    assert bare.call(H.TDH_SYS_KEY_CONFIG).rax == Status.TDX_SYS_KEY_CONFIG_NOT_PENDING
    assert bare.init_lps() == {Status.TDX_SUCCESS, Status.TDX_SYS_LP_INIT_DONE}
    assert bare.call(H.TDH_SYS_UPDATE).rax == Status.TDX_SYS_INVALID_HANDOFF
    assert bare.config() == Status.TDX_SUCCESS
    assert bare.call(H.TDH_MNG_CREATE, 0, 33).rax == Status.TDX_SYS_NOT_READY


def test_the_last_package_makes_the_module_ready() -> None:
    bare = Bare(profile("default"))
    bare.init(), bare.init_lps(), bare.config()
    one, other = (bare.platform.lp_package.index(package) for package in range(2))
    assert bare.call(H.TDH_SYS_KEY_CONFIG, lp=one).rax == Status.TDX_SUCCESS
    assert bare.call(H.TDH_SYS_KEY_CONFIG, lp=one).rax == Status.TDX_KEY_CONFIGURED
    assert bare.module.sys.state == SysState.SYSCONFIG_DONE
    assert bare.call(H.TDH_SYS_KEY_CONFIG, lp=other).rax == Status.TDX_SUCCESS
    assert bare.module.sys.state == SysState.READY


def test_a_key_that_cannot_be_made() -> None:
    bare = Bare()
    bare.init(), bare.init_lps(), bare.config()
    inputs = bare.module.hardware.inputs
    inputs.pconfig_error = PconfigStatus.ENTROPY_ERROR
    assert bare.call(H.TDH_SYS_KEY_CONFIG).rax == Status.TDX_KEY_GENERATION_FAILED
    inputs.pconfig_error = PconfigStatus.DEVICE_BUSY
    assert bare.call(H.TDH_SYS_KEY_CONFIG).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.KET)
    inputs.pconfig_error = PconfigStatus.INVALID_KEYID
    with pytest.raises(ModuleHalt):
        bare.call(H.TDH_SYS_KEY_CONFIG)
    with pytest.raises(ModuleHalt):
        bare.call(H.TDH_SYS_LP_SHUTDOWN)


def test_no_random_numbers() -> None:
    bare = Bare()
    bare.module.hardware.inputs.entropy_exhausted = True
    assert bare.init() == Status.TDX_RND_NO_ENTROPY
    bare.module.hardware.inputs.entropy_exhausted = False
    assert bare.init() == Status.TDX_SUCCESS
    bare.module.hardware.inputs.entropy_exhausted = True
    assert bare.init_lps() == {Status.TDX_RND_NO_ENTROPY}


def test_a_busy_module_lock() -> None:
    bare = Bare()
    lock = bare.module.sys_lock
    solo_call(lock.acquire(Mode.SHARED))
    assert bare.init() == Status.TDX_SYS_BUSY
    solo_call(lock.release(Mode.SHARED))
    assert bare.init() == Status.TDX_SUCCESS
    solo_call(lock.acquire(Mode.EXCLUSIVE))
    assert bare.init_lps() == {Status.TDX_SYS_BUSY}


# -- the platform ----------------------------------------------------------------------------------------------------

#: MSR, a value that TDH.SYS.INIT refuses, and the status.
REFUSED = [
    (msrs.IA32_ARCH_CAPABILITIES, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_XAPIC_DISABLE_STATUS, 3, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_MISC_PACKAGE_CTLS, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_PERF_CAPABILITIES, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_BASIC, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_PROCBASED_CTLS2, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_TRUE_ENTRY_CTLS, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_MISC, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_EPT_VPID_CAP, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_CR0_FIXED0, 0x2_0000, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_VMX_CR4_FIXED1, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_TME_ACTIVATE, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_TME_CAPABILITY, 0, Status.TDX_INCORRECT_MSR_VALUE),
    (msrs.IA32_WBNOINVDP, 1, Status.TDX_INCORRECT_MSR_VALUE),
]


@pytest.mark.parametrize(("address", "value", "status"), REFUSED)
def test_msrs_that_the_module_refuses(address: int, value: int, status: int) -> None:
    bare = Bare()
    bare.set_msr(address, value)
    assert bare.init() == status + address
    assert bare.module.sys.state == SysState.SYSINIT_PENDING


def test_smrr() -> None:
    low = MemoryRange(0x7F80_0000, 0x80_0000)
    bare = Bare(replace(profile("small"), smrr=low))
    assert bare.init() == with_details(Status.TDX_SMRR_OVERLAPS_CMR, 0, 0)
    bare = Bare()
    mask = bare.module.hardware.rdmsr(0, msrs.SMRR_MASK)
    for value, status in [
        (mask & ~msrs.SMRR_LOCK, Status.TDX_SMRR_NOT_LOCKED),
        (0xFF60_0C00, Status.TDX_INVALID_SMRR_CONFIGURATION),
        (0xC00, Status.TDX_INVALID_SMRR_CONFIGURATION),
        (mask & ~msrs.SMRR_VALID, Status.TDX_SUCCESS),
    ]:
        bare.set_msr(msrs.SMRR_MASK, value)
        assert bare.init() == status


def test_too_many_keyids() -> None:
    bare = Bare()
    bare.set_msr(msrs.IA32_MKTME_KEYID_PARTITIONING, 2017 << 32 | 31)
    assert bare.init() == with_operand(Status.TDX_NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, 2048)


@pytest.mark.parametrize("address", [*msrs.COMPARED_BEFORE_CPUID, *msrs.COMPARED_AFTER_CPUID])
def test_an_lp_that_differs(address: int) -> None:
    bare = Bare()
    bare.init()
    bare.set_msr(address, bare.module.hardware.rdmsr(1, address) ^ 1 << 40, 1)
    status = bare.call(H.TDH_SYS_LP_INIT, lp=1).rax
    smrr2 = address in (msrs.SMRR2_BASE, msrs.SMRR2_MASK)  # this CPU has none
    assert status == (Status.TDX_SUCCESS if smrr2 else Status.TDX_INCONSISTENT_MSR + address)
    assert bare.call(H.TDH_SYS_LP_INIT, lp=2).rax == Status.TDX_SUCCESS


# -- TDMRs -----------------------------------------------------------------------------------------------------------


def test_operands_of_config() -> None:
    bare = Bare()
    bare.init(), bare.init_lps(), bare.config(hkid=0)
    hkid = bare.platform.global_private_hkid
    for operands, operand in [
        ((BUFFER + 8, 1, hkid), Operand.RCX),
        ((1 << 52, 1, hkid), Operand.RCX),
        ((bare.platform.pa_format.with_hkid(BUFFER, hkid), 1, hkid), Operand.RCX),
        ((bare.platform.seamrr.base, 1, hkid), Operand.RCX),
        ((BUFFER, 0, hkid), Operand.RDX),
        ((BUFFER, 65, hkid), Operand.RDX),
        ((BUFFER, 1, hkid - 1), Operand.R8),
        ((BUFFER, 1, hkid | 1 << 16), Operand.R8),
    ]:
        assert bare.call(H.TDH_SYS_CONFIG, *operands).rax == with_operand(Status.TDX_OPERAND_INVALID, operand)
    assert bare.module.kot[hkid].state == KotState.HKID_FREE
    bare.module.memory.write(BUFFER, (INFOS + 8).to_bytes(8, "little"))
    assert bare.call(H.TDH_SYS_CONFIG, BUFFER, 1, hkid).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    # Here the module has already settled for the HKID.
    assert bare.module.kot[hkid].state == KotState.HKID_RESERVED


def reserved(info: TdmrInfo, *areas: tuple[int, int]) -> TdmrInfo:
    blank = info.reserved_areas[-1]
    filled = tuple(replace(blank, offset=offset, size_bytes=size) for offset, size in areas)
    return replace(info, reserved_areas=filled + (blank,) * (16 - len(areas)))


INFO = profile("small").tdmrs[0].info()
SIZE = INFO.size_bytes
FIRST = INFO.reserved_areas[0]
#: A change of the only TDMR, and the status with its details.
BAD_TDMRS = {
    "unaligned": (replace(INFO, base=INFO.base + PAGE_2M), with_details(Status.TDX_INVALID_TDMR, 0)),
    "empty": (replace(INFO, size_bytes=0), with_details(Status.TDX_INVALID_TDMR, 0)),
    "wraps": (replace(INFO, base=-PAGE_1G & (1 << 64) - 1), with_details(Status.TDX_INVALID_TDMR, 0)),
    "hkid": (replace(INFO, base=INFO.base | 1 << 46), with_details(Status.TDX_INVALID_TDMR, 0)),
    "pamt unaligned": (replace(INFO, pamt_4k_base=INFO.pamt_4k_base + 8), with_details(Status.TDX_INVALID_PAMT, 0, 0)),
    "pamt small": (replace(INFO, pamt_2m_size=PAGE_4K), with_details(Status.TDX_INVALID_PAMT, 0, 1)),
    "pamt empty": (replace(INFO, pamt_1g_size=0), with_details(Status.TDX_INVALID_PAMT, 0, 2)),
    "pamts overlap": (
        replace(INFO, pamt_1g_base=INFO.pamt_2m_base),
        with_details(Status.TDX_PAMT_OVERLAP, 0, 1, 0),
    ),
    "pamt in the open": (
        replace(INFO, pamt_1g_base=INFO.base + PAGE_2M),
        with_details(Status.TDX_PAMT_OVERLAP, 0, 2, 0),
    ),
    "pamt outside": (replace(INFO, pamt_1g_base=1 << 40), with_details(Status.TDX_PAMT_OUTSIDE_CMRS, 0, 2)),
    "gap in the list": (
        reserved(INFO, (FIRST.offset, FIRST.size_bytes), (0, 0), (SIZE - PAGE_4K, PAGE_4K)),
        with_details(Status.TDX_NON_ORDERED_RESERVED_IN_TDMR, 0, 1),
    ),
    "unordered": (
        reserved(INFO, (SIZE - PAGE_4K, PAGE_4K), (FIRST.offset, FIRST.size_bytes)),
        with_details(Status.TDX_NON_ORDERED_RESERVED_IN_TDMR, 0, 1),
    ),
    "reserved beyond": (reserved(INFO, (SIZE, PAGE_4K)), with_details(Status.TDX_INVALID_RESERVED_IN_TDMR, 0, 0)),
    "reserved unaligned": (reserved(INFO, (0, 512)), with_details(Status.TDX_INVALID_RESERVED_IN_TDMR, 0, 0)),
}


@pytest.mark.parametrize(("info", "status"), BAD_TDMRS.values(), ids=BAD_TDMRS.keys())
def test_tdmrs_that_the_module_refuses(info: TdmrInfo, status: int) -> None:
    bare = Bare()
    bare.init(), bare.init_lps()
    bare.infos = [info]
    assert bare.config() == status
    bare.infos = [INFO]
    assert bare.config() == Status.TDX_SUCCESS


def test_tdmrs_must_ascend() -> None:
    bare = Bare(profile("default"))
    bare.init(), bare.init_lps()
    bare.infos = bare.infos[::-1]
    assert bare.config() == with_details(Status.TDX_NON_ORDERED_TDMR, 1)


def test_memory_outside_the_cmrs_must_be_reserved() -> None:
    small = profile("small")
    half = replace(small, cmrs=(MemoryRange(small.cmrs[0].base, small.cmrs[0].size // 2), *small.cmrs[1:]))
    bare = Bare(half)
    bare.init(), bare.init_lps()
    # The PAMT lies in the lost half: that is what the module sees first.
    assert bare.config() >> 32 in (Status.TDX_PAMT_OUTSIDE_CMRS >> 32, Status.TDX_TDMR_OUTSIDE_CMRS >> 32)


@given(st.integers(1, 64), st.integers(0, (1 << 52) - 1))
def test_cmrs_that_touch_count_as_one(pieces: int, start: int) -> None:
    from septum.tdx.tdmr_checks import is_in_cmr  # noqa: PLC0415

    size = 4096
    cmrs = [MemoryRange(start + i * size, size) for i in range(pieces)]
    assert is_in_cmr(cmrs, MemoryRange(start, pieces * size))
    assert not is_in_cmr(cmrs, MemoryRange(start, pieces * size + 1))
    assert pieces < 3 or not is_in_cmr(cmrs[:1] + cmrs[2:], MemoryRange(start, pieces * size))


def test_pamt_initialisation_advances_in_whole_gib() -> None:
    machine = Machine()
    tdmr = machine.platform.tdmrs[0]
    assert machine.call(H.TDH_SYS_TDMR_INIT, rcx=tdmr.base).rax == Status.TDX_TDMR_ALREADY_INITIALIZED
    bare = Bare()
    bare.init(), bare.init_lps(), bare.config()
    for package in range(bare.platform.num_packages):
        bare.call(H.TDH_SYS_KEY_CONFIG, lp=bare.platform.lp_package.index(package))
    page = tdmr.available[0].base
    assert bare.call(H.TDH_PHYMEM_PAGE_RDMD, page).rax == with_operand(Status.TDX_OPERAND_ADDR_RANGE_ERROR, Operand.RCX)
    calls = PAGE_1G // PAGE_2M // 2
    done = [bare.call(H.TDH_SYS_TDMR_INIT, tdmr.base).rdx for _ in range(calls)]
    assert set(done[:-1]) == {tdmr.base}
    assert done[-1] == tdmr.base + PAGE_1G
    assert bare.call(H.TDH_PHYMEM_PAGE_RDMD, page).rax == Status.TDX_SUCCESS
    for address in (tdmr.base + PAGE_4K, tdmr.end, 1 << 46, 1 << 52):
        wrong = with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
        assert bare.call(H.TDH_SYS_TDMR_INIT, address).rax == wrong
    solo_call(bare.module.tdmr_locks[0].acquire(Mode.EXCLUSIVE))
    assert bare.call(H.TDH_SYS_TDMR_INIT, tdmr.base).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)


# -- information and the end -----------------------------------------------------------------------------------------


def test_info_tells_of_the_module_and_the_cmrs() -> None:
    machine = Machine()
    regs = machine.ok(H.TDH_SYS_INFO, rcx=BUFFER, rdx=1024, r8=INFOS, r9=32)
    assert (regs.rdx, regs.r9) == (1024, 32)
    info = TdSysInfo.unpack(machine.module.memory.read(BUFFER, 1024))
    assert (info.vendor_id, info.major_version, info.minor_version) == (0x8086, 1, 5)
    assert info.tdcs_base_size == info.tdvps_base_size == 6 * PAGE_4K
    assert info.attributes_fixed0 & info.attributes_fixed1 == info.attributes_fixed1
    cmrs = machine.module.memory.read(INFOS, 512)
    first = machine.platform.cmrs[0]
    assert cmrs[:16] == first.base.to_bytes(8, "little") + first.size.to_bytes(8, "little")
    assert not any(cmrs[16 * len(machine.platform.cmrs) :])


def test_a_bad_cmr_buffer_leaves_the_first_one_zeroed() -> None:
    machine = Machine()
    machine.module.memory.write(BUFFER, b"\xff" * 1024)
    operands = {"rcx": BUFFER, "rdx": 1024, "r8": INFOS, "r9": 32}
    answer = machine.call(H.TDH_SYS_INFO, **{**operands, "rdx": 1023}).rax
    assert answer == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
    assert machine.module.memory.read(BUFFER, 1024) == b"\xff" * 1024
    answer = machine.call(H.TDH_SYS_INFO, **{**operands, "r9": 31}).rax
    assert answer == with_operand(Status.TDX_OPERAND_INVALID, Operand.R9)
    assert not any(machine.module.memory.read(BUFFER, 1024))


def test_shutdown_waits_for_guests_to_leave() -> None:
    machine = Machine()
    tdr, tdvpr = machine.finalized_td()
    machine.call(H.TDH_VP_ENTER, rcx=tdvpr)
    assert machine.module.lps[0].running == tdvpr
    assert machine.call(H.TDH_SYS_SHUTDOWN, lp=1, rcx=1).rax == Status.TDX_OPERAND_INVALID + Operand.RCX
    assert machine.call(H.TDH_SYS_SHUTDOWN, lp=1).rax == Status.TDX_SYS_BUSY
    machine.module.hardware.inputs.tsc += 1 << 20  # too soon after entry, an interrupt would arouse suspicion
    solo_call(machine.module.td_exit(0, VmExit(ExitReason.INTERRUPT)))
    assert machine.call(H.TDH_SYS_SHUTDOWN, lp=1).rax == Status.TDX_SUCCESS
    assert machine.call(H.TDH_PHYMEM_PAGE_RDMD, rcx=tdr).rax == Status.TDX_SYS_SHUTDOWN
    assert machine.call(H.TDH_SYS_LP_SHUTDOWN).rax == Status.TDX_SUCCESS


def test_locks_of_the_platform() -> None:
    machine = Machine(boot=False)
    assert machine.locks_of(H.TDH_SYS_INIT) == [("SYS", "EXCLUSIVE")]
    assert machine.locks_of(H.TDH_SYS_LP_INIT) == [("SYS", "SHARED")]
    machine = Machine()
    assert machine.locks_of(H.TDH_SYS_KEY_CONFIG) == [("SYS", "EXCLUSIVE")]
    base = machine.platform.tdmrs[0].base
    assert machine.locks_of(H.TDH_SYS_TDMR_INIT, rcx=base) == [("TDMR[0]", "EXCLUSIVE")]
    assert machine.locks_of(H.TDH_SYS_INFO, rcx=BUFFER, rdx=1024, r8=INFOS, r9=32) == []
