"""Which kernel runs: a value made of contention policies per call site and named fixes.

A preset is what a kernel did as released. ``Kernel("v6.16").without("...")`` and ``.with_("...")`` give kernels that
never were, to see what one change does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from septum.arch.errors import UsageError


@dataclass(frozen=True, slots=True)
class Fix:
    """A change to KVM that a kernel can have or not: its commit, the first release that had it, and what it does."""

    name: str
    commit: str
    since: str
    does: str


@dataclass(frozen=True, slots=True)
class Site:
    """A place where KVM meets contention, and the policies that can be used there, the usual one first."""

    name: str
    policies: tuple[str, ...]
    does: str


FIXES: Final[Mapping[str, Fix]] = {
    fix.name: fix
    for fix in (
        Fix(
            "flush-rechecks-cpu",
            "merge of v6.16",
            "v6.16",
            "the IPI that flushes a vCPU does nothing when the vCPU has left that CPU meanwhile",
        ),
        Fix(
            "prefault-eagain-on-invalid-slot",
            "3ccbf6f47098",
            "v6.18",
            "KVM_PRE_FAULT_MEMORY returns -EAGAIN for a slot that is being deleted, instead of trying again",
        ),
        Fix(
            "no-local-retry-on-invalid-slot",
            "2bc2694fe20b",
            "v6.18",
            "the EPT violation handler re-enters the guest for a slot that is being deleted, instead of trying again",
        ),
        Fix(
            "state-locks",
            "15945e9ec195",
            "v6.19",
            "ioctls that change a TD's state hold kvm->lock, every vcpu->mutex and slots_lock",
        ),
        Fix("mr-extend-bugs-vm", "ad44aa4c5d3f", "v6.19", "a TDH.MR.EXTEND that fails bugs the VM"),
        Fix(
            "flush-on-vcpu-free",
            "1e3a825c9ec9",
            "v6.19",
            "a vCPU that is freed leaves its CPU's list first, also when its creation failed",
        ),
        Fix("vp-init-excludes-zaps", "9a89894f30d5", "v6.19", "TDH.VP.INIT runs with mmu_lock held for write"),
        Fix(
            "no-page-pinning",
            "20251030200951.3402865-1-seanjc@google.com",
            "v6.19",
            "private pages that the module has get no reference: guest_memfd alone says how long they live",
        ),
        Fix(
            "page-add-in-set-spte",
            "20251030200951.3402865-1-seanjc@google.com",
            "v6.19",
            "TDH.MEM.PAGE.ADD runs inside the change of the mirror SPTE, so that none is present without its page",
        ),
        Fix(
            "gup-before-gmem-lock",
            "hash and first release unverified",
            "v6.19",
            "the source of KVM_TDX_INIT_MEM_REGION is pinned before the guest_memfd file's invalidate lock is taken",
        ),
        Fix(
            "huge-pages",
            "20260106101646.24809-1-yan.y.zhao@intel.com",
            "not merged",
            "private memory of a running TD is mapped 2 MiB at a time (tdx_huge_page=Y), split with mmu_lock for write",
        ),
        Fix(
            "demote-loops",
            "intel-staging/tdx 4feb6bf371f3",
            "not merged",
            "TDH.MEM.PAGE.DEMOTE is made again while it is interrupted, so that modules that allow that get huge pages",
        ),
        Fix(
            "no-progress-exits",
            "Y8ljwsrrBBdh1aYw@google.com",
            "not posted",
            "a vCPU that comes back for a mapped page again and again leaves with KVM_EXIT_MEMORY_FAULT",
        ),
        Fix(
            "failed-conversion-ends",
            "found with Septum",
            "not posted",
            "KVM_SET_MEMORY_ATTRIBUTES that fails in splitting ends the invalidation that it began",
        ),
        Fix(
            "hole-invalidates-folios",
            "found with Septum",
            "not posted",
            "punching a hole holds off faults on all of a 2 MiB folio that it cuts, not only on the hole",
        ),
    )
}

SITES: Final[Mapping[str, Site]] = {
    site.name: site
    for site in (
        Site("map", ("unwind",), "TDH.MEM.SEPT.ADD and TDH.MEM.PAGE.AUG on behalf of a fault, mmu_lock held for read"),
        Site(
            "zap",
            ("kick-and-retry-once", "kick-without-flag", "once"),
            "TDH.MEM.RANGE.BLOCK, TDH.MEM.TRACK and TDH.MEM.PAGE.REMOVE, mmu_lock held for write",
        ),
        Site("fault", ("retry-locally", "re-enter"), "a private EPT violation that could not be resolved"),
        Site(
            "accept",
            ("split-exclusively", "split-shared", "ignore"),
            "a guest that accepts 4 KiB where 2 MiB are mapped: the mode of mmu_lock for the split, or no split",
        ),
    )
}

_MERGED: Final = {"map": "unwind", "zap": "kick-and-retry-once", "fault": "retry-locally"}
_RELEASES: Final = ("v6.16", "v6.18", "v6.19")
"""Mainline releases, from the one that TDX was merged in: each has the fixes of those before."""


def _fixes_of(release: str) -> frozenset[str]:
    until = _RELEASES[: _RELEASES.index(release) + 1]
    return frozenset(fix.name for fix in FIXES.values() if fix.since in until)


_PRESETS: Final[Mapping[str, tuple[Mapping[str, str], frozenset[str]]]] = {
    release: (_MERGED, _fixes_of(release)) for release in _RELEASES
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel by the name of its preset, with what was changed in it.

    :raises UsageError: for a name that is no preset.
    """

    name: str = "v6.16"
    policies: Mapping[str, str] = field(default_factory=dict)
    """Contention policy by call site. An empty mapping stands for the preset's."""
    fixes: frozenset[str] | None = None
    """None stands for the preset's."""

    def __post_init__(self) -> None:
        if self.name not in _PRESETS:
            raise UsageError(f"there is no kernel {self.name!r}; there are: {', '.join(_PRESETS)}")
        policies, fixes = _PRESETS[self.name]
        usual = {site.name: site.policies[0] for site in SITES.values()}
        object.__setattr__(self, "policies", self.policies or {**usual, **policies})
        if self.fixes is None:
            object.__setattr__(self, "fixes", fixes)

    def __hash__(self) -> int:
        return hash((self.name, self.fixes, *sorted(self.policies.items())))

    def has(self, fix: str) -> bool:
        """Whether this kernel has the fix."""
        return self.fixes is not None and fix in self.fixes

    def with_(self, *fixes: str) -> Kernel:
        """This kernel with more fixes.

        :raises UsageError: for a name that is no fix.
        """
        return replace(self, fixes=(self.fixes or frozenset()) | _known(fixes))

    def without(self, *fixes: str) -> Kernel:
        """This kernel with some fixes taken out.

        :raises UsageError: for a name that is no fix, or one that it does not have.
        """
        unwanted, had = _known(fixes), self.fixes or frozenset()
        if missing := sorted(unwanted - had):
            raise UsageError(f"kernel {self.name} does not have the fix {missing[0]}; it has: {', '.join(sorted(had))}")
        return replace(self, fixes=had - unwanted)

    def with_policy(self, site: str, policy: str) -> Kernel:
        """This kernel with another contention policy at a call site.

        :raises UsageError: for an unknown site, or a policy that it cannot have.
        """
        if site not in SITES:
            raise UsageError(f"there is no call site {site!r}; there are: {', '.join(SITES)}")
        if policy not in SITES[site].policies:
            known = ", ".join(SITES[site].policies)
            raise UsageError(f"policy {policy!r} cannot be used at call site {site}; there are: {known}")
        return replace(self, policies={**self.policies, site: policy})


def kernels() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(_PRESETS)


def _known(fixes: tuple[str, ...]) -> frozenset[str]:
    for name in fixes:
        if name not in FIXES:
            raise UsageError(f"there is no fix {name!r}; there are: {', '.join(FIXES)}")
    return frozenset(fixes)
