"""What holds in the module between calls, whatever was called: checked on its whole state."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from septum.arch import sept, sept_l2
from septum.arch.op_state import ANY_INITIALIZED, KotState, Lifecycle, VcpuState
from septum.arch.pages import PAGE_MASK, level_size
from septum.arch.pamt import PageType
from septum.core.cells import SharedMap
from septum.core.trylocks import SharexHp
from septum.tdx.module import Module
from septum.tdx.state.td import FIRST_L2_SEPT_ROOT_PAGE, Td
from septum.tdx.state.vp import NO_LP

IsFree = Callable[[int], bool]
IN_USE = frozenset({PageType.REG, PageType.TDR, PageType.TDCX, PageType.TDVPR, PageType.EPT})
HAS_HKID = (Lifecycle.HKID_ASSIGNED, Lifecycle.KEYS_CONFIGURED, Lifecycle.BLOCKED)


def check_locks(module: Module) -> None:
    """Only guests that run hold locks: their TDVPR, the PAMT entries above it, and their TDR, all shared."""
    held: Counter[Any] = Counter()
    for lp in module.lps:
        if lp.running:
            held.update(lp.running & -level_size(level) & PAGE_MASK | level for level in (2, 1, 0))
            held.update([module.pamt_entry(lp.running).owner])
    for key, word in dict.items(module.locks):
        priority = SharexHp.HP if isinstance(key, int) else 0
        assert word & ~priority == held[key] * SharexHp.READER, f"lock {key} is left as {word:#x}"
    assert all(key in module.locks for key in held)


def check_all(module: Module) -> None:
    """Pages, Secure EPTs, key ownership and VCPUs agree with one another."""
    check_locks(module)
    pages: dict[int, list[tuple[int, PageType]]] = defaultdict(list)
    for key, entry in dict.items(module.pamt):
        kind = PageType(entry.page_type)
        if kind not in IN_USE:
            continue
        owner = key if kind == PageType.TDR else entry.owner
        assert module.pamt_entry(owner).page_type == PageType.TDR, f"page {key:#x} belongs to no TD"
        assert kind == PageType.REG or not key & 3, f"a large {kind.name}"
        for level in range((key & 3) + 1, 3):
            above = module.pamt_entry(key & PAGE_MASK & -level_size(level) | level)
            assert above.page_type not in IN_USE, f"page {key:#x} is within a larger page in use"
        pages[owner].append((key, kind))
    owners: dict[int, int] = {}
    for tdr, its in pages.items():
        td = module.td(tdr)
        _check_children(td, its)
        _check_key(module, td, owners)
        _check_vcpus(module, td, [key for key, kind in its if kind == PageType.TDVPR])
        if td.tdr.lifecycle_state != Lifecycle.TEARDOWN and td.tdcs.op_state in ANY_INITIALIZED and td.tdcs.eptp:
            _check_secure_ept(module, td, its)
    for hkid, kot in enumerate(module.kot):
        if kot.state in (KotState.HKID_ASSIGNED, KotState.HKID_FLUSHED):
            assert hkid in owners, f"HKID {hkid} belongs to no TD"


def _check_children(td: Td, pages: list[tuple[int, PageType]]) -> None:
    children = sum(512 ** (key & 3) for key, kind in pages if kind != PageType.TDR)
    assert td.tdr.chldcnt == children, f"{td} counts {td.tdr.chldcnt} pages and has {children}"


def _check_key(module: Module, td: Td, owners: dict[int, int]) -> None:
    """TDs and the key ownership table agree on who has which HKID."""
    if td.tdr.lifecycle_state not in HAS_HKID:
        return
    hkid = td.tdr.hkid
    assert hkid not in owners, f"HKID {hkid} belongs to two TDs"
    owners[hkid] = td.pa
    flushed = td.tdr.lifecycle_state == Lifecycle.BLOCKED
    assert module.kot[hkid].state == (KotState.HKID_FLUSHED if flushed else KotState.HKID_ASSIGNED)


def _check_vcpus(module: Module, td: Td, tdvprs: list[int]) -> None:
    """Counts of VCPUs, their association with LPs, and how many are inside in which epoch."""
    vps = {pa: module.vp(pa).tdvps for pa in tdvprs}
    inside: Counter[int] = Counter()
    for pa, tdvps in vps.items():
        running = [lp.index for lp in module.lps if lp.running == pa]
        # Where a TD became fatal, its VCPU stays as it was.
        active = tdvps.vcpu_state == VcpuState.ACTIVE
        assert active == bool(running) or (active and td.tdr.fatal), f"VCPU {pa:#x} is active and runs nowhere"
        if running:
            assert running == [tdvps.assoc_lpid]
            inside[tdvps.vcpu_epoch & 1] += 1
    if td.tdr.lifecycle_state != Lifecycle.TEARDOWN:
        associated = sum(tdvps.assoc_lpid != NO_LP for tdvps in vps.values())
        assert td.tdcs.num_assoc_vcpus == associated, f"{td} counts {td.tdcs.num_assoc_vcpus}, has {associated}"
        ready = sum(tdvps.vcpu_state != VcpuState.UNINITIALIZED for tdvps in vps.values())
        assert td.tdcs.num_vcpus >= ready
    # A TD whose memory cannot be read any more is not counted out of.
    assert td.tdr.fatal or td.tdcs.refcount == (inside[0], inside[1]), f"{td} counts {td.tdcs.refcount} VCPUs inside"


def _check_secure_ept(module: Module, td: Td, pages: list[tuple[int, PageType]]) -> None:
    """Every page of the TD is mapped exactly once, every table is linked exactly once, and nothing else is."""
    eptp = td.tdcs.eptp
    tables, mapped = _walk(module.sept, eptp & PAGE_MASK, eptp >> 3 & 7, _is_free)
    for vm in range(td.tdcs.num_l2_vms):
        root = module.pa_format.address(td.tdr.tdcx_pa[FIRST_L2_SEPT_ROOT_PAGE + vm])
        l2_tables, aliases = _walk(module.sept_l2, root, eptp >> 3 & 7, _is_free_in_l2)
        tables += l2_tables
        for gpa, key in aliases.items():
            assert mapped.get(gpa) == key, f"L2 VM {vm + 1} maps {gpa:#x} to a page that the TD does not have there"
    assert sorted(tables) == sorted(key for key, kind in pages if kind == PageType.EPT)
    assert sorted(mapped.values()) == sorted(key for key, kind in pages if kind == PageType.REG)


def _walk(entries: SharedMap[int, int], root: int, level: int, is_free: IsFree) -> tuple[list[int], dict[int, int]]:
    """The tables below a root, and by GPA the PAMT keys of the pages that are mapped, blocked ones too."""
    by_table: dict[int, list[int]] = defaultdict(list)
    for pa in dict.keys(entries):
        by_table[pa & PAGE_MASK].append(pa)
    tables: list[int] = []
    mapped: dict[int, int] = {}
    todo = [(root, 0, level)]
    while todo:
        table, gpa, level = todo.pop()
        for pa in by_table[table]:
            entry, at = entries[pa], gpa + (pa - table) // 8 * level_size(level)
            if is_free(entry):
                continue
            if entry & sept.PS:
                mapped[at] = entry & PAGE_MASK & -level_size(level) | level
            else:
                tables.append(entry & PAGE_MASK)
                todo.append((entry & PAGE_MASK, at, level - 1))
    return tables, mapped


def _is_free(entry: int) -> bool:
    assert not entry & (sept.TDEL | sept.TDHP), f"entry {entry:#x} is left locked"
    return sept.state(entry) in (sept.SeptState.FREE, sept.SeptState.REMOVED)


def _is_free_in_l2(entry: int) -> bool:
    return sept_l2.state(entry) == sept_l2.L2State.FREE
