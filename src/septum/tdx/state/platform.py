"""Platform-wide state of the module: initialisation, keys, logical processors, TDMRs."""

from __future__ import annotations

from septum.core.cells import Shared


class Sys(Shared):
    """``tdx_module_global_t``: the module's own state and progress of its initialisation."""

    state: int = 0
    attributes: int = 0
    sampled: tuple[tuple[int, int], ...] = ()
    """MSRs as TDH.SYS.INIT read them: address and value."""
    num_initialised_lps: int = 0
    num_tdmrs: int = 0
    hkid: int = 0
    """The KeyID of the module itself."""
    packages_with_key: int = 0
    """Bitmap of the packages on which that KeyID has its key."""
    halted: str = ""

    def sampled_msr(self, address: int) -> int:
        """An MSR as TDH.SYS.INIT read it; every initialised LP had the same value then."""
        return dict(self.sampled)[address]


class Lp(Shared):
    """A logical processor: whether it is initialised, and the VCPU that runs on it (its TDVPR's address; 0: none)."""

    index: int
    package: int
    initialised: bool = False
    busy: bool = False
    running: int = 0
    rip_on_entry: int = 0
    """RIP of the VCPU when it was entered last."""
    last_entry_tsc: int = 0
    is_single_stepping: bool = False
    """The module steps through instructions of the VCPU, because it suspects that the host does."""
    steps_left: int = 0
    nmi_while_stepping: bool = False
    init_while_stepping: bool = False
    lfsr: int = 0xFEED_BEAF
    """Shift register that chooses how many instructions to step through; TDH.SYS.LP.INIT seeds it."""
    bus_lock_preempted: bool = False
    """A bus lock was reported together with another exit, and the host has not been told yet."""
    host_rbp: int = 0
    """The host's RBP at TDH.VP.ENTER, given back if the TD may not change it."""


class TdmrState(Shared):
    """A TDMR given to TDH.SYS.CONFIG and how far TDH.SYS.TDMR.INIT has come (``next`` address to initialise)."""

    base: int = 0
    size: int = 0
    pamt: tuple[tuple[int, int], ...] = ()
    """Base and size of the areas for 4 KiB, 2 MiB and 1 GiB pages."""
    reserved: tuple[tuple[int, int], ...] = ()
    """Offset and size of reserved areas."""
    next: int = 0


class KotEntry(Shared):
    """Key ownership of one private HKID and, per package, whether its cache lines may still be dirty."""

    state: int = 0
    wbinvd_bitmap: int = 0


class CacheWriteback(Shared):
    """``wbt_entry_t``: a write-back of a package's cache that was interrupted: after how many parts (0: there is none),
    and the HKIDs that it was begun for."""

    parts_done: int = 0
    hkids: tuple[int, ...] = ()
