"""Random calls on random states of the module: whatever comes, it answers with a status and stays consistent.

    python -m tests.tdx.random_calls [--calls N] [--seed N]

From one of a few states (power-on, ready, with TDs that are built or run) calls follow each other, by host and guests:
most suit the state in leaf and operands, some have a register spoilt or nothing but random registers. VM exits are
those that a CPU can make. After each call: a known status, registers of 64 bits, free lock words; after each that
changed more than locks, everything that :mod:`tests.tdx.invariants` knows.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from septum.arch import status, vmcs
from septum.arch.exits import ExitReason
from septum.arch.leaves import GuestLeaf, HostLeaf
from septum.arch.metadata import field_table
from septum.arch.msr import bitmap_bit
from septum.arch.op_state import KotState, Lifecycle, SysState
from septum.arch.pages import PAGE_2M, PAGE_4K, PAGE_MASK
from septum.arch.pamt import PageType
from septum.arch.structures import TdAttributes
from septum.core.cells import Journal, SharedMap, Tracking
from septum.core.run import solo_call
from septum.lab.playback import in_64_bit_mode
from septum.tdx.guest import HANDLERS as GUEST_HANDLERS
from septum.tdx.host import HANDLERS as HOST_HANDLERS
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import GPR_NAMES, Regs
from septum.tdx.state.hardware import IA32_INTR_PENDING
from septum.tdx.state.platform import KotEntry
from septum.tdx.state.td import Td, Tdcs, Tdr
from septum.tdx.vm_exit import VmExit
from tests.tdx.invariants import check_all, check_locks
from tests.tdx.machines import BUFFER, PARAMS, SOURCE, Machine

H, G = HostLeaf, GuestLeaf
EPISODE: Final = 1000
"""Calls after which a new start state is chosen."""
U64: Final = (1 << 64) - 1
PARAMS_AT: Final = 0x30000

#: What each register of a leaf is: T a TDR, V a TDVPR, F a free page, P any page, G an address with level, A an
#: address, L a page for an L2 VM, S memory of the host, K an HKID, M a TDMR, f a field of a metadata scope, n a number.
HOST_OPERANDS: Final[dict[HostLeaf, str]] = {
    H.TDH_VP_ENTER: "rcx=V", H.TDH_MNG_ADDCX: "rcx=F rdx=T", H.TDH_MEM_PAGE_ADD: "rcx=G rdx=T r8=F r9=S",
    H.TDH_MEM_SEPT_ADD: "rcx=G rdx=T r8=F r9=L r10=L r11=L", H.TDH_VP_ADDCX: "rcx=F rdx=V",
    H.TDH_MEM_PAGE_RELOCATE: "rcx=G rdx=T r8=F", H.TDH_MEM_PAGE_AUG: "rcx=G rdx=T r8=F",
    H.TDH_MEM_RANGE_BLOCK: "rcx=G rdx=T", H.TDH_MNG_KEY_CONFIG: "rcx=T", H.TDH_MNG_CREATE: "rcx=F rdx=K",
    H.TDH_VP_CREATE: "rcx=F rdx=T", H.TDH_MNG_RD: "rcx=T rdx=t", H.TDH_MEM_RD: "rcx=A rdx=T",
    H.TDH_MNG_WR: "rcx=T rdx=t r8=n r9=n", H.TDH_MEM_WR: "rcx=A rdx=T r8=n",
    H.TDH_MEM_PAGE_DEMOTE: "rcx=G rdx=T r8=F r9=L r10=L r11=L", H.TDH_MR_EXTEND: "rcx=A rdx=T",
    H.TDH_MR_FINALIZE: "rcx=T", H.TDH_VP_FLUSH: "rcx=V", H.TDH_MNG_VPFLUSHDONE: "rcx=T", H.TDH_MNG_KEY_FREEID: "rcx=T",
    H.TDH_MNG_INIT: "rcx=T rdx=I", H.TDH_VP_INIT: "rcx=V rdx=n", H.TDH_MEM_PAGE_PROMOTE: "rcx=G rdx=T",
    H.TDH_PHYMEM_PAGE_RDMD: "rcx=P", H.TDH_MEM_SEPT_RD: "rcx=G rdx=T", H.TDH_VP_RD: "rcx=V rdx=v",
    H.TDH_PHYMEM_PAGE_RECLAIM: "rcx=P", H.TDH_MEM_PAGE_REMOVE: "rcx=G rdx=T",
    H.TDH_MEM_SEPT_REMOVE: "rcx=G rdx=T", H.TDH_SYS_INFO: "rcx=B rdx=n r8=S r9=n", H.TDH_SYS_RD: "rdx=s",
    H.TDH_SYS_TDMR_INIT: "rcx=M", H.TDH_SYS_RDALL: "rdx=S r8=s", H.TDH_MEM_TRACK: "rcx=T",
    H.TDH_MEM_RANGE_UNBLOCK: "rcx=G rdx=T", H.TDH_PHYMEM_CACHE_WB: "rcx=n", H.TDH_PHYMEM_PAGE_WBINVD: "rcx=P",
    H.TDH_VP_WR: "rcx=V rdx=v r8=n r9=n", H.TDH_SYS_CONFIG: "rcx=B rdx=n r8=K",
    H.TDH_SERVTD_BIND: "rcx=T rdx=T r8=n r9=n r10=n", H.TDH_SERVTD_PREBIND: "rcx=T rdx=S r8=n r9=n r10=n",
}  # fmt: skip
_OTHERS: Final = "rcx=T rdx=T r8=S r9=n r10=n r11=n"
"""For functions that are in no row of the table."""
GUEST_OPERANDS: Final[dict[GuestLeaf, str]] = {
    G.TDG_VP_VMCALL: "rcx=n", G.TDG_MR_RTMR_EXTEND: "rcx=A rdx=n", G.TDG_MR_REPORT: "rcx=A rdx=A r8=n",
    G.TDG_VP_CPUIDVE_SET: "rcx=n", G.TDG_MEM_PAGE_ACCEPT: "rcx=G", G.TDG_VM_RD: "rdx=t",
    G.TDG_VM_WR: "rdx=t r8=n r9=n", G.TDG_VP_RD: "rdx=v", G.TDG_VP_WR: "rdx=v r8=n r9=n", G.TDG_SYS_RD: "rdx=s",
    G.TDG_SYS_RDALL: "rdx=A r8=s", G.TDG_SERVTD_RD: "rcx=n rdx=t", G.TDG_SERVTD_WR: "rcx=n rdx=t r8=n r9=n",
    G.TDG_MR_VERIFYREPORT: "rcx=A", G.TDG_MEM_PAGE_ATTR_RD: "rcx=G", G.TDG_MEM_PAGE_ATTR_WR: "rcx=G rdx=n r8=n",
    G.TDG_VP_ENTER: "rcx=n rdx=A", G.TDG_VP_INVEPT: "rcx=n", G.TDG_VP_INVVPID: "rcx=n rdx=n",
}  # fmt: skip
_ENDS_EVERYTHING: Final = (H.TDH_SYS_SHUTDOWN, H.TDH_SYS_LP_SHUTDOWN, H.TDH_SYS_UPDATE)
_RARE: Final = (
    H.TDH_MNG_CREATE, H.TDH_MNG_ADDCX, H.TDH_VP_CREATE, H.TDH_MNG_VPFLUSHDONE, H.TDH_MNG_KEY_FREEID, H.TDH_MR_FINALIZE,
    H.TDH_SYS_RDALL, H.TDH_SYS_INFO, H.TDH_SYS_INIT, H.TDH_SYS_LP_INIT, H.TDH_SYS_CONFIG, H.TDH_SYS_KEY_CONFIG,
    H.TDH_SYS_TDMR_INIT,
)  # fmt: skip
_FREQUENT: Final = (
    H.TDH_MEM_PAGE_AUG, H.TDH_MEM_PAGE_ADD, H.TDH_MEM_SEPT_ADD, H.TDH_MEM_RANGE_BLOCK, H.TDH_MEM_TRACK, H.TDH_VP_ENTER,
    H.TDH_MEM_PAGE_REMOVE, H.TDH_MEM_SEPT_REMOVE, H.TDH_MEM_PAGE_PROMOTE, H.TDH_MEM_PAGE_DEMOTE,
    H.TDH_MEM_PAGE_RELOCATE, H.TDH_MEM_RANGE_UNBLOCK,
)  # fmt: skip
#: VM exits that every guest can meet with, and the interruption information that belongs to them. No EPT
#: misconfigurations: private addresses have none.
EXITS: Final[dict[ExitReason, tuple[int, ...]]] = {
    ExitReason.EXCEPTION_OR_NMI: (0x8000_0202, 0x8000_0312),
    ExitReason.INTERRUPT: (0x8000_0020, 0x8000_00EC),
    **dict.fromkeys(
        (
            ExitReason.TRIPLE_FAULT, ExitReason.INIT_EVENT, ExitReason.SMI_OTHER_EVENT, ExitReason.NMI_WINDOW,
            ExitReason.TASK_SWITCH, ExitReason.CPUID_INSTRUCTION, ExitReason.HLT_INSTRUCTION,
            ExitReason.INVD_INSTRUCTION, ExitReason.RDPMC_INSTRUCTION, ExitReason.VMCALL_INSTRUCTION,
            ExitReason.CR_ACCESS, ExitReason.DR_ACCESS, ExitReason.IO_INSTRUCTION, ExitReason.MSR_READ,
            ExitReason.MSR_WRITE, ExitReason.MWAIT_INSTRUCTION, ExitReason.MONITOR_INSTRUCTION,
            ExitReason.PAUSE_INSTRUCTION, ExitReason.EPT_VIOLATION,
            ExitReason.WBINVD_INSTRUCTION, ExitReason.XSETBV_INSTRUCTION, ExitReason.INVPCID_INSTRUCTION,
        ),
        (0,),
    ),
}  # fmt: skip
_KILLS: Final = (ExitReason.SMI_OTHER_EVENT, ExitReason.TRIPLE_FAULT, ExitReason.EXCEPTION_OR_NMI)
"""VM exits after which a VCPU or its whole TD may be dead: too many make for dull guests."""
_MSRS: Final = (0x10, 0x1B, 0x3A, 0x3B, 0x48, 0xDA0, 0x6E0, 0x345, 0x600, 0xC000_0080, 0xC000_0102, 0x830, 0x4000_0000)
_LEAVES: Final = (0, 1, 4, 7, 0xD, 0x14, 0x1F, 0x21, 0x8000_0000, 0x8000_0008, 0x4000_0000, 99)
_NUMBERS: Final = (0, 0, 0, 1, 2, 3, 7, 64, 0x100, 0xFFFF, 1 << 16, 1 << 32, 1 << 48, 1 << 52, 1 << 63, U64)


def is_alive(td: Td) -> bool:
    """Whether a TD is initialised and can be used."""
    return bool(td.tdcs.eptp) and not td.tdr.fatal and td.tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED


@dataclass(slots=True)
class Found:
    """What a run has seen: calls, statuses, and halts (the module of a halted machine is put back)."""

    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    halts: Counter[str] = field(default_factory=Counter)


class Chaos:
    """A machine, and the dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.found = Found()
        self.fields = {
            scope: [int(entry.id) for entry in field_table(name).entries]
            for scope, name in (("t", "td"), ("v", "vp"), ("s", "sys"))
        }
        self.host_leaves = [leaf for leaf in HostLeaf if leaf in HOST_HANDLERS and leaf not in _ENDS_EVERYTHING]
        self.weights = [1 if leaf in _RARE else 12 if leaf in _FREQUENT else 4 for leaf in self.host_leaves]
        self.guest_leaves = [leaf for leaf in GuestLeaf if leaf in GUEST_HANDLERS]
        self.start = self._starts()
        self.rewind()

    # -- start states ----------------------------------------------------------------------------------------------

    def _starts(self) -> dict[str, tuple[Machine, Journal, int]]:
        self.machines: dict[str, tuple[Machine, Journal, int]] = {}
        for name, build in (("power-on", self._power_on), ("ready", Machine), ("TDs", self._tds)):
            machine = build()
            machine.module.memory.write(PARAMS_AT, PARAMS.pack())
            journal = Journal(Tracking.world)
            self.machines[name] = (machine, journal, journal.mark())
        return self.machines

    def _power_on(self) -> Machine:
        machine = Machine(boot=False)
        for i, tdmr in enumerate(machine.platform.tdmrs):
            machine.module.memory.write(BUFFER + 8 * i, (SOURCE + 512 * i).to_bytes(8, "little"))
            machine.module.memory.write(SOURCE + 512 * i, tdmr.info().pack())
        return machine

    def _tds(self) -> Machine:
        """A debuggable TD with an L2 VM that runs, one that is built, and one whose keys are configured."""
        machine = Machine()
        tdr, _ = machine.finalized_td(replace(PARAMS, attributes=TdAttributes.DEBUG, num_l2_vms=1))
        for i in range(4):
            machine.ok(H.TDH_MEM_PAGE_AUG, rcx=i * PAGE_4K, rdx=tdr, r8=machine.page())
        machine.ok(H.TDH_MEM_PAGE_AUG, rcx=PAGE_2M | 1, rdx=tdr, r8=machine.huge_page())
        built = machine.td()
        machine.add_tables(built, 0)
        machine.add_page(built, 0)
        machine.create_vcpu(built)
        machine.td_with_keys()
        return machine

    def rewind(self) -> None:
        """To one of the start states."""
        name = self.dice.choices(("power-on", "ready", "TDs"), (1, 1, 14))[0]
        self.machine, self.journal, mark = self.start[name]
        self.journal.resume()
        self.journal.undo(mark)
        self.module = self.machine.module
        memory = self.module.platform.tdmrs[0].available[0]
        self.pages = [memory.end - PAGE_2M * 3 + i * PAGE_4K for i in range(40)]
        self.pages += [memory.end - PAGE_2M * n for n in range(4, 8)]

    # -- operands --------------------------------------------------------------------------------------------------

    def _of_type(self, *kinds: PageType) -> list[int]:
        return sorted(key for key, entry in dict.items(self.module.pamt) if entry.page_type in kinds) or [0]

    def _vp(self) -> int:
        return self.dice.choice(self._of_type(PageType.TDVPR))

    def _any_page(self) -> int:
        used = self._of_type(PageType.TDR, PageType.TDCX, PageType.TDVPR, PageType.EPT, PageType.REG)
        return self.dice.choice(used if self.dice.random() < 0.7 else self.pages) & PAGE_MASK

    def _tdr(self) -> int:
        """Most often a TD that lives."""
        every = self._of_type(PageType.TDR)
        alive = [pa for pa in every if is_alive(self.module.td(pa))]
        return self.dice.choice(alive if alive and self.dice.random() < 0.85 else every)

    def _free_page(self) -> int:
        """Most often one that is free."""
        some = [self.dice.choice(self.pages) for _ in range(6)]
        return next((page for page in some if self.module.pamt_entry(page).page_type == PageType.NDA), some[0])

    def _gpa(self) -> int:
        level = self.dice.choices((0, 1, 2, 3, 4), (12, 8, 2, 1, 0.2))[0]
        return self.dice.randrange(6) << 12 + 9 * level | level

    def _address(self) -> int:
        near = self.dice.randrange(4) * (PAGE_2M if self.dice.random() < 0.2 else PAGE_4K)
        return near + self.dice.choice((0, 0, 0, 8, 64, 256, 1024, 0xFF8))

    def _hkid(self) -> int:
        free = [h for h, entry in enumerate(self.module.kot) if entry.state == KotState.HKID_FREE]
        return self.dice.choice(free or [0]) if self.dice.random() < 0.9 else self.dice.randrange(1 << 16)

    def _word(self) -> int:
        way = self.dice.random()
        if way < 0.7:
            return self.dice.choice(_NUMBERS)
        return self.dice.getrandbits(64) if way < 0.9 else 1 << self.dice.randrange(64)

    def _field(self, scope: str) -> int:
        """A field id, sometimes of another scope, a neighbour's, or with other bits (a write mask, a list's)."""
        number = self.dice.choice(self.fields[scope if self.dice.random() < 0.95 else self.dice.choice("tvs")])
        if self.dice.random() < 0.2:
            number = number + self.dice.randrange(4) ^ (1 << self.dice.randrange(64) if self.dice.random() < 0.3 else 0)
        return number & U64

    def operand(self, kind: str) -> int:
        """A value that suits a register of this kind in the present state."""
        ways: dict[str, Callable[[], int]] = {
            "T": self._tdr,
            "V": self._vp,
            "F": self._free_page,
            "P": self._any_page,
            "G": self._gpa,
            "A": self._address,
            "L": lambda: U64 if self.dice.random() < 0.6 else self._free_page(),
            "S": lambda: SOURCE + self.dice.choice((0, PAGE_4K)),
            "B": lambda: BUFFER,
            "I": lambda: PARAMS_AT,
            "K": self._hkid,
            "M": lambda: self.dice.choice([tdmr.base for tdmr in self.module.platform.tdmrs]),
            "n": self._word,
        }
        return ways[kind]() if kind in ways else self._field(kind)

    def registers(self, operands: str) -> dict[str, int]:
        """Registers for a call: mostly right, sometimes with one spoilt, or all random."""
        way = self.dice.random()
        if way < 0.03:
            return {name: self._word() for name in GPR_NAMES}
        regs = {name: self.operand(kind) for name, _, kind in (part.partition("=") for part in operands.split())}
        if way < 0.15 and regs:
            name = self.dice.choice(list(regs))
            spoilt = regs[name] ^ 1 << self.dice.randrange(64)
            regs[name] = self.dice.choice((spoilt, self._word(), self._any_page(), self.operand("V")))
        return regs

    # -- calls -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One event, and what must hold after it."""
        module = self.module
        running = [lp.index for lp in module.lps if lp.running]
        idle = [lp.index for lp in module.lps if not lp.running]
        self._disturb()
        mark = self.journal.mark()
        try:
            if running and (not idle or self.dice.random() < 0.5):
                self._leave_or_call(self.dice.choice(running))
            else:
                self._seamcall(self.dice.choice(idle))
        except ModuleHalt as halt:
            self.found.halts[f"{self.what}: {halt}"] += 1
            self.journal.undo(mark)
        self.found.calls += 1
        if any(map(self._matters, self.journal._log[mark:])):
            check_all(module)
        else:
            check_locks(module)

    def _matters(self, written: tuple[Any, Any, Any]) -> bool:
        """Whether a write can break what :func:`check_all` checks beside locks."""
        owner, key, _ = written
        module = self.module
        if isinstance(owner, SharedMap):
            return owner is module.pamt or owner is module.sept or owner is module.sept_l2
        return isinstance(owner, Tdr | Tdcs | KotEntry) or key in ("vcpu_state", "assoc_lpid", "vcpu_epoch", "running")

    def _disturb(self) -> None:
        """Time goes by; sometimes an interrupt is pending for an LP, or entropy runs out."""
        hardware = self.module.hardware
        hardware.inputs.tsc += self.dice.choice((0, 100, 100_000, 10_000_000))
        if self.dice.random() < 0.02:
            lp = self.dice.randrange(len(self.module.lps))
            hardware.msrs.store((lp, IA32_INTR_PENDING), self.dice.choice((None, None, 1)))
            hardware.inputs.entropy_exhausted = self.dice.random() < 0.1

    def _seamcall(self, lp: int) -> None:
        ready = self.module.sys.state == SysState.READY
        leaf: int = self.dice.choices(self.host_leaves, self.weights if ready else None)[0]
        gprs = self.registers(HOST_OPERANDS.get(HostLeaf(leaf), _OTHERS))
        if not ready:
            leaf = self._towards_ready(leaf, gprs)
        if leaf in (H.TDH_VP_ENTER, H.TDH_VP_FLUSH, H.TDH_VP_RD, H.TDH_VP_WR) and self.dice.random() < 0.9:
            lp = self._lp_of(gprs.get("rcx", 0), lp)
        versions = (0, 1) if leaf in self.module.versioned else (0,)
        version = self.dice.choice(versions) if self.dice.random() < 0.98 else self.dice.randrange(256)
        gprs["rax"] = leaf | version << 16
        if self.dice.random() < 0.01:
            gprs["rax"] = self.dice.choice((self.dice.randrange(128), self._word()))
        if gprs["rax"] & 0xFFFF in _ENDS_EVERYTHING and self.dice.random() < 0.9:
            gprs["rax"] = leaf
        self.what = f"SEAMCALL on LP {lp} of { {name: hex(value) for name, value in gprs.items()} }"
        regs = solo_call(self.module.seamcall(lp, Regs.of(gprs)))
        self._judge(regs, in_host=not self.module.lps[lp].running)

    def _lp_of(self, tdvpr: int, other: int) -> int:
        """The LP with which a VCPU is associated, if it is one and that LP is not in a guest."""
        module = self.module
        if module.pamt_entry(tdvpr & PAGE_MASK).page_type != PageType.TDVPR:
            return other
        lp = module.vp(tdvpr & PAGE_MASK).tdvps.assoc_lpid
        return lp if lp < len(module.lps) and not module.lps[lp].running else other

    def _towards_ready(self, leaf: int, gprs: dict[str, int]) -> int:
        """While the module is initialised, most calls go on with that."""
        if self.dice.random() < 0.3:
            return leaf
        steps = (H.TDH_SYS_INIT, H.TDH_SYS_LP_INIT, H.TDH_SYS_LP_INIT, H.TDH_SYS_CONFIG, H.TDH_SYS_KEY_CONFIG)
        platform = self.module.platform
        gprs.update(rcx=BUFFER, rdx=len(platform.tdmrs), r8=platform.global_private_hkid)
        return self.dice.choice(steps)

    def _leave_or_call(self, lp: int) -> None:
        vp = self.module.vp(self.module.lps[lp].running)
        state = in_64_bit_mode(vp) if self.dice.random() < 0.97 else {}
        if self.dice.random() < 0.03:
            state[vmcs.GUEST_RIP] = self._word()
        if self.dice.random() < 0.6:
            leaf: int = self.dice.choice(self.guest_leaves)
            gprs = self.registers(GUEST_OPERANDS.get(GuestLeaf(leaf), ""))
            gprs["rax"] = leaf if self.dice.random() < 0.97 else self._word()
            exit_ = replace(VmExit.tdcall(Regs.of(gprs)), vmcs=state)
        else:
            td = self.module.td(self.module.pamt_entry(vp.pa).owner)
            exit_ = self._exit(state, td.tdcs.msr_bitmaps)
        self.what = f"exit on LP {lp}: {exit_}"
        regs = solo_call(self.module.td_exit(lp, exit_))
        self._judge(Regs.from_tuple(vp.tdvps.gprs) if regs is None else regs, in_host=regs is not None)

    def _exit(self, state: dict[int, int], bitmaps: bytes) -> VmExit:
        reason = self.dice.choice(list(EXITS))
        rcx = self._word()
        if reason in (ExitReason.MSR_READ, ExitReason.MSR_WRITE):
            rcx = self.dice.choice(_MSRS)
            place = bitmap_bit(rcx, write=reason == ExitReason.MSR_WRITE)
            if place is not None and not bitmaps[place[0]] >> place[1] & 1:
                reason = ExitReason.HLT_INSTRUCTION  # that MSR does not exit
        if reason in _KILLS and self.dice.random() < 0.8:
            reason = ExitReason.INTERRUPT
        gprs = Regs(self.dice.choice(_LEAVES), rcx, self._word())
        qualification = self.dice.choice((0, 1, 2, 4, 0x181, 0x182, 0x30, self.dice.getrandbits(16)))
        details: dict[str, Any] = {"instruction_length": self.dice.choice((1, 2, 3)), "gprs": gprs, "vmcs": state}
        if self.dice.random() < 0.3:
            details["ran_long"] = True
        interruption = self.dice.choice(EXITS[reason])
        return VmExit(reason, qualification, self._address(), self._word(), interruption, **details)

    def _judge(self, regs: Regs, *, in_host: bool) -> None:
        values = regs.to_tuple()
        assert all(isinstance(value, int) for value in values), self.what
        assert 0 <= min(values) <= max(values) <= U64, f"{self.what}: {regs}"
        if in_host:
            decoded = status.decode(regs.rax)
            assert decoded.known, f"{self.what}: {regs.rax:#x} is no status"
            self.found.statuses[decoded.name] += 1


def run(calls: int, seed: int = 1) -> Found:
    """Makes that many calls.

    :raises AssertionError: naming the call, at the first thing that must not be.
    """
    chaos = Chaos(seed)
    for number in range(calls):
        if number % EPISODE == 0:
            chaos.rewind()
        try:
            chaos.step()
        except Exception as error:
            raise AssertionError(f"seed {seed}, call {number}: {chaos.what}") from error
    return chaos.found


def main() -> int:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.tdx.random_calls", description="random calls")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.perf_counter()
    found = run(options.calls, options.seed)
    print(f"{found.calls:,} calls in {time.perf_counter() - start:.0f} s, {len(found.statuses)} different statuses")
    print(*(f"  {count:8,} {name}" for name, count in found.statuses.most_common()), sep="\n")
    print("halts:", *(f"{count} {text}" for text, count in found.halts.most_common()), sep="\n  ")
    return int(bool(found.halts))


if __name__ == "__main__":
    raise SystemExit(main())
