"""What TDH.MNG.INIT finds in pages of the module's own: on the hardware of the recordings, and on the real one."""

from __future__ import annotations

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K
from septum.arch.pamt import PageType
from septum.arch.platform_msrs import IA32_VMX_BASIC
from septum.arch.status import Status, with_operand
from septum.lab.flat_memory import FlatMemory
from tests.tdx.machines import SOURCE, Machine

WRONG = {name: with_operand(Status.TDX_OPERAND_INVALID, Operand[name]) for name in ("ATTRIBUTES", "XFAM")}


@pytest.fixture
def flat() -> Machine:
    machine = Machine(boot=False)
    machine.module.memory = FlatMemory(machine.module)
    machine.boot()
    return machine


def pages_of_a_td(machine: Machine) -> dict[str, int]:
    """A TD's pages by what they are."""
    tdr = machine.td()
    machine.add_tables(tdr, 0)
    vcpu = machine.create_vcpu(tdr)
    module = machine.module
    tdcs = [module.pa_format.address(pa) for pa in module.td(tdr).tdr.tdcx_pa]
    tdvps = [module.pa_format.address(pa) for pa in module.vp(vcpu).tdvps.tdvps_page_pa]
    tdmr = machine.platform.tdmrs[0]
    return {
        "TDR": tdr,
        "TDCS": tdcs[0],
        "MSR bitmaps": tdcs[2],
        "S-EPT root": tdcs[3],
        "zero page": tdcs[4],
        "TDVPR": vcpu,
        "VMCS": tdvps[1],
        "VAPIC": tdvps[2],
        "S-EPT": next(pa for pa, entry in module.pamt.items() if entry and entry.page_type == PageType.EPT),
        "PAMT": tdmr.pamt_4k.base + (tdr - tdmr.base) // PAGE_4K * 16,
    }


def attributes_at(machine: Machine, pa: int) -> int:
    """TDH.MNG.INIT of a new TD with TD_PARAMS at ``pa``: its status."""
    return machine.call(HostLeaf.TDH_MNG_INIT, rcx=machine.td_with_tdcs(), rdx=pa).rax


def test_the_head_of_a_page_decides(flat: Machine) -> None:
    """Bits of ATTRIBUTES that may be set are 0, 28 to 30 and 63; all of the module's words but a few have others."""
    pages = pages_of_a_td(flat)
    valid = {"zero page", "TDVPR", "VAPIC"}
    for name, pa in pages.items():
        assert attributes_at(flat, pa & -1024) == WRONG["XFAM" if name in valid else "ATTRIBUTES"], name


def test_on_real_hardware_such_a_page_reads_as_zeros() -> None:
    machine = Machine()
    for name, pa in pages_of_a_td(machine).items():
        assert attributes_at(machine, pa & -1024) == WRONG["XFAM"], name


def test_words_are_those_of_the_structures(flat: Machine) -> None:
    pages, read = pages_of_a_td(flat), flat.module.memory.read
    td = flat.module.td(pages["TDR"])

    def word(name: str) -> int:
        return int.from_bytes(read(pages[name], 16)[:8], "little")

    assert word("TDR") == td.tdr.num_tdcx << 32
    assert int.from_bytes(read(pages["TDR"], 16)[8:], "little") == td.tdr.chldcnt
    assert word("TDCS") == 1 | 1 << 32
    assert word("VMCS") == flat.module.hardware.cpu.msr(IA32_VMX_BASIC) & 0x7FFF_FFFF
    assert word("PAMT") == 4 << 16


def test_what_the_host_wrote_is_what_it_reads(flat: Machine) -> None:
    flat.module.memory.write(SOURCE, b"\0" * 8 + b"x" * 24)
    assert flat.module.memory.read(SOURCE, 32) == b"\0" * 8 + b"x" * 24
    assert flat.module.memory.read(SOURCE + 0x8000, 32) == bytes(32)
