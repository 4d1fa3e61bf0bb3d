"""Structures that host, module and guest pass through memory.

Layouts are those of TDX Module 1.5.01, include/tdx_api_defs.h, and of the real TDREPORTs and quotes that exist. Whether
reserved fields must be zero, and what else is checked, is the business of the module's functions.
"""

import hashlib
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final, Self

from septum.arch.records import Record, array, nested, raw, u8, u16, u32, u64

SHA384_SIZE: Final = 48
MAX_CMRS: Final = 32
MAX_TDMRS: Final = 64
MAX_RESERVED_AREAS: Final = 16
"""Reserved areas in one TDMR."""
NUM_CPUID_CONFIG: Final = 12
"""Directly configurable CPUID leaves and sub-leaves of 1.5.01."""
NUM_RTMRS: Final = 4

TD_PARAMS_ALIGNMENT: Final = 1024
TDMR_INFO_POINTERS_ALIGNMENT: Final = 512
"""Alignment of the array of TDMR_INFO addresses for TDH.SYS.CONFIG; each TDMR_INFO itself needs the same."""


class TdAttributes(IntFlag):
    """TD ATTRIBUTES."""

    DEBUG = 1 << 0
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    PERFMON = 1 << 63


class ConfigFlags(IntFlag):
    """TD_PARAMS.CONFIG_FLAGS."""

    GPAW = 1 << 0
    """Guest physical addresses have 52 bits, the SHARED bit is 51; else 48 and 47."""
    FLEXIBLE_PENDING_VE = 1 << 1
    NO_RBP_MOD = 1 << 2


# Structures of the host ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CpuidValues(Record):
    """The four registers of a CPUID leaf."""

    eax: int = u32()
    ebx: int = u32()
    ecx: int = u32()
    edx: int = u32()


@dataclass(frozen=True, slots=True)
class CpuidConfig(Record):
    """CPUID_CONFIG: which bits of a CPUID leaf the host may configure. Sub-leaf 0xFFFFFFFF: the leaf has none."""

    leaf: int = u32()
    subleaf: int = u32()
    values: CpuidValues = nested(CpuidValues)  # noqa: RUF009 - a frozen record


@dataclass(frozen=True, slots=True)
class TdParams(Record):
    """TD_PARAMS, the input of TDH.MNG.INIT."""

    attributes: int = u64()
    xfam: int = u64()
    max_vcpus: int = u16()
    num_l2_vms: int = u8()
    msr_config_ctls: int = u8()
    """Bit 0: take IA32_ARCH_CAPABILITIES from ``ia32_arch_capabilities_config``; 7:1 reserved."""
    reserved_0: bytes = raw(4)
    eptp_controls: int = u64()
    """Memory type in 2:0, page-walk length less one in 5:3, all else reserved."""
    config_flags: int = u64()
    tsc_frequency: int = u16()
    """In units of 25 MHz."""
    reserved_1: bytes = raw(38)
    mr_config_id: bytes = raw(SHA384_SIZE)
    mr_owner: bytes = raw(SHA384_SIZE)
    mr_owner_config: bytes = raw(SHA384_SIZE)
    ia32_arch_capabilities_config: int = u64()
    reserved_2: bytes = raw(24)
    cpuid_config: tuple[CpuidValues, ...] = array(CpuidValues, NUM_CPUID_CONFIG)
    """In the order of TDSYSINFO_STRUCT.CPUID_CONFIG."""
    reserved_3: bytes = raw(768 - 16 * NUM_CPUID_CONFIG)


@dataclass(frozen=True, slots=True)
class CmrInfo(Record):
    """CMR_INFO: a convertible memory range. Size 0: no entry."""

    base: int = u64()
    size_bytes: int = u64()


@dataclass(frozen=True, slots=True)
class ReservedArea(Record):
    """A part of a TDMR that holds no private pages. Size 0: no entry."""

    offset: int = u64()
    """From the TDMR's base."""
    size_bytes: int = u64()


@dataclass(frozen=True, slots=True)
class TdmrInfo(Record):
    """TDMR_INFO: a TD memory region, its three PAMT areas and its reserved areas, as TDH.SYS.CONFIG takes them."""

    base: int = u64()
    size_bytes: int = u64()
    pamt_1g_base: int = u64()
    pamt_1g_size: int = u64()
    pamt_2m_base: int = u64()
    pamt_2m_size: int = u64()
    pamt_4k_base: int = u64()
    pamt_4k_size: int = u64()
    reserved_areas: tuple[ReservedArea, ...] = array(ReservedArea, MAX_RESERVED_AREAS)


@dataclass(frozen=True, slots=True)
class TdSysInfo(Record):
    """TDSYSINFO_STRUCT, the output of TDH.SYS.INFO."""

    attributes: int = u32()
    vendor_id: int = u32(0x8086)
    build_date: int = u32()
    """As a binary coded decimal: 0x20240129."""
    build_num: int = u16()
    minor_version: int = u16()
    major_version: int = u16()
    sys_rd: int = u8()
    """1: TDH.SYS.RD and TDH.SYS.RDALL tell more than this structure."""
    reserved_0: bytes = raw(13)
    max_tdmrs: int = u16()
    max_reserved_per_tdmr: int = u16()
    pamt_entry_size: int = u16()
    reserved_1: bytes = raw(10)
    tdcs_base_size: int = u16()
    reserved_2: bytes = raw(2)
    tdvps_base_size: int = u16()
    tdvps_xfam_dependent_size: int = u8()
    reserved_3: bytes = raw(9)
    attributes_fixed0: int = u64()
    """Bits that may be 1 in ATTRIBUTES."""
    attributes_fixed1: int = u64()
    """Bits that must be 1 in ATTRIBUTES."""
    xfam_fixed0: int = u64()
    xfam_fixed1: int = u64()
    reserved_4: bytes = raw(32)
    num_cpuid_config: int = u32()
    cpuid_config: tuple[CpuidConfig, ...] = array(CpuidConfig, NUM_CPUID_CONFIG)
    reserved_5: bytes = raw(892 - 24 * NUM_CPUID_CONFIG)


def pack_cmrs(cmrs: tuple[CmrInfo, ...]) -> bytes:
    """The table of all 32 CMR_INFO entries that TDH.SYS.INFO writes, unused ones zero."""
    return b"".join(cmr.pack() for cmr in cmrs).ljust(MAX_CMRS * CmrInfo.size(), b"\0")


# Structures of attestation ------------------------------------------------------------------------------------------

TEE_TYPE_TDX: Final = 0x81
TEE_TCB_INFO_HASHED: Final = 239
"""Bytes of TEE_TCB_INFO that ``tee_tcb_info_hash`` covers: what follows is reserved in TDREPORT_STRUCT."""


@dataclass(frozen=True, slots=True)
class ReportMac(Record):
    """REPORTMACSTRUCT, the part of a report that the CPU authenticates."""

    report_type: int = u8(TEE_TYPE_TDX)
    report_subtype: int = u8()
    report_version: int = u8()
    """1 when service TDs are bound, so that ``servtd_hash`` counts."""
    reserved_type: bytes = raw(1)
    reserved_0: bytes = raw(12)
    cpusvn: bytes = raw(16)
    tee_tcb_info_hash: bytes = raw(SHA384_SIZE)
    tee_info_hash: bytes = raw(SHA384_SIZE)
    report_data: bytes = raw(64)
    reserved_1: bytes = raw(32)
    mac: bytes = raw(32)


@dataclass(frozen=True, slots=True)
class TeeTcbInfo(Record):
    """TEE_TCB_INFO: identity and version of the TDX Module."""

    valid: int = u64()
    """Bit n: the field at byte offset 8 n counts."""
    tee_tcb_svn: bytes = raw(16)
    mr_seam: bytes = raw(SHA384_SIZE)
    mr_signer_seam: bytes = raw(SHA384_SIZE)
    attributes: int = u64()
    tee_tcb_svn_2: bytes = raw(16)
    """Reserved in 1.5.01; a second SVN in reports of machines that can update the module at run time."""
    reserved: bytes = raw(112)


@dataclass(frozen=True, slots=True)
class TdInfo(Record):
    """TDINFO_STRUCT: identity of the TD."""

    attributes: int = u64()
    xfam: int = u64()
    mr_td: bytes = raw(SHA384_SIZE)
    mr_config_id: bytes = raw(SHA384_SIZE)
    mr_owner: bytes = raw(SHA384_SIZE)
    mr_owner_config: bytes = raw(SHA384_SIZE)
    rtmr_0: bytes = raw(SHA384_SIZE)
    rtmr_1: bytes = raw(SHA384_SIZE)
    rtmr_2: bytes = raw(SHA384_SIZE)
    rtmr_3: bytes = raw(SHA384_SIZE)
    servtd_hash: bytes = raw(SHA384_SIZE)
    reserved: bytes = raw(64)

    @property
    def rtmrs(self) -> tuple[bytes, ...]:
        """The four run-time measurement registers."""
        return (self.rtmr_0, self.rtmr_1, self.rtmr_2, self.rtmr_3)


@dataclass(frozen=True, slots=True)
class TdReport(Record):
    """TDREPORT_STRUCT, the output of TDG.MR.REPORT."""

    mac: ReportMac = nested(ReportMac)  # noqa: RUF009 - a frozen record
    tcb_info: TeeTcbInfo = nested(TeeTcbInfo)  # noqa: RUF009 - a frozen record
    td_info: TdInfo = nested(TdInfo)  # noqa: RUF009 - a frozen record

    @classmethod
    def build(cls, mac: ReportMac, tcb_info: TeeTcbInfo, td_info: TdInfo) -> Self:
        """A report whose MAC structure holds the hashes of the other two parts; the MAC itself stays as given."""
        tcb_hash, info_hash = report_hashes(tcb_info, td_info)
        return cls(replace(mac, tee_tcb_info_hash=tcb_hash, tee_info_hash=info_hash), tcb_info, td_info)

    def hashes_match(self) -> bool:
        """Whether both hashes in the MAC structure are those of the other two parts."""
        return (self.mac.tee_tcb_info_hash, self.mac.tee_info_hash) == report_hashes(self.tcb_info, self.td_info)


def report_hashes(tcb_info: TeeTcbInfo, td_info: TdInfo) -> tuple[bytes, bytes]:
    """``tee_tcb_info_hash`` and ``tee_info_hash``, both SHA-384."""
    return hashlib.sha384(tcb_info.pack()[:TEE_TCB_INFO_HASHED]).digest(), hashlib.sha384(td_info.pack()).digest()
