"""A virtual processor of a TD: the TDVPS behind a TDVPR page.

Source: TDX Module 1.5.01, ``src/common/data_structures/tdx_tdvps.h``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from septum.core.cells import Fixed, Shared, SharedMap

NO_LP: Final = 0xFFFF_FFFF
"""ASSOC_LPID of a VCPU that is associated with no LP."""
VE_INFO_VALID: Final = 0xFFFF_FFFF
L2_VM_SHIFT: Final = 16


class VeInfo(NamedTuple):
    """VE_INFO: why the guest got its last #VE. ``valid`` is 0 once TDG.VP.VEINFO.GET has read it."""

    exit_reason: int = 0
    valid: int = 0
    exit_qualification: int = 0
    gla: int = 0
    gpa: int = 0
    eptp_index: int = 0
    instruction_length: int = 0
    instruction_information: int = 0


class Tdvps(Shared):
    """The parts of TDVPS that interface functions act upon, under their metadata names in lower case.

    ``gprs`` are the guest's registers in the order of :data:`septum.tdx.registers.GPR_NAMES`, also while it runs.
    """

    vcpu_state: int = 0
    last_td_exit: int = 0
    vcpu_index: int = 0
    num_tdvps_pages: int = 0
    tdvps_page_pa: tuple[int, ...] = ()
    assoc_lpid: int = NO_LP
    vcpu_epoch: int = 0
    cpuid_supervisor_ve: bool = False
    cpuid_user_ve: bool = False
    last_exit_tsc: int = 0
    pend_nmi: bool = False
    xfam: int = 0
    last_epf_gpa_list_idx: int = 0
    last_epf_gpa_list: tuple[int, ...] = (0,) * 32
    possibly_epf_stepping: int = 0
    hp_lock_busy: bool = False
    hp_lock_busy_start: int = 0
    curr_vm: int = 0
    vm_launched: bool = False
    lp_dependent_hpa_updated: bool = False
    module_dependent_fields_updated: bool = False
    gprs: tuple[int, ...] = (0,) * 15
    cr2: int = 0
    xcr0: int = 0
    ia32_xss: int = 0
    ve_info: VeInfo = VeInfo()
    export_count: int = 0
    """EXPORT_COUNT of the TD when the VCPU was exported last."""


class Vp(Fixed):
    """The VCPU whose TDVPR is the page at ``pa``.

    ``vmcs`` maps VMCS encodings to values (fields of L2 VM n at ``n << 16 | encoding``), ``fields`` the other metadata
    by field name and element. A field that nobody wrote is 0.
    """

    __slots__ = ("fields", "pa", "tdvps", "vmcs")

    def __init__(self, pa: int) -> None:
        self.pa = pa
        self.tdvps = Tdvps(f"TDVPS[{pa:#x}]")
        self.vmcs: SharedMap[int, int] = SharedMap(f"VMCS[{pa:#x}]", 0)
        self.fields: SharedMap[tuple[str, int], Any] = SharedMap(f"TDVPS.fields[{pa:#x}]", 0)

    def __repr__(self) -> str:
        return f"VP[{self.pa:#x}]"
