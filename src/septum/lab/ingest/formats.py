"""What the TDX code of different kernels prints, as a table of patterns.

Each pattern names what it found: ``leaf`` (a number or a ``TDH_...`` name), ``status`` (64 bits), facts of the host.
Sources: Linux 6.16 to 7.1 ``arch/x86/virt/vmx/tdx/tdx.c`` and ``arch/x86/kvm/vmx/tdx.c``; trees from before the merge
(Intel's 5.10 and 6.2, Ubuntu's 6.5, 6.8 and 6.14) as their logs show them; the tracepoints that were posted in July
2021 and never merged; maps that bpftrace prints at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

INTERESTING: Final = re.compile(
    r"SEAMCALL|SEAMRET|[Tt][Dd][Xx]|\bTD\b|HKID|hkid|kvm_|KVM internal error|extra data|[Gg]uest access before|\btdh_|"
    r"Hardware error|Hardware Error|hardware memory error|Memory failure|All packages need|\bR(?:CX|09) 0x"
)
"""What a line must contain to be looked at; most lines of a log have nothing of it."""
_STATUS: Final = r"0x(?P<status>[0-9a-fA-F]{9,16})\b"
_NAME: Final = r"(?P<leaf>TDH_\w+|tdh_\w+)"


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of message: what it is about, and how to know it."""

    kind: str
    pattern: re.Pattern[str]


def _format(kind: str, pattern: str) -> Format:
    return Format(kind, re.compile(pattern))


SEAMCALL: Final = "seamcall"
"""A SEAMCALL that failed."""
TD_EXIT: Final = "td-exit"
"""TDH.VP.ENTER returned something that KVM could not handle."""
REGISTERS: Final = "registers"
"""More of the SEAMCALL in the line before."""
_REGISTER: Final = re.compile(r"\b(rcx|rdx|r0?8|r0?9|r1[01]) (0x[0-9a-f]+)\b", re.IGNORECASE)

#: The first that matches counts.
FORMATS: Final[tuple[Format, ...]] = (
    # 6.16: SEAMCALL TDH_VP_INIT failed: 0x8000020000000080[, rcx 0x.., rdx 0x.. | , entry 0x.., level_state 0x..]
    _format(SEAMCALL, rf"SEAMCALL {_NAME} failed: {_STATUS}"),
    # 6.8 of Intel and Ubuntu, and early mainline: SEAMCALL (0x000000000000001c) failed: 0x... [RCX 0x... R11 0x...]
    _format(SEAMCALL, rf"SEAMCALL \(0x(?P<leaf_hex>[0-9a-fA-F]+)\) failed: {_STATUS}"),
    # 6.5: SEAMCALL failed: [CPU 94: ]leaf 33, error 0x....
    _format(SEAMCALL, rf"SEAMCALL failed: (?:CPU \d+: )?leaf (?P<leaf>\d+), error {_STATUS}"),
    # 5.10: SEAMCALL[TDH_MEM_RD(12)] failed: Unknown SEAMCALL status code(0xe000060400000000)
    _format(SEAMCALL, rf"SEAMCALL\[{_NAME}(?:\(\d+\))?\] failed: .*?\(?{_STATUS}"),
    # RFC of 2021: kvm_tdx_seamcall_exit: cpu: 3 op: TDH_MEM_PAGE_AUG err TDX_OPERAND_BUSY 0x8000020000000092 rcx: ...
    _format(SEAMCALL, rf"op: (?P<leaf>\w+) err \S* ?{_STATUS}"),
    # bpftrace, by function and full status: @busy[tdh_mem_page_aug, 0x8000020000000092]: 12 (numbers may be decimal)
    _format(SEAMCALL, rf"^@\w*\[{_NAME}, (?P<status_any>-?\w+)\]: (?P<count>\d+)$"),
    # bpftrace, by function, upper half and operand: @busy[tdh_mem_page_aug, 0x80000200, 0x92]: 12
    _format(SEAMCALL, rf"^@\w*\[{_NAME}, (?P<high>\w+), (?P<low>\w+)\]: (?P<count>\d+)$"),
    _format(REGISTERS, r"^(?:\S+ )?(?:additional output: rcx|RCX|R09) 0x"),
    _format("not-in-vmx", r"SEAMCALL failed: CPU (?P<cpu>\d+) is not in VMX operation"),
    _format(TD_EXIT, rf"TD exit {_STATUS}.*?hkid 0x(?P<hkid_hex>[0-9a-fA-F]+) hkid pa 0x(?P<hkid_pa>[0-9a-fA-F]+)"),
    _format(TD_EXIT, rf"TD (?:vp_enter_ret|exit) {_STATUS}"),
    _format(TD_EXIT, rf"extra data\[0\]: {_STATUS}"),
    _format("internal-error", r"KVM internal error. Suberror: (?P<suberror>\d+)"),
    _format("not-accepted", r"[Gg]uest access before accepting 0x(?P<gpa>[0-9a-fA-F]+) on vCPU (?P<vcpu>\d+)"),
    _format("hkid-leaked", r"(?P<leaf>tdh_\w+)\(\) failed\. HKID (?P<hkid>\d+) is leaked"),
    _format("kvm-warning", r"WARNING: CPU: (?P<cpu>\d+) PID: (?P<pid>\d+) at (?P<place>\S*tdx\S*(?: tdx_\S+)?)"),
    _format("poison", r"Uncorrected hardware memory error in user-access at (?P<pa>[0-9a-fA-F]+)"),
    _format("poison", r"Hardware error from APEI"),
    _format("poison", r"Memory failure: 0x(?P<pfn>[0-9a-fA-F]+)"),
    _format("keyids", r"private KeyID range \[(?P<first>\d+), (?P<end>\d+)\)"),
    _format(
        "module",
        r"TDX module: at+ributes 0x(?P<attributes>[0-9a-fA-F]+), vendor_id 0x\w+, major_version (?P<major>\d+),"
        r" minor_version (?P<minor>\d+), build_date (?P<date>\d+), build_num (?P<build>\d+)",
    ),
    _format(
        "module",
        r"TDX module (?P<version>[\d.]+), build number (?P<build>\d+), build date (?P<date_hex>[0-9a-fA-F]+)",
    ),
    _format("module", r"TDX[ -][Mm]odule version: (?P<version>[\d.]+)"),
    _format("module", r"TDX module: features0: (?P<features0>[0-9a-fA-F]+)"),
    _format("pamt", r"(?P<pages>\d+) pages allocated for PAMT"),
    _format("pamt", r"(?P<kb>\d+) KBs? allocated for PAMT"),
    _format("cmr", r"CMR: \[0x(?P<base>[0-9a-fA-F]+), 0x(?P<end>[0-9a-fA-F]+)\)"),
    _format("initialized", r"(?:TDX[ -])?[Mm]odule initialized"),
    _format("initialized", r"TDX is supported"),
    _format("init-failed", r"initialization failed \((?P<errno>-\d+)\)"),
    _format("init-failed", r"initialization failed: (?P<why>.+?)\.?$"),
    _format("init-failed", r"(?P<why>Failed to initialize TDX module)"),
    _format("init-failed", r"(?P<why>module not loaded|not enabled by BIOS|TDX requires TDP MMU)"),
    _format("init-failed", r"(?P<why>All packages need to have online CPU)"),
)


def recognise(text: str) -> tuple[str, Mapping[str, str]] | None:
    """What kind of message a text is, and what it names; None for one that is of no interest."""
    if not INTERESTING.search(text) and not text.startswith("@"):
        return None
    for format_ in FORMATS:
        if found := format_.pattern.search(text):
            return format_.kind, {name: value for name, value in found.groupdict().items() if value is not None}
    return None


def registers_in(text: str) -> dict[str, str]:
    """Registers that a message tells; those that somebody has blacked out are left out."""
    return {name.lower().replace("r0", "r"): value for name, value in _REGISTER.findall(text)}


def leaf_of(found: Mapping[str, str]) -> int | str:
    """The leaf that a message names: its number, or its name as printed."""
    if "leaf_hex" in found:
        return int(found["leaf_hex"], 16)
    text = found.get("leaf", "")
    return int(text) if text.isdigit() else text


def status_of(found: Mapping[str, str]) -> int:
    """The 64-bit completion status that a message names."""
    if "status" in found:
        return int(found["status"], 16)
    if "status_any" in found:
        return _number(found["status_any"]) & (1 << 64) - 1
    return _number(found["high"]) << 32 | _number(found["low"])


def _number(text: str) -> int:
    return int(text, 16 if text.lower().startswith("0x") else 10)
