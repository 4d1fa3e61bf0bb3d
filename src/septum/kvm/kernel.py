"""Which kernel runs: a value made of contention policies per call site and named fixes.

A preset is what a kernel did as released. ``Kernel("v6.16").without("...")`` and ``.with_("...")`` give kernels that
never were, to see what one change does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from septum.arch.errors import UsageError
from septum.arch.operands import Operand


@dataclass(frozen=True, slots=True)
class Fix:
    """A change to KVM that a kernel can have or not: its commit, the first release that had it, and what it does."""

    name: str
    commit: str
    since: str
    does: str


@dataclass(frozen=True, slots=True)
class Site:
    """A place where KVM meets contention, and the policies that can be used there, the usual one first.

    ``N`` and ``OPERAND`` behind a colon stand for a number and the name of an operand.
    """

    name: str
    policies: tuple[str, ...]
    does: str

    def allows(self, policy: str) -> bool:
        """Whether a policy, its parameter filled in, can be used here."""
        kind, colon, parameter = policy.partition(":")
        if not colon:
            return policy in self.policies
        return (f"{kind}:N" in self.policies and parameter.isdecimal() and int(parameter) <= MAX_RETRIES) or (
            f"{kind}:OPERAND" in self.policies and parameter in Operand.__members__
        )


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
        Fix(
            "freeze-external-spte",
            "merge of v6.16",
            "v6.16",
            "a mirror SPTE is FROZEN_SPTE while the SEAMCALL for it runs, so that others wait for what becomes of it",
        ),
        Fix(
            "hkid-outlives-mm",
            "merge of v6.16",
            "v6.16",
            "the KeyID is released when the VM is destroyed, not when the process's memory goes",
        ),
        Fix(
            "vp-init-x2apic-id",
            "merge of v6.16",
            "v6.16",
            "TDH.VP.INIT is called in version 1, with the x2APIC id; that takes the TDR exclusively",
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
            "2a62345b3052",
            "v7.0",
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

MAX_RETRIES: Final = 10_000
_ANYWHERE: Final = ("retry:N", "retry-exact:N", "loop", "loop-on:OPERAND", "waitqueue", "needbreak")
_IN_ZAPS: Final = ("kick-and-retry-once", "kick-without-flag", "once", *_ANYWHERE)
SITES: Final[Mapping[str, Site]] = {
    site.name: site
    for site in (
        Site(
            "map",
            ("unwind", *_ANYWHERE, "kick-and-retry-once"),
            "TDH.MEM.SEPT.ADD and TDH.MEM.PAGE.AUG on behalf of a fault, mmu_lock held for read",
        ),
        Site("build", ("unwind", *_ANYWHERE), "TDH.MEM.PAGE.ADD of KVM_TDX_INIT_MEM_REGION"),
        Site("block", _IN_ZAPS, "TDH.MEM.RANGE.BLOCK, mmu_lock held for write"),
        Site("track", (*_IN_ZAPS, "loop-counted"), "TDH.MEM.TRACK, mmu_lock held for write"),
        Site("remove", _IN_ZAPS, "TDH.MEM.PAGE.REMOVE, mmu_lock held for write"),
        Site("demote", _IN_ZAPS, "TDH.MEM.PAGE.DEMOTE, mmu_lock held for write"),
        Site("wbinvd", ("once", *_ANYWHERE), "TDH.PHYMEM.PAGE.WBINVD of a page that was removed"),
        Site("reclaim", ("once", *_ANYWHERE), "TDH.PHYMEM.PAGE.RECLAIM of a TD without KeyID"),
        Site(
            "cache-wb", ("bounded", "unbounded"), "TDH.PHYMEM.CACHE.WB: how often it is resumed when it was interrupted"
        ),
        Site("key-config", ("give-up", "try-on"), "TDH.MNG.KEY.CONFIG that fails with TDX_KEY_GENERATION_FAILED"),
        Site("enter", ("rerun", "rerun-tree-only"), "TDH.VP.ENTER: which BUSY is no error; the vCPU enters again"),
        Site("fault", ("retry-locally", "re-enter"), "a private EPT violation that could not be resolved"),
        Site(
            "accept",
            ("split-exclusively", "split-shared", "ignore"),
            "a guest that accepts 4 KiB where 2 MiB are mapped: the mode of mmu_lock for the split, or no split",
        ),
    )
}

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {"zap": ("block", "track", "remove", "demote")}
"""Call sites that can be named together."""
_MERGED: Final[Mapping[str, str]] = {}
"""What was merged for 6.16 is the usual policy everywhere."""
_V11: Final = {
    "map": "retry-exact:16",
    "build": "retry-exact:16",
    "block": "retry-exact:16",
    "track": "loop-counted",
    "remove": "loop-on:SEPT_TREE",
    "demote": "retry-exact:16",
    "wbinvd": "loop-on:RCX",
    "reclaim": "loop-on:RCX",
    "cache-wb": "unbounded",
    "key-config": "try-on",
    "enter": "rerun-tree-only",
    "fault": "re-enter",
}
"""The v11 series of January 2023 (018 and 056, 68fa413e61d7.1673539699.git.isaku.yamahata@intel.com), and v13 (056,
20795cbc7d7e) for the loops of ``tdx_track``, ``tdx_sept_drop_private_spte`` and ``tdx_reclaim_page``."""
_IN_V11: Final = frozenset({"flush-rechecks-cpu", "page-add-in-set-spte"})
"""v11 adds initial pages from ``tdx_sept_set_private_spte`` already, from ``kvm_tdx->source_pa``."""
_RELEASES: Final = ("v6.16", "v6.18", "v6.19")
"""Mainline releases, from the one that TDX was merged in: each has the fixes of those before."""


def _fixes_of(release: str) -> frozenset[str]:
    until = _RELEASES[: _RELEASES.index(release) + 1]
    return frozenset(fix.name for fix in FIXES.values() if fix.since in until)


_PRESETS: Final[Mapping[str, tuple[Mapping[str, str], frozenset[str]]]] = {
    "v11-2023": (_V11, _IN_V11),
    **{release: (_MERGED, _fixes_of(release)) for release in _RELEASES},
}

DESIGNS: Final[Mapping[str, Mapping[str, str]]] = {
    "retry-exact": {"map": "retry-exact:16", "build": "retry-exact:16", "zap": "retry-exact:16", "fault": "re-enter"},
    "retry": {"map": "retry:16", "build": "retry:16", "zap": "retry:16", "fault": "re-enter"},
    "unwind-and-refault": {"map": "unwind", "build": "unwind", "zap": "once", "fault": "re-enter"},
    "local-retry": {"map": "unwind", "build": "unwind", "zap": "once", "fault": "retry-locally"},
    "kick": {"map": "unwind", "build": "unwind", "zap": "kick-and-retry-once", "fault": "retry-locally"},
    "wait": {"map": "waitqueue", "build": "waitqueue", "zap": "waitqueue", "fault": "re-enter"},
    "break": {"map": "needbreak", "build": "needbreak", "zap": "needbreak", "fault": "re-enter"},
}
"""The designs of the founding thread and after it, as policies at all sites. "Lock everything first" is no policy but
fixes of 6.19, in kernel ``v6.19``."""


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
        chosen = GROUPS.get(site, (site,))
        for name in chosen:
            if name not in SITES:
                raise UsageError(f"there is no call site {name!r}; there are: {', '.join((*SITES, *GROUPS))}")
            if not SITES[name].allows(policy):
                known = ", ".join(SITES[name].policies)
                raise UsageError(f"policy {policy!r} cannot be used at call site {site}; there are: {known}")
        return replace(self, policies={**self.policies, **dict.fromkeys(chosen, policy)})

    def with_design(self, design: str) -> Kernel:
        """This kernel with the policies of one of :data:`DESIGNS`.

        :raises UsageError: for a name that is no design.
        """
        if design not in DESIGNS:
            raise UsageError(f"there is no design {design!r}; there are: {', '.join(DESIGNS)}")
        kernel = self
        for site, policy in DESIGNS[design].items():
            kernel = kernel.with_policy(site, policy)
        return kernel


def kernels() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(_PRESETS)


def _known(fixes: tuple[str, ...]) -> frozenset[str]:
    for name in fixes:
        if name not in FIXES:
            raise UsageError(f"there is no fix {name!r}; there are: {', '.join(FIXES)}")
    return frozenset(fixes)
