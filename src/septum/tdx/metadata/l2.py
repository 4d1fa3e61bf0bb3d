"""Fields of L2 VMs: what an L1 VMM sees and writes is kept apart from what the CPU uses.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/metadata_vp.c``.
"""

from __future__ import annotations

from septum.arch import vmcs
from septum.arch.metadata import Access, Element, Structure
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.tdx.metadata import controls, storage
from septum.tdx.metadata.controls import Effect
from septum.tdx.metadata.scope import Scope
from septum.tdx.outcome import check
from septum.tdx.state.vp import L2_VM_SHIFT

U64 = (1 << 64) - 1
ENABLE_SHARED_EPTP = 1 << 0
"""L2_CTLS."""
EPTP_SUPERVISOR_SHADOW_STACK = 1 << 7
XFAM_CET_S = 1 << 12
NULL_PA = U64
NO_DEADLINE = U64
ZERO_PAGE = 4
"""Index of the TDCX page that is all zero: the Shared EPT of an L2 VM that may not use one."""

_CR_SHADOWS = {
    "CR0 Guest/Host Mask": "SHADOW_CR0_GUEST_HOST_MASK",
    "CR0 Read Shadow": "SHADOW_CR0_READ_SHADOW",
    "CR4 Guest/Host Mask": "SHADOW_CR4_GUEST_HOST_MASK",
    "CR4 Read Shadow": "SHADOW_CR4_READ_SHADOW",
}
_TSC_SHADOWS = {"PLE_GAP": "SHADOW_PLE_GAP", "PLE_Window": "SHADOW_PLE_WINDOW"}
#: VMCS fields of which the L1 VMM sees what it wrote -> where that is, by VM.
_SHADOWS = _CR_SHADOWS | _TSC_SHADOWS


def special_read(scope: Scope, element: Element, value: int) -> int:
    """What the one who asks is shown; ``value`` is what the CPU uses."""
    name, fields = element.field.name, scope.of_vp.fields
    if name == "Shared EPTP":
        return int(fields["SHADOW_SHARED_EPTP", element.vm])
    if name == "Virtual-APIC address":
        return int(fields["L2_VAPIC_GPA", element.vm])
    if scope.by_host:
        return value
    if name in _SHADOWS:
        return int(fields[_SHADOWS[name], element.vm])
    if name in ("Guest CR0", "Guest CR4"):
        return controls.read_cr(value, *_base(scope, name))
    if name.startswith("L2_MSR_BITMAPS"):
        return storage.store(Structure.TDVPS, _shadow_bitmap(name)).read(scope, element.number)
    return value


def _base(scope: Scope, name: str) -> tuple[int, int]:
    """Guest/host mask and read shadow of Guest CR0 or CR4 for all L2 VMs of the VCPU."""
    fields, register = scope.of_vp.fields, name.removeprefix("Guest ")
    return int(fields[f"BASE_L2_{register}_GUEST_HOST_MASK", 0]), int(fields[f"BASE_L2_{register}_READ_SHADOW", 0])


def _shadow_bitmap(name: str) -> str:
    return name.replace("L2_", "L2_SHADOW_")


def _cr_control(scope: Scope, element: Element, write_mask: int, new: int) -> None:
    """The CPU gets the L1 VMM's bits and those that the module keeps for itself; the L1 VMM's shadow goes first."""
    vp, vm = scope.of_vp, element.vm
    vp.fields.store((_CR_SHADOWS[element.field.name], vm), new)
    register = element.field.name[:3]
    base_mask, base_shadow = _base(scope, register)
    mask = int(vp.fields[f"SHADOW_{register}_GUEST_HOST_MASK", vm])
    shadow = int(vp.fields[f"SHADOW_{register}_READ_SHADOW", vm])
    mask_field, shadow_field = _CR_FIELDS[register]
    vp.vmcs.store(vm << L2_VM_SHIFT | mask_field, base_mask | mask)
    vp.vmcs.store(vm << L2_VM_SHIFT | shadow_field, base_mask & ~mask & base_shadow | mask & shadow)


_CR_FIELDS = {"CR0": (vmcs.CR0_MASK, vmcs.CR0_SHADOW), "CR4": (vmcs.CR4_MASK, vmcs.CR4_SHADOW)}


def _guest_cr(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    present = storage.read(scope, element)
    return controls.write_cr(present, new, *_base(scope, element.field.name))


def _eptp(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    valid = not new & EPTP_SUPERVISOR_SHADOW_STACK or scope.of_td.tdcs.xfam & XFAM_CET_S
    check(valid, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return new


def _pause_loop(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """The L1 VMM counts in virtual TSC ticks, the CPU in its own."""
    if scope.access is not Access.GUEST:
        return new
    scope.of_vp.fields.store((_TSC_SHADOWS[element.field.name], element.vm), new & 0xFFFF_FFFF)
    ticks = native_tsc(scope, new)
    check(ticks is not None and ticks < 1 << 32, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
    return ticks or 0


def _capability(name: str, msr: int) -> Effect:
    """Controls as the virtual capability MSR allows them; those of a debugger, as the CPU does."""

    def effect(scope: Scope, element: Element, write_mask: int, new: int) -> int:
        td = scope.of_td
        debugger = scope.by_host and td.tdcs.attributes & TdAttributes.DEBUG
        capability = controls.native(scope, msr) if debugger else td.fields[name, 0]
        if msr == controls.IA32_VMX_PROCBASED_CTLS3:
            valid = not new & write_mask & ~capability
        else:
            valid = controls.allows(capability, new, write_mask)
        check(valid, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
        return new

    return effect


def _shared_eptp(scope: Scope, element: Element, write_mask: int, new: int) -> int | None:
    """The CPU gets it only while L2_CTLS enables it."""
    vp, vm = scope.of_vp, element.vm
    vp.fields.store(("SHADOW_SHARED_EPTP", vm), new)
    return new if vp.fields["L2_CTLS", vm] & ENABLE_SHARED_EPTP else None


def _vapic(scope: Scope, element: Element, write_mask: int, new: int) -> None:
    """The address is translated at the next entry to the L2 VM."""
    fields = scope.of_vp.fields
    fields.store(("L2_VAPIC_GPA", element.vm), new)
    fields.store(("L2_VAPIC_HPA", element.vm), NULL_PA)


def _msr_bitmaps(scope: Scope, element: Element, write_mask: int, new: int) -> None:
    """An MSR access exits if the L1 VMM or the module wants it to."""
    name, number = element.field.name, element.number
    of_td = storage.store(Structure.TDCS, "MSR_BITMAPS").read(scope, number)
    storage.store(Structure.TDVPS, _shadow_bitmap(name)).write(scope, number, new)
    storage.store(Structure.TDVPS, name).write(scope, number, new | of_td)


def l2_ctls(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """Switches an L2 VM's Shared EPT between the L1 VMM's and none."""
    vm = element.number
    if 0 < vm <= scope.l2_vms:
        vp = scope.of_vp
        pointer = vp.fields["SHADOW_SHARED_EPTP", vm]
        if not new & ENABLE_SHARED_EPTP or pointer == NULL_PA:
            pointer = scope.of_td.tdr.tdcx_pa[ZERO_PAGE]
        vp.vmcs.store(vm << L2_VM_SHIFT | vmcs.SHARED_EPTP, pointer)
    return new


def tsc_deadline(scope: Scope, element: Element, write_mask: int, new: int) -> int:
    """When an L2 VM is to be left at the latest, in virtual TSC ticks.

    :raises Fail: OPERAND_INVALID for a deadline that the CPU's own counter cannot express.
    """
    vm = element.number
    if 0 < vm <= scope.l2_vms and new != NO_DEADLINE:
        now = scope.module.hardware.rdtsc()
        deadline: int | None = now
        if new > virtual_tsc(scope, now):
            deadline = native_tsc(scope, new)
            ahead = deadline and (deadline - now) & U64 < 1 << 63
            check(ahead, Status.TDX_OPERAND_INVALID)
        scope.of_vp.fields.store(("SHADOW_TSC_DEADLINE", vm), deadline or 0)
    return new


def virtual_tsc(scope: Scope, native: int) -> int:
    """The TD's time-stamp counter when the CPU's is ``native`` (``calculate_virt_tsc``)."""
    td = scope.of_td.tdcs
    return (native * td.tsc_multiplier >> 48) + td.tsc_offset & U64


def native_tsc(scope: Scope, virtual: int) -> int | None:
    """The CPU's time-stamp counter when the TD's is ``virtual``; None if 64 bits do not hold it."""
    td = scope.of_td.tdcs
    ticks = virtual - td.tsc_offset & U64
    return (ticks << 48) // td.tsc_multiplier if ticks >> 16 < td.tsc_multiplier else None


EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(_CR_SHADOWS, _cr_control),
    **dict.fromkeys(_TSC_SHADOWS, _pause_loop),
    "Guest CR0": _guest_cr,
    "Guest CR4": _guest_cr,
    "EPTP": _eptp,
    "IA32_DEBUGCTL": controls.debugctl,
    "Primary Processor-Based VM-Exection Controls": _capability(
        "VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS", controls.IA32_VMX_TRUE_PROCBASED_CTLS
    ),
    "Secondary Processor-Based VM-Exection Controls": _capability(
        "VIRTUAL_IA32_VMX_PROCBASED_CTLS2", controls.IA32_VMX_PROCBASED_CTLS2
    ),
    "Tertiary Processor-Based VM-Exection Controls": _capability(
        "VIRTUAL_IA32_VMX_PROCBASED_CTLS3", controls.IA32_VMX_PROCBASED_CTLS3
    ),
    "Shared EPTP": _shared_eptp,
    "Virtual-APIC address": _vapic,
    **{f"L2_MSR_BITMAPS_{vm}": _msr_bitmaps for vm in (1, 2, 3)},
}
