"""Random calls that suit the present state of the module, as hypothesis draws them.

Whom a call is about, which interface function it is and what its operands are come from the model's state: TDs and
VCPUs that exist, what is mapped in their Secure EPT, pages that are free, LPs on which a guest runs. Three calls in ten
are then spoilt in one register. What registers are for is known from :func:`septum.arch.leaves.registers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final, TypeVar

from hypothesis import strategies as st

from septum.arch.exits import ExitReason, exit_reason_name
from septum.arch.leaves import ALLOWED_BEFORE_READY, VERSION_SHIFT, GuestLeaf, HostLeaf, Leaf, max_version, registers
from septum.arch.metadata import NULL_FIELD_ID, field_table
from septum.arch.op_state import HOST_ALLOWED, KotState, Lifecycle, OpState, SysState
from septum.arch.pages import NULL_PA, PAGE_2M, PAGE_4K, PAGE_MASK, Level, level_size
from septum.arch.pamt import PageType
from septum.arch.sept import FREE_ENTRY, PS, STATE_MASK
from septum.arch.sept import GUEST_ALLOWED as GUEST_ALLOWED_ENTRY
from septum.arch.sept import HOST_ALLOWED as HOST_ALLOWED_ENTRY
from septum.arch.structures import TdParams
from septum.lab.vectors import Event, Exit, Input, Outcome, Seamcall
from septum.tdx.guest import HANDLERS as GUEST_HANDLERS
from septum.tdx.host import HANDLERS as HOST_HANDLERS
from septum.tdx.module import Module
from septum.tdx.state.hardware import IA32_INTR_PENDING

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]

NOT_YET: Final = Outcome("", {}, {}, {})
"""The outcome of a call that nobody has made yet."""
TD_PARAMS, SOURCE, BUFFER = 0x101_0000, 0x102_0000, 0x104_0000
"""Where the host keeps what the module reads, and lets it write. (The start states use the same addresses.)"""
MEAN_LENGTH: Final = 100
"""Events after which a sequence ends by itself, on average; that a sequence can end makes it simpler."""
FREE_PAGES: Final = 24
"""Pages of 4 KiB at the end of the first TDMR that calls may be given; below them there are some of 2 MiB."""
FREE_HUGE_PAGES: Final = 4

_HOST_LEAVES: Final = [leaf for leaf in HostLeaf if leaf in HOST_HANDLERS]
_GUEST_LEAVES: Final = [leaf for leaf in GuestLeaf if leaf in GUEST_HANDLERS]
_ANY_TIME: Final = [
    HostLeaf.TDH_MNG_CREATE,
    HostLeaf.TDH_PHYMEM_PAGE_RDMD,
    HostLeaf.TDH_PHYMEM_PAGE_RECLAIM,
    HostLeaf.TDH_PHYMEM_CACHE_WB,
    HostLeaf.TDH_MNG_VPFLUSHDONE,
]
"""Functions that suit every state of every TD."""
_BY_LIFECYCLE: Final = {
    Lifecycle.HKID_ASSIGNED: [HostLeaf.TDH_MNG_KEY_CONFIG],
    Lifecycle.BLOCKED: [HostLeaf.TDH_PHYMEM_CACHE_WB, HostLeaf.TDH_MNG_KEY_FREEID],
    Lifecycle.TEARDOWN: [HostLeaf.TDH_PHYMEM_PAGE_RECLAIM],
}
_BY_OP_STATE: Final = {
    state: [leaf for leaf in _HOST_LEAVES if state in HOST_ALLOWED.get(leaf, ())] for state in OpState
}
_EXITS: Final = {
    ExitReason.EPT_VIOLATION: 0,
    ExitReason.INTERRUPT: 0x8000_0020,
    ExitReason.EXCEPTION_OR_NMI: 0x8000_0202,
    ExitReason.CPUID_INSTRUCTION: 0,
    ExitReason.HLT_INSTRUCTION: 0,
    ExitReason.IO_INSTRUCTION: 0,
    ExitReason.MSR_READ: 0,
    ExitReason.MSR_WRITE: 0,
    ExitReason.WBINVD_INSTRUCTION: 0,
    ExitReason.TRIPLE_FAULT: 0,
}
"""VM exits, and the interruption information that comes with them."""
_PARAMS: Final = TdParams(attributes=1, xfam=3, max_vcpus=4, eptp_controls=0x1E, tsc_frequency=40).pack()
_CHANGES: Final = [(0, 1 << 28), (0, 1 << 63), (8, 0xE7), (16, 0), (24, 0x26), (32, 1), (40, 0), (64, 1)]
"""Offsets in TD_PARAMS, and 8 bytes to write there."""
_INPUTS: Final = ("write", "set_msr", "set_tsc")
"""What may change around the module."""
_RANDOM_FIELDS: Final = ("TD_UUID",)
"""Metadata that the module takes from random numbers."""
_WORDS: Final = [0, 1, (1 << 64) - 1, 1 << 63, 0x1234_5678_9ABC_DEF0]


def draw_event(draw: Draw, module: Module, without: frozenset[str]) -> Event | None:
    """Something that happens next: a call, a VM exit, or a change of what is around the module. None: nothing more.

    ``draw`` is that of a hypothesis strategy; nothing is drawn that is in ``without``.
    """
    dice = Dice(draw)
    if dice.below(MEAN_LENGTH) == 0:
        return None
    running = [lp.index for lp in module.lps if lp.running]
    others = [lp.index for lp in module.lps if not lp.running]
    can_exit = "td_exit" not in without
    ways: list[Callable[[], Event]] = []
    if others:
        ways += [lambda: _seamcall(dice, module, dice.one(others), can_enter=can_exit)] * 12
    if running and can_exit:
        ways += [lambda: _exit(dice, module, dice.one(running))] * 12
    if not without.issuperset(_INPUTS):
        ways += [lambda: _input(dice, len(module.lps), without)]
    return dice.one(ways)()


class Dice:
    """Hypothesis's draws, in few words. The simplest outcome of each is the first."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def one(self, things: list[T]) -> T:
        """One of these."""
        return things[self.below(len(things))]

    def below(self, end: int) -> int:
        """A number from 0 on."""
        # A strategy for each list of things would take hypothesis longer to make than to draw from.
        return int(self.draw(_below(end)))

    def often(self, tenths: int) -> bool:
        """True in so many cases of ten, and in the simplest."""
        return self.below(10) < tenths

    def bit(self, lowest: int = 0) -> int:
        """One bit of a register."""
        return 1 << lowest + self.below(64 - lowest)


@cache
def _below(end: int) -> st.SearchStrategy[int]:
    return st.integers(0, end - 1)


def _seamcall(dice: Dice, module: Module, lp: int, *, can_enter: bool) -> Seamcall:
    subject = Subject.of(dice, module)
    leaves = _fitting(dice, module, subject.tdr) if dice.often(7) else _HOST_LEAVES
    leaf = dice.one([leaf for leaf in leaves if can_enter or leaf != HostLeaf.TDH_VP_ENTER])
    version = dice.below(max_version(leaf) + 1)
    given = {name: operand(subject, leaf) for name, operand in _operands(leaf).items()}
    gprs = {"rax": leaf | version << VERSION_SHIFT, **given}
    return Seamcall(0, leaf.abi_name, lp, _spoilt(dice, subject, gprs), NOT_YET)


def _fitting(dice: Dice, module: Module, tdr: int) -> list[HostLeaf]:
    """Interface functions that may succeed now for a TD (0: none)."""
    if module.sys.state != SysState.READY:
        return [*sorted(ALLOWED_BEFORE_READY), HostLeaf.TDH_SYS_TDMR_INIT]
    if not tdr or not dice.often(8):
        return _ANY_TIME
    td = module.td(tdr)
    if td.tdr.lifecycle_state != Lifecycle.KEYS_CONFIGURED:
        return _BY_LIFECYCLE[Lifecycle(td.tdr.lifecycle_state)]
    leaves = _BY_OP_STATE[OpState(td.tdcs.op_state)]
    return leaves + [HostLeaf.TDH_VP_ENTER] * 5 if td.tdcs.op_state == OpState.RUNNABLE else leaves


def _exit(dice: Dice, module: Module, lp: int) -> Exit:
    subject = Subject(dice, module, module.pamt[module.lps[lp].running].owner)
    if dice.often(7):
        leaf = dice.one(_GUEST_LEAVES)
        given = {name: operand(subject, leaf) for name, operand in _GUEST_OPERANDS[leaf].items()}
        gprs = _spoilt(dice, subject, {"rax": int(leaf), **given})
        return Exit(0, leaf.abi_name, lp, ExitReason.TDCALL, 0, 0, 0, 0, 4, gprs, {}, True, NOT_YET)
    reason = dice.one(list(_EXITS))
    is_violation = reason == ExitReason.EPT_VIOLATION
    gpa = subject.gpa() & PAGE_MASK if is_violation else 0
    gprs = {"rax": dice.below(64), "rcx": dice.below(64)}
    name = f"EXIT:{exit_reason_name(reason)}"
    return Exit(0, name, lp, int(reason), int(is_violation), gpa, 0, _EXITS[reason], 2, gprs, {}, False, NOT_YET)


def _input(dice: Dice, num_lps: int, without: frozenset[str]) -> Input:
    params = _PARAMS
    if not dice.often(5):
        offset, value = dice.one(_CHANGES)
        params = params[:offset] + value.to_bytes(8, "little") + params[offset + 8 :]
    pending = {"lp": dice.one(list(range(num_lps))), "msr": IA32_INTR_PENDING, "value": dice.one([0, 1])}
    later = {"tsc": 0x1_0000_0000 + (dice.below(64) << 32), "step_per_rdtsc": 1000}
    values: dict[str, dict[str, Any]] = {
        "write": {"pa": TD_PARAMS, "data": params},
        "set_msr": pending,
        "set_tsc": later,
    }
    name = dice.one([name for name in _INPUTS if name not in without])
    return Input(0, name, values[name])


def _spoilt(dice: Dice, subject: Subject, gprs: dict[str, int]) -> dict[str, int]:
    """The registers of a call, in three cases of ten with one that is wrong."""
    if dice.often(7):
        return gprs
    names = [name for name in gprs if name != "rax"]
    if not names or not dice.often(9):  # It stays the same interface function.
        return gprs | {"rax": gprs["rax"] ^ dice.bit(VERSION_SHIFT)}
    if len(names) > 1 and dice.often(5):  # One object in two places: the module finds its own lock taken.
        name = dice.one(names[1:])
        return gprs | {name: gprs[dice.one(names[: names.index(name)])]}
    name = dice.one(names)
    ways: list[Callable[[], int]] = [lambda: gprs[name] ^ dice.bit(), subject.page, subject.word]
    return gprs | {name: dice.one(ways)()}


# -- operands ----------------------------------------------------------------------------------------------------------


class Subject:
    """A TD that a call is about (``tdr`` 0: none), and operands for such a call, drawn from the module's state."""

    def __init__(self, dice: Dice, module: Module, tdr: int) -> None:
        self.dice, self.module, self.tdr = dice, module, tdr

    @classmethod
    def of(cls, dice: Dice, module: Module) -> Subject:
        """One of the TDs that exist, most often one that has its keys."""
        tdrs = _pages_of(module, PageType.TDR)
        keyed = [tdr for tdr in tdrs if module.td(tdr).tdr.lifecycle_state == Lifecycle.KEYS_CONFIGURED]
        return cls(dice, module, dice.one(keyed if keyed and dice.often(8) else tdrs or [0]))

    def its_tdr(self) -> int:
        """The TD's own root page."""
        return self.tdr

    def vp(self) -> int:
        """A VCPU of the TD, or of any if it has none."""
        vps = _pages_of(self.module, PageType.TDVPR)
        its = [pa for pa in vps if self.module.pamt_entry(pa).owner == self.tdr]
        return self.dice.one(its or vps or [0])

    def page(self) -> int:
        """Any page that somebody owns, or that is free."""
        kinds = (PageType.TDR, PageType.TDCX, PageType.TDVPR, PageType.EPT, PageType.REG)
        return self.dice.one(_pages_of(self.module, self.dice.one(list(kinds))) + self._pages())

    def free_page(self) -> int:
        """A page that is free, if there is one."""
        pages = self._pages()
        return self.dice.one([p for p in pages if self.module.pamt_entry(p).page_type == PageType.NDA] or pages)

    def new_page(self) -> int:
        """A page for memory: 4 KiB, or sometimes 2 MiB."""
        if self.dice.often(7):
            return self.free_page()
        first = self._pages()[0] - FREE_HUGE_PAGES * PAGE_2M & -PAGE_2M
        return self.dice.one([first + n * PAGE_2M for n in range(FREE_HUGE_PAGES)])

    def l2_page(self) -> int:
        """A page for an L2 VM; mostly there is none."""
        return NULL_PA if self.dice.often(7) else self.free_page()

    def keyed_page(self) -> int:
        """A page, often with the TD's HKID."""
        page = self.page()
        hkid = self.module.td(self.tdr).tdr.hkid if self.tdr and self.dice.often(7) else 0
        return self.module.pa_format.with_hkid(page, hkid)

    def gpa(self, leaf: Leaf | None = None) -> int:
        """Address and level of an entry in the TD's Secure EPT, or beside it; most often one that suits a function."""
        entries = {gpa & PAGE_MASK | level: raw for gpa, level, raw in self._entries()}
        allowed = (HOST_ALLOWED_ENTRY if isinstance(leaf, HostLeaf) else GUEST_ALLOWED_ENTRY).get(
            leaf or 0, frozenset()
        )
        levels = range(Level.PD, Level.PML5 + 1) if leaf and "SEPT" in leaf.name else range(Level.PD + 1)
        fitting = [gpa for gpa, raw in sorted(entries.items()) if raw & STATE_MASK in allowed and gpa & 7 in levels]
        return self.dice.one(fitting if fitting and self.dice.often(8) else sorted(entries) or [3])

    def address(self, leaf: Leaf) -> int:
        """A guest physical address in or beside the TD's memory."""
        return self.gpa(leaf) & PAGE_MASK | 0x100 * self.dice.below(16)

    def hkid(self) -> int:
        """A private HKID, most often one that is free."""
        hkids = list(self.module.platform.private_hkids)
        free = [hkid for hkid in hkids if self.module.kot[hkid].state == KotState.HKID_FREE]
        return self.dice.one(free if free and self.dice.often(7) else hkids)

    def tdmr(self) -> int:
        """The address of a TDMR."""
        return self.dice.one([tdmr.base for tdmr in self.module.platform.tdmrs])

    def small(self) -> int:
        """A small number."""
        return self.dice.below(64)

    def word(self) -> int:
        """Some 64 bits."""
        return self.dice.one(_WORDS)

    def _pages(self) -> list[int]:
        end = self.module.platform.tdmrs[0].available[0].end
        return list(range(end - FREE_PAGES * PAGE_4K, end, PAGE_4K))

    def _entries(self) -> Iterator[tuple[int, int, int]]:
        """Address, level and content of Secure EPT entries: those that are not free, and the one behind each."""
        eptp = self.module.td(self.tdr).tdcs.eptp if self.tdr else 0
        tables: dict[int, list[int]] = {}
        for pa in self.module.sept if eptp else ():
            tables.setdefault(pa & PAGE_MASK, []).append(pa)
        todo = [(eptp & PAGE_MASK, 0, eptp >> 3 & 7)]
        while todo:
            table, gpa, level = todo.pop()
            size = level_size(level)
            for pa in tables.get(table, ()):
                entry, at = self.module.sept[pa], gpa + (pa - table) // 8 * size
                if entry != FREE_ENTRY:
                    yield at, level, entry
                    yield at + size, level, self.module.sept[pa + 8]
                    if level and not entry & PS:
                        todo.append((entry & PAGE_MASK, at, level - 1))


def _pages_of(module: Module, kind: PageType) -> list[int]:
    """The pages of a type, in ascending order."""
    return sorted(key & PAGE_MASK for key, (page_type, _, _) in module.pamt.items() if page_type == kind)


Operand = Callable[[Subject, Leaf], int]


@cache
def fields(table: str) -> list[int]:
    """Ids of the fields in a metadata table, each with a neighbour that may not exist, and the null id."""
    ids = [entry.id for entry in field_table(table).entries if entry.name not in _RANDOM_FIELDS]
    return [int(NULL_FIELD_ID), *sorted({int(f) + near for f in ids for near in (0, 1)})]


def _field(subject: Subject, leaf: Leaf) -> int:
    """A field id of the scope that the function is named for."""
    _, scope, *_ = leaf.name.split("_")
    return subject.dice.one(fields({"SYS": "sys", "VP": "vp"}.get(scope, "td")))


def _drawn(way: Callable[[Subject], int]) -> Operand:
    return lambda subject, leaf: way(subject)


def _just(value: int) -> Operand:
    return lambda subject, leaf: value


_TDR, _VP, _PAGE = map(_drawn, (Subject.its_tdr, Subject.vp, Subject.free_page))
_SMALL_NUMBER, _ANY = map(_drawn, (Subject.small, Subject.word))
_GPA, _ADDRESS = Subject.gpa, Subject.address
OF_MEANING: Final[dict[str, Operand]] = {
    **dict.fromkeys(("TDR page", "TDR page and flags", "target TDR page"), _TDR),
    "service TDR page": _drawn(lambda subject: Subject.of(subject.dice, subject.module).tdr),
    **dict.fromkeys(("TDVPR page", "TDVPR page and flags"), _VP),
    **dict.fromkeys(("GPA and level", "GPA"), _GPA),
    **dict.fromkeys(("GPA of 8 bytes", "GPA of 256 bytes"), _ADDRESS),
    "new page": _drawn(Subject.new_page),
    **dict.fromkeys(("new L1 page", "new TDCX page", "new TDR page", "new TDVPR page"), _PAGE),
    **dict.fromkeys(("new L2 pages", "new L2 pages (version 1)"), _drawn(Subject.l2_page)),
    "page": _drawn(Subject.page),
    "page with HKID": _drawn(Subject.keyed_page),
    **dict.fromkeys(("HKID", "global private HKID"), _drawn(Subject.hkid)),
    "TDMR base": _drawn(Subject.tdmr),
    "field id": _field,
    "TD_PARAMS": _just(TD_PARAMS),
    "source page": _just(SOURCE),
    **dict.fromkeys(("TDSYSINFO_STRUCT", "metadata list page", "array of TDMR_INFO addresses"), _just(BUFFER)),
    **dict.fromkeys(("CMR_INFO array", "service TD info hash"), _just(BUFFER + PAGE_4K)),
    "its size": _just(1024),
    **dict.fromkeys(("its entries", "slot", "type", "0 start or 1 resume", "to the guest"), _SMALL_NUMBER),
}
"""Operands by what :func:`septum.arch.leaves.registers` says that a register is for; all others are any word."""

_READ: Final = {"rcx": _just(0), "rdx": _field}
_WRITE: Final = {**_READ, "r8": _SMALL_NUMBER, "r9": _ANY}
_GUEST_OPERANDS: Final[dict[GuestLeaf, dict[str, Operand]]] = {
    GuestLeaf.TDG_VP_VMCALL: {"rcx": _just(0xFC00), "r10": _SMALL_NUMBER, "r11": _SMALL_NUMBER, "r12": _ANY},
    GuestLeaf.TDG_VP_INFO: {},
    GuestLeaf.TDG_MR_RTMR_EXTEND: {"rcx": _ADDRESS, "rdx": _SMALL_NUMBER},
    GuestLeaf.TDG_VP_VEINFO_GET: {},
    GuestLeaf.TDG_MR_REPORT: {"rcx": _ADDRESS, "rdx": _ADDRESS, "r8": _just(0)},
    GuestLeaf.TDG_VP_CPUIDVE_SET: {"rcx": _SMALL_NUMBER},
    GuestLeaf.TDG_MEM_PAGE_ACCEPT: {"rcx": _GPA},
    GuestLeaf.TDG_VM_RD: _READ,
    GuestLeaf.TDG_VM_WR: _WRITE,
    GuestLeaf.TDG_VP_RD: _READ,
    GuestLeaf.TDG_VP_WR: _WRITE,
    GuestLeaf.TDG_SYS_RD: _READ,
    GuestLeaf.TDG_SYS_RDALL: {"rdx": _ADDRESS, "r8": _ANY},
    GuestLeaf.TDG_SERVTD_RD: {"rcx": _ANY, "rdx": _field},
    GuestLeaf.TDG_SERVTD_WR: _WRITE,
    GuestLeaf.TDG_MR_VERIFYREPORT: {"rcx": _ADDRESS},
    GuestLeaf.TDG_MEM_PAGE_ATTR_RD: {"rcx": _GPA},
    GuestLeaf.TDG_MEM_PAGE_ATTR_WR: {"rcx": _GPA, "rdx": _ANY, "r8": _ANY},
    GuestLeaf.TDG_VP_ENTER: {"rcx": _SMALL_NUMBER, "rdx": _ADDRESS},
    GuestLeaf.TDG_VP_INVEPT: {"rcx": _SMALL_NUMBER},
    GuestLeaf.TDG_VP_INVVPID: {"rcx": _SMALL_NUMBER, "rdx": _ANY},
}


@cache
def _operands(leaf: HostLeaf) -> dict[str, Operand]:
    """How each input register of a host-side function is drawn."""
    ways: dict[str, Operand] = {}
    for names, meaning in registers(leaf).inputs.items():
        first, _, last = names.lower().partition("-r")
        each = [f"r{n}" for n in range(int(first[1:]), int(last) + 1)] if last else [first]
        ways |= dict.fromkeys(each, OF_MEANING.get(meaning, _ANY))
    return ways
