"""Random calls: never an exception, always a status, never an inconsistent state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState
from septum.arch.pages import PAGE_MASK
from septum.arch.pamt import PageType
from septum.arch.sept import TDEL
from septum.core.cells import Tracking, World
from septum.tdx.host import HANDLERS
from septum.tdx.module import Module
from septum.tdx.state.memory import PamtEntry
from tests.tdx.invariants import check_all
from tests.tdx.random_calls import Chaos, run


@pytest.fixture(autouse=True)
def _a_world_without_journal_afterwards() -> Iterator[None]:
    yield
    Tracking.world = World()


def test_random_calls_are_answered_and_leave_a_consistent_module() -> None:
    found = run(8_000, seed=3)
    assert found.calls == 8_000
    assert not found.halts
    assert len(found.statuses) > 30
    assert found.statuses["TDX_SUCCESS"] > 500


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_50_000_random_calls(seed: int) -> None:
    found = run(10_000, seed=100 + seed)
    assert not found.halts


def entry_of(module: Module, kind: PageType) -> tuple[int, PamtEntry]:
    return next((key, entry) for key, entry in dict.items(module.pamt) if entry.page_type == kind)


def leave_a_lock(module: Module) -> None:
    module.locks["kot"] = 2


def leave_an_entry_locked(module: Module) -> None:
    pa = next(iter(dict.keys(module.sept)))
    module.sept[pa] = module.sept[pa] | TDEL


def lose_a_page(module: Module) -> None:
    key, entry = entry_of(module, PageType.REG)
    module.pamt[key] = entry._replace(page_type=PageType.NDA)


def change_an_owner(module: Module) -> None:
    key, entry = entry_of(module, PageType.EPT)
    other = max(key for key, entry in dict.items(module.pamt) if entry.page_type == PageType.TDR)
    module.pamt[key] = entry._replace(owner=other)


def miscount_children(module: Module) -> None:
    module.td(entry_of(module, PageType.TDR)[0]).tdr.chldcnt += 1


def unmap_a_page(module: Module) -> None:
    key, _ = entry_of(module, PageType.REG)
    module.sept.pop(next(pa for pa, entry in dict.items(module.sept) if entry & PAGE_MASK == key & PAGE_MASK))


def free_a_key(module: Module) -> None:
    module.kot[module.td(entry_of(module, PageType.TDR)[0]).tdr.hkid].state = KotState.HKID_FREE


def assign_a_key_to_nobody(module: Module) -> None:
    next(entry for entry in module.kot if entry.state == KotState.HKID_FREE).state = KotState.HKID_ASSIGNED


def miscount_vcpus_inside(module: Module) -> None:
    module.td(entry_of(module, PageType.TDR)[0]).tdcs.refcount = (1, 0)


def associate_a_vcpu(module: Module) -> None:
    tdvps = module.vp(entry_of(module, PageType.TDVPR)[0]).tdvps
    tdvps.assoc_lpid = 0 if tdvps.assoc_lpid else 0xFFFF_FFFF


@pytest.mark.parametrize(
    "damage",
    [
        leave_a_lock,
        leave_an_entry_locked,
        lose_a_page,
        change_an_owner,
        miscount_children,
        unmap_a_page,
        free_a_key,
        assign_a_key_to_nobody,
        miscount_vcpus_inside,
        associate_a_vcpu,
    ],
)
def test_an_inconsistent_module_is_noticed(damage: Callable[[Module], None]) -> None:
    machine = Chaos._tds(object.__new__(Chaos))
    check_all(machine.module)
    damage(machine.module)
    with pytest.raises((AssertionError, ValueError)):
        check_all(machine.module)


def test_a_defect_is_reported_with_the_call_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(call: Any) -> int:
        raise KeyError("gone")

    monkeypatch.setitem(HANDLERS, HostLeaf.TDH_MEM_TRACK, broken)
    with pytest.raises(AssertionError, match=r"seed 1, call \d+: SEAMCALL on LP \d of .*'rax': '0x26'"):
        run(2_000)
