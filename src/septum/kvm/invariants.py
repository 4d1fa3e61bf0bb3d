"""Properties of a host that hold in every state, for runs and explorations.

What is checked where it happens (lock order, sleeping in atomic context, freeing what the module owns, lists of vCPUs)
is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from septum.arch import sept
from septum.arch.pages import PAGE_MASK
from septum.core.cells import Tracking
from septum.core.steps import require
from septum.kvm.mmu.spte import (
    PG_LEVEL_4K,
    is_frozen_spte,
    is_last_spte,
    is_shadow_present_pte,
    pages_per_hpage,
    read_spte,
    spte_to_pa,
)
from septum.kvm.mmu.walk import Found, present_sptes
from septum.kvm.tdx.sept import pg_level_to_tdx_sept_level
from septum.tdx.secure_ept import walk_sept

if TYPE_CHECKING:
    from septum.kvm.host import Host
    from septum.kvm.vm import Vm


def no_bug(host: Host, vms: Callable[[], list[Vm]]) -> Callable[[], None]:
    """No VM is bugged: KVM_BUG_ON is never reached."""

    def check() -> None:
        for kvm in vms():
            require(not kvm.vm_bugged, "no KVM_BUG_ON", f"{kvm} is bugged: {kvm.vm_bugged}")

    return check


def mirror_agrees(vms: Callable[[], list[Vm]]) -> Callable[[], None]:
    """While nobody holds ``mmu_lock``, a page that is in the mirror is in the Secure EPT, at the same address.

    Except for pages that are premapped (6.16 to 6.18, during the build)."""

    def check() -> None:
        for kvm in vms():
            if kvm.mirror_root and kvm.mmu_lock.writer is None and not kvm.mmu_lock.readers:
                _compare(kvm)

    return check


def _compare(kvm: Vm) -> None:
    module = kvm.host.module
    td = module.td(kvm.tdr_page)
    premapped = 0
    for found in _mirror_leaves(kvm):
        level = pg_level_to_tdx_sept_level(found.level)
        entry = walk_sept(module, td, found.gfn << 12, level)
        require(not is_frozen_spte(read_spte(kvm, found.sptep, True)), "no SPTE stays frozen", f"gfn {found.gfn:#x}")
        if entry.level != level or sept.is_free(entry.value):
            premapped += 1
            continue
        require(
            entry.page == spte_to_pa(found.spte) and not sept.is_any_blocked(entry.value),
            "mirror and Secure EPT agree",
            f"gfn {found.gfn:#x}: SPTE {found.spte:#x}, Secure EPT entry {entry.value:#x}",
        )
    require(
        premapped == kvm.nr_premapped,
        "mirror and Secure EPT agree",
        f"{premapped} pages of {kvm} are only in the mirror, {kvm.nr_premapped} of them premapped",
    )


def _mirror_leaves(kvm: Vm) -> Iterator[Found]:
    """The leaves of the mirror page table.

    An exploration has to see which entries they are found by, a live run wants them fast.
    """
    if Tracking.recorder is not None:
        yield from present_sptes(kvm, kvm.mirror_root, True, 0, kvm.shared_gpa_bit >> 12, PG_LEVEL_4K, 0)
        return
    for sptep, spte in dict.items(kvm.mirror_sptes):
        sp = kvm.sps[sptep & PAGE_MASK]
        if is_shadow_present_pte(spte) and is_last_spte(spte, sp.level):
            yield Found(sp.gfn + (sptep >> 3 & 511) * pages_per_hpage(sp.level), sp.level, sptep, spte)
