"""TDH.PHYMEM.*: page metadata, reclaiming a TD's pages, and the write-back of caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState, Lifecycle
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_1G, PAGE_2M, PAGE_4K, Level
from septum.arch.pamt import PageType
from septum.arch.status import Status, with_operand
from septum.core.run import solo_call
from septum.core.trylocks import Mode, SharexHp
from septum.tdx.call import PamtLock
from septum.tdx.state.hardware import IA32_INTR_PENDING
from tests.tdx.machines import Machine

H = HostLeaf


@pytest.fixture
def machine() -> Machine:
    return Machine()


def metadata(machine: Machine, pa: int) -> tuple[int, int, int]:
    regs = machine.ok(H.TDH_PHYMEM_PAGE_RDMD, rcx=pa, r9=5, r10=5, r11=5)
    assert (regs.r10, regs.r11) == (0, 0)
    return regs.rcx, regs.rdx, regs.r8


def control_page(machine: Machine, tdr: int) -> int:
    """A page of the TD's TDCS."""
    return machine.platform.pa_format.address(machine.module.td(tdr).tdr.tdcx_pa[1])


def tear_down(machine: Machine, tdr: int) -> None:
    """To the state in which a TD's pages can be reclaimed."""
    for vp in [key for key, entry in machine.module.pamt.items() if entry.page_type == PageType.TDVPR]:
        machine.call(H.TDH_VP_FLUSH, rcx=vp)
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    for lp in machine.lp_of_each_package:
        machine.ok(H.TDH_PHYMEM_CACHE_WB, lp=lp)
    machine.ok(H.TDH_MNG_KEY_FREEID, rcx=tdr)


def test_metadata_of_every_kind_of_page(machine: Machine) -> None:
    tdr, tdvpr = machine.finalized_td()
    huge = machine.huge_page()
    machine.ok(H.TDH_MEM_PAGE_AUG, rcx=PAGE_2M | Level.PD, rdx=tdr, r8=huge)
    assert metadata(machine, tdr) == (PageType.TDR, 0, Level.PT)
    assert metadata(machine, control_page(machine, tdr)) == (PageType.TDCX, tdr, Level.PT)
    assert metadata(machine, tdvpr) == (PageType.TDVPR, tdr, Level.PT)
    assert metadata(machine, huge) == metadata(machine, huge + PAGE_4K) == (PageType.REG, tdr, Level.PD)
    assert metadata(machine, machine.page()) == (PageType.NDA, 0, Level.PT)
    tdmr = machine.platform.tdmrs[0]
    assert metadata(machine, tdmr.base + tdmr.reserved[0].base) == (PageType.RSVD, 0, Level.PT)


@pytest.mark.parametrize("leaf", [H.TDH_PHYMEM_PAGE_RDMD, H.TDH_PHYMEM_PAGE_RECLAIM, H.TDH_PHYMEM_PAGE_WBINVD])
def test_bad_addresses(machine: Machine, leaf: HostLeaf) -> None:
    page, hkid_bit = machine.page(), 1 << machine.platform.pa_format.hkid_shift
    for address, status in [
        (page + 8, Status.TDX_OPERAND_INVALID),
        (page | 1 << 52, Status.TDX_OPERAND_INVALID),
        (page | hkid_bit, Status.TDX_OPERAND_INVALID),
        (machine.platform.tdmrs[-1].end, Status.TDX_OPERAND_ADDR_RANGE_ERROR),
    ]:
        regs = machine.call(leaf, rcx=address)
        if leaf == H.TDH_PHYMEM_PAGE_WBINVD and address == page | hkid_bit:
            assert regs.rax == Status.TDX_SUCCESS  # here the HKID is part of the operand
        else:
            assert regs.rax == with_operand(status, Operand.RCX)


def test_only_free_pages_can_be_written_back(machine: Machine) -> None:
    tdr = machine.create_td()
    wrong = with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
    assert machine.call(H.TDH_PHYMEM_PAGE_WBINVD, rcx=tdr).rax == wrong
    assert machine.call(H.TDH_PHYMEM_PAGE_WBINVD, rcx=machine.page()).rax == Status.TDX_SUCCESS


def test_a_whole_td_is_reclaimed_and_its_pages_are_free_again(machine: Machine) -> None:
    tdr, _ = machine.finalized_td()
    module, td = machine.module, machine.module.td(tdr)
    huge = machine.huge_page()
    machine.ok(H.TDH_MEM_PAGE_AUG, rcx=PAGE_2M | Level.PD, rdx=tdr, r8=huge)
    pages = {key & -PAGE_4K: key & 3 for key, entry in module.pamt.items() if entry.owner == tdr}
    assert td.tdr.chldcnt == len(pages) - 1 + PAGE_2M // PAGE_4K
    some = min(pages)
    regs = machine.call(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=some)
    assert (regs.rax, regs.rdx) == (Status.TDX_LIFECYCLE_STATE_INCORRECT, tdr)
    tear_down(machine, tdr)
    assert td.tdr.lifecycle_state == Lifecycle.TEARDOWN
    regs = machine.call(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=tdr)
    assert (regs.rax, regs.rcx) == (Status.TDX_TD_ASSOCIATED_PAGES_EXIST, PageType.TDR)
    regs = machine.call(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=huge + PAGE_4K)
    assert (regs.rax, regs.r8) == (with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX), Level.PD)
    for page, level in pages.items():
        regs = machine.ok(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=page)
        assert (regs.rdx, regs.r8) == (tdr, level)
        # The metadata of a 4 KiB page still tell the last owner.
        assert metadata(machine, page) == (PageType.NDA, 0 if level else tdr, Level.PT)
    assert td.tdr.chldcnt == 0
    machine.ok(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=tdr)
    again = machine.call(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=tdr)
    assert (again.rax, again.rcx) == (with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX), 0)
    # No entry of the TD's Secure EPT is left behind.
    assert dict(module.sept) == {}


def test_a_busy_tdr_and_a_busy_page(machine: Machine) -> None:
    tdr = machine.td()
    page = control_page(machine, tdr)
    for busy, operand in [(tdr, Operand.TDR), (page, Operand.RCX)]:
        lock: SharexHp = PamtLock(machine.module.locks, busy)
        solo_call(lock.acquire(Mode.EXCLUSIVE))
        status = machine.call(H.TDH_PHYMEM_PAGE_RECLAIM, rcx=page).rax
        assert status == with_operand(Status.TDX_OPERAND_BUSY, operand)
        solo_call(lock.release(Mode.EXCLUSIVE))


# -- caches ----------------------------------------------------------------------------------------------------------


def test_cache_write_back_frees_the_hkid_package_by_package(machine: Machine) -> None:
    tdr = machine.td()
    hkid = machine.module.td(tdr).tdr.hkid
    assert machine.call(H.TDH_PHYMEM_CACHE_WB, rcx=2).rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    assert machine.call(H.TDH_PHYMEM_CACHE_WB).rax == Status.TDX_NO_HKID_READY_TO_WBCACHE
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    entry = machine.module.kot[hkid]
    assert entry.state == KotState.HKID_FLUSHED
    for lp in machine.lp_of_each_package:
        assert machine.call(H.TDH_MNG_KEY_FREEID, rcx=tdr).rax == Status.TDX_WBCACHE_NOT_COMPLETE
        assert entry.wbinvd_bitmap >> machine.platform.lp_package[lp] & 1
        machine.ok(H.TDH_PHYMEM_CACHE_WB, lp=lp)
    assert entry.wbinvd_bitmap == 0
    machine.ok(H.TDH_MNG_KEY_FREEID, rcx=tdr)


def test_an_interrupted_write_back_goes_on_where_it_was(machine: Machine) -> None:
    tdr = machine.td()
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    resume = {"rcx": 1}
    assert machine.call(H.TDH_PHYMEM_CACHE_WB, **resume).rax == Status.TDX_WBCACHE_RESUME_ERROR
    machine.module.hardware.msrs[0, IA32_INTR_PENDING] = 1
    assert machine.call(H.TDH_PHYMEM_CACHE_WB).rax == Status.TDX_INTERRUPTED_RESUMABLE
    # An HKID that is flushed only now has to wait for the next write-back.
    late = machine.td()
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=late)
    answers = [machine.call(H.TDH_PHYMEM_CACHE_WB, **resume).rax for _ in range(machine.platform.wbinvd_blocks - 1)]
    assert set(answers[:-1]) == {Status.TDX_INTERRUPTED_RESUMABLE}
    assert answers[-1] == Status.TDX_SUCCESS
    waiting = [bool(machine.module.kot[machine.module.td(td).tdr.hkid].wbinvd_bitmap & 1) for td in (tdr, late)]
    assert waiting == [False, True]
    assert machine.call(H.TDH_PHYMEM_CACHE_WB, **resume).rax == Status.TDX_WBCACHE_RESUME_ERROR


def test_packages_write_back_at_the_same_time_but_not_twice(machine: Machine) -> None:
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=machine.td())
    solo_call(machine.module.writeback_locks[0].acquire(Mode.EXCLUSIVE))
    busy, free = machine.lp_of_each_package
    status = machine.call(H.TDH_PHYMEM_CACHE_WB, lp=busy).rax
    assert status == with_operand(Status.TDX_OPERAND_BUSY, Operand.WBCACHE)
    machine.ok(H.TDH_PHYMEM_CACHE_WB, lp=free)
    solo_call(machine.module.kot_lock.acquire(Mode.EXCLUSIVE))
    status = machine.call(H.TDH_PHYMEM_CACHE_WB, lp=free).rax
    assert status == with_operand(Status.TDX_OPERAND_BUSY, Operand.KOT)


# -- locks -----------------------------------------------------------------------------------------------------------

KINDS = {"PAMT_1G": "PAMT_1G", "PAMT_2M": "PAMT_2M", "PAMT_4K": "PAMT_4K", "GLOBAL.wbt": "WBCACHE", "GLOBAL.kot": "KOT"}


def recorded_locks(shared: Path, operation: str) -> list[tuple[str, str]]:
    """Kind and mode of each lock that the real module took."""
    footprints = json.loads((shared / "contention" / "lock_footprints.json").read_text(encoding="utf-8"))
    found = next(f for f in footprints if f["op"] == operation and f["td"] in ("td", "run", "global"))
    short = {"SH": "SHARED", "EX": "EXCLUSIVE"}
    return [
        (next(kind for name, kind in KINDS.items() if lock["lock"].startswith(name)), short[lock["mode"]])
        for lock in found["acquired"]
    ]


def test_locks_are_taken_in_the_recorded_order(machine: Machine, shared: Path) -> None:
    tdr = machine.td()
    page = control_page(machine, tdr)
    machine.ok(H.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    calls = {
        "PAGE.RDMD(TDCX)": (H.TDH_PHYMEM_PAGE_RDMD, page),
        "PAGE.WBINVD(free page)": (H.TDH_PHYMEM_PAGE_WBINVD, machine.page()),
        "PHYMEM.CACHE.WB": (H.TDH_PHYMEM_CACHE_WB, 0),
        "PAGE.RECLAIM(TD page)": (H.TDH_PHYMEM_PAGE_RECLAIM, page),
    }
    for operation, (leaf, rcx) in calls.items():
        taken = [(name.partition("[")[0], mode) for name, mode in machine.locks_of(leaf, rcx=rcx)]
        assert taken == recorded_locks(shared, operation), operation


def test_gigabyte_blocks_are_covered_only_when_initialised(machine: Machine) -> None:
    tdmr = machine.module.tdmrs[0]
    last = tdmr.base + tdmr.size - PAGE_4K
    assert machine.call(H.TDH_PHYMEM_PAGE_RDMD, rcx=last).rax == Status.TDX_SUCCESS
    tdmr.next -= PAGE_2M
    status = machine.call(H.TDH_PHYMEM_PAGE_RDMD, rcx=last).rax
    assert status == with_operand(Status.TDX_OPERAND_ADDR_RANGE_ERROR, Operand.RCX)
    assert machine.call(H.TDH_PHYMEM_PAGE_RDMD, rcx=last - PAGE_1G).rax == Status.TDX_SUCCESS
