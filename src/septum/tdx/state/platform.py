"""Platform-wide state of the module: initialisation, keys, logical processors, TDMRs."""

from __future__ import annotations

from septum.core.cells import Shared


class Sys(Shared):
    """``tdx_module_global_t``: the module's own state and progress of its initialisation."""

    state: int = 0
    num_initialised_lps: int = 0
    pkg_key_config: int = 0
    hkid: int = 0
    halted: str = ""


class Lp(Shared):
    """A logical processor: whether it is initialised, and the VCPU that runs on it (its TDVPR's address; 0: none)."""

    index: int
    package: int
    initialised: bool = False
    busy: bool = False
    running: int = 0


class TdmrState(Shared):
    """A TDMR given to TDH.SYS.CONFIG and how far TDH.SYS.TDMR.INIT has come (``next`` address to initialise)."""

    base: int
    size: int
    pamt: tuple[tuple[int, int], ...] = ()
    reserved: tuple[tuple[int, int], ...] = ()
    next: int = 0


class KotEntry(Shared):
    """Key ownership of one private HKID and, per package, whether its cache lines may still be dirty."""

    state: int = 0
    wbinvd_bitmap: int = 0
