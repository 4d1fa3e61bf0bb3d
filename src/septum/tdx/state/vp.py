"""A virtual processor of a TD: the TDVPS behind a TDVPR page.

Source: TDX Module 1.5.01, ``src/common/data_structures/tdx_tdvps.h``.
"""

from __future__ import annotations

from typing import Any

from septum.core.cells import Shared, SharedMap


class Tdvps(Shared):
    """Management fields of a TD VCPU, and the state that interface functions act upon."""

    state: int = 0
    num_tdvps_pages: int = 0
    tdvps_pa: tuple[int, ...] = ()
    assoc_lpid: int = -1
    assoc_hkid: int = 0
    vcpu_epoch: int = 0
    vcpu_index: int = 0
    x2apic_id: int = 0
    launched: bool = False
    last_td_exit: int = 0
    gprs: tuple[int, ...] = (0,) * 15
    ve_info: tuple[int, ...] | None = None
    last_epf_gpa_list: tuple[int, ...] = ()
    possibly_epf_stepping: int = 0
    hp_lock_busy_start: int = 0


class Vp:
    """The VCPU whose TDVPR is the page at ``pa``; ``vmcs`` maps VMCS encodings to values, ``fields`` the other metadata."""

    __slots__ = ("fields", "pa", "tdvps", "vmcs")

    def __init__(self, pa: int) -> None:
        self.pa = pa
        self.tdvps = Tdvps(f"TDVPS[{pa:#x}]")
        self.vmcs: SharedMap[int, int] = SharedMap(f"VMCS[{pa:#x}]", 0)
        self.fields: SharedMap[tuple[str, int], Any] = SharedMap(f"TDVPS.fields[{pa:#x}]", 0)

    def __repr__(self) -> str:
        return f"VP[{self.pa:#x}]"
