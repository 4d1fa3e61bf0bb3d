"""The whole life of a TD: what is measured, what the guest sees, and what is left when it ends."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.arch.leaves import HostLeaf
from septum.arch.pages import PAGE_2M, PAGE_4K
from septum.arch.platform import profile
from septum.arch.status import Status
from septum.arch.structures import TdAttributes
from septum.arch.tdmr import MemoryRange
from septum.core.run import at_random, round_robin
from septum.guest.scripts import SCRIPTS, Job
from septum.guest.vcpu import HostRefused, Vcpu
from septum.kvm.seamcall import Injection
from septum.tdx.measurement import extend_rtmr
from septum.vmm.boot import BootResult, boot, builtin_image
from septum.vmm.hob import build_td_hob, hob_digest
from septum.vmm.layout import FOUR_GIB
from septum.vmm.measure import measure_image
from septum.vmm.payload import make_image
from septum.vmm.sections import MR_EXTEND, PAGE_AUG, PAGE_SIZE, Section, SectionType
from septum.vmm.tdvf import TdvfImage, load_image, parse_image

BUILTIN_MRTD = "2e39bcb30c2adb4ced6c0e79c97ab5144ae8950c4e10026a6f6a3aad7b36fbb3e30326cb0599ffa87261b55ed6a3a7ca"
SMALL = Job(eager=2 << 20, touches=3, converted=2 * PAGE_4K, rounds=2)
MEMORY = 64 << 20


def small_boot(vcpus: int = 2, guest: str = "boot", **options: object) -> BootResult:
    return boot(memory=MEMORY, vcpus=vcpus, guest=guest, platform="small", job=SMALL, **options)  # type: ignore[arg-type]


def check(result: BootResult) -> None:
    assert result.problems == []
    assert result.exit == "power off"
    assert result.mrtd.hex() == BUILTIN_MRTD
    assert result.leaked_pages == 0
    assert result.leaked_keyids == []


def calls(result: BootResult, leaf: HostLeaf) -> int:
    return sum(result.counts.get(leaf.abi_name, {}).values())


# -- measurement -------------------------------------------------------------------------------------------------------


def test_module_guest_and_image_agree_on_mrtd() -> None:
    result = boot(vcpus=2)
    check(result)
    assert result.report is not None
    assert result.report.hashes_match()
    assert result.report.td_info.mr_td == result.mrtd == measure_image(builtin_image()) == result.predicted_mrtd
    assert result.report.td_info.attributes == result.attributes == 0


def test_rtmrs_show_the_hob_and_what_the_script_extended() -> None:
    result = small_boot()
    hob = build_td_hob(builtin_image().sections, MEMORY)
    script = hashlib.sha384(b"septum").digest()
    assert result.rtmrs == (
        extend_rtmr(bytes(48), hob_digest(hob)),
        bytes(48),
        bytes(48),
        extend_rtmr(bytes(48), script),
    )


@pytest.mark.parametrize("name", ["deb12-2022.11-OVMF.fd.xz", "deb13-2025.02-OVMF.fd.xz"])
def test_real_firmware_has_the_known_mrtd(shared: Path, name: str) -> None:
    known = json.loads((shared / "firmware" / "known-mrtd.json").read_text())
    (entry,) = [entry for entry in known if entry["file"] == name]
    result = boot(load_image(shared / "firmware" / name), 1 << 30, 2, job=SMALL)
    assert result.problems == []
    assert result.mrtd.hex() == entry["mrtd"]
    assert calls(result, HostLeaf.TDH_MEM_PAGE_ADD) == entry["page_adds"]
    assert calls(result, HostLeaf.TDH_MR_EXTEND) == entry["mr_extends"]
    assert result.leaked_pages == 0


def test_memory_size_does_not_change_mrtd_but_rtmr0() -> None:
    small, large = small_boot(), boot(memory="64G", vcpus=1, job=SMALL)
    assert small.mrtd == large.mrtd
    assert small.rtmrs[0] != large.rtmrs[0]


def test_pages_beyond_the_split_of_ram_are_used_too() -> None:
    result = boot(memory="4G", job=Job(eager=0, touches=64, converted=0))
    assert result.problems == []
    assert result.done[0] is not None
    assert result.done[0].accepted_on_ve >= 64


# -- what the guest does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_every_page_that_was_added_dynamically_was_accepted(vcpus: int) -> None:
    result = small_boot(vcpus)
    check(result)
    assert calls(result, HostLeaf.TDH_MEM_PAGE_AUG) == result.accepted_4k
    assert result.accepted_2m == 0
    assert [done is not None and done.converted for done in result.done] == [2 * PAGE_4K] * vcpus


def test_accept_all_takes_every_page_of_memory() -> None:
    result = boot(memory=10 << 20, vcpus=2, guest="accept-all", platform="small")
    check(result)
    added = sum(s.memory_data_size for s in builtin_image().sections if s.type is not SectionType.BFV)
    assert result.accepted_4k == ((10 << 20) - added) // PAGE_4K


def test_a_td_without_virtualization_exceptions_accepts_first() -> None:
    result = small_boot(attributes=TdAttributes.SEPT_VE_DISABLE)
    check(result)
    assert result.attributes == TdAttributes.SEPT_VE_DISABLE
    assert [done is not None and done.accepted_on_ve for done in result.done] == [0, 0]


def test_memory_that_is_used_as_shared_is_converted_by_the_vmm() -> None:
    async def script(vcpu: Vcpu) -> None:
        gpa = 0x100_0000
        await vcpu.write(gpa, b"private")
        await vcpu.write(gpa | vcpu.shared_bit, b"shared")  # without asking: KVM_EXIT_MEMORY_FAULT
        assert await vcpu.read(gpa | vcpu.shared_bit, 7) == b"shared\0"
        await vcpu.map_gpa(gpa, PAGE_4K, shared=False)
        await vcpu.accept(gpa, gpa + PAGE_4K)
        await vcpu.publish((await vcpu.read(gpa, 7), await vcpu.get_td_vm_call_info()) and True)
        await vcpu.io_write(0x604, 0x2000, 2)

    result = boot(guest=script)
    check(result)
    assert calls(result, HostLeaf.TDH_MEM_PAGE_REMOVE) > 1


def test_neither_side_finds_again_what_it_had_before_a_conversion() -> None:
    async def script(vcpu: Vcpu) -> None:
        gpa, shared = 0x100_0000, 0x100_0000 | vcpu.shared_bit
        await vcpu.write(gpa, b"private")
        await vcpu.map_gpa(gpa, PAGE_4K, shared=True)
        assert await vcpu.read(shared, 7) == bytes(7)
        await vcpu.write(shared, b"shared")
        await vcpu.map_gpa(gpa, PAGE_4K, shared=False)
        assert await vcpu.read(gpa, 7) == bytes(7)
        await vcpu.map_gpa(gpa, PAGE_4K, shared=True)
        assert await vcpu.read(shared, 7) == bytes(7)
        await vcpu.publish(True)
        await vcpu.io_write(0x604, 0x2000, 2)

    check(boot(guest=script))


def test_a_large_conversion_goes_in_parts() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.map_gpa(0x100_0000, 5 * PAGE_2M, shared=True)
        for gpa in range(0x100_0000, 0x100_0000 + 5 * PAGE_2M, PAGE_2M):
            await vcpu.write(gpa | vcpu.shared_bit, b"x")
        await vcpu.publish(True)
        await vcpu.io_write(0x604, 0x2000, 2)

    check(boot(guest=script))


def test_a_conversion_outside_of_memory_is_refused() -> None:
    async def script(vcpu: Vcpu) -> None:
        try:
            await vcpu.map_gpa(1 << 40, PAGE_4K, shared=True)
        except HostRefused as refused:
            await vcpu.publish(refused.status == 1 << 63)
        assert await vcpu.io_read(0x70, 2) == 0xFFFF
        await vcpu.io_write(0x604, 0x2000, 2)

    check(boot(guest=script))


# -- how it can end ----------------------------------------------------------------------------------------------------


def test_a_guest_that_gives_up_ends_the_vm() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.report_fatal_error(1, "no way")
        await vcpu.publish(True)

    result = boot(guest=script)
    assert "KVM_EXIT_SYSTEM_EVENT" in result.exit
    assert [problem for problem in result.problems if problem.startswith("the VM ended with: vCPU 0")]
    assert result.leaked_pages == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_vcpu_that_computes_for_ever_is_made_to_leave(seed: int) -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.publish(True)
        if vcpu.index:
            await vcpu.idle()
        await vcpu.io_write(0x604, 0x2000, 2)

    result = boot(memory=MEMORY, vcpus=3, guest=script, platform="small", choose=at_random(seed))
    assert [problem for problem in result.problems if not problem.startswith("not finished")] == []
    assert result.exit == "power off"
    assert result.leaked_pages == 0


def test_a_triple_fault_ends_the_vm() -> None:
    async def script(vcpu: Vcpu) -> None:
        await vcpu.touch(1 << 49)

    result = boot(guest=script, vcpus=2)
    assert "KVM_EXIT_MEMORY_FAULT" in result.exit or "memory fault" in result.exit
    assert result.leaked_pages == 0


def test_a_host_without_memory_ends_the_vm() -> None:
    small = profile("small")
    (tdmr,) = small.tdmrs
    low, high = tdmr.reserved
    middle = MemoryRange(20 << 20, high.base - (20 << 20))
    little = replace(small, tdmrs=(replace(tdmr, reserved=(low, middle, high)),))
    assert little.private_memory == 19 << 20

    async def script(vcpu: Vcpu) -> None:
        await vcpu.accept(0x100_0000, 0x1000_0000)

    result = boot(memory="1G", guest=script, platform=little)
    assert result.exit == "KVM_RUN returned -ENOMEM"
    assert result.leaked_pages == 0


@pytest.mark.parametrize(
    ("leaf", "call"),
    [
        (HostLeaf.TDH_MNG_CREATE, "KVM_TDX_INIT_VM returned -EIO"),
        (HostLeaf.TDH_MNG_INIT, "KVM_TDX_INIT_VM returned -EIO"),
        (HostLeaf.TDH_VP_CREATE, "KVM_TDX_INIT_VCPU returned -EIO"),
        (HostLeaf.TDH_MEM_PAGE_ADD, "KVM_TDX_INIT_MEM_REGION returned -EBUSY"),
        (HostLeaf.TDH_MR_FINALIZE, "KVM_TDX_FINALIZE_VM returned -EBUSY"),
    ],
)
def test_a_td_that_cannot_be_built_leaves_nothing_behind(leaf: HostLeaf, call: str) -> None:
    result = boot(injections=[Injection(leaf, 1, Status.TDX_OPERAND_BUSY)])
    assert result.exit == call
    assert f"the VM ended with: {call}" in result.problems
    assert result.busy == 1
    assert result.leaked_keyids == []
    assert result.leaked_pages == 0


def test_what_leaks_is_counted_and_said() -> None:
    result = small_boot(injections=[Injection(HostLeaf.TDH_PHYMEM_PAGE_RECLAIM, 5, Status.TDX_OPERAND_BUSY)])
    assert result.leaked_pages > 0
    assert sum(result.leaks.values()) == result.leaked_pages
    assert any("pages leaked" in problem for problem in result.problems)
    assert result.busy == 1


def test_a_firmware_without_hob_works_with_the_memory_that_the_layout_has() -> None:
    size = 4 * PAGE_SIZE
    sections = (
        Section(SectionType.BFV, 0, size, FOUR_GIB - size, size, MR_EXTEND),
        Section(SectionType.PermMem, memory_address=0, memory_data_size=0x10_0000, attributes=PAGE_AUG),
        Section(SectionType.TempMem, memory_address=0x20_0000, memory_data_size=0x1000),
    )
    image = parse_image(make_image(sections, bytes(size)))
    result = boot(image, MEMORY, 2, job=SMALL)
    assert result.problems == []
    assert result.rtmrs[0] == bytes(48)


def full_image() -> TdvfImage:
    """A firmware that leaves a guest of 8 KiB no memory to accept."""
    size = 4 * PAGE_SIZE
    sections = (
        Section(SectionType.BFV, 0, size, FOUR_GIB - size, size, MR_EXTEND),
        Section(SectionType.TD_HOB, memory_address=0, memory_data_size=2 * PAGE_SIZE),
    )
    return parse_image(make_image(sections, bytes(size)))


def test_a_guest_without_memory_shuts_down() -> None:
    result = boot(full_image(), 2 * PAGE_SIZE)
    assert "KVM_EXIT_SHUTDOWN" in result.exit
    assert "not finished: vCPU 0" in result.problems
    assert result.leaked_pages == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vcpus": 0}, "0 vCPUs on platform default, which has 16 CPUs: give 1 to 16"),
        ({"vcpus": 17}, "17 vCPUs"),
        ({"memory": "4M"}, "is not inside the VM's memory"),
        ({"memory": "2X"}, "memory size '2X'"),
        ({"kernel": "v5.0"}, "there is no kernel 'v5.0'"),
        ({"platform": "pdp-11"}, "no platform is named 'pdp-11'"),
        ({"guest": "doom"}, "there is no script 'doom'"),
    ],
)
def test_what_cannot_be_booted_is_a_misuse(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        boot(**options)  # type: ignore[arg-type]


# -- schedules ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from([name for name in SCRIPTS if name != "accept-all"]), st.integers(1, 4), st.integers(0, 1 << 32))
@settings(max_examples=12)
def test_every_schedule_gives_the_same_mrtd_and_leaks_nothing(name: str, vcpus: int, seed: int) -> None:
    check(small_boot(vcpus, name, choose=at_random(seed)))


def test_round_robin() -> None:
    check(small_boot(3, choose=round_robin))


def test_a_seed_gives_the_same_run_again() -> None:
    first, second = (small_boot(3, "convert-storm", choose=at_random(11), trace=True) for _ in range(2))
    check(first)
    assert first.outcome is not None
    assert second.outcome is not None
    assert first.outcome.trace.schedule == second.outcome.trace.schedule
    assert first.outcome.trace.events == second.outcome.trace.events
    assert first.counts == second.counts


def test_a_trace_tells_what_happened() -> None:
    result = small_boot(1, "idle", trace=True)
    check(result)
    assert result.outcome is not None
    kinds = Counter(event.kind for event in result.outcome.trace.events)
    assert kinds["seamcall"] == result.seamcalls
    assert kinds["tdcall"]
    assert kinds["access"]
    assert [phase.name for phase in result.phases] == ["create", "vcpus", "measure", "finalize", "run", "destroy"]
    assert all(phase.seamcalls for phase in result.phases)
