"""Records in memory: sizes, offsets, round trips, and a TDREPORT from a real machine."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch import structures
from septum.arch.errors import UsageError
from septum.arch.records import Record
from septum.arch.structures import (
    CmrInfo,
    CpuidConfig,
    CpuidValues,
    ReportMac,
    ReservedArea,
    TdInfo,
    TdmrInfo,
    TdParams,
    TdReport,
    TdSysInfo,
    TeeTcbInfo,
)


@pytest.mark.parametrize(
    ("record", "size"),
    [
        (TdParams, 1024),
        (TdSysInfo, 1024),
        (TdReport, 1024),
        (TdmrInfo, 320),
        (CmrInfo, 16),
        (CpuidConfig, 24),
        (ReportMac, 256),
        (TeeTcbInfo, 256),
        (TdInfo, 512),
    ],
)
def test_sizes(record: type[Record], size: int) -> None:
    assert record.size() == size
    assert len(record().pack()) == size


@pytest.mark.parametrize(
    ("record", "offsets"),
    [
        (
            TdParams,
            {
                "attributes": 0,
                "xfam": 8,
                "max_vcpus": 16,
                "num_l2_vms": 18,
                "eptp_controls": 24,
                "config_flags": 32,
                "tsc_frequency": 40,
                "mr_config_id": 80,
                "mr_owner": 128,
                "mr_owner_config": 176,
                "ia32_arch_capabilities_config": 224,
                "cpuid_config": 256,
            },
        ),
        (
            TdSysInfo,
            {
                "max_tdmrs": 32,
                "tdcs_base_size": 48,
                "tdvps_base_size": 52,
                "attributes_fixed0": 64,
                "xfam_fixed1": 88,
                "num_cpuid_config": 128,
                "cpuid_config": 132,
            },
        ),
        (ReportMac, {"cpusvn": 16, "tee_tcb_info_hash": 32, "tee_info_hash": 80, "report_data": 128, "mac": 224}),
        (TdInfo, {"mr_td": 16, "mr_config_id": 64, "rtmr_0": 208, "rtmr_3": 352, "servtd_hash": 400}),
        (TdmrInfo, {"pamt_1g_base": 16, "pamt_4k_size": 56, "reserved_areas": 64}),
        (TdReport, {"tcb_info": 256, "td_info": 512}),
    ],
)
def test_offsets(record: type[Record], offsets: dict[str, int]) -> None:
    assert {name: record.offset_of(name) for name in offsets} == offsets


@given(st.binary(min_size=1024, max_size=1024), st.sampled_from([TdParams, TdSysInfo, TdReport]))
def test_unpack_then_pack_gives_the_same_bytes(data: bytes, record: type[Record]) -> None:
    assert record.unpack(data).pack() == data


def test_arrays_and_nested_records_keep_their_order() -> None:
    params = TdParams(cpuid_config=tuple(CpuidValues(eax=i) for i in range(12)))
    assert params.pack()[256 + 16 * 3] == 3
    config = CpuidConfig(leaf=7, subleaf=1, values=CpuidValues(edx=0x99))
    assert config.pack()[20] == 0x99
    info = TdmrInfo(base=1 << 30, reserved_areas=(ReservedArea(0x1000, 0x2000),) + (ReservedArea(),) * 15)
    assert TdmrInfo.unpack(info.pack()).reserved_areas[0].size_bytes == 0x2000


def test_reserved_fields() -> None:
    assert TdParams(attributes=1).reserved_clear()
    assert not TdParams(reserved_1=bytes(37) + b"\1").reserved_clear()
    assert TdmrInfo(reserved_areas=(ReservedArea(0, 0x1000),) * 16).reserved_clear()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TdParams(max_vcpus=1 << 16), "TdParams.max_vcpus = 65536 does not fit in 2 bytes"),
        (TdParams(mr_owner=b"short"), "TdParams.mr_owner must have 48 bytes, not 5"),
        (TdParams(cpuid_config=()), "TdParams.cpuid_config must have 12 entries, not 0"),
    ],
)
def test_values_that_do_not_fit_are_misuse(record: Record, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        record.pack()


def test_short_data_is_misuse() -> None:
    with pytest.raises(UsageError, match="TdReport needs 1024 bytes at offset 8, only 1016"):
        TdReport.unpack(bytes(1024), 8)


def test_cmr_table_is_always_512_bytes() -> None:
    table = structures.pack_cmrs((CmrInfo(0x40000000, 0xC0000000), CmrInfo(0x140000000, 0x80000000)))
    assert len(table) == 512
    assert CmrInfo.unpack(table, 16).base == 0x140000000
    assert not any(table[32:])


def test_report_hashes_cover_the_other_parts() -> None:
    report = TdReport.build(ReportMac(), TeeTcbInfo(mr_seam=bytes([7] * 48)), TdInfo(mr_td=bytes([9] * 48)))
    assert report.hashes_match()
    data = bytearray(report.pack())
    assert TdReport.unpack(bytes(data)).hashes_match()
    data[512 + 16] ^= 1
    assert not TdReport.unpack(bytes(data)).hashes_match()


def test_tdreport_of_a_real_machine(shared: Path) -> None:
    path = shared / "quotes" / "tdreport-intel-dcap.dat"
    if not path.exists():
        pytest.skip(f"{path.name} is not among the recorded data")
    report = TdReport.unpack(path.read_bytes())
    assert report.mac.report_type == structures.TEE_TYPE_TDX
    assert report.hashes_match()
    assert report.reserved_clear()
    assert report.mac.reserved_clear()
    assert report.td_info.reserved_clear()
    assert report.pack() == path.read_bytes()[: TdReport.size()]
