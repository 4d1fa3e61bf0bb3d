"""TDs come, run and go, under several schedulers, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBADF, EINVAL, EIO

import pytest

from septum.core.run import Chooser, at_random, round_robin, solo
from septum.core.steps import PRIMITIVES
from septum.guest.vcpu import Vcpu
from septum.kvm.arguments import Region
from septum.kvm.host import Host
from septum.kvm.invariants import mirror_agrees, no_bug
from septum.kvm.process import Process
from septum.kvm.vm import Vm
from tests.kvm.machines import BUILT, Vmm

PAGE = 4096


async def accept_and_touch(vcpu: Vcpu) -> int:
    """Each vCPU accepts pages of its own and writes to one."""
    base = 0x10_0000 + 0x1_0000 * vcpu.index
    small, large = await vcpu.accept(base, base + 3 * PAGE)
    await vcpu.write(base, b"mine")
    return small + large


async def convert_and_back(vcpu: Vcpu) -> bytes:
    """Memory becomes shared, is used, and becomes private again."""
    base = 0x10_0000 + 0x1_0000 * vcpu.index
    await vcpu.accept(base, base + 2 * PAGE)
    for _ in range(2):
        await vcpu.map_gpa(base, 2 * PAGE, shared=True)
        await vcpu.write(base | vcpu.shared_bit, b"for all")
        await vcpu.map_gpa(base, 2 * PAGE, shared=False)
        await vcpu.accept(base, base + 2 * PAGE)
    return await vcpu.read(base, 4)


CHOOSERS: dict[str, Callable[[], Chooser]] = {
    "solo": lambda: solo,
    "round robin": lambda: round_robin,
    "random 1": lambda: at_random(1),
    "random 2": lambda: at_random(2),
}


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_td_is_built_runs_and_is_destroyed(chooser: str, vcpus: int) -> None:
    vmm = Vmm()
    outcome = vmm.run(*[accept_and_touch] * vcpus, choose=CHOOSERS[chooser]())
    assert outcome.violation is None, outcome.message
    assert outcome.results[: vcpus + 1] == [0] * (vcpus + 1)
    assert [guest.result for guest in vmm.guests] == [3] * vcpus
    vmm.assert_clean()
    counts = vmm.host.counts
    assert counts["TDH.MEM.PAGE.ADD"] == {"TDX_SUCCESS": 2}
    assert counts["TDH.MR.EXTEND"] == {"TDX_SUCCESS": 32}
    assert counts["TDH.MEM.PAGE.AUG"]["TDX_SUCCESS"] == 3 * vcpus
    assert counts["TDH.MEM.PAGE.REMOVE"]["TDX_SUCCESS"] == 3 * vcpus + 2
    assert counts["TDH.MNG.KEY.FREEID"] == {"TDX_SUCCESS": 1}


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_vcpus_convert_memory_at_the_same_time(chooser: str) -> None:
    vmm = Vmm()
    outcome = vmm.run(*[convert_and_back] * 3, choose=CHOOSERS[chooser]())
    assert outcome.violation is None, outcome.message
    assert [guest.result for guest in vmm.guests] == [bytes(4)] * 3
    vmm.assert_clean()


@pytest.mark.parametrize("seed", range(10))
def test_properties_hold_in_every_state_of_random_runs(seed: int) -> None:
    vmm = Vmm()

    def vms() -> list[Vm]:
        return [vmm.kvm] if vmm.progress.ready and vmm.process.files.peek(vmm.vm) else []

    outcome = vmm.run(
        *[convert_and_back] * 2, choose=at_random(seed), invariants=[mirror_agrees(vms), no_bug(vmm.host, vms)]
    )
    assert outcome.violation is None, outcome.message
    vmm.assert_clean()


def test_steps_inside_lock_primitives_change_nothing() -> None:
    vmm = Vmm()
    outcome = vmm.run(*[convert_and_back] * 2, choose=at_random(3), level=PRIMITIVES)
    assert outcome.violation is None, outcome.message
    vmm.assert_clean()


def test_contention_happens_and_is_dealt_with() -> None:
    """Over some schedules TDH.MEM.TRACK and TDH.VP.ENTER find each other's lock busy; no VM is bugged for it."""
    busy = {"TDH.MEM.TRACK": 0, "TDH.VP.ENTER": 0}
    for seed in range(16):
        vmm = Vmm()
        assert vmm.run(*[convert_and_back] * 3, choose=at_random(seed)).violation is None
        vmm.assert_clean()
        for leaf in busy:
            busy[leaf] += vmm.host.counts[leaf].get("TDX_OPERAND_BUSY", 0)
    assert all(busy.values()), busy


def test_the_order_of_closing_does_not_matter() -> None:
    """The VM lives until its last file is closed; guest_memfd gives its pages back before."""
    for order in ("vm gmem vcpu", "vcpu gmem vm", "gmem vm vcpu", "vm vcpu gmem"):
        vmm = Vmm()

        async def main(vmm: Vmm = vmm, order: str = order) -> list[int]:
            assert await vmm.build() == 0
            fds = {"vm": vmm.vm, "gmem": vmm.gmem, "vcpu": vmm.vcpus[0]}
            return [await vmm.process.close(fds[name]) for name in order.split()]

        assert vmm.solo(main) == [0, 0, 0]
        assert vmm.host.counts["TDH.MEM.PAGE.REMOVE"] == {"TDX_SUCCESS": 2}
        assert not vmm.host.keyids_in_use()
        vmm.solo(vmm.process.exit)
        vmm.assert_clean()


def test_two_tds_of_two_processes() -> None:
    first = Vmm()
    second = Vmm(host=first.host, name="other")
    host = first.host

    async def main() -> tuple[int, int]:
        return await first.build(2), await second.build(2)

    assert first.solo(main) == (0, 0)
    assert len(host.keyids_in_use()) == 2
    first.solo(first.process.exit)
    assert len(host.keyids_in_use()) == 1
    second.solo(second.process.exit)
    first.assert_clean()


def test_a_file_of_another_process_is_of_no_use() -> None:
    """A descriptor is looked up in the caller's table; a VM only serves the process that made it."""
    first = Vmm()
    second = Vmm(host=first.host, name="other")

    async def main() -> tuple[int, int]:
        assert await first.build() == 0
        file = first.process.files.get(first.vm)
        assert file is not None
        fd = second.process.files.install(file)
        return await second.process.create_vcpu(99, 1), await second.process.create_vcpu(fd, 1)

    assert first.solo(main) == (-EBADF, -EIO)


def test_a_vcpu_moves_between_cpus() -> None:
    """KVM_RUN on another CPU has the old one flush the vCPU."""
    vmm = Vmm()

    async def one_page(vcpu: Vcpu) -> int:
        await vcpu.accept(0x10_0000, 0x10_1000)
        await vcpu.io_write(0x80, 1, 1)
        await vcpu.accept(0x10_1000, 0x10_2000)
        await vcpu.io_write(0x80, 2, 1)
        return 0

    async def build() -> int:
        return await vmm.build()

    async def enter() -> int:
        return await vmm.process.run(vmm.vcpus[0])

    assert vmm.solo(build) == 0
    vmm.attach(one_page)
    flushes = vmm.host.counts["TDH.VP.FLUSH"]["TDX_SUCCESS"] if "TDH.VP.FLUSH" in vmm.host.counts else 0
    assert vmm.solo(enter, cpu=1) == 0
    assert vmm.host.associated_tdvcpus[1] == (vmm.process.vcpu(vmm.vcpus[0]),)
    assert vmm.solo(enter, cpu=2) == 0
    assert not vmm.host.associated_tdvcpus[1]
    assert vmm.host.counts["TDH.VP.FLUSH"]["TDX_SUCCESS"] == flushes + 2
    vmm.solo(vmm.process.exit)
    vmm.assert_clean()


def test_no_td_without_boot() -> None:
    vmm = Vmm()
    host = Host(vmm.host.platform)
    process = Process(host)

    async def main() -> int:
        return await process.create_vm()

    assert vmm.solo(main) == -EINVAL


def test_memory_is_measured() -> None:
    """The same pages give the same MRTD, another content another one."""
    digests = []
    for content in (b"\x90", b"\x90", b"\xcc"):
        vmm = Vmm()

        async def main(vmm: Vmm = vmm, content: bytes = content) -> bytes:
            assert await vmm.init() == 0
            assert await vmm.add_vcpus(1) == 0
            assert await vmm.add_memory() == 0
            source = vmm.process.mmap(PAGE)
            vmm.process.write(source, content * PAGE)
            assert await vmm.process.tdx_init_mem_region(vmm.vcpus[0], Region(source, BUILT, 1), 1) == 0
            assert await vmm.process.tdx_finalize_vm(vmm.vm) == 0
            return vmm.host.module.td(vmm.kvm.tdr_page).tdcs.mrtd

        digests.append(vmm.solo(main))
    assert digests[0] == digests[1] != digests[2]
