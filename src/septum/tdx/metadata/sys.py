"""Fields of the module: constants of 1.5.01, and what the platform adds.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_sys.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from septum.arch.cpuid import KNOWN_FMS, SUBLEAF_NA, XFAM_FIXED0, CpuModel, configurable
from septum.arch.metadata import Element, sys_constants
from septum.tdx.metadata.scope import Scope

if TYPE_CHECKING:
    from septum.tdx.module import Module

_STEPPING = 0xF
_NO_LEAF = SUBLEAF_NA << 32 | 0xFFFF_FFFF
#: What this module can do: all optional features of 1.5.01 but TDG.MR.VERIFYREPORT need no support by the platform.
_TDX_FEATURES0 = 0xF0FBF
#: 4 KiB pages for hand-off data at the beginning of the module's data region, minus one, on the recorded platform.
_NUM_HANDOFF_PAGES = 0x3F


def xfam_fixed0(cpu: CpuModel) -> int:
    """XFAM bits that a TD may have: those that the module knows and the CPU has, by CPUID(0xd)."""
    user, supervisor = cpu.cpuid(0xD, 0), cpu.cpuid(0xD, 1)
    return XFAM_FIXED0 & (user.edx << 32 | user.eax | supervisor.edx << 32 | supervisor.ecx)


def allowed_fms(cpu: CpuModel) -> tuple[int, ...]:
    """Family, model and stepping values that a TD may be given: the CPU's own, and the older generations'."""
    own = next(i for i, fms in enumerate(KNOWN_FMS) if (fms ^ cpu.fms) & ~_STEPPING == 0)
    return (cpu.fms, *KNOWN_FMS[own + 1 :])


def _at(values: tuple[int, ...], number: int, beyond: int = 0) -> int:
    return values[number] if number < len(values) else beyond


def _config_values(number: int) -> int:
    entry, half = divmod(number, 2)
    if entry >= len(configurable()):
        return 0
    direct = configurable()[entry].config_direct
    return direct.high if half else direct.low


_COMPUTED: dict[str, Callable[[Module, int], int]] = {
    "NUM_PKGS": lambda module, number: module.platform.num_packages,
    "PKG_FMS": lambda module, number: module.hardware.cpu.fms if number < module.platform.num_packages else 0,
    "NUM_HANDOFF_PAGES": lambda module, number: _NUM_HANDOFF_PAGES,
    "SYS_ATTRIBUTES": lambda module, number: module.sys.attributes,
    "TDX_FEATURES0": lambda module, number: _TDX_FEATURES0,
    "CMR_BASE": lambda module, number: _at(tuple(cmr.base for cmr in module.platform.cmrs), number),
    "CMR_SIZE": lambda module, number: _at(tuple(cmr.size for cmr in module.platform.cmrs), number),
    "XFAM_FIXED0": lambda module, number: xfam_fixed0(module.hardware.cpu),
    "CPUID_CONFIG_LEAVES": lambda module, number: _at(
        tuple(entry.leaf_subleaf for entry in configurable()), number, _NO_LEAF
    ),
    "CPUID_CONFIG_VALUES": lambda module, number: _config_values(number),
    "NUM_ALLOWED_FMS": lambda module, number: len(allowed_fms(module.hardware.cpu)),
    "ALLOWED_FMS": lambda module, number: _at(allowed_fms(module.hardware.cpu), number),
}


def read_sys(scope: Scope, element: Element) -> int:
    """The value of an element. Hand-off data, which the model does not have, reads as 0."""
    name = element.field.name
    computed = _COMPUTED.get(name)
    return sys_constants().get(name, 0) if computed is None else computed(scope.module, element.number)
