"""Logs of real hosts: what each kernel prints is understood, storms are found, damaged logs give one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.lab.ingest.faults import SUSPECTS, Faults
from septum.lab.ingest.formats import recognise
from septum.lab.ingest.lines import take_apart
from septum.lab.ingest.report import Log, ingest

BUSY = 0x8000_0200_0000_0092


def read(folder: Path, *lines: str, name: str = "host.log") -> Log:
    """A log of these lines."""
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines))
    return ingest([path])


def kinds(log: Log) -> list[str]:
    """What was found, in order."""
    return [found["kind"] for found in log.findings]


# -- the recorded logs -------------------------------------------------------------------------------------------------

HOST = ("keyids", "pamt_kb", "pamt_pages", "features0", "module", "build", "build_date", "errno", "error", "warnings")
"""Facts that the index of the recorded logs and a report name alike."""


def test_the_logs_of_real_hosts(shared: Path) -> None:
    index = json.loads((shared / "traces" / "index.json").read_text())
    assert len(index) > 20
    for entry in index:
        log = ingest([shared / "traces" / entry["file"]])
        expected: dict[str, Any] = entry["expected"]
        host = log.host
        for fact in HOST:
            if fact in expected and fact != "error":
                assert host[fact] == expected[fact], (entry["file"], fact)
        if "version" in expected:
            assert host["module"] == expected["version"]
        if "error" in expected:
            assert str(host["error"]).endswith("reserved areas exhausted")
        if "status" in expected:
            (error, *_) = log.errors
            assert int(error["status"], 16) == int(expected["status"], 16)
            assert error["leaf"] == expected.get("leaf", error["leaf"])
            assert error["leaf_name"] == expected.get("leaf_name", error["leaf_name"])
            assert error["name"] == expected.get("name", error["name"])
        if "rdx_field" in expected:
            assert expected["rdx_field"].endswith(log.errors[0]["field"])


def test_a_poisoned_page_is_traced_to_the_guest(shared: Path) -> None:
    log = ingest([shared / "traces" / "td-fatal_5.10.60-tdx_mce.log"])
    assert (log.host["hkid"], log.host["hkid_shift"]) == (65, 45)
    assert log.host["poisoned"] == {"hpa": "0x80a5669000", "gfn": hex(70939)}
    assert {"td-fatal", "poison", "internal-error"} <= set(kinds(log))


# -- formats -----------------------------------------------------------------------------------------------------------

SEAMCALLS = {
    "SEAMCALL TDH_MEM_PAGE_AUG failed: 0x8000020000000092, rcx 0x0, rdx 0x0": ("TDH.MEM.PAGE.AUG", BUSY, 1),
    "SEAMCALL TDH_MEM_RANGE_BLOCK failed: 0x8000020000000092, entry 0x1, level_state 0x0": (
        "TDH.MEM.RANGE.BLOCK",
        BUSY,
        1,
    ),
    "virt/tdx: SEAMCALL (0x0000000000000006) failed: 0x8000020000000092 RCX 0x0": ("TDH.MEM.PAGE.AUG", BUSY, 1),
    "tdx: SEAMCALL failed: CPU 94: leaf 6, error 0x8000020000000092.": ("TDH.MEM.PAGE.AUG", BUSY, 1),
    "tdx: SEAMCALL failed: leaf 254, error 0x8000020000000092.": ("leaf 254", BUSY, 1),
    "SEAMCALL[TDH_MEM_RD(12)] failed: Unknown SEAMCALL status code(0x8000020000000092)": ("TDH.MEM.RD", BUSY, 1),
    "@busy[tdh_mem_page_aug, 0x8000020000000092]: 12": ("TDH.MEM.PAGE.AUG", BUSY, 12),
    "@[tdh_mem_page_aug, 9223374235878031506]: 3": ("TDH.MEM.PAGE.AUG", BUSY, 3),
    "@[tdh_mem_page_aug, -9223369837831520110]: 3": ("TDH.MEM.PAGE.AUG", BUSY, 3),
    "@busy[tdh_mem_track, 2147484160, 169]: 7": ("TDH.MEM.TRACK", 0x8000_0200_0000_00A9, 7),
    "qemu-1 [003] d..1 5.5: kvm_tdx_seamcall_exit: cpu: 3 op: TDH_MEM_PAGE_AUG err TDX_OPERAND_BUSY "
    "0x8000020000000092 rcx: 0x0": ("TDH.MEM.PAGE.AUG", BUSY, 1),
}


@pytest.mark.parametrize("prefix", ["", "[   12.345678] ", "<4>[    1.0] ", "Nov  3 10:00:01 host kernel: [  7.1] "])
@pytest.mark.parametrize("text", SEAMCALLS)
def test_a_seamcall_that_failed(tmp_path: Path, prefix: str, text: str) -> None:
    if text.startswith("qemu") and prefix:
        pytest.skip("a line of ftrace has a prefix of its own")
    leaf, code, times = SEAMCALLS[text]
    log = read(tmp_path, prefix + text)
    assert log.by_leaf == {leaf: times}
    assert log.by_pair == {(leaf, code): times}
    assert log.events == 1


def test_registers_in_the_next_lines_belong_to_the_call(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        "virt/tdx: SEAMCALL (0x22) failed: 0xc000050500000000",
        "virt/tdx: RCX 0x0000000000000000 RDX 0x9100000100000008 R08 0x0000000000000001",
        "virt/tdx: R09 0x0000000000000002 R10 0xxxxxxxxx R11 0x3",
    )
    (error,) = log.errors
    assert error["registers"] == {
        "rcx": "0x0000000000000000", "rdx": "0x9100000100000008", "r8": "0x0000000000000001",
        "r9": "0x0000000000000002", "r11": "0x3",
    }  # fmt: skip
    assert error["field"] == "MAX_TDMRS"


def test_the_task_of_a_tracepoint_may_have_any_name() -> None:
    line = take_apart(1, "  my vm-1-13694-13714   [065] ....   807.856265: kvm_mmu_set_spte: gfn 1 spte 2")
    assert (line.pid, line.cpu, line.seconds, line.event) == (13714, 65, 807.856265, "kvm_mmu_set_spte")


def test_lines_of_no_interest() -> None:
    assert recognise("usb 1-1: new high-speed USB device") is None
    assert recognise(" => trace_event_raw_event_kvm_mmu_page_class") is None


# -- what is suspicious ------------------------------------------------------------------------------------------------


def fault(vcpu: int, gpa: int, rip: int = 0, at: float = 1.0) -> str:
    return (
        f"CPU {vcpu}/KVM-{100 + vcpu}  [00{vcpu}] .....  {at:.6f}: kvm_page_fault: "
        f"vcpu {vcpu} rip 0x{rip:x} address 0x{gpa:016x} error_code 0x2"
    )


def trace(vcpu: int, text: str) -> str:
    return f"CPU {vcpu}/KVM-{100 + vcpu}  [00{vcpu}] .....  2.0: {text}"


@pytest.mark.parametrize("count", [SUSPECTS - 1, SUSPECTS, 100])
def test_one_vcpu_that_faults_on_and_on(tmp_path: Path, count: int) -> None:
    lines = [fault(0, 0x5000 + i % 3) for i in range(count)]
    log = read(tmp_path, fault(0, 0x1000), *lines, fault(0, 0x9000))
    storms = [found for found in log.findings if found["kind"] == "fault-storm"]
    assert [(s["vcpu"], s["value"], s["count"]) for s in storms] == (
        [("vCPU 0", "0x5000", count)] if count >= SUSPECTS else []
    )
    assert not storms or storms[0]["where"].endswith(":2")


def test_another_exit_ends_a_storm(tmp_path: Path) -> None:
    some = [fault(0, 0x5000)] * (SUSPECTS - 1)
    log = read(tmp_path, *some, trace(0, "kvm_exit: vcpu 0 reason TDCALL rip 0x0 info1 0x0"), *some)
    assert kinds(log) == []
    log = read(tmp_path, *some, trace(0, "kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x0 info1 0x0"), *some)
    assert kinds(log) == ["fault-storm"]


def test_vcpus_do_not_mix(tmp_path: Path) -> None:
    mixed = [fault(i % 2, 0x5000 if i % 2 else 0x7000) for i in range(2 * SUSPECTS)]
    log = read(tmp_path, *mixed)
    assert sorted(found["value"] for found in log.findings) == ["0x5000", "0x7000"]
    same = [fault(i % 2, 0x5000) for i in range(2 * SUSPECTS)]
    assert kinds(read(tmp_path, *same)) == ["fault-storm", "fault-storm", "shared-storm"]


def test_one_rip_with_many_addresses(tmp_path: Path) -> None:
    log = read(tmp_path, *(fault(0, 0x1000 * i, rip=0xFFFF_8000) for i in range(1, 20)))
    assert [(found["at"], found["count"]) for found in log.findings] == [("RIP", 19)]


def test_old_kernels_name_no_vcpu(tmp_path: Path) -> None:
    old = "VCPU-0-61883   [078] ..... 72276.115679: kvm_page_fault: address 84d000 error_code 4"
    assert kinds(read(tmp_path, *[old] * SUSPECTS)) == ["fault-storm"]


def test_local_retries_are_requests_without_a_fault(tmp_path: Path) -> None:
    request = trace(0, "kvm_mmu_spte_requested: gfn 5 pfn 77 level 1")
    log = read(tmp_path, fault(0, 0x5000), *[request] * 10, trace(0, "kvm_entry: vcpu 0, rip 0x0"))
    assert log.faults["retries"] == 9
    assert kinds(log) == ["local-retries"]


def test_zaps_and_entries_that_failed(tmp_path: Path) -> None:
    log = read(
        tmp_path,
        trace(0, "kvm_tdp_mmu_spte_changed: as id 0 gfn 800 level 1 old_spte 1003eb27e67 new_spte 80000000000005a0"),
        trace(0, "kvm_exit: vcpu 0 reason UNKNOWN rip 0x0"),
        trace(0, "kvm_vm_set_mem_attributes: 0x0000000000000000 -- 0x0000000000200000 [0x8]"),
    )
    assert (log.faults["zaps"], log.faults["entry_errors"], log.faults["conversions"]) == (1, 1, 1)
    assert kinds(log) == ["entry-errors"]


def test_who_could_have_held_a_busy_lock(tmp_path: Path) -> None:
    text = read(tmp_path, *["SEAMCALL TDH_MEM_PAGE_AUG failed: 0x8000020000000092"] * 5).findings[0]["text"]
    assert text.startswith("TDH.MEM.PAGE.AUG was busy 5 times with TDX_OPERAND_BUSY(SEPT_TREE)")
    assert "RANGE.BLOCK" in text
    never = read(tmp_path, "SEAMCALL TDH_MEM_PAGE_AUG failed: 0x80000200000000a9").findings[0]["text"]
    assert "no pair of calls in the model gives that" in never


def test_an_error_that_comes_again_and_again(tmp_path: Path) -> None:
    line = "SEAMCALL (0x000000000000001c) failed: 0xc000030000000001 RCX 0x0"
    assert kinds(read(tmp_path, line)) == ["error"]
    assert kinds(read(tmp_path, *[line] * 3)) == ["error-storm"]


def test_several_files_are_one_report(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("tdx: module initialized.\n")
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(b"SEAMCALL TDH_VP_INIT failed: 0x8000020000000080\n"))
    log = ingest([tmp_path / "a.log", tmp_path / "b.log.gz"])
    assert (log.events, log.by_leaf, log.host) == (2, {"TDH.VP.INIT": 1}, {"initialized": True})


# -- what is no log ----------------------------------------------------------------------------------------------------


def test_what_is_no_log_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no line of it is one that a TDX host writes"):
        read(tmp_path, "hello", "world")
    with pytest.raises(UsageError, match="there is no such file"):
        ingest([tmp_path / "absent"])
    with pytest.raises(UsageError, match="this is a folder"):
        ingest([tmp_path])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"SEAMCALL TDH_VP_INIT failed: 0x8000020000000080\n" * 99)[:-9])
    with pytest.raises(UsageError, match=r"line \d+: cannot be read, the file may have been cut off"):
        ingest([tmp_path / "cut.gz"])


PIECES = st.sampled_from(
    [*SEAMCALLS, fault(0, 0x1000), trace(0, "kvm_exit: reason"), "TDX module: atributes 0x", "@[", "\0"]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=60), st.binary(max_size=60)), max_size=12), st.integers(0, 400))
def test_damaged_logs_never_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Any], cut: int
) -> None:
    raw = b"\n".join(part if isinstance(part, bytes) else part.encode(errors="replace") for part in parts)
    path = tmp_path_factory.mktemp("fuzz") / "x.log"
    path.write_bytes(raw[: len(raw) - cut % (len(raw) + 1)])
    try:
        log = ingest([path])
    except UsageError:
        return
    assert 0 < log.events <= log.lines
    json.dumps(log.record())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=60))
def test_storms_are_runs_of_each_vcpu(steps: list[tuple[int, int]]) -> None:
    """Against a direct count of runs."""
    faults = Faults()
    for number, (vcpu, page) in enumerate(steps, 1):
        assert faults.see(take_apart(number, fault(vcpu, page << 12)))
    faults.close()
    expected = []
    for vcpu in range(3):
        pages = [page for who, page in steps if who == vcpu]
        starts = [i for i in range(len(pages)) if i == 0 or pages[i] != pages[i - 1]]
        ends = [*starts, len(pages)][1:]
        runs = [(pages[start], end - start) for start, end in zip(starts, ends, strict=True)]
        expected += [(f"vCPU {vcpu}", page << 12, count) for page, count in runs if count >= SUSPECTS]
    assert sorted((who, run.value, run.count) for who, what, run in faults.storms) == sorted(expected)
