"""``septum boot``: the answer in its three forms, its exit status, and one-line complaints about misuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from septum.vmm.layout import FOUR_GIB
from septum.vmm.payload import make_image
from septum.vmm.sections import MR_EXTEND, PAGE_SIZE, Section, SectionType
from tests.cli.calling import Septum

MRTD = "2e39bcb30c2adb4ced6c0e79c97ab5144ae8950c4e10026a6f6a3aad7b36fbb3e30326cb0599ffa87261b55ed6a3a7ca"
QUICK = ("--memory", "64M", "--eager", "1M", "--platform", "small")


def test_the_built_in_payload(septum: Septum) -> None:
    answer = septum("boot", *QUICK, "--vcpus", "2", "--json")
    assert (answer.status, answer.err) == (0, "")
    record = answer.json
    assert record["mrtd"] == record["predicted_mrtd"] == MRTD
    assert (record["busy"], record["leaked_pages"], record["exit"], record["problems"]) == (0, 0, "power off", [])
    assert record["leaked_keyids"] == []
    assert record["seamcalls"] == sum(phase["seamcalls"] for phase in record["phases"])
    assert record["seamcalls"] == sum(n for by_status in record["by_leaf"].values() for n in by_status.values())
    assert record["by_leaf"]["TDH.MEM.PAGE.AUG"]["TDX_SUCCESS"] == record["accepts"]["4K"]
    assert len(record["vcpu"]) == 2
    assert len(record["rtmr"]) == 4
    assert MRTD in record["report"]


def test_the_three_forms_agree(septum: Septum) -> None:
    assert septum("boot", *QUICK, "--quiet").out == f"{MRTD}\n"
    words = septum("boot", *QUICK, "--vcpus", "4")
    assert words.status == 0
    assert MRTD in words.out
    assert "none leaked" in words.out
    assert words.out.endswith("exit: power off\n")
    assert words.out.isascii()
    assert max(map(len, words.out.splitlines())) <= 100


def test_real_firmware(septum: Septum, shared: Path) -> None:
    image = "deb13-2025.02-OVMF.fd.xz"
    known = json.loads((shared / "firmware/known-mrtd.json").read_text())
    expected = next(entry for entry in known if entry["file"] == image)
    record = septum("boot", shared / "firmware" / image, "--memory", "2G", "--vcpus", "4", "--json").json
    assert record["mrtd"] == expected["mrtd"]
    assert record["by_leaf"]["TDH.MR.EXTEND"] == {"TDX_SUCCESS": expected["mr_extends"]}
    assert (record["leaked_pages"], record["exit"]) == (0, "power off")


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    phases = [{k: v for k, v in phase.items() if k != "seconds"} for phase in record["phases"]]
    return {**record, "phases": phases, "seconds": 0}


def test_a_seed_chooses_a_schedule(septum: Septum) -> None:
    first, again, other = (
        septum("boot", *QUICK, "--script", "convert-storm", "--vcpus", "3", "--seed", seed, "--json").json
        for seed in ("1", "1", "2")
    )
    assert without_time(first) == without_time(again)
    assert first["mrtd"] == other["mrtd"] == MRTD
    assert first["leaked_pages"] == other["leaked_pages"] == 0
    assert first["seed"] == 1


def test_a_td_that_does_not_end_well_is_a_bad_answer(septum: Septum, tmp_path: Path) -> None:
    size = 4 * PAGE_SIZE
    sections = (
        Section(SectionType.BFV, 0, size, FOUR_GIB - size, size, MR_EXTEND),
        Section(SectionType.TD_HOB, memory_address=0, memory_data_size=2 * PAGE_SIZE),
    )
    image = tmp_path / "hungry.fd"
    image.write_bytes(make_image(sections, bytes(size)))
    answer = septum("boot", image, "--memory", "8K")
    assert answer.status == 1
    assert "KVM_EXIT_SHUTDOWN" in answer.out
    assert "not finished: vCPU 0" in answer.out
    record = septum("boot", image, "--memory", "8K", "--json")
    assert record.status == 1
    assert record.json["leaked_pages"] == 0
    assert record.json["problems"]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nothing.fd"], "nothing.fd: can't be read"),
        (["--guest", "machine"], "--guest machine: guests of real machine code are not there yet"),
        (["--guest", "penguin"], "--guest penguin: there is no such guest; give scripted"),
        (["--script", "doom"], "there is no script 'doom'; there are: boot, accept-all, lazy, convert-storm, idle"),
        (["--vcpus", "0"], "0 vCPUs on platform default, which has 16 CPUs: give 1 to 16"),
        (["--vcpus", "99999999999999999999"], "99999999999999999999 vCPUs on platform default"),
        (["--vcpus", "two"], "invalid value for '--vcpus'"),
        (["--memory", "lots"], "memory size 'lots': not a size"),
        (["--memory", "1M"], "is not inside the VM's memory"),
        (["--eager", "-1"], "memory size '-1': not a size"),
        (["--kernel", "v2.6.18"], "there is no kernel 'v2.6.18'"),
        (["--platform", "vax"], "no platform is named 'vax'"),
        (["--seed", "-1"], "invalid value for '--seed'"),
    ],
)
def test_misuse_is_one_line_that_says_what_to_mend(septum: Septum, args: list[str], complaint: str) -> None:
    assert complaint in septum("boot", *args).misuse()
