"""The registers of every leaf, in words: ``inputs -> outputs``, each ``REGISTER: meaning`` and separated by ``;``.

Kept apart from :mod:`septum.arch.leaves` because only documentation and reports read it; use
:func:`septum.arch.leaves.registers`. Registers named by several leaves mean: SEPTE, the Secure-EPT entry where a walk
ended, in its architectural form; LEVEL_STATE, that entry's level (2:0), state (15:8) and VM (17:16).
"""

from typing import Final

from septum.arch.leaves import GuestLeaf as G
from septum.arch.leaves import HostLeaf as H

_SEPT_OUT: Final = "RCX: SEPTE; RDX: LEVEL_STATE"
_FREED_OUT: Final = "RCX: on success the freed page, else SEPTE; RDX: LEVEL_STATE"
_MAP_IN: Final = "RCX: GPA and level; RDX: TDR page"
_FIELD_IN: Final = "RCX: {}; RDX: field id"
_NEXT_OUT: Final = "RDX: next field id (version 1); R8: value"
_WRITE_IN: Final = "; R8: value; R9: write mask"
_STREAM: Final = "R8: MBMD page and size; R9: page list; R10: stream index and command"

HOST_REGISTERS: Final[dict[H, str]] = {
    H.TDH_VP_ENTER: "RCX: TDVPR page and flags; RBX: to the guest after VMCALL; RBP: to the guest; RSI: to the guest;"
    "RDI: to the guest; R8-R15: to the guest"
    "-> RCX: exit qualification, or GPR mask of TDG.VP.VMCALL; RDX: extended exit qualification; R8: exit GPA;"
    "R9: interruption information; RBX: from the guest; R10-R15: from the guest",
    H.TDH_MNG_ADDCX: "RCX: new TDCX page; RDX: TDR page ->",
    H.TDH_MEM_PAGE_ADD: f"{_MAP_IN}; R8: new page; R9: source page -> {_SEPT_OUT}",
    H.TDH_MEM_SEPT_ADD: f"{_MAP_IN} and flags; R8: new L1 page; R9-R11: new L2 pages (version 1)"
    f"-> {_SEPT_OUT}; R8-R11: pages not used (version 1)",
    H.TDH_VP_ADDCX: "RCX: new TDCX page; RDX: TDVPR page ->",
    H.TDH_MEM_PAGE_RELOCATE: f"RCX: GPA; RDX: TDR page; R8: new page -> {_FREED_OUT}",
    H.TDH_MEM_PAGE_AUG: f"{_MAP_IN}; R8: new page -> {_SEPT_OUT}",
    H.TDH_MEM_RANGE_BLOCK: f"{_MAP_IN} -> {_SEPT_OUT}",
    H.TDH_MNG_KEY_CONFIG: "RCX: TDR page ->",
    H.TDH_MNG_CREATE: "RCX: new TDR page; RDX: HKID ->",
    H.TDH_VP_CREATE: "RCX: new TDVPR page; RDX: TDR page ->",
    H.TDH_MNG_RD: f"{_FIELD_IN.format('TDR page')} -> {_NEXT_OUT}",
    H.TDH_MEM_RD: f"RCX: GPA of 8 bytes; RDX: TDR page -> {_SEPT_OUT}; R8: value",
    H.TDH_MNG_WR: f"{_FIELD_IN.format('TDR page')}{_WRITE_IN} -> R8: old value",
    H.TDH_MEM_WR: f"RCX: GPA of 8 bytes; RDX: TDR page; R8: value -> {_SEPT_OUT}; R8: old value",
    H.TDH_MEM_PAGE_DEMOTE: f"{_MAP_IN} and flags; R8: new L1 page; R9-R11: new L2 pages"
    f"-> {_SEPT_OUT}; R9-R11: pages not used",
    H.TDH_MR_EXTEND: f"RCX: GPA of 256 bytes; RDX: TDR page -> {_SEPT_OUT}",
    H.TDH_MR_FINALIZE: "RCX: TDR page ->",
    H.TDH_VP_FLUSH: "RCX: TDVPR page ->",
    H.TDH_MNG_VPFLUSHDONE: "RCX: TDR page ->",
    H.TDH_MNG_KEY_FREEID: "RCX: TDR page ->",
    H.TDH_MNG_INIT: "RCX: TDR page; RDX: TD_PARAMS -> RCX: offending CPUID leaf and sub-leaf",
    H.TDH_VP_INIT: "RCX: TDVPR page; RDX: the vCPU's initial RCX and R8 ->",
    H.TDH_MEM_PAGE_PROMOTE: f"{_MAP_IN} -> {_FREED_OUT}; R9-R11: freed L2 pages (version 1)",
    H.TDH_PHYMEM_PAGE_RDMD: "RCX: page -> RCX: page type; RDX: owner; R8: page size; R9: BEPOCH",
    H.TDH_MEM_SEPT_RD: f"{_MAP_IN} -> {_SEPT_OUT}",
    H.TDH_VP_RD: f"{_FIELD_IN.format('TDVPR page')} -> {_NEXT_OUT}",
    H.TDH_MNG_KEY_RECLAIMID: "RCX: TDR page ->",
    H.TDH_PHYMEM_PAGE_RECLAIM: "RCX: page -> RCX: page type; RDX: owner; R8: page size",
    H.TDH_MEM_PAGE_REMOVE: f"{_MAP_IN} -> {_FREED_OUT}",
    H.TDH_MEM_SEPT_REMOVE: f"{_MAP_IN} -> {_FREED_OUT}; R9-R11: freed L2 pages (version 1)",
    H.TDH_SYS_KEY_CONFIG: "->",
    H.TDH_SYS_INFO: "RCX: TDSYSINFO_STRUCT; RDX: its size; R8: CMR_INFO array; R9: its entries"
    "-> RDX: bytes written; R9: CMR entries written",
    H.TDH_SYS_INIT: "RCX: attributes, 0 ->",
    H.TDH_SYS_RD: f"RDX: field id -> {_NEXT_OUT.replace(' (version 1)', '')}",
    H.TDH_SYS_LP_INIT: "->",
    H.TDH_SYS_TDMR_INIT: "RCX: TDMR base -> RDX: next address to initialise",
    H.TDH_SYS_RDALL: "RDX: metadata list page; R8: first field id -> R8: next field id",
    H.TDH_MEM_TRACK: "RCX: TDR page ->",
    H.TDH_MEM_RANGE_UNBLOCK: f"{_MAP_IN} -> {_SEPT_OUT}",
    H.TDH_PHYMEM_CACHE_WB: "RCX: 0 start or 1 resume ->",
    H.TDH_PHYMEM_PAGE_WBINVD: "RCX: page with HKID ->",
    H.TDH_VP_WR: f"{_FIELD_IN.format('TDVPR page')}{_WRITE_IN} -> R8: old value",
    H.TDH_SYS_LP_SHUTDOWN: "->",
    H.TDH_SYS_CONFIG: "RCX: array of TDMR_INFO addresses; RDX: its entries; R8: global private HKID ->",
    H.TDH_SERVTD_BIND: "RCX: target TDR page; RDX: service TDR page; R8: slot; R9: type; R10: attributes"
    "-> RCX: binding handle; R10-R13: target TD UUID",
    H.TDH_SERVTD_PREBIND: "RCX: target TDR page; RDX: service TD info hash; R8: slot; R9: type; R10: attributes ->",
    H.TDH_SYS_SHUTDOWN: "RCX: handoff version ->",
    H.TDH_SYS_UPDATE: "->",
    H.TDH_EXPORT_ABORT: "RCX: TDR page; R8: MBMD page and size; R10: stream index ->",
    H.TDH_EXPORT_BLOCKW: "RCX: GPA list; RDX: TDR page -> RCX: next GPA list entry",
    H.TDH_EXPORT_RESTORE: "RCX: GPA list; RDX: TDR page -> RCX: next GPA list entry",
    H.TDH_EXPORT_MEM: "RCX: GPA list; RDX: TDR page; R8: MBMD page and size; R9: migration buffer list;"
    "R10: stream index and command; R11: MAC list 0; R12: MAC list 1"
    "-> RCX: next GPA list entry; RDX: number of exported entries",
    H.TDH_EXPORT_PAUSE: "RCX: TDR page ->",
    H.TDH_EXPORT_TRACK: "RCX: TDR page; R8: MBMD page and size; R10: stream index and command ->",
    H.TDH_EXPORT_STATE_IMMUTABLE: f"RCX: TDR page; {_STREAM} -> RDX: number of exported pages",
    H.TDH_EXPORT_STATE_TD: f"RCX: TDR page; {_STREAM} -> RDX: number of exported pages",
    H.TDH_EXPORT_STATE_VP: f"RCX: TDVPR page; {_STREAM} -> RDX: number of exported pages",
    H.TDH_EXPORT_UNBLOCKW: f"RCX: GPA and level; RDX: TDR page -> {_SEPT_OUT}",
    H.TDH_IMPORT_ABORT: "RCX: TDR page; R8: MBMD page and size; R10: stream index ->",
    H.TDH_IMPORT_END: "RCX: TDR page ->",
    H.TDH_IMPORT_COMMIT: "RCX: TDR page ->",
    H.TDH_IMPORT_MEM: "RCX: GPA list; RDX: TDR page; R8: MBMD page and size; R9: migration buffer list;"
    "R10: stream index and command; R11: MAC list 0; R12: MAC list 1; R13: new page list"
    "-> RCX: next GPA list entry",
    H.TDH_IMPORT_TRACK: "RCX: TDR page; R8: MBMD page and size; R10: stream index and command ->",
    H.TDH_IMPORT_STATE_IMMUTABLE: f"RCX: TDR page; {_STREAM} -> RCX: error information; RDX: error information",
    H.TDH_IMPORT_STATE_TD: f"RCX: TDR page; {_STREAM} -> RCX: error information; RDX: error information",
    H.TDH_IMPORT_STATE_VP: f"RCX: TDVPR page; {_STREAM} -> RCX: error information; RDX: error information",
    H.TDH_MIG_STREAM_CREATE: "RCX: new MIGSC page; RDX: TDR page ->",
}

GUEST_REGISTERS: Final[dict[G, str]] = {
    G.TDG_VP_VMCALL: "RCX: mask of GPRs (15:0) and XMMs (31:16) to pass; R10: 0 or vendor call number;"
    "R11: sub-function; R12-R15: arguments -> R10: the host's answer; R11-R15: results",
    G.TDG_VP_INFO: "-> RCX: GPA width; RDX: ATTRIBUTES; R8: number of vCPUs, maximum in 63:32; R9: vCPU index;"
    "R10: TDG.SYS.RD available",
    G.TDG_MR_RTMR_EXTEND: "RCX: GPA of 48 bytes, 64-aligned; RDX: RTMR index ->",
    G.TDG_VP_VEINFO_GET: "-> RCX: exit reason; RDX: exit qualification; R8: GLA; R9: GPA;"
    "R10: instruction length, information in 63:32",
    G.TDG_MR_REPORT: "RCX: GPA of TDREPORT_STRUCT; RDX: GPA of REPORTDATA; R8: report sub-type ->",
    G.TDG_VP_CPUIDVE_SET: "RCX: bit 0 user, bit 1 supervisor ->",
    G.TDG_MEM_PAGE_ACCEPT: "RCX: GPA and level ->",
    G.TDG_VM_RD: f"{_FIELD_IN.format('VM, 0')} -> {_NEXT_OUT}",
    G.TDG_VM_WR: f"{_FIELD_IN.format('VM, 0')}{_WRITE_IN} -> R8: old value",
    G.TDG_VP_RD: "RDX: field id -> R8: value",
    G.TDG_VP_WR: f"RDX: field id{_WRITE_IN} -> R8: old value",
    G.TDG_SYS_RD: "RDX: field id -> RDX: next field id; R8: value",
    G.TDG_SYS_RDALL: "RDX: GPA of the metadata list; R8: first field id -> R8: next field id",
    G.TDG_SERVTD_RD: f"{_FIELD_IN.format('binding handle')} -> R8: value; R10-R13: target TD UUID",
    G.TDG_SERVTD_WR: f"{_FIELD_IN.format('binding handle')}{_WRITE_IN} -> R8: old value; R10-R13: target TD UUID",
    G.TDG_MR_VERIFYREPORT: "RCX: GPA of REPORTMACSTRUCT ->",
    G.TDG_MEM_PAGE_ATTR_RD: "RCX: GPA -> RCX: GPA and level; RDX: attributes",
    G.TDG_MEM_PAGE_ATTR_WR: "RCX: GPA and level; RDX: attributes; R8: attribute flags"
    "-> RCX: GPA and level; RDX: attributes",
    G.TDG_VP_ENTER: "RCX: VM and flags; RDX: GPA of the L2 register list"
    "-> RCX: exit qualification; RDX: GLA; R8: GPA; R9: interruption information; R10: instruction information",
    G.TDG_VP_INVEPT: "RCX: mask of VMs ->",
    G.TDG_VP_INVVPID: "RCX: VM and flags; RDX: GLA list or entry -> RDX: next list entry",
}
