"""Kernels by text, as parameters of scenarios and options of commands name them.

``v6.16`` is a preset; changes to it follow after commas: ``+FIX`` or ``-FIX`` for a fix that it gets or loses,
``SITE=POLICY`` for another contention policy at a call site, ``design=NAME`` for the policies of a whole design.
``v6.16,+state-locks,zap=once`` has one of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from septum.arch.errors import UsageError
from septum.kvm.kernel import DESIGNS, GROUPS, SITES, Kernel

DEFAULT: Final = "v6.16"
DESIGN: Final = "design"


def read_kernel(text: str) -> Kernel:
    """The kernel that ``text`` stands for.

    :raises UsageError: for an unknown preset, fix, site or policy, and for a fix that the kernel lacks already.
    """
    name, *changes = text.split(",")
    kernel = Kernel(name)
    for change in changes:
        site, equals, policy = change.partition("=")
        if change.startswith("+"):
            kernel = kernel.with_(change[1:])
        elif change.startswith("-"):
            kernel = kernel.without(change[1:])
        elif equals and site == DESIGN:
            kernel = kernel.with_design(policy)
        elif equals:
            kernel = kernel.with_policy(site, policy)
        else:
            raise UsageError(f"kernel {text!r}: {change!r} changes nothing; write +FIX, -FIX or SITE=POLICY")
    return kernel


def changed_kernel(text: str, *, fixes: Iterable[str], without: Iterable[str], policies: Iterable[str]) -> str:
    """The text of a kernel with further changes. A policy may be given without its site where only one has it.

    :raises UsageError: for a policy that several sites have, or none.
    """
    changes = [*(f"+{fix}" for fix in fixes), *(f"-{fix}" for fix in without), *map(_with_site, policies)]
    return ",".join([text, *changes])


def kernel_and_policy(text: str) -> tuple[str, str | None]:
    """The text of a kernel taken apart: without its policies, and those (None: the preset's)."""
    name, *changes = text.split(",")
    policies = [change for change in changes if "=" in change]
    return ",".join([name, *(change for change in changes if "=" not in change)]), ",".join(policies) or None


def _with_site(policy: str) -> str:
    if "=" in policy:
        return policy
    if policy in DESIGNS:
        return f"{DESIGN}={policy}"
    sites = [site.name for site in SITES.values() if site.allows(policy)]
    sites = next(([group] for group, members in GROUPS.items() if set(members) == set(sites)), sites)
    if len(sites) == 1:
        return f"{sites[0]}={policy}"
    if sites:
        raise UsageError(f"policy {policy!r} is one of several call sites; write {' or '.join(sites)}={policy}")
    known = "; ".join(f"{site.name}={', '.join(site.policies)}" for site in SITES.values())
    raise UsageError(f"there is no policy {policy!r}; there are: {known}")
