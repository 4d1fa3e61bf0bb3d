"""Fields of a TD: those whose value is computed on reading, and those whose new value is checked.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_td.c``.
"""

from __future__ import annotations

from septum.arch.cpuid import cpuid_table
from septum.arch.metadata import Access
from septum.arch.operands import Operand
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags
from septum.core.steps import ATOMICS, ctx, step
from septum.tdx.metadata import storage
from septum.tdx.metadata.l2 import virtual_tsc
from septum.tdx.metadata.scope import Located, Scope
from septum.tdx.migration.streams import new_encryption_key
from septum.tdx.outcome import check

U64 = (1 << 64) - 1
USEC_PER_SECOND = 1_000_000
MIN_HP_LOCK_TIMEOUT_USEC = 10_000
MAX_HP_LOCK_TIMEOUT_USEC = 100_000_000
PENDING_VE_DISABLE = 1 << 0
"""TD_CTLS."""
MIGRATION_VERSION = 0
"""The only one that 1.5.01 exports and imports."""


def read_td(scope: Scope, located: Located) -> int:
    """The value of an element, all of its bits.

    :raises Fail: METADATA_FIELD_NOT_READABLE for a CPUID leaf without a value, RND_NO_ENTROPY.
    """
    element = located.element
    field = element.field
    if field.name == "CPUID_VALUES":
        index = element.number // 2
        valid = scope.of_td.tdcs.cpuid_valid
        has_value = index < len(valid) and valid[index] and not cpuid_table()[index].faulting
        check(has_value, Status.TDX_METADATA_FIELD_NOT_READABLE)
    if not field.special_read:
        return storage.read(scope, element)
    match field.name:
        case "NUM_CPUID_VALUES":
            return len(cpuid_table())
        case "HP_LOCK_TIMEOUT":
            ticks = min(storage.read(scope, element), U64 // USEC_PER_SECOND)
            return ticks * USEC_PER_SECOND // scope.module.platform.tsc_hz
        case "VIRTUAL_TSC" if scope.access is Access.EXPORT_MUTABLE:
            return virtual_tsc(scope, scope.module.hardware.rdtsc())
        case "MIG_ENC_KEY" if element.number == 0 and scope.access is Access.SERVICE_TD:
            # Each time a migration TD reads the first word, the key is made anew.
            new_encryption_key(scope.module, scope.of_td)
    return storage.read(scope, element)


async def write_td(scope: Scope, located: Located, value: int, mask: int) -> int:
    """Writes the bits of an element that ``mask`` and the writer's rights allow; returns the old value.

    :raises Fail: METADATA_FIELD_NOT_WRITABLE, METADATA_FIELD_VALUE_NOT_VALID (also for a change of a bit that must not
        be written), METADATA_WR_MASK_NOT_VALID, or OPERAND_BUSY when another LP changed the element meanwhile.
    """
    element = located.element
    old = read_td(scope, located)
    writable = located.write_mask & mask
    check(writable, Status.TDX_METADATA_FIELD_NOT_WRITABLE)
    check_protected_bits(old, value, mask & ~located.write_mask)
    new = old & ~writable | value & writable
    match element.field.name:
        case "HP_LOCK_TIMEOUT":
            check(writable == U64, Status.TDX_METADATA_WR_MASK_NOT_VALID)
            storage.write(scope, element, timeout_in_ticks(scope, new))
            return old & located.read_mask
        case "TD_CTLS" if scope.access is Access.GUEST:
            flexible = scope.of_td.tdcs.config_flags & ConfigFlags.FLEXIBLE_PENDING_VE
            changed = (new ^ old) & PENDING_VE_DISABLE
            check(flexible or not changed, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
        case "MIG_DEC_KEY":
            scope.of_td.tdcs.mig_dec_key_set = True
        case "MIG_VERSION":
            check(new == MIGRATION_VERSION, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    if ctx.level >= ATOMICS:
        await step("cmpxchg", element.field.name)
    check(storage.read(scope, element) == old, Status.TDX_OPERAND_BUSY, Operand.METADATA_FIELD)
    storage.write(scope, element, new)
    return old & located.read_mask


def timeout_in_ticks(scope: Scope, timeout: int) -> int:
    """HP_LOCK_TIMEOUT, from microseconds to ticks of the CPU's counter, of which the module keeps 32 bits.

    :raises Fail: METADATA_FIELD_VALUE_NOT_VALID when it is too short or too long.
    """
    in_range = MIN_HP_LOCK_TIMEOUT_USEC <= timeout <= MAX_HP_LOCK_TIMEOUT_USEC
    check(in_range, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return timeout * scope.module.platform.tsc_hz // USEC_PER_SECOND & 0xFFFF_FFFF


def check_protected_bits(old: int, new: int, protected: int) -> None:
    """``md_check_forbidden_bits_unchanged``: bits that the writer named without a right to them keep their value.

    :raises Fail: METADATA_FIELD_VALUE_NOT_VALID.
    """
    check((old ^ new) & protected == 0, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
