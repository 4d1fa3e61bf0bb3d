"""Importing the fields of a TD: what is checked, and what the TD gets from them in the end.

Source: TDX Module 1.5.01, ``md_td_write_field`` and ``check_cpuid_compatibility_and_set_flags`` in
``src/common/metadata_handlers/metadata_td.c``, ``check_and_init_imported_td_state_immutable`` in ``helpers.c``,
``check_virt_ia32_arch_capabilities`` in ``virt_msr_helpers.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from septum.arch.cpuid import Registers, cpuid_table
from septum.arch.pages import PAGE_MASK
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags, TdAttributes
from septum.tdx.call import MIN_TDCS_PAGES
from septum.tdx.metadata import storage
from septum.tdx.metadata.import_cpuid import import_cpuid
from septum.tdx.metadata.scope import Located, Scope
from septum.tdx.metadata.td import check_protected_bits, timeout_in_ticks
from septum.tdx.outcome import check
from septum.tdx.servtd import ATTRIBUTES_ALLOWED, MAX_SERVTDS, MIGRATION_TD, Binding, BindingState
from septum.tdx.state.td import MAX_L2_VMS, SEPT_ROOT_PAGE
from septum.tdx.td_params.checks import (
    CONFIG_FLAGS_FIXED0,
    attributes_allowed,
    eptp_allowed,
    tsc_parameters,
    xbuff_layout,
    xfam_allowed,
)
from septum.tdx.td_params.msrs import msr_bitmaps, virtual_arch_capabilities_allowed

if TYPE_CHECKING:
    from septum.tdx.module import Module
    from septum.tdx.state.td import Td

_U64: Final = (1 << 64) - 1
_ELEMENTS_OF_BINDING: Final = 16


def write_td_field(scope: Scope, located: Located, values: list[int], mask: int) -> None:
    """Writes the elements of a field, of which ``located`` is the first one.

    :raises Fail: METADATA_FIELD_NOT_WRITABLE, METADATA_FIELD_VALUE_NOT_VALID, TDCS_NOT_ALLOCATED.
    """
    element = located.element
    writable = located.write_mask & mask
    check(writable, Status.TDX_METADATA_FIELD_NOT_WRITABLE)
    special = _SPECIAL.get(element.field.name)
    if special is not None and special(scope, located, values, writable):
        return
    for number, value in enumerate(values, element.number):
        one = replace(element, number=number)
        old = storage.read(scope, one)
        check_protected_bits(old, value, mask & ~located.write_mask)
        storage.write(scope, one, old & ~writable | value & writable)


def _check(condition: object) -> None:
    check(condition, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)


#: Checks the values of a field; the last argument is the mask of bits to write. Returns whether they are dealt with.
_Special = Callable[[Scope, Located, list[int], int], bool]


def _td_uuid(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    """The TD has had another one, by which service TDs know it."""
    scope.of_td.tdcs.pre_import_uuid = scope.of_td.tdr.td_uuid
    return False


def _num_l2_vms(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    td = scope.of_td
    _check(values[0] <= MAX_L2_VMS)
    td.tdcs.num_l2_vms = values[0]
    check(td.tdr.num_tdcx >= MIN_TDCS_PAGES + values[0], Status.TDX_TDCS_NOT_ALLOCATED)
    return True


def _attributes(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    attributes = values[0] & mask
    _check(attributes_allowed(attributes) and attributes & TdAttributes.MIGRATABLE)
    return False


def _xfam(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    _check(xfam_allowed(values[0] & mask, scope.module.native_cpu))
    return False


def _config_flags(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    _check(not values[0] & mask & ~CONFIG_FLAGS_FIXED0)
    return False


def _eptp(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    """Walk length and memory type; the root is the TD's own."""
    td, eptp = scope.of_td, values[0] & mask
    _check(eptp_allowed(eptp, td.tdcs.gpaw, scope.module.native_cpu))
    td.tdcs.eptp = eptp | scope.module.pa_format.address(td.tdr.tdcx_pa[SEPT_ROOT_PAGE]) & PAGE_MASK
    return True


def _hp_lock_timeout(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    scope.of_td.tdcs.hp_lock_timeout = timeout_in_ticks(scope, values[0] & mask)
    return True


def _num_cpuid_values(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    _check(values[0] == len(cpuid_table()))
    return True


def _virtual_tsc(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    """The TD's clock goes on from where it was."""
    module, tdcs = scope.module, scope.of_td.tdcs
    now = module.hardware.rdtsc()
    tdcs.tsc_multiplier, offset = tsc_parameters(now, module.platform.tsc_hz, tdcs.tsc_frequency)
    tdcs.tsc_offset = offset + values[0] & _U64
    return True


def _cpuid_values(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    index = located.element.number // 2
    _check(import_cpuid(scope, cpuid_table()[index], Registers.from_halves(*values)))
    return False


def _servtd_binding(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    """Only a service TD of the same type and attributes as here could have been bound there. Nothing is written."""
    binding = Binding.unpack(values)
    if binding.state == BindingState.NOT_BOUND:
        return True
    own = Binding.unpack(scope.of_td.tdcs.servtd_bindings_table)
    _check(binding.state in (BindingState.PRE_BOUND, BindingState.BOUND))
    _check(located.element.number // _ELEMENTS_OF_BINDING < MAX_SERVTDS and binding.type == MIGRATION_TD)
    _check(not binding.attributes & ~ATTRIBUTES_ALLOWED)
    same = (own.type, own.attributes) == (binding.type, binding.attributes)
    _check(own.state not in (BindingState.PRE_BOUND, BindingState.BOUND) or same)
    return True


def _arch_capabilities(scope: Scope, located: Located, values: list[int], mask: int) -> bool:
    native, tsx = scope.module.native_cpu.arch_capabilities, scope.of_td.tdcs.cpuid_flags.tsx
    _check(virtual_arch_capabilities_allowed(native, values[0], tsx=tsx))
    return False


_SPECIAL: dict[str, _Special] = {
    "TD_UUID": _td_uuid,
    "NUM_L2_VMS": _num_l2_vms,
    "ATTRIBUTES": _attributes,
    "XFAM": _xfam,
    "CONFIG_FLAGS": _config_flags,
    "EPTP": _eptp,
    "HP_LOCK_TIMEOUT": _hp_lock_timeout,
    "NUM_CPUID_VALUES": _num_cpuid_values,
    "VIRTUAL_TSC": _virtual_tsc,
    "CPUID_VALUES": _cpuid_values,
    "SERVTD_BINDINGS_TABLE": _servtd_binding,
    "VIRTUAL_IA32_ARCH_CAPABILITIES": _arch_capabilities,
}


def finish_immutable_state(module: Module, td: Td) -> bool:
    """What follows from imported immutable state; False if its parts do not go together."""
    tdcs, cpu = td.tdcs, module.native_cpu
    if tdcs.attributes & TdAttributes.MIGRATABLE and tdcs.num_l2_vms:
        return False
    if not 0 < tdcs.num_vcpus <= tdcs.max_vcpus:
        return False
    tdcs.num_assoc_vcpus = 0
    tdcs.td_epoch = 1
    tdcs.refcount = (0, 0)
    tdcs.xbuff_offsets, tdcs.xbuff_size = xbuff_layout(tdcs.xfam, cpu)
    tdcs.config_flags = tdcs.config_flags & ~ConfigFlags.GPAW | (ConfigFlags.GPAW if tdcs.gpaw else 0)
    pending_ve_disable = int(bool(tdcs.attributes & TdAttributes.SEPT_VE_DISABLE))
    tdcs.td_ctls = tdcs.td_ctls & ~1 | pending_ve_disable
    tdcs.msr_bitmaps = msr_bitmaps(cpu, tdcs.attributes, tdcs.xfam, tdcs.cpuid_flags)
    return True
