"""Fields of the module: constants of 1.5.01, and what the platform adds.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_sys.c``.
"""

from __future__ import annotations

from septum.arch.cpuid import SUBLEAF_NA, configurable
from septum.arch.metadata import Element, sys_constants
from septum.tdx.metadata.scope import Scope

_NO_LEAF = SUBLEAF_NA << 32 | 0xFFFF_FFFF
#: What 1.5.01 can do. Bit 8, local attestation, also needs a CPU that has SEAMVERIFYREPORT: it is taken to be there.
_TDX_FEATURES0 = 0xF0FBF
#: TDX_FEATURES0 of newer modules: ENHANCED_DEMOTE_INTERRUPTIBILITY.
_FEATURE_BITS = {"enhanced_demote": 1 << 51}
#: 4 KiB pages for hand-off data at the beginning of the module's data region, minus one, on the recorded platform.
_NUM_HANDOFF_PAGES = 0x3F


def read_sys(scope: Scope, element: Element) -> int:
    """The value of an element. Hand-off data, which the model does not have, reads as 0."""
    platform, cpu, number = scope.module.platform, scope.module.native_cpu, element.number
    match element.field.name:
        case "NUM_PKGS":
            return platform.num_packages
        case "PKG_FMS":
            return cpu.cpu.fms if number < platform.num_packages else 0
        case "NUM_HANDOFF_PAGES":
            return _NUM_HANDOFF_PAGES
        case "SYS_ATTRIBUTES":
            return scope.module.sys.attributes
        case "TDX_FEATURES0":
            newer = (bit for feature, bit in _FEATURE_BITS.items() if feature in scope.module.features)
            return _TDX_FEATURES0 | sum(newer)
        case "CMR_BASE":
            return platform.cmrs[number].base if number < len(platform.cmrs) else 0
        case "CMR_SIZE":
            return platform.cmrs[number].size if number < len(platform.cmrs) else 0
        case "XFAM_FIXED0":
            return cpu.xfam_fixed0
        case "CPUID_CONFIG_LEAVES":
            return configurable()[number].leaf_subleaf if number < len(configurable()) else _NO_LEAF
        case "CPUID_CONFIG_VALUES" if number < 2 * len(configurable()):
            direct = configurable()[number // 2].config_direct
            return direct.high if number % 2 else direct.low
        case "NUM_ALLOWED_FMS":
            return len(cpu.allowed_fms)
        case "ALLOWED_FMS":
            return cpu.allowed_fms[number] if number < len(cpu.allowed_fms) else 0
    return sys_constants().get(element.field.name, 0)
