"""TDH.MNG.*: the life of a TD and of its HKID."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.op_state import KotState, Lifecycle, OpState
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_2M
from septum.arch.pamt import PageType
from septum.arch.status import Status, with_operand
from septum.core.trylocks import Mode
from septum.tdx.outcome import ModuleHalt
from septum.tdx.state.hardware import PconfigStatus
from septum.tdx.state.td import MAX_TDCS_PAGES
from tests.tdx.machines import BUFFER, MIN_TDCX, PARAMS, Machine

TDR_EXCLUSIVE = ["PAMT_1G SHARED", "PAMT_2M SHARED", "PAMT_4K EXCLUSIVE"]
KOT_EXCLUSIVE = ["KOT EXCLUSIVE"]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def kinds(locks: list[tuple[str, str]]) -> list[str]:
    """Locks without the page that they are for."""
    return [f"{name.partition('[')[0]} {mode}" for name, mode in locks]


def invalid(operand: Operand) -> int:
    return with_operand(Status.TDX_OPERAND_INVALID, operand)


# -- the way up ------------------------------------------------------------------------------------------------------


def test_a_td_comes_to_life_step_by_step(machine: Machine) -> None:
    module = machine.module
    tdr = machine.create_td()
    td = module.td(tdr)
    assert td.tdr.lifecycle_state == Lifecycle.HKID_ASSIGNED
    assert module.pamt_entry(tdr).page_type == PageType.TDR
    assert module.kot[td.tdr.hkid].state == KotState.HKID_ASSIGNED
    assert len(set(td.tdr.td_uuid)) == 4

    for package, lp in enumerate(machine.lp_of_each_package):
        assert td.tdr.lifecycle_state == Lifecycle.HKID_ASSIGNED
        machine.ok(HostLeaf.TDH_MNG_KEY_CONFIG, lp=lp, rcx=tdr)
        assert td.tdr.pkg_config_bitmap >> package & 1
    assert td.tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED

    pages = [machine.page() for _ in range(MIN_TDCX)]
    for count, page in enumerate(pages, 1):
        machine.ok(HostLeaf.TDH_MNG_ADDCX, rcx=page, rdx=tdr)
        assert (td.tdr.num_tdcx, td.tdr.chldcnt) == (count, count)
        assert module.pamt_entry(page) == (PageType.TDCX, tdr, 0)
    assert [module.pa_format.address(pa) for pa in td.tdr.tdcx_pa[:MIN_TDCX]] == pages
    assert {module.pa_format.hkid(pa) for pa in td.tdr.tdcx_pa[:MIN_TDCX]} == {td.tdr.hkid}
    assert any(td.tdcs.mig_enc_key)

    assert machine.init_td(tdr).rax == Status.TDX_SUCCESS
    assert td.tdcs.op_state == OpState.INITIALIZED


@pytest.mark.parametrize("hkid", [0, 1, 31, 64, 32 | 1 << 16, 1 << 63 | 33])
def test_create_wants_a_private_hkid(machine: Machine, hkid: int) -> None:
    assert machine.call(HostLeaf.TDH_MNG_CREATE, rcx=machine.page(), rdx=hkid).rax == invalid(Operand.RDX)


def test_create_wants_a_free_hkid_and_a_free_page(machine: Machine) -> None:
    tdr, page = machine.create_td(), machine.page()
    used = machine.module.td(tdr).tdr.hkid
    for hkid in (used, machine.platform.global_private_hkid):
        assert machine.call(HostLeaf.TDH_MNG_CREATE, rcx=page, rdx=hkid).rax == Status.TDX_HKID_NOT_FREE
    taken = machine.call(HostLeaf.TDH_MNG_CREATE, rcx=tdr, rdx=used + 1)
    assert taken.rax == with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
    assert machine.call(HostLeaf.TDH_MNG_CREATE, rcx=page + 1, rdx=used + 1).rax == invalid(Operand.RCX)


def test_without_entropy_nothing_changes(machine: Machine) -> None:
    page, inputs = machine.page(), machine.module.hardware.inputs
    hkid = next(machine.hkids)
    inputs.entropy_exhausted = True
    assert machine.call(HostLeaf.TDH_MNG_CREATE, rcx=page, rdx=hkid).rax == Status.TDX_RND_NO_ENTROPY
    assert machine.module.pamt_entry(page).page_type == PageType.NDA
    inputs.entropy_exhausted = False
    machine.ok(HostLeaf.TDH_MNG_CREATE, rcx=page, rdx=hkid)


def test_the_sixth_page_needs_entropy(machine: Machine) -> None:
    tdr = machine.td_with_tdcs(MIN_TDCX - 1)
    page, td = machine.page(), machine.module.td(tdr)
    machine.module.hardware.inputs.entropy_exhausted = True
    assert machine.call(HostLeaf.TDH_MNG_ADDCX, rcx=page, rdx=tdr).rax == Status.TDX_RND_NO_ENTROPY
    assert (td.tdr.num_tdcx, machine.module.pamt_entry(page).page_type) == (MIN_TDCX - 1, PageType.NDA)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PconfigStatus.ENTROPY_ERROR, Status.TDX_KEY_GENERATION_FAILED),
        (PconfigStatus.DEVICE_BUSY, with_operand(Status.TDX_OPERAND_BUSY, Operand.KET)),
    ],
)
def test_a_key_that_could_not_be_made_can_be_tried_again(machine: Machine, error: int, status: int) -> None:
    tdr = machine.create_td()
    inputs = machine.module.hardware.inputs
    inputs.pconfig_error = error
    assert machine.call(HostLeaf.TDH_MNG_KEY_CONFIG, rcx=tdr).rax == status
    inputs.pconfig_error = PconfigStatus.SUCCESS
    machine.ok(HostLeaf.TDH_MNG_KEY_CONFIG, rcx=tdr)
    assert machine.call(HostLeaf.TDH_MNG_KEY_CONFIG, lp=1, rcx=tdr).rax == Status.TDX_KEY_CONFIGURED


def test_any_other_pconfig_error_halts_the_module(machine: Machine) -> None:
    tdr = machine.create_td()
    machine.module.hardware.inputs.pconfig_error = PconfigStatus.INVALID_KEYID
    with pytest.raises(ModuleHalt):
        machine.call(HostLeaf.TDH_MNG_KEY_CONFIG, rcx=tdr)
    with pytest.raises(ModuleHalt):
        machine.call(HostLeaf.TDH_MNG_KEY_RECLAIMID, rcx=tdr)


def test_tdcs_pages_come_after_the_keys_and_before_init(machine: Machine) -> None:
    tdr = machine.create_td()
    assert machine.call(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr).rax == Status.TDX_TD_KEYS_NOT_CONFIGURED
    tdr = machine.td()
    assert machine.call(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr).rax == Status.TDX_OP_STATE_INCORRECT
    tdr = machine.td_with_tdcs(MAX_TDCS_PAGES)
    assert machine.call(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr).rax == Status.TDX_TDCX_NUM_INCORRECT


def test_a_page_cannot_be_its_own_tdr(machine: Machine) -> None:
    tdr = machine.td_with_keys()
    busy = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    assert machine.call(HostLeaf.TDH_MNG_ADDCX, rcx=tdr, rdx=tdr).rax == busy


def test_init_wants_all_pages_and_params_in_shared_memory(machine: Machine) -> None:
    tdr = machine.td_with_tdcs(MIN_TDCX - 1)
    assert machine.init_td(tdr).rax == Status.TDX_TDCS_NOT_ALLOCATED
    machine.ok(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr)
    private = machine.module.pa_format.with_hkid(BUFFER, machine.module.td(tdr).tdr.hkid)
    for pa in (BUFFER + 512, machine.platform.seamrr.base, private, 1 << 52):
        regs = machine.call(HostLeaf.TDH_MNG_INIT, rcx=tdr, rdx=pa)
        assert (regs.rax, regs.rcx) == (invalid(Operand.RDX), 0)
    machine.module.memory.write(BUFFER, PARAMS.pack())
    own_key = machine.module.pa_format.with_hkid(BUFFER, 1)
    machine.ok(HostLeaf.TDH_MNG_INIT, rcx=tdr, rdx=own_key)


# -- the way down ----------------------------------------------------------------------------------------------------


def flush_caches(machine: Machine) -> None:
    for lp in machine.lp_of_each_package:
        machine.ok(HostLeaf.TDH_PHYMEM_CACHE_WB, lp=lp, rcx=0)


def test_an_hkid_is_free_again_when_all_caches_are_written_back(machine: Machine) -> None:
    tdr = machine.td()
    td = machine.module.td(tdr)
    entry = machine.module.kot[td.tdr.hkid]
    assert machine.call(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr).rax == Status.TDX_LIFECYCLE_STATE_INCORRECT
    machine.ok(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    assert (td.tdr.lifecycle_state, entry.state, entry.wbinvd_bitmap) == (Lifecycle.BLOCKED, KotState.HKID_FLUSHED, 3)
    assert machine.call(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr).rax == Status.TDX_LIFECYCLE_STATE_INCORRECT
    assert machine.call(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr).rax == Status.TDX_WBCACHE_NOT_COMPLETE
    flush_caches(machine)
    machine.ok(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)
    assert (td.tdr.lifecycle_state, entry.state) == (Lifecycle.TEARDOWN, KotState.HKID_FREE)
    machine.ok(HostLeaf.TDH_MNG_CREATE, rcx=machine.page(), rdx=td.tdr.hkid)


def test_a_td_without_keys_can_be_taken_down(machine: Machine) -> None:
    machine.ok(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=machine.create_td())


def test_associated_vcpus_must_be_flushed_first(machine: Machine) -> None:
    tdr, tdvpr = machine.finalized_td()
    assert machine.call(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr).rax == Status.TDX_FLUSHVP_NOT_DONE
    machine.ok(HostLeaf.TDH_VP_FLUSH, rcx=tdvpr)
    machine.ok(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)


def test_a_page_can_hold_another_td_later(machine: Machine) -> None:
    tdr = machine.td()
    td = machine.module.td(tdr)
    pages = [machine.module.pa_format.address(pa) for pa in td.tdr.tdcx_pa[:MIN_TDCX]]
    machine.ok(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    flush_caches(machine)
    machine.ok(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)
    for page in (*pages, tdr):
        machine.ok(HostLeaf.TDH_PHYMEM_PAGE_RECLAIM, rcx=page)
    machine.module.locks[td.op_state_lock.key] = 2  # a host found it busy and asked for priority
    machine.ok(HostLeaf.TDH_MNG_CREATE, rcx=tdr, rdx=next(machine.hkids))
    new = machine.module.td(tdr)
    assert (new.tdr.num_tdcx, new.tdr.chldcnt, new.tdr.pkg_config_bitmap) == (0, 0, 0)
    assert new.tdcs.op_state == OpState.UNINITIALIZED
    for lp in machine.lp_of_each_package:
        machine.ok(HostLeaf.TDH_MNG_KEY_CONFIG, lp=lp, rcx=tdr)
    machine.ok(HostLeaf.TDH_MNG_ADDCX, rcx=pages[0], rdx=tdr)
    assert new.op_state_lock.key not in machine.module.locks


def test_a_new_secure_ept_root_is_empty(machine: Machine) -> None:
    tdr = machine.td_with_tdcs(3)
    page = machine.page()
    machine.module.sept[page + 8] = 7
    machine.ok(HostLeaf.TDH_MNG_ADDCX, rcx=page, rdx=tdr)
    assert page + 8 not in machine.module.sept


def test_reclaimid_does_nothing(machine: Machine) -> None:
    before = dict(machine.module.pamt)
    machine.ok(HostLeaf.TDH_MNG_KEY_RECLAIMID, rcx=123)
    assert dict(machine.module.pamt) == before


# -- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [HostLeaf.TDH_MNG_VPFLUSHDONE, HostLeaf.TDH_MNG_KEY_FREEID])
def test_the_kot_is_busy_for_one_at_a_time(machine: Machine, leaf: HostLeaf) -> None:
    tdr = machine.td()
    if leaf == HostLeaf.TDH_MNG_KEY_FREEID:
        machine.ok(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    machine.module.locks["kot"] = 1
    assert machine.call(leaf, rcx=tdr).rax == with_operand(Status.TDX_OPERAND_BUSY, Operand.KOT)
    assert set(machine.module.locks) == {"kot"}


def test_locks_are_taken_in_the_order_of_the_module(machine: Machine) -> None:
    tdr = machine.create_td()
    create = {"rcx": machine.page(), "rdx": next(machine.hkids)}
    free_page = [*TDR_EXCLUSIVE]
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_CREATE, **create)) == free_page + KOT_EXCLUSIVE
    for lp in machine.lp_of_each_package:
        assert kinds(machine.locks_of(HostLeaf.TDH_MNG_KEY_CONFIG, lp=lp, rcx=tdr)) == TDR_EXCLUSIVE
    for _ in range(MIN_TDCX):
        addcx = machine.locks_of(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr)
        assert kinds(addcx) == TDR_EXCLUSIVE + free_page
    machine.module.memory.write(BUFFER, PARAMS.pack())
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_INIT, rcx=tdr, rdx=BUFFER)) == TDR_EXCLUSIVE
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)) == TDR_EXCLUSIVE + KOT_EXCLUSIVE
    flush_caches(machine)
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)) == TDR_EXCLUSIVE + KOT_EXCLUSIVE
    assert not dict(machine.module.locks)


def test_lock_footprints_are_the_recorded_ones(shared: Path, machine: Machine) -> None:
    recorded = json.loads((shared / "contention" / "lock_footprints.json").read_text())
    names = {"GLOBAL.kot.lock": "KOT", "TDCS.op_state_lock": "OP_STATE"}
    modes = {"SH": Mode.SHARED.name, "EX": Mode.EXCLUSIVE.name}

    def footprint(leaf: str, td: str) -> list[str]:
        entry = next(e for e in recorded if (e["leaf"], e["td"]) == (leaf, td))
        short = [(a["short"].partition("[")[0], modes[a["mode"]]) for a in entry["acquired"]]
        return [f"{names.get(name, name)} {mode}" for name, mode in short]

    page, hkid = machine.page(), next(machine.hkids)
    create = machine.locks_of(HostLeaf.TDH_MNG_CREATE, rcx=page, rdx=hkid)
    assert kinds(create) == footprint("TDH.MNG.CREATE", "global")
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_KEY_CONFIG, rcx=page)) == footprint("TDH.MNG.KEY.CONFIG", "key")
    tdr = machine.td_with_keys()
    addcx = machine.locks_of(HostLeaf.TDH_MNG_ADDCX, rcx=machine.page(), rdx=tdr)
    assert kinds(addcx) == footprint("TDH.MNG.ADDCX", "addcx")
    tdr = machine.td()
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)) == footprint("TDH.MNG.KEY.FREEID", "run")
    flushed = machine.locks_of(HostLeaf.TDH_MNG_VPFLUSHDONE, rcx=tdr)
    assert kinds(flushed) == footprint("TDH.MNG.VPFLUSHDONE", "flushed")
    flush_caches(machine)
    assert kinds(machine.locks_of(HostLeaf.TDH_MNG_KEY_FREEID, rcx=tdr)) == footprint("TDH.MNG.KEY.FREEID", "freeid")


def test_a_large_page_is_no_tdr(machine: Machine) -> None:
    huge = machine.huge_page()
    assert huge % PAGE_2M == 0
    assert machine.call(HostLeaf.TDH_MNG_KEY_CONFIG, rcx=huge).rax == with_operand(
        Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX
    )
