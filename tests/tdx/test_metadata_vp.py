"""Fields of a VCPU: where they are, what writing them means, and what an L1 VMM is shown of its L2 VMs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import vmcs
from septum.arch.metadata import Access, Context, FieldId, all_ids, field_table, locate
from septum.arch.status import Status, with_operand
from septum.arch.structures import TdAttributes
from septum.tdx.metadata.controls import IA32_DEBUGCTL, IA32_VMX_PROCBASED_CTLS2, IA32_VMX_TRUE_PROCBASED_CTLS
from septum.tdx.state.vp import VeInfo
from tests.tdx.metadata_objects import ALL, TDCX_PA, Objects

VP = Context.VP
HOST, DEBUG, GUEST = Access.HOST, Access.HOST_DEBUG, Access.GUEST
NOT_VALID = Status.TDX_METADATA_FIELD_VALUE_NOT_VALID
NOT_WRITABLE = Status.TDX_METADATA_FIELD_NOT_WRITABLE
FIRST_L2_CLASS = 36
U64 = st.integers(0, ALL)


def tdvps(name: str) -> FieldId:
    return field_table("vp").named(name).id


def l1(encoding: int) -> FieldId:
    return FieldId.of(field_code=encoding)


def l2(encoding: int, vm: int = 1) -> FieldId:
    return FieldId.of(field_code=encoding, class_code=FIRST_L2_CLASS + 8 * (vm - 1))


def debuggable(l2_vms: int = 0) -> Objects:
    return Objects(l2_vms=l2_vms, attributes=TdAttributes.DEBUG)


@pytest.mark.parametrize("access", [HOST, DEBUG, GUEST])
@pytest.mark.parametrize("l2_vms", [0, 2])
def test_every_id_reads_and_shows_only_readable_bits(access: Access, l2_vms: int) -> None:
    objects = Objects(l2_vms=l2_vms)
    for field_id in all_ids(VP, access, l2_vms=l2_vms):
        element = locate(VP, field_id, l2_vms)
        assert element is not None
        value = objects.read(VP, access, field_id)
        assert value & ~element.field.read_mask(access) == 0


@pytest.mark.parametrize("access", [DEBUG, GUEST])
def test_every_writable_element_of_a_plain_entry_keeps_what_is_written(access: Access) -> None:
    objects = debuggable(l2_vms=1)
    for field_id in all_ids(VP, access, l2_vms=1, write=True):
        element = locate(VP, field_id, 1)
        assert element is not None
        field = element.field
        mask = field.write_mask(access) & field.element_mask
        if field.special_write or field.attributes.value & 0xF or mask & ~field.read_mask(access):
            continue
        before = objects.read(VP, access, field_id)
        value = 0x5AA5_1234_8765_0FF1 & mask
        assert objects.write(VP, access, field_id, value, mask) == before
        assert objects.read(VP, access, field_id) & mask == value


def test_registers_and_ve_information_are_in_the_records() -> None:
    objects = debuggable()
    objects.vp.tdvps.gprs = tuple(range(100, 115))
    assert objects.read(VP, DEBUG, tdvps("RAX")) == 100
    assert objects.read(VP, DEBUG, tdvps("RCX")) == 101
    assert objects.read(VP, DEBUG, tdvps("R15")) == 114
    assert objects.write(VP, DEBUG, tdvps("RSI"), 7) == 105
    assert objects.vp.tdvps.gprs[5] == 7
    objects.vp.tdvps.ve_info = VeInfo(exit_reason=48, valid=0xFFFF_FFFF, gpa=0x1000)
    assert objects.read(VP, DEBUG, tdvps("EXIT_REASON")) == 48
    assert objects.read(VP, DEBUG, tdvps("VALID")) == 0xFFFF_FFFF
    assert objects.read(VP, DEBUG, tdvps("GPA")) == 0x1000


def test_high_halves_of_vmcs_fields_and_l2_vms_that_are_not_there_have_no_id() -> None:
    objects = debuggable(l2_vms=1)
    for wrong in (l1(vmcs.EPTP + 1), l2(vmcs.GUEST_CR0, vm=2), tdvps("L2_MSR_BITMAPS_2")):
        assert objects.read(VP, DEBUG, wrong) == Status.TDX_METADATA_FIELD_ID_INCORRECT


def test_a_value_wider_than_its_field_is_not_taken() -> None:
    objects = Objects()
    assert objects.write(VP, HOST, l1(vmcs.POSTED_INTERRUPT_VECTOR), 0x1_0020) == NOT_VALID
    assert objects.write(VP, HOST, l1(vmcs.POSTED_INTERRUPT_VECTOR), 0x1_0020, 0xFFFF) == 0
    assert objects.read(VP, HOST, l1(vmcs.POSTED_INTERRUPT_VECTOR)) == 0x20


def test_posted_interrupts_need_a_vector_then_a_descriptor() -> None:
    objects = Objects()
    fields = objects.vp.vmcs
    fields[vmcs.POSTED_INTERRUPT_VECTOR], fields[vmcs.POSTED_INTERRUPT_DESCRIPTOR] = 0xFFFF, ALL
    enable = l1(vmcs.PINBASED_CTLS), 0x80, 0x80
    for missing, value in ((vmcs.POSTED_INTERRUPT_VECTOR, 0x30), (vmcs.POSTED_INTERRUPT_DESCRIPTOR, 0x4_0040)):
        assert objects.write(VP, HOST, *enable) == with_operand(Status.TDX_TD_VMCS_FIELD_NOT_INITIALIZED, missing)
        objects.write(VP, HOST, l1(missing), value, ALL if value > 0xFF else 0xFFFF)
    assert objects.write(VP, HOST, *enable) == 0
    assert fields[vmcs.PINBASED_CTLS] == 0x80
    assert objects.read(VP, DEBUG, tdvps("SHADOW_PINBASED_EXEC_CTLS")) == 0x80
    assert objects.read(VP, DEBUG, tdvps("SHADOW_PID_HPA")) == 0x4_0040
    assert objects.read(VP, DEBUG, tdvps("SHADOW_POSTED_INT_NOTIFICATION_VECTOR")) == 0x30
    assert objects.write(VP, HOST, l1(vmcs.POSTED_INTERRUPT_VECTOR), 0x100, 0xFFFF) == NOT_VALID


def test_addresses_must_be_the_hosts() -> None:
    objects = Objects()
    objects.vp.vmcs[vmcs.SHARED_EPTP] = ALL
    private = objects.module.platform.private_hkids.start << objects.module.pa_format.hkid_shift
    seamrr = objects.module.platform.seamrr.base
    for wrong in (seamrr, seamrr & 0xFFFFF_FFFF_F000 | private):
        assert objects.write(VP, HOST, l1(vmcs.SHARED_EPTP), wrong) == NOT_VALID
    # The initial value is no address: bits that cannot be written do not have to be named as they are.
    assert objects.write(VP, HOST, l1(vmcs.SHARED_EPTP), 0x7000) == ALL & 0xFFFFFFFFFF000
    assert objects.vp.vmcs[vmcs.SHARED_EPTP] == 0x7000
    assert objects.read(VP, DEBUG, tdvps("SHADOW_SHARED_EPTP")) == 0x7000


@given(real=U64, mask=U64, shadow=U64, value=U64)
def test_a_control_register_is_written_as_by_the_guest(real: int, mask: int, shadow: int, value: int) -> None:
    objects = debuggable()
    fields = objects.vp.vmcs
    fields.store(vmcs.GUEST_CR0, real)
    fields.store(vmcs.CR0_MASK, mask)
    fields.store(vmcs.CR0_SHADOW, shadow)
    answer = objects.write(VP, DEBUG, l1(vmcs.GUEST_CR0), value)
    if (value ^ shadow) & mask:
        assert answer == NOT_VALID
        assert fields[vmcs.GUEST_CR0] == real
    else:
        assert answer == real
        assert fields[vmcs.GUEST_CR0] == real & mask | value & ~mask


def test_branch_trace_messages_only_for_debug_tds_and_bit_13_is_the_hosts() -> None:
    traces = 1 << 6
    objects = debuggable(l2_vms=1)
    objects.module.hardware.msrs[0, IA32_DEBUGCTL] = 1 << 13 | 1
    assert objects.write(VP, DEBUG, l1(vmcs.GUEST_DEBUGCTL), traces, traces) == 0
    assert objects.vp.vmcs[vmcs.GUEST_DEBUGCTL] == traces | 1 << 13
    objects = Objects(l2_vms=1)
    assert objects.write(VP, GUEST, l2(vmcs.GUEST_DEBUGCTL), traces, traces) == NOT_VALID
    assert objects.write(VP, GUEST, l2(vmcs.GUEST_DEBUGCTL), traces << 1, traces << 1) == 0


@pytest.mark.parametrize("debug", [False, True])
def test_a_page_modification_log_needs_a_debug_td_and_an_address(debug: bool) -> None:
    objects = debuggable() if debug else Objects()
    objects.module.hardware.msrs[0, IA32_VMX_PROCBASED_CTLS2] = 0xFFFF_FFFF << 32
    objects.vp.vmcs[vmcs.PML_ADDRESS] = ALL
    controls, pml = l1(vmcs.PROCBASED_CTLS2), 1 << 17
    access = DEBUG if debug else HOST
    expected = NOT_VALID if debug else NOT_WRITABLE
    assert objects.write(VP, access, controls, pml, pml) == expected
    objects.vp.vmcs[vmcs.PML_ADDRESS] = 0x5000
    assert objects.write(VP, access, controls, pml, pml) == (0 if debug else expected)
    objects.module.hardware.msrs[0, IA32_VMX_PROCBASED_CTLS2] = 0
    assert objects.write(VP, access, controls, 1 << 30, 1 << 30) == NOT_VALID


def test_a_debugger_cannot_write_the_xsave_header_nor_xfam() -> None:
    objects = debuggable()
    xbuff = tdvps("XBUFF")
    assert objects.write(VP, DEBUG, xbuff + 63, 1) == 0
    assert objects.write(VP, DEBUG, xbuff + 72, 1) == 0
    for element in range(64, 72):
        assert objects.write(VP, DEBUG, xbuff + element, 1) == NOT_WRITABLE
    objects.td.tdcs.xfam, objects.td.tdcs.xbuff_offsets = 1 << 8, (0,) * 8 + (0x240,) + (0,) * 10
    assert objects.write(VP, DEBUG, xbuff + 72, 2) == NOT_WRITABLE
    assert objects.write(VP, DEBUG, tdvps("XFAM"), 3) == NOT_WRITABLE


def test_a_guest_that_does_not_know_ddpd_u_does_not_see_it() -> None:
    objects, spec_ctrl = debuggable(), tdvps("IA32_SPEC_CTRL")
    objects.td.tdcs.ia32_spec_ctrl_mask = 1 << 8
    assert objects.write(VP, DEBUG, spec_ctrl, 0x105) == 0
    native = objects.module.hardware.cpu.cpuid(7, 2).edx >> 3 & 1
    assert objects.vp.fields["IA32_SPEC_CTRL", 0] == 5 | native << 8
    assert objects.read(VP, DEBUG, spec_ctrl) == 5
    objects.td.tdcs.ia32_spec_ctrl_mask = 0
    assert objects.read(VP, DEBUG, spec_ctrl) == 5 | native << 8


@pytest.mark.parametrize(
    ("requested", "priority", "pending"), [(0, 0, 0), (0x31, 0x20, 1), (0x2F, 0x20, 0), (0x30, 0x3F, 0)]
)
def test_the_host_sees_whether_a_virtual_interrupt_is_pending(requested: int, priority: int, pending: int) -> None:
    objects = Objects()
    objects.vp.vmcs.store(vmcs.GUEST_INTERRUPT_STATUS, requested | 0x4400)
    objects.vp.fields.store(("VAPIC", 0xA0 // 8), priority)
    assert objects.read(VP, HOST, tdvps("VCPU_STATE_DETAILS")) == pending


# --- L2 VMs ------------------------------------------------------------------------------------------------------


@given(base_mask=U64, base_shadow=U64, mask=U64, shadow=U64)
def test_the_module_adds_its_own_bits_to_the_masks_of_an_l1_vmm(
    base_mask: int, base_shadow: int, mask: int, shadow: int
) -> None:
    objects = Objects(l2_vms=2)
    fields = objects.vp.fields
    fields.store(("BASE_L2_CR4_GUEST_HOST_MASK", 0), base_mask)
    fields.store(("BASE_L2_CR4_READ_SHADOW", 0), base_shadow)
    assert objects.write(VP, GUEST, l2(vmcs.CR4_MASK, 2), mask) == 0
    assert objects.write(VP, GUEST, l2(vmcs.CR4_SHADOW, 2), shadow) == 0
    assert objects.read(VP, GUEST, l2(vmcs.CR4_MASK, 2)) == mask
    assert objects.read(VP, GUEST, l2(vmcs.CR4_SHADOW, 2)) == shadow
    assert objects.read(VP, DEBUG, l2(vmcs.CR4_MASK, 2)) == base_mask | mask
    for bit in range(64):
        owner = shadow if mask >> bit & 1 else base_shadow & base_mask
        assert objects.read(VP, DEBUG, l2(vmcs.CR4_SHADOW, 2)) >> bit & 1 == owner >> bit & 1
    assert objects.read(VP, DEBUG, l2(vmcs.CR4_MASK, 1)) == 0


def test_pause_loop_times_of_an_l1_vmm_are_in_its_own_ticks() -> None:
    objects = debuggable(l2_vms=1)
    tdcs = objects.td.tdcs
    tdcs.tsc_multiplier, tdcs.tsc_offset = 1 << 47, 1000
    gap = field_table("l2_vmcs").named("PLE_GAP").id.replace(class_code=FIRST_L2_CLASS)
    assert objects.write(VP, GUEST, gap, 5000, 0xFFFF_FFFF) == 0
    assert objects.read(VP, GUEST, gap) == 5000
    assert objects.read(VP, DEBUG, gap) == 8000
    assert objects.write(VP, GUEST, gap, 500, 0xFFFF_FFFF) == NOT_VALID
    assert objects.write(VP, DEBUG, gap, 44, 0xFFFF_FFFF) == 8000
    assert objects.read(VP, DEBUG, gap) == 44


@pytest.mark.parametrize("access", [DEBUG, GUEST])
def test_controls_follow_the_capabilities_of_the_cpu_or_of_the_td(access: Access) -> None:
    objects = debuggable(l2_vms=1)
    must, may = 1 << 9, 1 << 9 | 1 << 11
    if access is DEBUG:
        objects.module.hardware.msrs[0, IA32_VMX_TRUE_PROCBASED_CTLS] = may << 32 | must
    else:
        objects.td.fields["VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS", 0] = may << 32 | must
    controls = l2(vmcs.PROCBASED_CTLS)
    assert objects.write(VP, access, controls, 1 << 11, 1 << 11) == NOT_VALID
    assert objects.write(VP, access, controls, may | 1 << 12, may | 1 << 12) == NOT_VALID
    assert objects.write(VP, access, controls, may, may) == 0


def test_shared_ept_of_an_l2_vm_only_while_it_is_enabled() -> None:
    objects = debuggable(l2_vms=1)
    fields, key = objects.vp.fields, 1 << 16 | vmcs.SHARED_EPTP
    fields["SHADOW_SHARED_EPTP", 1] = ALL
    assert objects.write(VP, GUEST, tdvps("L2_CTLS") + 1, 1, 1) == 0
    assert objects.vp.vmcs[key] == TDCX_PA + 0x4000
    assert objects.write(VP, DEBUG, l2(vmcs.SHARED_EPTP), 0x9000) == ALL
    assert objects.vp.vmcs[key] == 0x9000
    assert objects.write(VP, GUEST, tdvps("L2_CTLS") + 1, 0, 1) == 1
    assert objects.vp.vmcs[key] == TDCX_PA + 0x4000
    assert objects.write(VP, DEBUG, l2(vmcs.SHARED_EPTP), 0xA000) == 0x9000
    assert objects.vp.vmcs[key] == TDCX_PA + 0x4000
    assert objects.read(VP, DEBUG, l2(vmcs.SHARED_EPTP)) == 0xA000
    # Elements for VMs that are not there are stored and do nothing.
    assert objects.write(VP, GUEST, tdvps("L2_CTLS") + 3, 1, 1) == 0
    assert objects.read(VP, GUEST, tdvps("L2_CTLS") + 3) == 1


def test_virtual_apic_page_is_a_private_gpa_that_is_translated_later() -> None:
    objects = Objects(l2_vms=1)
    page = l2(vmcs.VIRTUAL_APIC)
    assert objects.write(VP, GUEST, page, 1 << 47 | 0x3000) == NOT_VALID
    assert objects.write(VP, GUEST, page, 0x3000) == 0
    assert objects.read(VP, GUEST, page) == 0x3000
    assert objects.vp.fields["L2_VAPIC_HPA", 1] == ALL
    assert 1 << 16 | vmcs.VIRTUAL_APIC not in objects.vp.vmcs


def test_msr_bitmaps_of_an_l2_vm_are_those_of_both_vmms_together() -> None:
    objects = Objects(l2_vms=1)
    bitmaps = tdvps("L2_MSR_BITMAPS_1")
    assert objects.read(VP, GUEST, bitmaps + 5) == ALL
    assert objects.read(VP, DEBUG, bitmaps + 5) == ALL
    objects.td.tdcs.msr_bitmaps = bytes(40) + bytes([0xF0]) + bytes(4096 - 41)
    assert objects.write(VP, GUEST, bitmaps + 5, 0x0F0) == ALL
    assert objects.write(VP, GUEST, bitmaps + 5, 0x001) == 0x0F0
    assert objects.read(VP, GUEST, bitmaps + 5) == 0x001
    assert objects.read(VP, DEBUG, bitmaps + 5) == 0x0F1
    assert objects.read(VP, DEBUG, tdvps("L2_SHADOW_MSR_BITMAPS_1") + 5) == 0x001


def test_deadline_of_an_l2_vm_is_translated_and_must_not_be_out_of_reach() -> None:
    objects = Objects(l2_vms=1)
    tdcs, inputs = objects.td.tdcs, objects.module.hardware.inputs
    tdcs.tsc_multiplier, inputs.tsc, inputs.tsc_step = 1 << 48, 10_000, 0
    deadline, fields = tdvps("TSC_DEADLINE") + 1, objects.vp.fields
    assert objects.write(VP, GUEST, deadline, 12_000) == 0
    assert fields["SHADOW_TSC_DEADLINE", 1] == 12_000
    assert objects.write(VP, GUEST, deadline, 9_000) == 12_000
    assert fields["SHADOW_TSC_DEADLINE", 1] == 10_000
    assert objects.write(VP, GUEST, deadline, ALL - 1) == Status.TDX_OPERAND_INVALID
    assert objects.write(VP, GUEST, deadline, ALL) == 9_000
    assert objects.read(VP, GUEST, deadline) == ALL
    assert fields["SHADOW_TSC_DEADLINE", 1] == 10_000
