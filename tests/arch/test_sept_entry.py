"""Secure-EPT entries: state bits, what the host is told, which leaf each state allows, and entries in the making."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import sept, sept_l2
from septum.arch.leaves import HOST_LEAF_BY_NAME, GuestLeaf, HostLeaf
from septum.arch.pages import Level
from septum.arch.sept import SeptState as S
from septum.arch.sept_l2 import L2State

PAGE = 0x1234567000
states = st.sampled_from([*S])
entries = st.builds(lambda state, rest: rest & ~sept.STATE_MASK | state, states, st.integers(0, (1 << 64) - 1))


@pytest.mark.parametrize(
    ("entry", "rcx", "rdx"),
    [
        (sept.FREE_ENTRY, 0x8000000000000000, 0x000),
        (sept.leaf_entry(PAGE, S.PENDING), 0x80000012345670F0, 0x200),
        (sept.leaf_entry(PAGE, S.MAPPED, sept.RWX), 0x80000012345670F7, 0x400),
        (sept.blocked(sept.leaf_entry(PAGE, S.MAPPED, sept.RWX), 0), 0x80000012345670F0, 0x100),
        (sept.blocked(sept.leaf_entry(PAGE, S.PENDING), 0), 0x80000012345670F0, 0x300),
        (sept.non_leaf_entry(PAGE), 7, 0x8400),
        (sept.blocked(sept.non_leaf_entry(PAGE), 0), 0, 0x8100),
    ],
)
def test_what_the_host_sees(entry: int, rcx: int, rdx: int) -> None:
    assert sept.arch_details(entry, Level.PT) == (rcx, rdx)


def test_raw_bits_of_the_common_entries() -> None:
    assert sept.FREE_ENTRY == 1 << 63 | 1 << 55 | 1 << 54 | 1 << 53
    assert sept.leaf_entry(PAGE, S.PENDING) == 1 << 63 | 1 << 56 | PAGE | 0xF0
    assert sept.leaf_entry(PAGE, S.MAPPED, sept.RWX, locked=True) == 1 << 63 | PAGE | 0x8F7
    assert sept.non_leaf_entry(PAGE) == 1 << 63 | PAGE | 7


def test_accept_progress_shows_in_rcx_but_not_after_blocking() -> None:
    pending = sept.leaf_entry(0x40000000, S.PENDING) | 5 << sept.ACCEPT_COUNTER_SHIFT
    assert sept.arch_entry(pending) & 0x1FF000 == 0x5000
    assert sept.blocked(pending, Level.PD) & 0x1FF000 == 0
    assert sept.blocked(pending, Level.PT) & 0x1FF000 == 0x5000


LEAF_STATES = {state.name for state in S if sept.is_leaf(state)}
BLOCKED = {"BLOCKED", "PENDING_BLOCKED"}
ACCESSIBLE = {state.name for state in S if sept.is_guest_accessible_leaf(state)}
WRITABLE = {"MAPPED", "EXPORTED_DIRTY"}
PENDING_WRITABLE = {"PENDING", "PENDING_EXPORTED_DIRTY"}
BLOCKEDW = {"BLOCKEDW", "PENDING_BLOCKEDW"}
EXPORTED = {name for name in LEAF_STATES if "EXPORTED" in name}


@pytest.mark.parametrize(
    ("leaf", "states"),
    [
        (HostLeaf.TDH_MEM_PAGE_ADD, {"FREE"}),
        (HostLeaf.TDH_MEM_SEPT_ADD, {"FREE", "NL_MAPPED"}),
        (HostLeaf.TDH_MEM_PAGE_AUG, {"FREE", "REMOVED"}),
        (HostLeaf.TDH_MEM_SEPT_RD, {state.name for state in S}),
        (HostLeaf.TDH_MEM_PAGE_RELOCATE, LEAF_STATES),
        (HostLeaf.TDH_MEM_RANGE_BLOCK, {"NL_MAPPED", "MAPPED", "PENDING"} | BLOCKEDW),
        (HostLeaf.TDH_MEM_RANGE_UNBLOCK, {"NL_BLOCKED"} | BLOCKED),
        (HostLeaf.TDH_MEM_PAGE_REMOVE, {"MAPPED", "PENDING"} | BLOCKED | BLOCKEDW),
        (HostLeaf.TDH_MEM_SEPT_REMOVE, {"NL_MAPPED", "NL_BLOCKED"}),
        (HostLeaf.TDH_MEM_PAGE_PROMOTE, {"NL_MAPPED", "NL_BLOCKED"}),
        (HostLeaf.TDH_MEM_PAGE_DEMOTE, {"MAPPED", "PENDING"} | BLOCKED),
        (HostLeaf.TDH_MEM_RD, ACCESSIBLE),
        (HostLeaf.TDH_MEM_WR, WRITABLE),
        (HostLeaf.TDH_MR_EXTEND, {"MAPPED"}),
        (HostLeaf.TDH_EXPORT_BLOCKW, WRITABLE | PENDING_WRITABLE),
        (HostLeaf.TDH_EXPORT_MEM, LEAF_STATES - BLOCKED),
        (HostLeaf.TDH_EXPORT_RESTORE, EXPORTED),
        (HostLeaf.TDH_EXPORT_UNBLOCKW, {name for name in LEAF_STATES if name.endswith("BLOCKEDW")}),
        (HostLeaf.TDH_IMPORT_MEM, {"FREE", "REMOVED", "MAPPED", "PENDING"}),
        (GuestLeaf.TDG_MEM_PAGE_ACCEPT, PENDING_WRITABLE),
        (GuestLeaf.TDG_MEM_PAGE_ATTR_RD, LEAF_STATES - BLOCKED),
        (GuestLeaf.TDG_MEM_PAGE_ATTR_WR, WRITABLE | PENDING_WRITABLE),
    ],
)
def test_allowed_leaves_by_state(leaf: HostLeaf | GuestLeaf, states: set[str]) -> None:
    def allowed(state: S) -> bool:
        return sept.host_allowed(leaf, state) if isinstance(leaf, HostLeaf) else sept.guest_allowed(leaf, state)

    assert {state.name for state in S if allowed(state)} == states


def test_every_row_of_the_tables_is_checked_above() -> None:
    assert (len(sept.HOST_ALLOWED), len(sept.GUEST_ALLOWED)) == (19, 3)


def test_unknown_bits_are_no_state() -> None:
    with pytest.raises(ValueError, match="in no state"):
        sept.state(sept.PS)


@given(entries)
def test_other_bits_do_not_change_state_or_rights(raw: int) -> None:
    state = sept.state(raw)
    assert raw & sept.STATE_MASK == state
    for leaf, allowed in sept.HOST_ALLOWED.items():
        assert sept.host_allowed(HostLeaf(leaf), raw) == (state in allowed)
    assert sept.is_any_blocked(raw) == (state.name in {"NL_BLOCKED", "BLOCKED", "PENDING_BLOCKED"})
    assert sept.is_any_pending(raw) == state.name.startswith("PENDING")


@given(entries, states)
def test_with_state_touches_only_state_and_sve(raw: int, state: S) -> None:
    changed = sept.with_state(raw, state)
    assert sept.state(changed) is state
    assert (changed ^ raw) & ~(sept.STATE_MASK | sept.SVE) == 0
    assert changed & sept.SVE


@given(
    st.sampled_from(
        [
            sept.leaf_entry(PAGE, S.MAPPED, sept.RWX),
            sept.leaf_entry(PAGE, S.PENDING),
            sept.non_leaf_entry(PAGE),
            sept.leaf_entry(PAGE, S.MAPPED, sept.RWX, locked=True) | sept.TDHP,
        ]
    ),
    st.sampled_from(Level),
)
def test_unblock_undoes_block(entry: int, level: Level) -> None:
    closed = sept.blocked(entry, level)
    assert sept.is_any_blocked(closed)
    assert not sept.is_present(closed)
    expected = sept.without_accept_progress(entry, level)
    assert sept.unblocked(closed) == expected
    assert sept.unblocked(expected) == expected


def test_aliases_and_locks() -> None:
    entry = sept.leaf_entry(PAGE, S.MAPPED, sept.RWX) | 0b101 << sept.TDAL_SHIFT
    assert [sept.is_aliased(entry, vm) for vm in (1, 2, 3)] == [True, False, True]
    assert sept.is_any_aliased(entry)
    assert not sept.is_any_aliased(sept.FREE_ENTRY)
    assert sept.is_locked(entry | sept.TDEL)
    assert not sept.is_locked(entry | sept.TDHP)


def test_state_names() -> None:
    assert sept.arch_state_name(0x84) == "NL_MAPPED"
    assert sept.arch_state_name(3) == "PENDING_BLOCKED"
    assert sept.arch_state_name(99) == "state 99"


def test_recorded_entries_have_the_modelled_form(shared: Path) -> None:
    """Whatever TDH.MEM.SEPT.RD returned on the real module, the modelled entry of that state reads the same."""
    recording = shared / "vectors" / "dev" / "lifecycle.jsonl.gz"
    seen = set()
    with gzip.open(recording, "rt") as lines:
        for line in lines:
            if "TDH.MEM.SEPT.RD" not in line:
                continue
            event = json.loads(line)
            out = {**event["in"], **event["out"]}
            if out["rax"] != "0x0":
                continue
            rcx, rdx = int(out["rcx"], 16), int(out["rdx"], 16)
            state, level = next(s for s in S if sept.ARCH_STATE[s] == rdx >> 8 & 0xFF), rdx & 7
            page = rcx & sept.HPA_MASK
            entry = {
                S.FREE: sept.FREE_ENTRY,
                S.NL_MAPPED: sept.non_leaf_entry(page),
                S.NL_BLOCKED: sept.blocked(sept.non_leaf_entry(page), level),
                S.MAPPED: sept.leaf_entry(page, S.MAPPED, sept.RWX),
                S.BLOCKED: sept.blocked(sept.leaf_entry(page, S.MAPPED, sept.RWX), level),
                S.PENDING: sept.leaf_entry(page, S.PENDING),
                S.PENDING_BLOCKED: sept.blocked(sept.leaf_entry(page, S.PENDING), level),
            }[state]
            assert sept.arch_details(entry, level) == (rcx, rdx)
            seen.add(state)
    assert {S.FREE, S.NL_MAPPED, S.MAPPED, S.BLOCKED} <= seen


def test_recorded_refusals_agree_with_the_table_of_allowed_leaves(shared: Path) -> None:
    """Where the real module answered EPT_ENTRY_STATE_INCORRECT, the state that it returned does not allow the leaf."""
    refusals = set()
    for name in ("errors", "lifecycle"):
        with gzip.open(shared / "vectors" / "dev" / f"{name}.jsonl.gz", "rt") as lines:
            for line in lines:
                if '"TDX_EPT_ENTRY_STATE_INCORRECT' in line and (event := json.loads(line))["op"] == "seamcall":
                    rdx = int({**event["in"], **event["out"]}["rdx"], 16)
                    refusals.add((HOST_LEAF_BY_NAME[event["leaf"]], sept.arch_state_name(rdx >> 8 & 0xFF)))
    # Version 0 of TDH.MEM.SEPT.ADD refuses an entry that has its table already; version 1 may add the L2 tables to it.
    refusals -= {(HostLeaf.TDH_MEM_SEPT_ADD, "NL_MAPPED")}
    assert len(refusals) > 10
    for leaf, name in refusals:
        assert not sept.host_allowed(leaf, S[name]), f"{leaf.abi_name} on {name}"


l2_leaves = st.builds(
    sept_l2.leaf_entry,
    st.integers(0, (1 << 40) - 1).map(lambda page: page << 12),
    st.integers(0, (1 << 64) - 1).map(lambda bits: bits & (sept_l2.PERMISSIONS | sept_l2.SSS | sept.SVE)),
)


@given(l2_leaves)
def test_l2_leaf_gets_its_permissions_back(entry: int) -> None:
    closed = sept_l2.block(entry)
    assert sept_l2.state(closed) is L2State.BLOCKED
    assert closed & sept_l2.PERMISSIONS == 0
    assert sept_l2.unblock(closed) == entry
    assert sept_l2.unblock(entry) == entry


def test_l2_leaf_made_blocked_is_the_blocked_leaf() -> None:
    attributes = sept.R | sept.W | sept.SVE
    entry = sept_l2.leaf_entry(PAGE, attributes)
    assert sept_l2.leaf_entry(PAGE, attributes, blocked=True) == sept_l2.block(entry)
    kept = sept_l2.block(entry, blocked_for_writing=True)
    assert kept & sept_l2.TDWR == 0
    assert sept_l2.block(entry) & sept_l2.TDWR


def test_l2_tables() -> None:
    entry = sept_l2.non_leaf_entry(PAGE)
    closed = sept_l2.block(entry)
    assert (sept_l2.state(entry), sept_l2.state(closed)) == (L2State.NL_MAPPED, L2State.NL_BLOCKED)
    assert sept_l2.unblock(closed) == entry


@pytest.mark.parametrize(
    ("entry", "debug", "rcx", "rdx"),
    [
        (0, False, 1 << 63, 0x14001),
        (sept_l2.non_leaf_entry(PAGE), False, 0x407, 0x1C401),
        (sept_l2.block(sept_l2.non_leaf_entry(PAGE)), False, 0, 0x1C101),
        (sept_l2.leaf_entry(PAGE, sept.X), False, PAGE | 0x4F7, 0x14401),
        (sept_l2.leaf_entry(PAGE, sept.X), True, PAGE | 0xF4, 0x14401),
        (sept_l2.leaf_entry(PAGE, sept.R), True, PAGE | 0xF1, 0x10001),
        (sept_l2.leaf_entry(PAGE, sept.R, blocked=True), False, PAGE | 0xC8, 0x14101),
    ],
)
def test_what_the_host_sees_of_l2_entries(entry: int, debug: bool, rcx: int, rdx: int) -> None:
    assert sept_l2.arch_details(entry, Level.PD, 1, debug=debug) == (rcx, rdx)
