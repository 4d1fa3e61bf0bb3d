"""A machine on which recorded events are played, and the comparison of its answers with the recorded ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from septum.arch import status, vmcs
from septum.arch.leaves import HostLeaf
from septum.arch.platform import Platform
from septum.core.cells import Journal, Tracking, World
from septum.core.run import solo_call
from septum.lab.flat_memory import FlatMemory
from septum.lab.vectors import Event, Exit, Input, MemoryCheck, Outcome, Seamcall, StateCheck
from septum.tdx.host import HANDLERS
from septum.tdx.module import Module
from septum.tdx.outcome import ModuleHalt
from septum.tdx.registers import GPR_NAMES, Regs
from septum.tdx.state.vp import Vp
from septum.tdx.vm_exit import VmExit

LONG_MODE_EFER: Final = 0xD01
LONG_MODE_CS: Final = 1 << 13
DEFAULT_SIZE_CS: Final = 1 << 14
NMI_WINDOW_EXITING: Final = 1 << 22
_ALL_ZERO: Final = dict.fromkeys(GPR_NAMES, 0)


class Different(Exception):
    """The model's answer is not the recorded one; carries what differs."""

    def __init__(self, expected: Mapping[str, object], actual: Mapping[str, object]) -> None:
        super().__init__(expected, actual)
        self.expected = {name: str(value) for name, value in expected.items()}
        self.actual = {name: str(value) for name, value in actual.items()}


@lru_cache(4096)
def describe(rax: int) -> str:
    """A completion status as people read it: ``TDX_OPERAND_BUSY(RCX)``."""
    decoded = status.decode(rax)
    if decoded.operand:
        return f"{decoded.name}({decoded.operand})"
    return f"{decoded.name} ({decoded.detail_text})" if decoded.detail_text else decoded.name


def show(name: str, value: object, *, as_status: bool = True) -> str:
    """A register's value for people; RAX as a status."""
    if not isinstance(value, int):
        return str(value)
    return f"{value:#x} {describe(value)}" if as_status and name == "rax" else f"{value:#x}"


def compare(expected: Mapping[str, Any], actual: Mapping[str, Any], *, as_status: bool = True) -> None:
    """:raises Different: unless both have equal values under the same names; what one lacks is 0."""
    if expected == actual:
        return
    names = [n for n in {**expected, **actual} if expected.get(n, 0) != actual.get(n, 0)]
    if names:
        raise Different(
            {n: show(n, expected.get(n, 0), as_status=as_status) for n in names},
            {n: show(n, actual.get(n, 0), as_status=as_status) for n in names},
        )


def _guest_view(module: Module, lp: int, expected: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the guest on an LP will find, in the form of the recording: the VMCS part and the VE_INFO part."""
    vp = module.vp(module.lps[lp].running)
    fields, tdvps = vp.vmcs, vp.tdvps
    view: dict[str, Any] = {
        "rip": fields[vmcs.GUEST_RIP],
        "rflags": fields[vmcs.GUEST_RFLAGS] if "rflags" in expected.vmcs or fields[vmcs.GUEST_RFLAGS] != 2 else 0,
        "interruptibility": fields[vmcs.GUEST_INTERRUPTIBILITY],
        "nmi_window_exiting": int(bool(fields[vmcs.PROCBASED_CTLS] & NMI_WINDOW_EXITING)),
    }
    event = fields[vmcs.ENTRY_INTERRUPTION]
    if event & vmcs.VALID:
        view["inject"] = {"intr_info": event, "vector": event & vmcs.VECTOR_MASK, "type": event >> vmcs.TYPE_SHIFT & 7}
        if event & vmcs.ERROR_CODE_VALID:
            view["inject"]["error_code"] = fields[vmcs.ENTRY_ERROR_CODE]
        if view["inject"]["vector"] == vmcs.VECTOR_PF:
            view["inject"]["cr2"] = tdvps.cr2
    if "state" in expected.vmcs:
        view["state"] = {
            "cr0": fields[vmcs.GUEST_CR0],
            "cr4": fields[vmcs.GUEST_CR4],
            "cr0_shadow": fields[vmcs.CR0_SHADOW],
            "cr4_shadow": fields[vmcs.CR4_SHADOW],
            "efer": fields[vmcs.GUEST_EFER],
            "debugctl": fields[vmcs.GUEST_DEBUGCTL],
            "pending_dbg": fields[vmcs.GUEST_PENDING_DEBUG],
            "entry_ctls": fields[vmcs.ENTRY_CTLS],
            "hw_xcr0": tdvps.xcr0,
            "hw_xss": tdvps.ia32_xss,
        }
    ve = tdvps.ve_info
    ve_info = {
        "valid": ve.valid,
        "exit_reason": ve.exit_reason,
        "exit_qualification": ve.exit_qualification,
        "gla": ve.gla,
        "gpa": ve.gpa,
        "eptp_index": ve.eptp_index,
        "instr_len": ve.instruction_length,
        "instr_info": ve.instruction_information,
    }
    return view, ve_info if ve.valid else {}


def _check_guest(module: Module, lp: int, expected: Outcome) -> None:
    """Compares a guest that goes on with the recorded one."""
    gprs = module.vp(module.lps[lp].running).tdvps.gprs
    compare(expected.gprs, dict(zip(GPR_NAMES, gprs, strict=True)), as_status="vmcs" in expected.vmcs)
    if not expected.vmcs:
        return
    view, ve_info = _guest_view(module, lp, expected)
    for part in ("inject", "state"):
        compare(expected.vmcs.get(part, {}), view.pop(part, {}), as_status=False)
    compare({n: v for n, v in expected.vmcs.items() if not isinstance(v, dict)}, view, as_status=False)
    compare(expected.ve_info, ve_info, as_status=False)


def _check_outcome(module: Module, lp: int, regs: Regs | None, expected: Outcome, before: Mapping[str, int]) -> None:
    """Compares where the CPU is and what its registers hold. ``regs``: the host's, if it is there."""
    if expected.state == "module_halted":
        raise Different({"state": expected.state}, {"state": "the module goes on"})
    if module.lps[lp].running:
        _check_same_state(expected, {"state": "in_td"})
        _check_guest(module, lp, expected)
    else:
        assert regs is not None
        _check_same_state(expected, {"state": "host", "rax": show("rax", regs.rax)})
        compare({**_ALL_ZERO, **before, **expected.gprs}, regs.values())


def _check_same_state(expected: Outcome, actual: dict[str, str]) -> None:
    if actual["state"] != expected.state:
        rax = expected.gprs.get("rax", 0)
        raise Different(
            {"state": expected.state, **({"rax": show("rax", rax)} if expected.state == "host" else {})}, actual
        )


def in_64_bit_mode(vp: Vp) -> dict[int, int]:
    """Guest state by VMCS encoding with which a guest runs in 64-bit mode, as the recording harness puts it there."""
    access_rights = vp.vmcs[vmcs.GUEST_CS_ACCESS_RIGHTS] & ~DEFAULT_SIZE_CS | LONG_MODE_CS
    return {vmcs.GUEST_EFER: LONG_MODE_EFER, vmcs.GUEST_CS_ACCESS_RIGHTS: access_rights}


class Machine:
    """A module whose state can be put back, and the harness around it that plays the recorded events.

    Its hardware is that of the recordings where it can be told from the real one: one flat memory, no XSAVES.
    """

    def __init__(self, platform: Platform) -> None:
        Tracking.world = World()
        self.module = Module(platform)
        self.module.memory = FlatMemory(self.module)
        self.module.hardware.inputs.xsaves_writes_header = False
        self.journal = Journal(Tracking.world)

    def close(self) -> None:
        """Stops logging, and leaves the world to others."""
        self.journal.close()
        Tracking.world = World()

    def play(self, event: Event) -> None:
        """Carries out one event and checks its answer.

        :raises Different: when the answer is not the recorded one.
        """
        if isinstance(event, Input):
            self._set_up(event)
        elif isinstance(event, Seamcall):
            self._seamcall(event)
        elif isinstance(event, Exit):
            self._exit(event)
        elif isinstance(event, MemoryCheck):
            check_bytes(self.module.memory.read(event.pa, event.size), event.content, event.sha256)
        elif isinstance(event, StateCheck):
            self._look_inside(event)

    def _seamcall(self, event: Seamcall) -> None:
        module, regs = self.module, Regs.of(event.gprs)
        number = regs.rax & 0xFFFF
        try:
            solo_call(module.seamcall(event.lp, regs))
        except ModuleHalt as halt:
            check_halted(event.outcome, halt)
            return
        try:
            _check_outcome(module, event.lp, regs, event.outcome, event.gprs)
        except Different as different:
            if number not in HANDLERS and number in HostLeaf._value2member_map_:
                raise Different(different.expected, {"model": f"{event.name} is not modelled"}) from None
            raise

    def _exit(self, event: Exit) -> None:
        module = self.module
        running = module.lps[event.lp].running
        if not running:
            raise Different({"state": event.outcome.state}, {"state": f"no guest runs on LP {event.lp}"})
        vp = module.vp(running)
        fields = in_64_bit_mode(vp) if event.long_mode else {}
        gprs = {**dict(zip(GPR_NAMES, vp.tdvps.gprs, strict=True)), **event.gprs}
        exit_ = VmExit(
            event.reason,
            event.qualification,
            event.gpa,
            event.gla,
            event.interruption,
            event.instruction_length,
            Regs.of(gprs),
            {**fields, **event.vmcs},
        )
        try:
            regs = solo_call(module.td_exit(event.lp, exit_))
        except ModuleHalt as halt:
            check_halted(event.outcome, halt)
            return
        _check_outcome(module, event.lp, regs, event.outcome, {})

    def _set_up(self, event: Input) -> None:
        module, values = self.module, event.values
        inputs = module.hardware.inputs
        if event.name in ("write", "fill", "guest_write"):
            module.memory.write(values["pa"], values["data"])
        elif event.name == "set_tsc":
            inputs.tsc, inputs.tsc_step = values["tsc"], values["step_per_rdtsc"]
        elif event.name == "set_msr":
            lps = range(len(module.lps)) if values["lp"] < 0 else (values["lp"],)
            for lp in lps:
                module.hardware.msrs[lp, values["msr"]] = values["value"]
        elif event.name == "set_pconfig_error":
            inputs.pconfig_error = values["value"]
        elif event.name == "set_entropy":
            inputs.entropy_exhausted = not values["ok"]
        else:
            guest = module.vp(module.lps[values["lp"]].running).vmcs
            guest[vmcs.GUEST_RIP] = guest[vmcs.GUEST_RIP] + values["delta"]

    def _look_inside(self, event: StateCheck) -> None:
        td = self.module.td(event.tdr)
        tdcs = td.tdcs
        if event.what == "TD_VMCS":
            fields = self.module.vp(self.module.lps[event.lp].running).vmcs
            compare(
                {f"{encoding:#x}": value for encoding, value in event.vmcs.items()},
                {f"{encoding:#x}": fields[encoding] for encoding in event.vmcs},
            )
            return
        content = {
            "MRTD": lambda: tdcs.mrtd,
            "RTMR0..3": lambda: b"".join(tdcs.rtmr),
            "LAST_TEEINFOHASH": lambda: tdcs.last_teeinfo_hash,
            "MSR_BITMAPS": lambda: tdcs.msr_bitmaps,
        }.get(event.what)
        if content is None:
            raise Different({event.what: "a value"}, {event.what: "Septum does not know what this is"})
        check_bytes(content(), event.content, event.sha256)


def check_bytes(actual: bytes, expected: bytes, sha256: str) -> None:
    """:raises Different: unless ``actual`` is the recorded content, or has the recorded SHA-256."""
    if expected:
        if actual != expected:
            at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(actual))
            raise Different(
                {f"bytes from {at:#x}": expected[at : at + 32].hex()},
                {f"bytes from {at:#x}": actual[at : at + 32].hex()},
            )
    elif hashlib.sha256(actual).hexdigest() != sha256:
        raise Different({"sha256": sha256}, {"sha256": hashlib.sha256(actual).hexdigest()})


def check_halted(expected: Outcome, halt: ModuleHalt) -> None:
    """:raises Different: unless the real module halted too."""
    if expected.state != "module_halted":
        raise Different({"state": expected.state}, {"state": f"module_halted: {halt}"})
