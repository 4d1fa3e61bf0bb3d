"""Fields of a TD: rights, translated values, checked values, and what concurrent writers get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.cpuid import cpuid_table
from septum.arch.metadata import Access, Context, Field, FieldId, all_ids, field_table, locate
from septum.arch.status import Status
from septum.arch.structures import ConfigFlags, TdAttributes
from septum.core.steps import ATOMICS, ctx
from septum.tdx.metadata import next_field, storage, write_element
from septum.tdx.metadata.td import MAX_HP_LOCK_TIMEOUT_USEC, MIN_HP_LOCK_TIMEOUT_USEC
from septum.tdx.outcome import Fail
from tests.tdx.metadata_objects import ALL, TDCX_PA, Objects

TD = Context.TD
HOST, DEBUG, GUEST, SERVICE_TD = Access.HOST, Access.HOST_DEBUG, Access.GUEST, Access.SERVICE_TD
ACCESSES = [HOST, DEBUG, GUEST, SERVICE_TD]
NOT_VALID = Status.TDX_METADATA_FIELD_VALUE_NOT_VALID
CHECKED = {"HP_LOCK_TIMEOUT", "TD_CTLS", "MIG_VERSION"}
#: Plain fields that somebody may write.
WRITABLE = [
    entry
    for entry in field_table("td").entries
    if any(entry.write_mask(access) for access in ACCESSES) and entry.name not in CHECKED
]


def named(name: str) -> FieldId:
    return field_table("td").named(name).id


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("l2_vms", [0, 3])
def test_every_id_reads_or_says_why_not_and_shows_only_readable_bits(access: Access, l2_vms: int) -> None:
    objects = Objects(l2_vms=l2_vms)
    objects.td.tdcs.mrtd = bytes(range(48))
    for field_id in all_ids(TD, access, l2_vms=l2_vms):
        element = locate(TD, field_id, l2_vms)
        assert element is not None
        value = objects.read(TD, access, field_id)
        faulting = element.field.name == "CPUID_VALUES" and cpuid_table()[element.number // 2].faulting
        if faulting:
            assert value == Status.TDX_METADATA_FIELD_NOT_READABLE
        else:
            assert value & ~element.field.read_mask(access) == 0
            assert value <= element.field.element_mask


def test_attributes_of_the_records_are_read_element_by_element() -> None:
    objects = Objects()
    tdr, tdcs = objects.td.tdr, objects.td.tdcs
    tdr.td_uuid, tdr.fatal, tdr.hkid = (1, 2, 3, 4), True, 33
    tdcs.mrtd = bytes(range(48))
    tdcs.rtmr = (bytes(48), bytes(48), bytes([7] * 48), bytes(48))
    tdcs.refcount, tdcs.gpaw = (5, 6), True
    assert [objects.read(TD, HOST, named("TD_UUID") + i) for i in range(4)] == [1, 2, 3, 4]
    assert objects.read(TD, HOST, named("FATAL")) == 1
    assert objects.read(TD, HOST, named("HKID")) == 33
    assert objects.read(TD, HOST, named("GPAW")) == 1
    assert objects.read(TD, HOST, named("REFCOUNT") + 1) == 6
    assert objects.read(TD, HOST, named("MRTD") + 1) == int.from_bytes(bytes(range(8, 16)), "little")
    assert objects.read(TD, DEBUG, named("RTMR") + 2 * 6 + 5) == 0x0707070707070707
    assert objects.read(TD, HOST, named("RTMR")) == Status.TDX_METADATA_FIELD_NOT_READABLE


def test_the_secure_ept_root_is_where_the_entries_are() -> None:
    objects = Objects(l2_vms=1, attributes=TdAttributes.DEBUG)
    objects.module.sept[TDCX_PA + 0x3000 + 8] = 0x1234
    objects.module.sept_l2[TDCX_PA + 0x6000 + 16] = 0x5678
    assert objects.read(TD, DEBUG, named("SEPT_ROOT") + 1) == 0x1234
    assert objects.read(TD, DEBUG, named("SEPT_ROOT")) == objects.module.sept.default
    assert objects.read(TD, DEBUG, named("L2_SEPT_ROOT_1") + 2) == 0x5678
    assert objects.read(TD, DEBUG, named("L2_SEPT_ROOT_2")) == Status.TDX_METADATA_FIELD_ID_INCORRECT


def test_cpuid_values_are_named_by_leaf_and_need_to_be_valid() -> None:
    objects = Objects()
    entry = next(entry for entry in cpuid_table() if not entry.faulting and entry.index)
    field_id = named("CPUID_VALUES").with_cpuid_leaf(entry.leaf, entry.subleaf, 1)
    assert objects.read(TD, HOST, field_id) == 2 * entry.index + 1
    objects.td.tdcs.cpuid_valid = ()
    assert objects.read(TD, HOST, field_id) == Status.TDX_METADATA_FIELD_NOT_READABLE
    assert objects.read(TD, HOST, field_id | 1 << 20) == Status.TDX_METADATA_FIELD_ID_INCORRECT
    assert objects.read(TD, HOST, named("NUM_CPUID_VALUES")) == len(cpuid_table())


def test_reserved_bits_and_sequence_parts_are_no_element() -> None:
    objects = Objects()
    for part in ({"last_element_in_field": 1}, {"last_field_in_sequence": 1}):
        assert objects.read(TD, HOST, named("TD_UUID").replace(**part)) == Status.TDX_METADATA_FIELD_ID_INCORRECT
    assert objects.read(TD, HOST, named("TD_UUID") | 1 << 62) == Status.TDX_METADATA_FIELD_ID_INCORRECT
    wrong_but_ignored = named("TD_UUID").replace(context_code=5, element_size_code=0, write_mask_valid=1, non_arch=0)
    assert objects.read(TD, HOST, wrong_but_ignored) == 0


@given(
    entry=st.sampled_from(WRITABLE),
    access=st.sampled_from(ACCESSES),
    before=st.integers(0, ALL),
    value=st.integers(0, ALL),
    mask=st.integers(0, ALL),
    place=st.integers(0, 15),
)
def test_a_write_changes_the_named_bits_that_the_writer_has_a_right_to(
    entry: Field, access: Access, before: int, value: int, mask: int, place: int
) -> None:
    objects = Objects()
    number = place % (entry.fields * entry.elements)
    before &= entry.element_mask
    scope = objects.scope(TD, access)
    element = locate(TD, entry.id + number)
    assert element is not None
    storage.write(scope, element, before)
    answer = objects.write(TD, access, entry.id + number, value, mask)
    allowed = entry.write_mask(access)
    after = storage.read(scope, element)
    if not allowed & mask:
        assert answer == Status.TDX_METADATA_FIELD_NOT_WRITABLE
        assert after == before
    elif (before ^ value) & mask & ~allowed:
        assert answer == NOT_VALID
        assert after == before
    else:
        assert answer == before & entry.read_mask(access)
        assert after == before & ~(allowed & mask) | value & allowed & mask


@pytest.mark.parametrize("microseconds", [MIN_HP_LOCK_TIMEOUT_USEC, 1_000_000, 2_000_000])
def test_the_lock_timeout_is_given_in_microseconds_and_kept_in_ticks(microseconds: int) -> None:
    objects, field_id = Objects(), named("HP_LOCK_TIMEOUT")
    assert objects.write(TD, HOST, field_id, microseconds) == 0
    ticks = microseconds * objects.module.platform.tsc_hz // 1_000_000
    assert objects.td.tdcs.hp_lock_timeout == ticks
    assert objects.read(TD, HOST, field_id) == microseconds
    assert objects.write(TD, HOST, field_id, microseconds) == microseconds


def test_the_lock_timeout_has_bounds_and_is_written_whole() -> None:
    objects, field_id = Objects(), named("HP_LOCK_TIMEOUT")
    for wrong in (0, MIN_HP_LOCK_TIMEOUT_USEC - 1, MAX_HP_LOCK_TIMEOUT_USEC + 1, ALL):
        assert objects.write(TD, HOST, field_id, wrong) == NOT_VALID
    assert objects.write(TD, HOST, field_id, 1_000_000, ALL >> 1) == Status.TDX_METADATA_WR_MASK_NOT_VALID
    assert objects.write(TD, GUEST, field_id, 1_000_000) == Status.TDX_METADATA_FIELD_NOT_WRITABLE
    # 100 s at 2 GHz do not fit into 32 bits: the module cuts the ticks.
    assert objects.write(TD, HOST, field_id, MAX_HP_LOCK_TIMEOUT_USEC) == 0
    assert objects.td.tdcs.hp_lock_timeout < 1 << 32


@pytest.mark.parametrize("flexible", [False, True])
def test_a_guest_changes_pending_ve_disable_only_if_it_may(flexible: bool) -> None:
    objects, field_id = Objects(), named("TD_CTLS")
    objects.td.tdcs.config_flags = ConfigFlags.FLEXIBLE_PENDING_VE if flexible else 0
    assert objects.write(TD, GUEST, field_id, 0, 1) == 0
    assert objects.write(TD, GUEST, field_id, 1, 1) == (0 if flexible else NOT_VALID)
    assert objects.td.tdcs.td_ctls == int(flexible)
    # Bits without a right may be named as long as they stay as they are.
    assert objects.write(TD, GUEST, field_id, int(flexible), ALL) == int(flexible)


def test_a_migration_td_gets_a_new_key_each_time_it_reads_the_first_word() -> None:
    objects, key = Objects(), named("MIG_ENC_KEY")
    first = [objects.read(TD, SERVICE_TD, key + i) for i in range(4)]
    again = [objects.read(TD, SERVICE_TD, key + i) for i in (1, 2, 3)]
    assert len(set(first)) == 4
    assert again == first[1:]
    assert objects.read(TD, SERVICE_TD, key) != first[0]
    assert objects.read(TD, DEBUG, key) == objects.read(TD, DEBUG, key)
    objects.module.hardware.inputs.entropy_exhausted = True
    assert objects.read(TD, SERVICE_TD, key) == Status.TDX_RND_NO_ENTROPY
    assert objects.write(TD, SERVICE_TD, named("MIG_VERSION"), 0, 0xFFFF) == 0
    assert objects.write(TD, SERVICE_TD, named("MIG_VERSION"), 1, 0xFFFF) == NOT_VALID
    assert objects.read(TD, HOST, named("MIG_DEC_KEY_SET")) == 0
    assert objects.write(TD, SERVICE_TD, named("MIG_DEC_KEY") + 2, 77) == 0
    assert objects.read(TD, HOST, named("MIG_DEC_KEY_SET")) == 1
    assert objects.read(TD, DEBUG, named("MIG_DEC_KEY") + 2) == 77


def test_a_writer_that_is_overtaken_gets_busy() -> None:
    objects, field_id = Objects(), named("NOTIFY_ENABLES")
    ctx.level = ATOMICS
    try:
        slow = write_element(objects.scope(TD, GUEST), field_id, 1, 1)
        slow.send(None)  # up to its compare-and-exchange
        objects.td.tdcs.notify_enables = 1
        with pytest.raises(Fail) as failure:
            slow.send(None)
    finally:
        ctx.level = 0
    assert failure.value.status & ~0xFFFF_FFFF == Status.TDX_OPERAND_BUSY


@pytest.mark.parametrize("access", ACCESSES)
def test_following_ids_one_by_one_gives_all_of_them(access: Access) -> None:
    scope = Objects(l2_vms=1).scope(TD, access)
    found = []
    field_id = next_field(scope, ALL)
    while field_id != ALL:
        found.append(field_id)
        field_id = next_field(scope, field_id)
    assert found == list(all_ids(TD, access, l2_vms=1))
