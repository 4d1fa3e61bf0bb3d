"""Importing virtual CPUID values: whether this platform can give the TD what it saw on the other one.

Source: TDX Module 1.5.01, ``check_cpuid_compatibility_and_set_flags`` in
``src/common/metadata_handlers/metadata_td.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from septum.arch.cpuid import NO_BITS, CpuidEntry, Registers, xfam_bits
from septum.arch.structures import TdAttributes
from septum.tdx.td_params.checks import LBR, PT, TILECFG, TILEDATA, has
from septum.tdx.td_params.configure import MAX_CPUID_VALUES
from septum.tdx.td_params.cpuid import TSX_CTRL
from septum.tdx.td_params.msrs import DDPD_U
from septum.tdx.td_params.native import MAX_XFAM_BIT

if TYPE_CHECKING:
    from septum.tdx.metadata.scope import Scope
    from septum.tdx.state.td import Tdcs
    from septum.tdx.td_params import NativeCpu

_KEY_LOCKER, _PKS, _XFD = 23, 31, 4


def import_cpuid(scope: Scope, entry: CpuidEntry, value: Registers) -> bool:
    """Whether the TD can have these values of a leaf; if so, the leaf is valid, and flags of the TD are set."""
    cpu, tdcs = scope.module.native_cpu, scope.of_td.tdcs
    native = cpu.cpuid_values[entry.index]
    if value & entry.fixed0_or_dynamic != NO_BITS or ~value & entry.fixed1 != NO_BITS:
        return False
    if entry.config_index is not None and value & entry.allow_direct & ~native != NO_BITS:
        return False
    special = _SPECIAL.get(entry.leaf)
    if special is not None and not special(cpu, tdcs, entry, value):
        return False
    valid = tdcs.cpuid_valid or (0,) * MAX_CPUID_VALUES
    tdcs.cpuid_valid = (*valid[: entry.index], 1, *valid[entry.index + 1 :])
    return True


def _fits_xfam(tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    """Whether no bit is set that an extended feature brings which the TD has not."""
    depending = xfam_bits(entry.leaf, entry.subleaf).items()
    return all(has(tdcs.xfam, bit) or value & bits == NO_BITS for bit, bits in depending)


def _version(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    if not cpu.allows_fms(value.eax) or not _fits_xfam(tdcs, entry, value):
        return False
    tdcs.cpuid_flags = tdcs.cpuid_flags._replace(
        monitor_mwait=has(value.ecx, 3), dca=has(value.ecx, 18), tsc_deadline=has(value.ecx, 24)
    )
    return True


def _monitor(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    expected = cpu.cpuid_values[entry.index] & ~entry.fixed0_or_dynamic if tdcs.cpuid_flags.monitor_mwait else NO_BITS
    return value == expected


def _features(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    if entry.subleaf == 2:
        tdcs.cpuid_flags = tdcs.cpuid_flags._replace(ddpd=has(value.edx, 3))
        tdcs.ia32_spec_ctrl_mask = 0 if tdcs.cpuid_flags.ddpd else DDPD_U
        return True
    if entry.subleaf > 2 or not _fits_xfam(tdcs, entry, value):
        return False
    if entry.subleaf == 1:
        return True
    hle, rtm = has(value.ebx, 4), has(value.ebx, 11)
    if hle != rtm or (hle and not has(cpu.arch_capabilities, TSX_CTRL)):
        return False
    tdcs.cpuid_flags = tdcs.cpuid_flags._replace(tsx=hle)
    if has(value.ecx, _PKS) != bool(tdcs.attributes & TdAttributes.PKS) or has(value.ecx, _KEY_LOCKER):
        return False
    tdcs.cpuid_flags = tdcs.cpuid_flags._replace(
        waitpkg=has(value.ecx, 5), tme=has(value.ecx, 13), la57=has(value.ecx, 16), mktme=has(value.edx, 18)
    )
    return True


def _perfmon(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    """All of the CPU's counters, or none."""
    return value == (cpu.cpuid_values[entry.index] if tdcs.attributes & TdAttributes.PERFMON else NO_BITS)


def _xstate(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    if entry.subleaf == 0:
        return _fits_xfam(tdcs, entry, value) and value.ecx == cpu.cpu.cpuid(entry.leaf).ebx
    if entry.subleaf == 1:
        xfd = has(value.eax, _XFD)
        if not _fits_xfam(tdcs, entry, value) or (xfd and not has(cpu.cpu.cpuid(entry.leaf, 1).eax, _XFD)):
            return False
        tdcs.cpuid_flags = tdcs.cpuid_flags._replace(xfd=xfd)
        return True
    return entry.subleaf > MAX_XFAM_BIT or has(tdcs.xfam, entry.subleaf) or value == NO_BITS


def _tsc(cpu: NativeCpu, tdcs: Tdcs, entry: CpuidEntry, value: Registers) -> bool:
    return value.ebx == tdcs.tsc_frequency


_Check = Callable[["NativeCpu", "Tdcs", CpuidEntry, Registers], bool]


def _only_with(*features: int) -> _Check:
    """A leaf that is all 0 unless the TD has these extended features."""
    return lambda cpu, tdcs, entry, value: all(has(tdcs.xfam, bit) for bit in features) or value == NO_BITS


_SPECIAL: dict[int, _Check] = {
    0x1: _version,
    0x5: _monitor,
    0x7: _features,
    0xA: _perfmon,
    0xD: _xstate,
    0x14: _only_with(PT),
    0x15: _tsc,
    0x19: lambda cpu, tdcs, entry, value: value == NO_BITS,
    0x1C: _only_with(LBR),
    0x1D: _only_with(TILECFG, TILEDATA),
}
