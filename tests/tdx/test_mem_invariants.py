"""What holds after any sequence of memory calls: Secure EPT, PAMT and the TD's counter agree, nothing is locked."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from septum.arch import sept
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.pages import PAGE_4K, Level
from septum.arch.pamt import PageType
from septum.tdx.secure_ept import table_entries
from tests.tdx.mem_machine import LARGE, MemMachine

H = HostLeaf
LEAVES = [
    H.TDH_MEM_PAGE_AUG,
    H.TDH_MEM_PAGE_REMOVE,
    H.TDH_MEM_PAGE_RELOCATE,
    H.TDH_MEM_PAGE_DEMOTE,
    H.TDH_MEM_PAGE_PROMOTE,
    H.TDH_MEM_RANGE_BLOCK,
    H.TDH_MEM_RANGE_UNBLOCK,
    H.TDH_MEM_SEPT_ADD,
    H.TDH_MEM_SEPT_REMOVE,
    H.TDH_MEM_SEPT_RD,
]
PLACES = st.sampled_from(
    [(0, Level.PT), (LARGE, Level.PD), (LARGE, Level.PD), (LARGE, Level.PT), (2 * LARGE, Level.PD), (0, Level.PDPT)]
)
CALLS = st.tuples(st.sampled_from([*LEAVES, "retire", "retire", GuestLeaf.TDG_MEM_PAGE_ACCEPT]), PLACES)
"""``retire``: block and track, so that the next call may take something away."""
TO_AND_FRO = [
    H.TDH_MEM_PAGE_AUG,
    "retire",
    H.TDH_MEM_PAGE_DEMOTE,
    "retire",
    H.TDH_MEM_PAGE_PROMOTE,
    "retire",
    H.TDH_MEM_PAGE_REMOVE,
    H.TDH_MEM_SEPT_ADD,
    "retire",
    H.TDH_MEM_SEPT_REMOVE,
]
CHILDREN = {PageType.REG, PageType.EPT, PageType.TDCX, PageType.TDVPR}


def reached(machine: MemMachine) -> tuple[list[tuple[int, int]], list[int]]:
    """Pages (address, level) and tables that the TD's Secure EPT leads to."""
    entries, td = machine.module.sept, machine.of_td
    pages: list[tuple[int, int]] = []
    tables: list[int] = []
    todo = [(td.tdcs.eptp & sept.HPA_MASK, td.tdcs.eptp >> 3 & 7)]
    while todo:
        table, level = todo.pop()
        for pa in table_entries(table):
            value = entries.get(pa, sept.FREE_ENTRY)
            if sept.is_free(value):
                continue
            if sept.is_leaf(value):
                pages.append((sept.without_accept_progress(value, level) & sept.HPA_MASK, level))
            else:
                tables.append(value & sept.HPA_MASK)
                todo.append((value & sept.HPA_MASK, level - 1))
    return pages, tables


def check(machine: MemMachine) -> None:
    module, td = machine.module, machine.of_td
    owned = [
        (key & -PAGE_4K, key & 3, entry.page_type)
        for key, entry in module.pamt.items()
        if entry.owner == machine.tdr and entry.page_type in CHILDREN
    ]
    assert td.tdr.chldcnt == sum(512**level for _, level, _ in owned)
    pages, tables = reached(machine)
    assert sorted(pages) == sorted((pa, level) for pa, level, kind in owned if kind == PageType.REG)
    assert sorted(tables) == sorted(pa for pa, _, kind in owned if kind == PageType.EPT)
    assert not any(sept.is_locked(value) for value in module.sept.values())


@settings(max_examples=100)
@example([(leaf, (LARGE, Level.PD)) for leaf in TO_AND_FRO])
@given(st.lists(CALLS, max_size=30))
def test_secure_ept_pamt_and_counter_agree(calls: list[tuple[HostLeaf | GuestLeaf | str, tuple[int, Level]]]) -> None:
    machine = MemMachine()
    for call, (gpa, level) in calls:
        if isinstance(call, GuestLeaf):
            machine.run()
            if machine.guest_exit(call, gpa | level) is None:
                machine.leave()
        elif isinstance(call, str):
            machine.mem(H.TDH_MEM_RANGE_BLOCK, gpa, level)
            machine.track()
        else:
            page = machine.huge_page() if (call, level) == (H.TDH_MEM_PAGE_AUG, Level.PD) else machine.page()
            machine.mem(call, gpa, level, r8=page)
        check(machine)
    assert not machine.module.locks
