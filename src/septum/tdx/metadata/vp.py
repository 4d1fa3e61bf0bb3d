"""Fields of a VCPU: those whose value is computed on reading, and those whose new value is checked or has effects.

Fields of L2 VMs are in ``septum.tdx.metadata.l2``.
Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_vp.c``.
"""

from __future__ import annotations

from collections.abc import Callable

from septum.arch import vmcs
from septum.arch.metadata import Access, Attribute, Element
from septum.arch.op_state import LastExit, VcpuState
from septum.arch.pages import PAGE_4K, is_valid_gpa
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.metadata import controls, l2, storage
from septum.tdx.metadata.controls import Effect
from septum.tdx.metadata.scope import Located, Scope
from septum.tdx.metadata.td import check_protected_bits
from septum.tdx.outcome import Fail, check
from septum.tdx.td_params.checks import xcr0_allowed
from septum.tdx.td_params.msrs import DDPD_U
from septum.tdx.td_params.native import NativeCpu

NOT_A_PHYSICAL_ADDRESS = 1 << 63
"""Set in the initial value of address fields."""
PI_VECTOR, PI_DESCRIPTOR = vmcs.POSTED_INTERRUPT_VECTOR, vmcs.POSTED_INTERRUPT_DESCRIPTOR
PI_DESCRIPTOR_SIZE = 64
PROCESS_POSTED_INTERRUPTS = 1 << 7
ENABLE_PML = 1 << 17
NO_PI_VECTOR = 0xFFFF
NO_ADDRESS = (1 << 64) - 1
VAPIC_PPR = 0xA0
XSAVE_HEADER = range(512 // 8, (512 + 64) // 8)
"""Elements of XBUFF."""
XFAM_PT = 8
HOST_ROUTINGS = range(3)
"""Values of L2_EXIT_HOST_ROUTING: none, as an asynchronous exit, as a TDVMCALL."""
_CR_CONTROLS = {"Guest CR0": (vmcs.CR0_MASK, vmcs.CR0_SHADOW), "Guest CR4": (vmcs.CR4_MASK, vmcs.CR4_SHADOW)}
_MIGRATION = (Access.EXPORT_MUTABLE, Access.IMPORT_MUTABLE)
"""Who sees control registers as the guest does."""


def read_vp(scope: Scope, located: Located) -> int:
    """The value of an element, all of its bits."""
    element = located.element
    value = storage.read(scope, element)
    if element.field.special_read:
        if element.vm:
            value = l2.special_read(scope, element, value)
        elif element.field.name in _CR_CONTROLS and scope.access in _MIGRATION:
            mask, shadow = _CR_CONTROLS[element.field.name]
            value = controls.read_cr(value, scope.of_vp.vmcs[mask], scope.of_vp.vmcs[shadow])
        elif element.field.name == "VCPU_STATE_DETAILS":
            value = interrupt_pending(scope)
        elif element.field.name == "IA32_SPEC_CTRL":
            value &= ~scope.of_td.tdcs.ia32_spec_ctrl_mask
    return value & element.field.element_mask


def interrupt_pending(scope: Scope) -> int:
    """VCPU_STATE_DETAILS.VMXIP: a virtual interrupt is pending that the guest's priority does not hold back."""
    requested = scope.of_vp.vmcs[vmcs.GUEST_INTERRUPT_STATUS] & 0xF0
    masked = scope.of_vp.fields["VAPIC", VAPIC_PPR // 8] & 0xF0
    return int(requested > masked)


def write_vp(scope: Scope, located: Located, value: int, mask: int) -> int:
    """Writes the bits of an element that ``mask`` and the writer's rights allow; returns the old value.

    :raises Fail: METADATA_FIELD_NOT_WRITABLE, METADATA_FIELD_VALUE_NOT_VALID (also for a change of a bit that must not
        be written), TD_VMCS_FIELD_NOT_INITIALIZED, or OPERAND_INVALID for a deadline too far ahead.
    """
    element = located.element
    field = element.field
    present = read_vp(scope, located)
    writable = located.write_mask & mask
    check(writable, Status.TDX_METADATA_FIELD_NOT_WRITABLE)
    # What is replaced as a whole needs no translation back.
    old = 0 if writable == field.element_mask else present
    if field.attributes & (Attribute.HPA | Attribute.GPA) and old & NOT_A_PHYSICAL_ADDRESS:
        old &= located.write_mask
    check_protected_bits(old, value, mask & ~located.write_mask)
    new = old & ~writable | value & writable
    _check_address(scope, element, new)
    final: int | None = new
    if field.special_write:
        effect = l2.EFFECTS.get(field.name) if element.vm else _EFFECTS.get(field.name)
        if effect is not None:
            final = effect(scope, element, located.write_mask, new)
    if final is not None:
        storage.write(scope, element, final)
    return present & located.read_mask


def _check_address(scope: Scope, element: Element, address: int) -> None:
    """The address in an address field is the host's, or a private one of the guest's."""
    attributes = element.field.attributes
    valid = True
    if Attribute.HPA | Attribute.SHARED in attributes:
        size = PI_DESCRIPTOR_SIZE if element.offset == PI_DESCRIPTOR else PAGE_4K
        valid = scope.module.is_shared_hpa(address, size)
    elif Attribute.GPA | Attribute.PRIVATE in attributes:
        valid = is_valid_gpa(address, scope.of_td.tdcs.gpaw, private=True)
    check(valid, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)


def _guest_cr(mask: int, shadow: int) -> Effect:
    """Written as if by the guest: bits that the module owns keep their real value, and look to the guest as before."""

    def effect(scope: Scope, element: Element, write_mask: int, new: int) -> int:
        fields = scope.of_vp.vmcs
        return controls.write_cr(fields[element.offset], new, fields[mask], fields[shadow])

    return effect


def _pin_based(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """Posted interrupts need a vector and a descriptor."""
    fields = scope.of_vp.vmcs
    if new & PROCESS_POSTED_INTERRUPTS:
        check(fields[PI_VECTOR] != NO_PI_VECTOR, Status.TDX_TD_VMCS_FIELD_NOT_INITIALIZED, PI_VECTOR)
        check(fields[PI_DESCRIPTOR] != NO_ADDRESS, Status.TDX_TD_VMCS_FIELD_NOT_INITIALIZED, PI_DESCRIPTOR)
    scope.of_vp.fields.store(("SHADOW_PINBASED_EXEC_CTLS", 0), new)
    return new


def _shadowed(name: str) -> Effect:
    """The value is also kept in TDVPS."""

    def effect(scope: Scope, element: Element, write_mask: int, new: int) -> int:
        scope.of_vp.fields.store((name, 0), new)
        return new

    return effect


def _pi_vector(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    check(new <= 0xFF, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    scope.of_vp.fields.store(("SHADOW_POSTED_INT_NOTIFICATION_VECTOR", 0), new)
    return new


def _secondary(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """What the CPU allows; a page modification log only for debug TDs, and with an address."""
    valid = controls.allows(controls.native(scope, controls.IA32_VMX_PROCBASED_CTLS2), new, write_mask)
    if new & ENABLE_PML:
        has_log = not scope.of_vp.vmcs[vmcs.PML_ADDRESS] & NOT_A_PHYSICAL_ADDRESS
        valid = valid and has_log and bool(scope.of_td.tdcs.attributes & TdAttributes.DEBUG)
    check(valid, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return new


def _xbuff(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """A debugger cannot write the XSAVE header, nor the image of IA32_RTIT_CTL, which comes first in the PT state."""
    td = scope.of_td.tdcs
    forbidden = element.number in XSAVE_HEADER or (
        td.xfam >> XFAM_PT & 1 and element.number == td.xbuff_offsets[XFAM_PT] // 8
    )
    check(not (scope.by_host and forbidden), Status.TDX_METADATA_FIELD_NOT_WRITABLE)
    return new


def _spec_ctrl(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """Bit DDPD_U of a guest that does not know it is 1, if the CPU has it."""
    if not cpu_has_ddpd(scope):
        return new & ~DDPD_U
    return new if scope.of_td.tdcs.cpuid_flags.ddpd else new | DDPD_U


def cpu_has_ddpd(scope: Scope) -> bool:
    """CPUID(7,2).EDX.DDPD."""
    return bool(scope.module.hardware.cpu.cpuid(7, 2).edx & 1 << 3)


def _never(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    raise Fail(Status.TDX_METADATA_FIELD_NOT_WRITABLE)


def _imported(is_valid: Callable[[Scope, int], object]) -> Effect:
    """A field that only an import writes, and what is asked of its value."""

    def effect(scope: Scope, element: Element, write_mask: int, new: int) -> int:
        check(is_valid(scope, new), Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
        return new

    return effect


def _is_xcr0(scope: Scope, new: int) -> bool:
    cpu: NativeCpu = scope.module.native_cpu
    return xcr0_allowed(new, scope.of_td.tdcs.xfam, cpu)


def _vcpu_state(scope: Scope, element: Element, write_mask: int, new: int) -> int | None:
    """Imported only for a VCPU that is disabled here already, as the module has it."""
    return new if scope.of_vp.tdvps.vcpu_state == VcpuState.DISABLED else None


_EFFECTS: dict[str, Effect] = {
    **{name: _guest_cr(mask, shadow) for name, (mask, shadow) in _CR_CONTROLS.items()},
    "IA32_DEBUGCTL": controls.debugctl,
    "Pin-Based VM-Exection Controls": _pin_based,
    "Posted-interrupt descriptor address": _shadowed("SHADOW_PID_HPA"),
    "Posted-interrupt notification vector": _pi_vector,
    "Secondary Processor-Based VM-Exection Controls": _secondary,
    "Shared EPTP": _shadowed("SHADOW_SHARED_EPTP"),
    "XBUFF": _xbuff,
    "IA32_SPEC_CTRL": _spec_ctrl,
    "XFAM": _never,
    "XCR0": _imported(_is_xcr0),
    "IA32_XSS": _imported(lambda scope, new: not new & ~scope.of_td.tdcs.xfam),
    "VCPU_STATE": _vcpu_state,
    "VCPU_INDEX": _imported(lambda scope, new: new < scope.of_td.tdcs.num_vcpus),
    "LAST_TD_EXIT": _imported(lambda scope, new: new in tuple(LastExit)),
    "CURR_VM": _imported(lambda scope, new: new <= scope.of_td.tdcs.num_l2_vms),
    "L2_EXIT_HOST_ROUTING": _imported(lambda scope, new: new in HOST_ROUTINGS),
    "L2_CTLS": l2.l2_ctls,
    "TSC_DEADLINE": l2.tsc_deadline,
}
