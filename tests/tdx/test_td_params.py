"""TD_PARAMS: which are accepted, and what a TD gets from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.cpuid import Registers, configurable, cpuid_table, index_of, recording_cpu
from septum.arch.leaves import HostLeaf
from septum.arch.msr import Bitmap, bitmap_bit, find_msr, msr_table
from septum.arch.operands import Operand
from septum.arch.platform import profile, profile_names
from septum.arch.status import Status, with_operand
from septum.arch.structures import ConfigFlags, CpuidValues, TdAttributes, TdParams
from septum.lab.conform import conform_files
from septum.tdx.outcome import Fail
from septum.tdx.registers import Regs
from septum.tdx.state.hardware import IA32_INTR_PENDING
from septum.tdx.state.td import CpuidFlags
from septum.tdx.td_params import NativeCpu
from septum.tdx.td_params.checks import (
    TSC_FREQUENCY_UNIT,
    attributes_allowed,
    eptp_allowed,
    tsc_parameters,
    xbuff_layout,
    xfam_allowed,
)
from septum.tdx.td_params.cpuid import VirtualCpuid
from septum.tdx.td_params.msrs import arch_capabilities, msr_bitmaps, vmx_msrs
from tests.tdx.machines import BUFFER, MIN_TDCX, PARAMS, Machine

CPU = NativeCpu(recording_cpu())
ALL_FEATURES = 0x61BE7
U64 = (1 << 64) - 1


@pytest.fixture(scope="module")
def machine() -> Machine:
    """A machine with TDs to initialise; a test that succeeds in that uses up one TD."""
    return Machine()


def refused(machine: Machine, params: TdParams, tdr: int | None = None) -> tuple[int, int]:
    """Status and RCX of a TDH.MNG.INIT that fails."""
    regs = machine.init_td(machine.td_with_tdcs() if tdr is None else tdr, params)
    return regs.rax, regs.rcx


@pytest.fixture(scope="module")
def waiting_td(machine: Machine) -> int:
    """A TD that waits for TDH.MNG.INIT."""
    return machine.td_with_tdcs()


# -- single checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(64))
def test_attributes_have_five_known_bits(bit: int) -> None:
    assert attributes_allowed(1 << bit) == (bit in (0, 28, 29, 30, 63))


def test_migratable_td_is_neither_debug_nor_perfmon() -> None:
    migratable = TdAttributes.MIGRATABLE
    assert attributes_allowed(migratable | TdAttributes.PKS | TdAttributes.SEPT_VE_DISABLE)
    assert not attributes_allowed(migratable | TdAttributes.DEBUG)
    assert not attributes_allowed(migratable | TdAttributes.PERFMON)
    assert attributes_allowed(TdAttributes.DEBUG | TdAttributes.PERFMON)


@pytest.mark.parametrize("xfam", [0x3, 0x7, 0xE7, 0x203, 0x103, 0x1803, 0x60003, ALL_FEATURES])
def test_xfam_that_is_consistent(xfam: int) -> None:
    assert xfam_allowed(xfam, CPU)


@pytest.mark.parametrize("xfam", [0, 1, 2, 0x23, 0x27, 0xE3, 0x803, 0x1003, 0x20003, 0x40003, 0x13, 0x403, 1 << 63 | 3])
def test_xfam_that_is_not(xfam: int) -> None:
    assert not xfam_allowed(xfam, CPU)


@given(st.integers(0, U64))
def test_xfam_beyond_the_cpu_is_never_accepted(xfam: int) -> None:
    if xfam_allowed(xfam, CPU):
        assert xfam & ~CPU.xfam_fixed0 == 0
        assert xfam & 3 == 3


def test_eptp_is_write_back_with_four_or_five_levels() -> None:
    assert [eptp for eptp in range(1 << 12) if eptp_allowed(eptp, 0, CPU)] == [0x1E, 0x26]
    assert [eptp for eptp in range(1 << 12) if eptp_allowed(eptp, 1, CPU)] == [0x26]
    assert not eptp_allowed(1 << 12 | 0x1E, 0, CPU)


@given(st.integers(4, 400), st.integers(1_000_000_000, 5_000_000_000), st.integers(0, 1 << 63))
def test_virtual_tsc_starts_at_zero_and_runs_at_its_frequency(frequency: int, native: int, tsc: int) -> None:
    multiplier, offset = tsc_parameters(tsc, native, frequency)
    assert (tsc * multiplier >> 48) + offset & U64 == 0
    a_second_later = ((tsc + native) * multiplier >> 48) + offset & U64
    assert abs(a_second_later - frequency * TSC_FREQUENCY_UNIT) <= 1 + (native >> 48)


@given(st.integers(0, ALL_FEATURES).map(lambda bits: bits & CPU.xfam_fixed0 | 3))
def test_xsave_components_lie_one_behind_the_other(xfam: int) -> None:
    offsets, size = xbuff_layout(xfam, CPU)
    end = 576
    for bit, component in enumerate(CPU.xsave_components):
        if bit > 1 and xfam >> bit & 1:
            assert end <= offsets[bit] < end + 64
            assert not component.aligned or offsets[bit] % 64 == 0
            end = offsets[bit] + component.size
        else:
            assert offsets[bit] == 0
    assert size == end


# -- IA32_ARCH_CAPABILITIES, IA32_VMX_*, bitmaps ---------------------------------------------------------------------


def test_arch_capabilities_follow_cpu_host_and_tsx() -> None:
    ssb_no, rrsba, tsx_ctrl = 1 << 4, 1 << 19, 1 << 7
    native = CPU.arch_capabilities | ssb_no | tsx_ctrl
    plain = arch_capabilities(native, 0, tsx=False)
    assert plain is not None
    assert plain & (ssb_no | rrsba & ~native | tsx_ctrl) == 0
    assert arch_capabilities(native, ssb_no, tsx=True) == plain | ssb_no | tsx_ctrl
    assert arch_capabilities(native & ~ssb_no, ssb_no, tsx=False) == plain
    assert arch_capabilities(native & ~rrsba, rrsba, tsx=False) == plain | rrsba


@pytest.mark.parametrize("bit", [b for b in range(64) if b not in (4, 19, 20, 24)])
def test_arch_capabilities_that_the_host_has_no_say_in(bit: int) -> None:
    assert arch_capabilities(CPU.arch_capabilities, 1 << bit, tsx=True) is None


def exits(bitmaps: bytes, address: int, *, write: bool) -> bool:
    place = bitmap_bit(address, write=write)
    return place is None or bool(bitmaps[place[0]] >> place[1] & 1)


def test_bitmaps_of_a_plain_td_let_only_fixed_0_accesses_through() -> None:
    bitmaps = msr_bitmaps(CPU, 0, 3, CpuidFlags())
    through = {b for b in range(8 * 4096) if not bitmaps[b // 8] >> b % 8 & 1}
    expected = set()
    for row in msr_table():
        for handling, write in ((row.read, False), (row.write, True)):
            for address in range(row.start, row.end + 1) if handling.bitmap is Bitmap.FIXED_0 else ():
                place = bitmap_bit(address, write=write)
                assert place is not None
                expected.add(8 * place[0] + place[1])
    assert through == expected


@pytest.mark.parametrize(
    ("attributes", "xfam", "flags", "address"),
    [
        (TdAttributes.PERFMON, 3, CpuidFlags(), 0x38F),
        (0, 3 | 1 << 8, CpuidFlags(), 0x570),
        (0, 3 | 3 << 11, CpuidFlags(), 0x6A0),
        (0, 3 | 1 << 15, CpuidFlags(), 0x14CE),
        (0, 3, CpuidFlags(waitpkg=True), 0xE1),
        (0, 3, CpuidFlags(xfd=True), 0x1C4),
        (0, 3, CpuidFlags(tsx=True), 0x122),
        (TdAttributes.PKS, 3, CpuidFlags(), 0x6E1),
        (TdAttributes.PERFMON, 3 | 1 << 8, CpuidFlags(), 0x345),
    ],
)
def test_a_feature_lets_its_msrs_through(attributes: int, xfam: int, flags: CpuidFlags, address: int) -> None:
    assert find_msr(address) is not None
    assert exits(msr_bitmaps(CPU, 0, 3, CpuidFlags()), address, write=False)
    assert not exits(msr_bitmaps(CPU, attributes, xfam, flags), address, write=False)


@given(st.sampled_from([0, 1, 1 << 30, 1 << 63]), st.sampled_from([3, 0x1803, ALL_FEATURES]), st.booleans())
def test_vmx_controls_that_must_be_1_may_be_1(attributes: int, xfam: int, feature: bool) -> None:
    msrs = vmx_msrs(CPU, attributes, xfam, CpuidFlags(*[feature] * 10))
    for name, value in msrs.items():
        if name.endswith(("CTLS", "CTLS2")):
            assert value & 0xFFFF_FFFF & ~(value >> 32) == 0
    assert msrs["CR4_FIXED0"] & ~msrs["CR4_FIXED1"] == 0
    assert bool(msrs["CR4_FIXED1"] >> 24 & 1) == bool(attributes & TdAttributes.PKS)
    assert bool(msrs["CR4_FIXED1"] >> 23 & 1) == (xfam >> 11 & 3 == 3)


# -- CPUID -----------------------------------------------------------------------------------------------------------


def virtual(params: TdParams, leaf: int, subleaf: int = 0) -> Registers:
    index = index_of(leaf, subleaf)
    assert index is not None
    return VirtualCpuid(CPU, params, Regs()).values[index]


def with_config(leaf: int, subleaf: int, values: CpuidValues, params: TdParams = PARAMS) -> TdParams:
    """TD_PARAMS with one of its CPUID_CONFIG entries set."""
    place = next(i for i, e in enumerate(configurable()) if (e.leaf, e.subleaf) == (leaf, subleaf))
    config = (*params.cpuid_config[:place], values, *params.cpuid_config[place + 1 :])
    return replace(params, cpuid_config=config)


def test_cpuid_tells_the_features_that_xfam_allows() -> None:
    assert virtual(PARAMS, 0xD, 2).eax == 0
    assert virtual(replace(PARAMS, xfam=0x7), 0xD, 2).eax == 256
    assert virtual(PARAMS, 0x1D, 1) == Registers(0, 0, 0, 0)
    assert virtual(replace(PARAMS, xfam=0x60003), 0x1D, 1) == CPU.cpuid_values[index_of(0x1D, 1) or 0]
    assert virtual(PARAMS, 0xD, 1).eax >> 4 & 1 == 0
    assert virtual(replace(PARAMS, xfam=0x60003), 0xD, 1).eax >> 4 & 1 == 1


def test_cpuid_tells_attributes_and_tsc() -> None:
    assert virtual(PARAMS, 7).ecx >> 31 == 0
    assert virtual(replace(PARAMS, attributes=TdAttributes.PKS), 7).ecx >> 31 == 1
    assert virtual(PARAMS, 0xA) == Registers(0, 0, 0, 0)
    assert virtual(replace(PARAMS, attributes=TdAttributes.PERFMON), 0xA).eax & 0xFF == 5
    assert virtual(PARAMS, 0x15) == Registers(1, PARAMS.tsc_frequency, TSC_FREQUENCY_UNIT, 0)


def test_host_may_hide_la57_and_the_address_width_follows() -> None:
    la57 = 1 << 16
    assert virtual(PARAMS, 0x8000_0008).eax >> 8 & 0xFF == 48
    allowed = with_config(7, 0, CpuidValues(ecx=la57))
    assert virtual(allowed, 7).ecx & la57
    assert virtual(allowed, 0x8000_0008).eax >> 8 & 0xFF == 57


@given(st.data())
def test_bits_are_fixed_configured_allowed_or_native(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from([e for e in configurable() if e.leaf in (1, 4, 7)]))
    if entry.leaf == 7 and entry.subleaf == 0:
        return
    may = entry.config_direct | entry.allow_direct
    draw = [data.draw(st.integers(0, 0xFFFF_FFFF)) & mask for mask in may]
    draw[0] = 0 if entry.leaf == 1 else draw[0]
    config = Registers(*draw)
    value = virtual(with_config(entry.leaf, entry.subleaf, CpuidValues(*config)), entry.leaf, entry.subleaf)
    if entry.leaf == 1:
        value = value._replace(eax=0)
        config = config._replace(eax=0)
    assert value & entry.config_direct == config & entry.config_direct
    assert value & entry.allow_direct & ~config == Registers(0, 0, 0, 0)
    assert entry.fixed1 & ~entry.allow_direct & ~value == Registers(0, 0, 0, 0) or entry.leaf == 1


@pytest.mark.parametrize("index", range(len(configurable())))
def test_a_bit_that_is_not_configurable_is_refused_with_its_leaf(machine: Machine, waiting_td: int, index: int) -> None:
    entry = configurable()[index]
    forbidden = ~(entry.config_direct | entry.allow_direct)
    register = next(i for i, mask in enumerate(forbidden) if mask)
    values = [0] * 4
    values[register] = forbidden[register] & -forbidden[register]
    params = with_config(entry.leaf, entry.subleaf, CpuidValues(*values))
    wrong = with_operand(Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)
    assert refused(machine, params, waiting_td) == (wrong, entry.subleaf << 32 | entry.leaf)


def test_only_migratable_tds_may_pretend_to_be_another_cpu(machine: Machine, waiting_td: int) -> None:
    fms = recording_cpu().fms
    wrong = with_operand(Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)
    older = with_config(1, 0xFFFF_FFFF, CpuidValues(eax=fms - 1))
    assert refused(machine, older, waiting_td)[0] == wrong
    own = with_config(1, 0xFFFF_FFFF, CpuidValues(eax=fms))
    assert virtual(own, 1).eax == virtual(PARAMS, 1).eax == fms
    migratable = replace(older, attributes=TdAttributes.MIGRATABLE)
    assert virtual(migratable, 1).eax == fms - 1
    newer = with_config(1, 0xFFFF_FFFF, CpuidValues(eax=fms + 1), replace(PARAMS, attributes=TdAttributes.MIGRATABLE))
    assert refused(machine, newer, waiting_td)[0] == wrong


HLE, RTM, TSX_CTRL = 1 << 4, 1 << 11, 1 << 7


def cpu_with_tsx(*, tsx_ctrl: bool) -> NativeCpu:
    """The recorded CPU, with the TSX that it lacks."""
    cpu = recording_cpu()
    features = cpu.leaves[7][0]
    leaves = {**cpu.leaves, 7: {**cpu.leaves[7], 0: features._replace(ebx=features.ebx | HLE | RTM)}}
    arch_caps = cpu.msrs[0x10A] | TSX_CTRL if tsx_ctrl else cpu.msrs[0x10A] & ~TSX_CTRL
    return NativeCpu(replace(cpu, leaves=leaves, msrs={**cpu.msrs, 0x10A: arch_caps}))


@pytest.mark.parametrize("alone", [HLE, RTM])
def test_hle_and_rtm_go_together(alone: int) -> None:
    regs = Regs()
    with pytest.raises(Fail) as failure:
        VirtualCpuid(cpu_with_tsx(tsx_ctrl=True), with_config(7, 0, CpuidValues(ebx=alone)), regs)
    assert failure.value.status == with_operand(Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)
    assert regs.rcx == 0


def test_tsx_needs_tsx_ctrl() -> None:
    params = with_config(7, 0, CpuidValues(ebx=HLE | RTM))
    assert VirtualCpuid(cpu_with_tsx(tsx_ctrl=True), params, Regs()).flags.tsx
    with pytest.raises(Fail) as failure:
        VirtualCpuid(cpu_with_tsx(tsx_ctrl=False), params, Regs())
    assert failure.value.status == Status.TDX_INCORRECT_MSR_VALUE | 0x10A
    assert not VirtualCpuid(cpu_with_tsx(tsx_ctrl=False), PARAMS, Regs()).flags.tsx


# -- TDH.MNG.INIT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "operand"),
    [
        (replace(PARAMS, attributes=2), Operand.ATTRIBUTES),
        (replace(PARAMS, xfam=1), Operand.XFAM),
        (replace(PARAMS, max_vcpus=0), Operand.MAX_VCPUS),
        (replace(PARAMS, num_l2_vms=4), Operand.NUM_L2_VMS),
        (replace(PARAMS, reserved_0=b"\0\0\0\1"), Operand.RDX),
        (replace(PARAMS, config_flags=8), Operand.EXEC_CONTROLS),
        (replace(PARAMS, eptp_controls=0x16), Operand.EPTP_CONTROLS),
        (replace(PARAMS, config_flags=ConfigFlags.GPAW), Operand.EPTP_CONTROLS),
        (replace(PARAMS, tsc_frequency=3), Operand.TSC_FREQUENCY),
        (replace(PARAMS, tsc_frequency=401), Operand.TSC_FREQUENCY),
        (replace(PARAMS, reserved_1=bytes(37) + b"\1"), Operand.RDX),
        (replace(PARAMS, msr_config_ctls=2), Operand.RDX),
        (replace(PARAMS, reserved_2=b"\1" + bytes(23)), Operand.RDX),
        (replace(PARAMS, reserved_3=bytes(575) + b"\1"), Operand.RDX),
        (replace(PARAMS, ia32_arch_capabilities_config=1 << 4), Operand.IA32_ARCH_CAPABILITIES_CONFIG),
        (
            replace(PARAMS, msr_config_ctls=1, ia32_arch_capabilities_config=1),
            Operand.IA32_ARCH_CAPABILITIES_CONFIG,
        ),
        # What is wrong first is reported.
        (replace(PARAMS, attributes=2, xfam=1, max_vcpus=0), Operand.ATTRIBUTES),
        (replace(PARAMS, tsc_frequency=0, reserved_1=b"\1" + bytes(37)), Operand.TSC_FREQUENCY),
    ],
)
def test_wrong_td_params(machine: Machine, waiting_td: int, params: TdParams, operand: Operand) -> None:
    assert refused(machine, params, waiting_td) == (with_operand(Status.TDX_OPERAND_INVALID, operand), 0)


def test_l2_vms_need_pages_and_exclude_migration(machine: Machine, waiting_td: int) -> None:
    assert refused(machine, replace(PARAMS, num_l2_vms=1), waiting_td)[0] == Status.TDX_TDCS_NOT_ALLOCATED
    both = replace(PARAMS, num_l2_vms=1, attributes=TdAttributes.MIGRATABLE)
    tdr = machine.td_with_tdcs(MIN_TDCX + 1)
    assert refused(machine, both, tdr)[0] == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
    assert machine.init_td(tdr, replace(PARAMS, num_l2_vms=1)).rax == Status.TDX_SUCCESS


def test_hardware_that_the_host_has_tampered_with(waiting_td: int, machine: Machine) -> None:
    msrs = machine.module.hardware.msrs
    for address, value, status in (
        (0x3B, 1, Status.TDX_INCONSISTENT_MSR | 0x3B),
        (0x1A0, 1 << 22, Status.TDX_LIMIT_CPUID_MAXVAL_SET),
    ):
        msrs[0, address] = value
        assert refused(machine, PARAMS, waiting_td)[0] == status
        del msrs[0, address]
    assert not machine.module.hardware.interrupt_pending(0)
    msrs[0, IA32_INTR_PENDING] = 1
    assert machine.module.hardware.interrupt_pending(0)
    del msrs[0, IA32_INTR_PENDING]


def test_a_failure_changes_nothing_and_the_next_try_can_succeed(machine: Machine) -> None:
    tdr = machine.td_with_tdcs()
    td = machine.module.td(tdr)
    assert refused(machine, replace(PARAMS, attributes=1, reserved_3=b"\1" + bytes(575)), tdr)[0] != 0
    assert (td.tdcs.attributes, td.tdcs.op_state, td.tdcs.eptp) == (0, 0, 0)
    assert machine.init_td(tdr).rax == Status.TDX_SUCCESS
    assert td.tdcs.eptp & 0xFFF == PARAMS.eptp_controls
    assert td.tdcs.eptp >> 12 == machine.module.pa_format.address(td.tdr.tdcx_pa[3]) >> 12
    assert td.tdcs.td_epoch == 1
    assert td.tdcs.hp_lock_timeout == machine.platform.tsc_hz
    assert len(td.tdcs.cpuid_values) == 2 * len(cpuid_table())
    again = machine.call(HostLeaf.TDH_MNG_INIT, rcx=tdr, rdx=BUFFER)
    assert again.rax == Status.TDX_OP_STATE_INCORRECT


@pytest.mark.parametrize("name", [name for name in profile_names() if "1t" not in name and "b457" not in name])
def test_ordinary_td_params_suit_every_platform(name: str) -> None:
    machine = Machine(profile(name))
    tdr = machine.td(replace(PARAMS, xfam=0xE7, attributes=TdAttributes.SEPT_VE_DISABLE))
    assert machine.module.td(tdr).tdcs.td_ctls == 1


def test_recorded_variations(shared: Path) -> None:
    report = conform_files([shared / "vectors" / "guest" / "tdparams.jsonl.gz"], limit=400, leaf="TDH.MNG.INIT")
    assert report.events >= 300
    assert report.differences == []
