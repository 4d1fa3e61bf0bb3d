"""Every SEAMCALL of a TD's life fails once, in several ways.

KVM's answer must be the one of Linux 6.16: its errno, a bugged VM exactly where it uses KVM_BUG_ON, and pages that are
lost only where the module may still have them. Never is a page freed that the module owns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from errno import EAGAIN, EBUSY, EINVAL, EIO
from functools import cache
from typing import NamedTuple

import pytest

from septum.arch.leaves import HostLeaf
from septum.arch.operands import Operand
from septum.arch.status import SeamcallFailure, Status, with_operand
from septum.core.steps import Violation
from septum.guest.vcpu import Vcpu
from septum.kvm import abi
from septum.kvm.kernel import Kernel
from septum.kvm.seamcall import RDRAND_RETRY_LOOPS, Injection
from tests.kvm.machines import Vmm

BUSY = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
HARD = with_operand(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
FIRST_PAGE = 0x10_0000


class Answer(NamedTuple):
    """What comes of a failure: the first errno (or exit) that userspace sees, whether the VM is bugged, pages lost."""

    errno: int = 0
    bugged: bool = False
    leaks: int = 0


UNNOTICED = Answer()
KEYID_LOST = Answer(0, bugged=True, leaks=17)
"""TDR, six TDCS pages, six pages of the vCPU, four of the Secure EPT: all that is the TD's when its KeyID stays."""
INTERNAL_ERROR = -abi.KVM_EXIT_INTERNAL_ERROR

L = HostLeaf
WHEN_HARD: dict[HostLeaf, Answer] = {
    L.TDH_MNG_CREATE: Answer(EIO),
    L.TDH_MNG_KEY_CONFIG: Answer(EIO, bugged=True),
    L.TDH_MNG_ADDCX: Answer(EIO),
    L.TDH_MNG_INIT: Answer(EIO),
    L.TDH_MNG_RD: UNNOTICED,
    L.TDH_VP_CREATE: Answer(EIO, bugged=True),
    L.TDH_VP_ADDCX: Answer(EIO, bugged=True),
    L.TDH_VP_INIT: Answer(EIO, bugged=True),
    L.TDH_VP_WR: Answer(EIO, bugged=True),
    L.TDH_VP_FLUSH: KEYID_LOST,
    L.TDH_VP_ENTER: Answer(INTERNAL_ERROR),
    L.TDH_MEM_SEPT_ADD: Answer(EIO, bugged=True),
    L.TDH_MEM_PAGE_ADD: Answer(EIO),
    L.TDH_MEM_PAGE_AUG: Answer(EIO, bugged=True),
    L.TDH_MEM_RANGE_BLOCK: Answer(0, bugged=True, leaks=2),
    L.TDH_MEM_TRACK: Answer(0, bugged=True, leaks=2),
    L.TDH_MEM_PAGE_REMOVE: Answer(0, bugged=True, leaks=2),
    L.TDH_MR_EXTEND: Answer(EIO),
    L.TDH_MR_FINALIZE: Answer(EIO, bugged=True),
    L.TDH_MNG_VPFLUSHDONE: KEYID_LOST,
    L.TDH_PHYMEM_CACHE_WB: KEYID_LOST,
    L.TDH_MNG_KEY_FREEID: KEYID_LOST,
    L.TDH_PHYMEM_PAGE_RECLAIM: Answer(0, leaks=2),
    L.TDH_PHYMEM_PAGE_WBINVD: Answer(0, bugged=True, leaks=1),
}
ZAPS = (L.TDH_MEM_RANGE_BLOCK, L.TDH_MEM_TRACK, L.TDH_MEM_PAGE_REMOVE)
WHEN_BUSY = WHEN_HARD | {
    L.TDH_VP_ENTER: UNNOTICED,
    L.TDH_MEM_SEPT_ADD: UNNOTICED,
    L.TDH_MEM_PAGE_ADD: Answer(EBUSY),
    L.TDH_MEM_PAGE_AUG: UNNOTICED,
    L.TDH_MEM_RANGE_BLOCK: UNNOTICED,
    L.TDH_MEM_TRACK: UNNOTICED,
    L.TDH_MEM_PAGE_REMOVE: UNNOTICED,
    L.TDH_MR_FINALIZE: Answer(EBUSY),
}
WHEN_WITHOUT_ENTROPY = WHEN_HARD | {L.TDH_MNG_CREATE: Answer(EAGAIN), L.TDH_MNG_ADDCX: Answer(EAGAIN)}


async def guest(vcpu: Vcpu) -> int:
    """Two pages, then out to userspace."""
    await vcpu.accept(FIRST_PAGE, FIRST_PAGE + 0x2000)
    await vcpu.io_write(0x80, 1, 1)
    return 1


async def life(vmm: Vmm) -> int:
    """A TD is built, runs up to its I/O exit, and goes. Returns the first errno, or minus an unexpected exit."""
    r = await vmm.build(1, 2)
    if not r:
        vmm.attach(guest)
        r = await vmm.process.run(vmm.vcpus[0])
        reason = vmm.process.kvm_run(vmm.vcpus[0]).exit_reason
        if not r and reason != abi.KVM_EXIT_IO:
            r = reason
    await vmm.process.exit()
    return -r


@cache
def calls(kernel: str = "v6.16") -> dict[HostLeaf, int]:
    """How often each leaf is called in a life without failures."""
    vmm = Vmm(kernel=Kernel(kernel))
    before = {leaf: sum(n.values()) for leaf, n in vmm.host.counts.items()}
    assert vmm.solo(lambda: life(vmm)) == 0
    vmm.assert_clean()
    after = {leaf: sum(n.values()) - before.get(leaf, 0) for leaf, n in vmm.host.counts.items()}
    return {leaf: after[leaf.abi_name] for leaf in HostLeaf if after.get(leaf.abi_name)}


def occurrences(kernel: str = "v6.16") -> Iterator[tuple[HostLeaf, int]]:
    """Each call of a life; of the many measurements only some."""
    for leaf, number in calls(kernel).items():
        step = 16 if leaf is L.TDH_MR_EXTEND else 1
        for occurrence in range(1, number + 1, step):
            yield leaf, occurrence


def after(*injections: Injection, kernel: str = "v6.16") -> tuple[Vmm, Answer]:
    """A life in which calls fail, and what came of it."""
    vmm = Vmm(injections=injections, kernel=Kernel(kernel))
    errno = vmm.solo(lambda: life(vmm))
    pages = vmm.host.pages
    assert pages.in_use == len(pages.leaks), "every page that is not free was reported as lost"
    return vmm, Answer(errno, bool(vmm.host.log.bugs), len(pages.leaks))


def compare(leaf: HostLeaf, occurrence: int, found: Answer, expected: Answer) -> None:
    """Whether KVM answered as it should."""
    where = f"{leaf.abi_name}, call {occurrence} of {calls()[leaf]}: {found}"
    if leaf is L.TDH_PHYMEM_PAGE_RECLAIM and occurrence == calls()[leaf] and expected.leaks:
        expected = Answer(leaks=1)  # the TDR goes last; any other page takes it along
    assert found == expected, where


def compare_kernel(
    kernel: str, status: int, expected: dict[HostLeaf, Answer], freed: Collection[HostLeaf] = ()
) -> None:
    """The outcome of one failure of each call of a life. After those in ``freed``, Linux frees a page that the module
    still has."""
    for leaf, occurrence in occurrences(kernel):
        injection = Injection(leaf, occurrence, status)
        if leaf in freed:
            with pytest.raises(Violation, match="is freed, but the module uses it as REG"):
                after(injection, kernel=kernel)
        elif not (leaf in (L.TDH_PHYMEM_PAGE_RECLAIM, L.TDH_PHYMEM_PAGE_WBINVD) and occurrence == calls(kernel)[leaf]):
            # The last one is for the TDR, on which kernels agree.
            _, found = after(injection, kernel=kernel)
            assert found == expected[leaf], f"{kernel}: {leaf.abi_name}, call {occurrence}: {found}"


def test_v6_18_fails_as_v6_16() -> None:
    compare_kernel("v6.18", HARD, WHEN_HARD)
    compare_kernel("v6.18", BUSY, WHEN_BUSY)


V6_19 = {
    L.TDH_MR_EXTEND: Answer(EIO, bugged=True),
    L.TDH_PHYMEM_PAGE_WBINVD: Answer(0, bugged=True),
}
"""What differs since 6.19, which pins no pages, and bugs the VM where a build cannot go on."""


def test_v6_19_fails_in_its_own_way() -> None:
    hard = WHEN_HARD | V6_19 | {L.TDH_MEM_PAGE_ADD: Answer(EIO, bugged=True)}
    compare_kernel("v6.19", HARD, hard, freed=ZAPS)
    compare_kernel("v6.19", BUSY, WHEN_BUSY | V6_19 | {L.TDH_MEM_PAGE_ADD: UNNOTICED})


V11_KEYID_LOST = Answer(0, bugged=True, leaks=21)
"""The two pages of data of each kind are left too: the KeyID has gone through half of its release."""
V11 = {
    L.TDH_MEM_PAGE_ADD: Answer(EIO, bugged=True),
    L.TDH_MNG_KEY_FREEID: V11_KEYID_LOST,
    L.TDH_PHYMEM_CACHE_WB: V11_KEYID_LOST,
}
"""What differs in v11, which releases the KeyID before the pages."""


def test_v11_fails_in_its_own_way() -> None:
    compare_kernel("v11-2023", HARD, WHEN_HARD | V11)
    busy = {
        L.TDH_MEM_PAGE_ADD: UNNOTICED,
        L.TDH_VP_ENTER: Answer(INTERNAL_ERROR),  # only the tree lock's BUSY is let pass
        L.TDH_PHYMEM_PAGE_WBINVD: UNNOTICED,
        L.TDH_PHYMEM_PAGE_RECLAIM: UNNOTICED,
        L.TDH_MEM_RANGE_BLOCK: WHEN_HARD[L.TDH_MEM_RANGE_BLOCK],
        L.TDH_MEM_PAGE_REMOVE: WHEN_HARD[L.TDH_MEM_PAGE_REMOVE],
    }
    compare_kernel("v11-2023", BUSY, WHEN_BUSY | V11 | busy)


def test_a_life_makes_every_kind_of_call() -> None:
    assert set(calls()) == set(WHEN_HARD)


def test_busy_once() -> None:
    for leaf, occurrence in occurrences():
        _, found = after(Injection(leaf, occurrence, BUSY))
        compare(leaf, occurrence, found, WHEN_BUSY[leaf])


def test_a_hard_error() -> None:
    for leaf, occurrence in occurrences():
        _, found = after(Injection(leaf, occurrence, HARD))
        compare(leaf, occurrence, found, WHEN_HARD[leaf])


def test_no_entropy_once() -> None:
    """Every call but TDH.VP.ENTER is simply made again."""
    for leaf, occurrence in occurrences():
        _, found = after(Injection(leaf, occurrence, Status.TDX_RND_NO_ENTROPY))
        compare(leaf, occurrence, found, WHEN_HARD[leaf] if leaf is L.TDH_VP_ENTER else UNNOTICED)


def test_no_entropy_for_long() -> None:
    for leaf, occurrence in occurrences():
        many = (Injection(leaf, occurrence + i, Status.TDX_RND_NO_ENTROPY) for i in range(RDRAND_RETRY_LOOPS))
        _, found = after(*many)
        compare(leaf, occurrence, found, WHEN_WITHOUT_ENTROPY[leaf])


@pytest.mark.parametrize("leaf", ZAPS, ids=[leaf.abi_name for leaf in ZAPS])
def test_busy_twice_in_a_zap_bugs_the_vm(leaf: HostLeaf) -> None:
    _, found = after(Injection(leaf, 1, BUSY), Injection(leaf, 2, BUSY))
    compare(leaf, 1, found, WHEN_HARD[leaf])


def test_other_kinds_of_busy_are_errors() -> None:
    """TDX_PREVIOUS_TLB_EPOCH_BUSY is not TDX_OPERAND_BUSY: no kick, no second attempt."""
    vmm, found = after(Injection(L.TDH_MEM_TRACK, 1, Status.TDX_PREVIOUS_TLB_EPOCH_BUSY))
    assert found.bugged
    assert vmm.host.counts["TDH.MEM.TRACK"]["TDX_PREVIOUS_TLB_EPOCH_BUSY"] == 1


def test_flushvp_not_done_loses_the_keyid_quietly() -> None:
    vmm, found = after(Injection(L.TDH_MNG_VPFLUSHDONE, 1, Status.TDX_FLUSHVP_NOT_DONE))
    assert found == KEYID_LOST
    assert len(vmm.host.keyids_in_use()) == 1
    assert not vmm.host.log.messages
    # Only the Secure EPT's pages, which come later, make the kernel notice.
    assert set(vmm.host.log.bugs) == {"a Secure EPT page is freed while the KeyID is assigned"}


@pytest.mark.parametrize("leaf", [L.TDH_MNG_VPFLUSHDONE, L.TDH_MNG_KEY_FREEID])
def test_a_lost_keyid_is_logged(leaf: HostLeaf) -> None:
    vmm, _ = after(Injection(leaf, 1, HARD))
    (keyid,) = vmm.host.keyids_in_use()
    name = leaf.name.lower()
    assert vmm.host.log.messages[f"{name}() failed. HKID {keyid} is leaked."] == 1


def test_cache_write_back_is_resumed() -> None:
    vmm, found = after(*(Injection(L.TDH_PHYMEM_CACHE_WB, i, Status.TDX_INTERRUPTED_RESUMABLE) for i in range(1, 40)))
    assert found.bugged, "the injected interruptions did not resume anything in the module"
    assert vmm.host.counts["TDH.PHYMEM.CACHE.WB"]["TDX_INTERRUPTED_RESUMABLE"] == 39


def test_no_hkid_to_write_back_is_no_error() -> None:
    """Another TD's write-back has done the work."""
    answer = Status.TDX_NO_HKID_READY_TO_WBCACHE
    vmm, found = after(*(Injection(L.TDH_PHYMEM_CACHE_WB, i, answer, reaches=True) for i in (1, 2)))
    assert found == UNNOTICED
    assert vmm.host.counts["TDH.PHYMEM.CACHE.WB"] == {"TDX_NO_HKID_READY_TO_WBCACHE": 2}


def test_an_invalid_operand_of_mng_init_is_userspaces_fault() -> None:
    _, found = after(Injection(L.TDH_MNG_INIT, 1, with_operand(Status.TDX_OPERAND_INVALID, Operand.CPUID_CONFIG)))
    assert found == Answer(EINVAL)


def test_a_seamcall_that_does_not_reach_the_module_bugs_the_vm() -> None:
    _, found = after(Injection(L.TDH_VP_ENTER, 2, SeamcallFailure.TDX_SEAMCALL_UD))
    assert found == Answer(INTERNAL_ERROR, bugged=True)


def test_an_injection_may_reach_the_module() -> None:
    """The page is added, KVM is told that it is not; the page is lost, because the Secure EPT still has it."""
    _, found = after(Injection(L.TDH_MEM_PAGE_ADD, 1, BUSY, reaches=True))
    assert found.errno == EBUSY
    assert not found.leaks, "the zap finds the page, though KVM thought it premapped"
