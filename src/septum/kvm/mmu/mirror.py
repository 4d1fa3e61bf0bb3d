"""Changing an entry, and carrying the change to the Secure EPT.

With ``mmu_lock`` held for read, several CPUs may change the tables at once. A change to a mirror entry then goes in
three steps: cmpxchg from the old value to FROZEN_SPTE, the SEAMCALL, and a plain store of the new value, or of the old
one if the SEAMCALL failed. Entries disappear only with ``mmu_lock`` held for write.
Source: Linux 6.16, ``arch/x86/kvm/mmu/tdp_mmu.c``.
"""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING, Final

from septum.core.steps import ctx, current_task, emit, require, step
from septum.kvm.mmu.roots import tdp_mmu_free_sp
from septum.kvm.mmu.spte import (
    FROZEN_SPTE,
    SHADOW_NONPRESENT,
    is_frozen_spte,
    is_last_spte,
    is_shadow_present_pte,
    pages_per_hpage,
    read_spte,
    spte_to_pa,
    write_spte,
)
from septum.kvm.mmu.walk import Found
from septum.kvm.tdx.sept import (
    tdx_sept_free_private_spt,
    tdx_sept_link_private_spt,
    tdx_sept_remove_private_spte,
    tdx_sept_set_private_spte,
)
from septum.kvm.tdx.sept_split import tdx_sept_split_private_spte
from septum.kvm.vm import kvm_bug_on

if TYPE_CHECKING:
    from septum.kvm.vm import Vm


RCU_READ_SECTION: Final = "RCU read section"


def rcu_dereference_check() -> None:
    """``rcu_dereference(sptep)``: an entry's address is good only in the RCU read section that it was found in.

    :raises Violation: outside of one.
    """
    task = current_task()
    inside = RCU_READ_SECTION in task.atomic
    require(inside, "RCU read section", f"{task.name} changes an SPTE outside of an RCU read section")


async def tdp_mmu_set_spte_atomic(kvm: Vm, found: Found, new: int, mirror: bool) -> int:
    """``tdp_mmu_set_spte_atomic``: with ``mmu_lock`` held for read. 0, or -EBUSY when it has to be tried again, or what
    the SEAMCALL came to."""
    rcu_dereference_check()
    kvm.host.log.warn_on(is_frozen_spte(found.spte), "a frozen SPTE is to be changed")
    if mirror and not is_frozen_spte(new):
        if await kvm_bug_on(not is_shadow_present_pte(new), kvm, "atomic zap of a mirror SPTE"):
            return -EBUSY
        if r := await set_external_spte_present(kvm, found, new):
            return r
    else:
        await step("cmpxchg SPTE of gfn", found.gfn)
        if read_spte(kvm, found.sptep, mirror) != found.spte:
            return -EBUSY
        write_spte(kvm, found.sptep, new, mirror)
    await handle_changed_spte(kvm, found, new, mirror)
    return 0


async def set_external_spte_present(kvm: Vm, found: Found, new: int) -> int:
    """``set_external_spte_present``: a mirror entry becomes present, and the Secure EPT with it; or a leaf a table."""
    splits = is_split(found, new)
    await kvm_bug_on(is_shadow_present_pte(found.spte) and not splits, kvm, "a present mirror SPTE is replaced")
    await step("cmpxchg SPTE of gfn", found.gfn)
    if kvm.mirror_sptes[found.sptep] != found.spte:
        return -EBUSY
    # Before the merge the new value was there at once, for others to see, while the SEAMCALL was still to come.
    kvm.mirror_sptes[found.sptep] = FROZEN_SPTE if kvm.host.kernel.has("freeze-external-spte") else new
    if splits:
        r = await split_external_spte(kvm, found, new, shared=True)
    elif is_last_spte(new, found.level):
        r = await tdx_sept_set_private_spte(kvm, found.gfn, found.level, spte_to_pa(new))
    else:
        r = await tdx_sept_link_private_spt(kvm, found.gfn, found.level, await get_external_spt(kvm, new))
    await step("write SPTE of gfn", found.gfn)
    kvm.mirror_sptes.store(found.sptep, found.spte if r else new)
    return r


async def tdp_mmu_set_spte(kvm: Vm, found: Found, new: int, mirror: bool) -> None:
    """``tdp_mmu_set_spte``: with ``mmu_lock`` held for write. A mirror entry can only be removed or split."""
    rcu_dereference_check()
    frozen = is_frozen_spte(found.spte) or is_frozen_spte(new)
    kvm.host.log.warn_on(frozen, "a frozen SPTE under mmu_lock held for write")
    write_spte(kvm, found.sptep, new, mirror)
    await handle_changed_spte(kvm, found, new, mirror)
    if mirror and not is_shadow_present_pte(new):
        await remove_external_spte(kvm, found)
    elif mirror and is_split(found, new):
        await split_external_spte(kvm, found, new, shared=False)
    elif mirror:
        await kvm_bug_on(True, kvm, "a mirror SPTE is set with mmu_lock held for write")


def is_split(found: Found, new: int) -> bool:
    """Whether a leaf becomes a table."""
    was_leaf = is_shadow_present_pte(found.spte) and is_last_spte(found.spte, found.level)
    return was_leaf and is_shadow_present_pte(new) and not is_last_spte(new, found.level)


async def get_external_spt(kvm: Vm, spte: int) -> int:
    """``get_external_spt``: the page that the module gets in the place of a mirror page table."""
    external_spt = kvm.sps[spte_to_pa(spte)].external_spt
    await kvm_bug_on(not external_spt, kvm, "a mirror page table has no external one")
    return external_spt


async def split_external_spte(kvm: Vm, found: Found, new: int, *, shared: bool) -> int:
    """``split_external_spte`` (huge pages v3). With ``mmu_lock`` held for write a failure has bugged the VM."""
    external_spt = await get_external_spt(kvm, new)
    return await tdx_sept_split_private_spte(kvm, found.gfn, found.level, external_spt, mmu_lock_shared=shared)


async def remove_external_spte(kvm: Vm, found: Found) -> None:
    """``remove_external_spte``: takes a leaf out of the Secure EPT, which must succeed."""
    if is_last_spte(found.spte, found.level):
        r = await tdx_sept_remove_private_spte(kvm, found.gfn, found.level, spte_to_pa(found.spte))
        await kvm_bug_on(r, kvm, "a private page could not be removed")


async def handle_changed_spte(kvm: Vm, found: Found, new: int, mirror: bool) -> None:
    """``handle_changed_spte``: what follows from a change; a table that is gone goes with all below it."""
    old, level = found.spte, found.level
    if old == new:
        return
    if ctx.trace is not None:
        emit("spte", f"gfn {found.gfn:#x} level {level} old_spte {old:x} new_spte {new:x}", mirror=mirror)
    was_leaf = is_shadow_present_pte(old) and is_last_spte(old, level)
    is_leaf = is_shadow_present_pte(new) and is_last_spte(new, level)
    if was_leaf and is_leaf and spte_to_pa(old) != spte_to_pa(new):
        why = f"SPTE of gfn {found.gfn:#x} changes from {old:#x} to {new:#x}: the kernel stops (BUG)"
        require(False, "no leaf is replaced by another", why)
    if is_shadow_present_pte(old) and not was_leaf and not is_shadow_present_pte(new):
        await handle_removed_pt(kvm, spte_to_pa(old), mirror)


async def handle_removed_pt(kvm: Vm, spt: int, mirror: bool) -> None:
    """``handle_removed_pt``: clears a table that is no longer linked, and frees it.

    A table that the module would not give back is leaked. Tables are freed at once: nobody walks them without
    ``mmu_lock``, so that waiting for RCU readers changes nothing.
    """
    sp = kvm.sps[spt]
    for index in range(512):
        sptep = spt + 8 * index
        old = read_spte(kvm, sptep, mirror)
        if is_shadow_present_pte(old):
            found = Found(sp.gfn + index * pages_per_hpage(sp.level), sp.level, sptep, old)
            write_spte(kvm, sptep, FROZEN_SPTE, mirror)
            await handle_changed_spte(kvm, found, FROZEN_SPTE, mirror)
            if mirror:
                await remove_external_spte(kvm, found)
        if mirror:
            kvm.mirror_sptes.store(sptep, SHADOW_NONPRESENT)
    if mirror:
        failed = await tdx_sept_free_private_spt(kvm, sp.external_spt)
        if kvm.host.log.warn_on(failed, "a Secure EPT page could not be freed"):
            kvm.host.pages.leak(sp.external_spt, "Secure EPT page not given back")
            kvm.sps[spt] = sp._replace(external_spt=0)
    tdp_mmu_free_sp(kvm, spt)
