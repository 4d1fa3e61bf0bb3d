"""Virtual CPUID: from the CPU's values and the host's configuration to what a TD sees.

Source: TDX Module 1.5.01, ``read_and_set_cpuid_configurations`` in ``tdh_mng_init.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from septum.arch.cpuid import NO_BITS, CpuidEntry, Registers, cpuid_table, xfam_bits
from septum.arch.operands import Operand
from septum.arch.platform_msrs import IA32_ARCH_CAPABILITIES
from septum.arch.status import Status
from septum.arch.structures import TdAttributes, TdParams
from septum.tdx.outcome import Fail, check
from septum.tdx.registers import Regs
from septum.tdx.state.td import CpuidFlags
from septum.tdx.td_params.checks import LBR, PT, TILECFG, TILEDATA, has
from septum.tdx.td_params.native import NativeCpu

TSX_CTRL: Final = 7
"""Bit of IA32_ARCH_CAPABILITIES."""
_PKS: Final = 1 << 31
_KEY_LOCKER: Final = 1 << 23
_XFD: Final = 1 << 4
_LA_BITS_SHIFT: Final = 8


class VirtualCpuid:
    """The computation for one TD. ``values`` has an entry for each of ``cpuid_table`` when it is done.

    :raises Fail: OPERAND_INVALID(CPUID_CONFIG), for a bit that is not configurable or a wrong family/model/stepping
        with the leaf and sub-leaf in RCX; INCORRECT_MSR_VALUE when TSX is wanted and IA32_TSX_CTRL does not exist.
    """

    def __init__(self, cpu: NativeCpu, params: TdParams, regs: Regs) -> None:
        self.cpu = cpu
        self.params = params
        self.flags = CpuidFlags()
        self.values: list[Registers] = []
        for entry, native in zip(cpuid_table(), cpu.cpuid_values, strict=True):
            value = native
            if entry.config_index is not None:
                value = self._configured(entry, native, regs)
            for bit, depending in xfam_bits(entry.leaf, entry.subleaf).items():
                if not has(params.xfam, bit):
                    value &= ~depending
            if entry.leaf in _SPECIAL:
                value = _SPECIAL[entry.leaf](self, entry, value, regs)
            self.values.append(value)

    def _configured(self, entry: CpuidEntry, native: Registers, regs: Regs) -> Registers:
        assert entry.config_index is not None
        given = self.params.cpuid_config[entry.config_index]
        config = Registers(given.eax, given.ebx, given.ecx, given.edx)
        self._check(config & ~(entry.config_direct | entry.allow_direct) == NO_BITS, entry, regs)
        return ((native & ~entry.config_direct) | (config & entry.config_direct)) & (config | ~entry.allow_direct)

    def _check(self, condition: bool, entry: CpuidEntry, regs: Regs) -> None:
        if not condition:
            regs.rcx = entry.leaf_subleaf
            raise Fail(Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)

    def _version(self, entry: CpuidEntry, value: Registers, regs: Regs) -> Registers:
        own = self.cpu.cpu.fms
        fms = value.eax or own
        migratable = self.params.attributes & TdAttributes.MIGRATABLE
        self._check(self.cpu.allows_fms(fms) if migratable else fms == own, entry, regs)
        self.flags = self.flags._replace(
            monitor_mwait=has(value.ecx, 3), dca=has(value.ecx, 18), tsc_deadline=has(value.ecx, 24)
        )
        return value._replace(eax=fms)

    def _features(self, entry: CpuidEntry, value: Registers, regs: Regs) -> Registers:
        if entry.subleaf == 2:
            self.flags = self.flags._replace(ddpd=has(value.edx, 3))
        if entry.subleaf:
            return value
        hle, rtm = has(value.ebx, 4), has(value.ebx, 11)
        check(hle == rtm, Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)
        if hle and not has(self.cpu.arch_capabilities, TSX_CTRL):
            raise Fail(Status.TDX_INCORRECT_MSR_VALUE, IA32_ARCH_CAPABILITIES)
        ecx = value.ecx & ~(_PKS | _KEY_LOCKER)
        self.flags = self.flags._replace(
            tsx=hle, waitpkg=has(ecx, 5), tme=has(ecx, 13), la57=has(ecx, 16), mktme=has(value.edx, 18)
        )
        return value._replace(ecx=ecx | _PKS if self.params.attributes & TdAttributes.PKS else ecx)

    def _xstate(self, entry: CpuidEntry, value: Registers, regs: Regs) -> Registers:
        if entry.subleaf == 0:
            return value._replace(ecx=self.cpu.cpu.cpuid(entry.leaf).ebx)
        if entry.subleaf == 1:
            eax = value.eax if self.cpu.xfd_mask & self.params.xfam else value.eax & ~_XFD
            self.flags = self.flags._replace(xfd=bool(eax & _XFD))
            return value._replace(eax=eax)
        return value if has(self.params.xfam, entry.subleaf) else NO_BITS

    def _tsc(self, entry: CpuidEntry, value: Registers, regs: Regs) -> Registers:
        return value._replace(ebx=self.params.tsc_frequency)

    def _address_sizes(self, entry: CpuidEntry, value: Registers, regs: Regs) -> Registers:
        la_bits = 57 if self.flags.la57 else 48
        return value._replace(eax=value.eax & ~(0xFF << _LA_BITS_SHIFT) | la_bits << _LA_BITS_SHIFT)


_Special = Callable[[VirtualCpuid, CpuidEntry, Registers, Regs], Registers]


def _only_if(condition: Callable[[VirtualCpuid], object]) -> _Special:
    """A leaf that is all 0 unless the TD has a feature."""
    return lambda td, entry, value, regs: value if condition(td) else NO_BITS


_SPECIAL: Final[dict[int, _Special]] = {
    0x1: VirtualCpuid._version,
    0x5: _only_if(lambda td: td.flags.monitor_mwait),
    0x7: VirtualCpuid._features,
    0xA: _only_if(lambda td: td.params.attributes & TdAttributes.PERFMON),
    0xD: VirtualCpuid._xstate,
    0x14: _only_if(lambda td: has(td.params.xfam, PT)),
    0x15: VirtualCpuid._tsc,
    0x19: _only_if(lambda td: False),
    0x1C: _only_if(lambda td: has(td.params.xfam, LBR)),
    0x1D: _only_if(lambda td: has(td.params.xfam, TILECFG) and has(td.params.xfam, TILEDATA)),
    0x8000_0008: VirtualCpuid._address_sizes,
}
