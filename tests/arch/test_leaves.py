"""Leaf functions: numbers, names in every spelling, versions and register documentation."""

import pytest

from septum.arch import leaves
from septum.arch.errors import UsageError
from septum.arch.leaves import GUEST_LEAF_BY_NAME, HOST_LEAF_BY_NAME, GuestLeaf, HostLeaf


@pytest.mark.parametrize(
    ("leaf", "number", "name"),
    [
        (HostLeaf.TDH_VP_ENTER, 0, "TDH.VP.ENTER"),
        (HostLeaf.TDH_MEM_PAGE_AUG, 6, "TDH.MEM.PAGE.AUG"),
        (HostLeaf.TDH_PHYMEM_PAGE_RECLAIM, 28, "TDH.PHYMEM.PAGE.RECLAIM"),
        (HostLeaf.TDH_SYS_CONFIG, 45, "TDH.SYS.CONFIG"),
        (HostLeaf.TDH_MIG_STREAM_CREATE, 96, "TDH.MIG.STREAM.CREATE"),
        (GuestLeaf.TDG_VP_VMCALL, 0, "TDG.VP.VMCALL"),
        (GuestLeaf.TDG_MEM_PAGE_ACCEPT, 6, "TDG.MEM.PAGE.ACCEPT"),
        (GuestLeaf.TDG_VP_INVVPID, 27, "TDG.VP.INVVPID"),
    ],
)
def test_numbers_and_names(leaf: leaves.Leaf, number: int, name: str) -> None:
    assert (leaf.value, leaf.abi_name) == (number, name)


def test_how_many_there_are() -> None:
    assert (len(HostLeaf), len(GuestLeaf)) == (68, 21)
    assert len(HOST_LEAF_BY_NAME) == len(HostLeaf)
    assert len(GUEST_LEAF_BY_NAME) == len(GuestLeaf)


@pytest.mark.parametrize("text", ["TDH.MEM.PAGE.AUG", "tdh_mem_page_aug", " mem.page.aug ", "Mem_Page.Aug"])
def test_every_spelling_finds_the_leaf(text: str) -> None:
    assert leaves.host_leaf(text) is HostLeaf.TDH_MEM_PAGE_AUG


def test_unknown_names_are_misuse() -> None:
    assert leaves.guest_leaf("mem_page_accept") is GuestLeaf.TDG_MEM_PAGE_ACCEPT
    with pytest.raises(UsageError, match="no host-side TDX function"):
        leaves.host_leaf("TDH.MEM.SEPT.WR")
    with pytest.raises(UsageError, match="no guest-side TDX function"):
        leaves.guest_leaf("TDH.VP.ENTER")


def test_versions_are_told_by_kind_and_not_by_number() -> None:
    assert leaves.max_version(HostLeaf.TDH_MNG_RD) == 1
    assert leaves.max_version(GuestLeaf.TDG_SYS_RD) == 0, "same number, 11, as TDH.MNG.RD"
    assert leaves.max_version(GuestLeaf.TDG_VM_RD) == 1
    assert leaves.max_version(HostLeaf.TDH_MEM_RANGE_BLOCK) == 0, "same number, 7, as TDG.VM.RD"


def test_leaf_name_of_any_number() -> None:
    assert leaves.leaf_name(2) == "TDH.MEM.PAGE.ADD"
    assert leaves.leaf_name(2, guest=True) == "TDG.MR.RTMR.EXTEND"
    assert leaves.leaf_name(46) == "leaf 46"


@pytest.mark.parametrize("leaf", [*HostLeaf, *GuestLeaf])
def test_every_leaf_documents_its_registers(leaf: leaves.Leaf) -> None:
    documented = leaves.registers(leaf)
    named = {"RBX", "RBP", "RSI", "RDI", "RCX", "RDX", *(f"R{number}" for number in range(8, 16))}
    for register, meaning in (*documented.inputs.items(), *documented.outputs.items()):
        first, _, last = register.partition("-")
        assert first in named
        assert not last or last in named
        assert meaning


def test_host_and_guest_leaves_of_one_number_have_registers_of_their_own() -> None:
    assert leaves.registers(HostLeaf.TDH_MEM_RANGE_BLOCK) != leaves.registers(GuestLeaf.TDG_VM_RD)
