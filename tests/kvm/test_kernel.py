"""Kernels as values: presets, fixes, policies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from septum.arch.errors import UsageError
from septum.kvm.contention import POLICIES, WITH_PARAMETER
from septum.kvm.kernel import DESIGNS, FIXES, GROUPS, SITES, Kernel, kernels
from septum.kvm.tdx.run import RERUNS


def test_presets() -> None:
    assert "v6.16" in kernels()
    assert Kernel() == Kernel("v6.16")
    for name in kernels():
        kernel = Kernel(name)
        assert kernel.policies.keys() == SITES.keys()
        assert all(SITES[site].allows(policy) for site, policy in kernel.policies.items())
        assert kernel.fixes is not None
        assert kernel.fixes <= FIXES.keys()


def test_every_policy_has_code() -> None:
    """Some have their code where they are used; the others wrap a SEAMCALL."""
    handlers = ("fault", "accept", "enter", "cache-wb", "key-config")
    named = {policy for site in SITES.values() if site.name not in handlers for policy in site.policies}
    plain = {policy for policy in named if ":" not in policy}
    assert plain == POLICIES.keys()
    assert {policy.partition(":")[0] for policy in named - plain} == WITH_PARAMETER.keys()
    assert set(SITES["enter"].policies) == RERUNS.keys()


def test_fixes() -> None:
    kernel = Kernel().with_("state-locks", "mr-extend-bugs-vm")
    assert kernel.has("state-locks")
    assert not Kernel().has("state-locks")
    assert kernel.without("mr-extend-bugs-vm", "state-locks") == Kernel()
    assert not Kernel().without("flush-rechecks-cpu").has("flush-rechecks-cpu")


def test_policies() -> None:
    kernel = Kernel().with_policy("zap", "once")
    assert {kernel.policies[site] for site in GROUPS["zap"]} == {"once"}
    assert kernel != Kernel()
    assert kernel.with_policy("track", "loop").policies["block"] == "once"
    assert kernel.with_policy("zap", "kick-and-retry-once") == Kernel()


def test_designs_choose_at_the_contended_sites() -> None:
    chosen = [Kernel().with_design(design) for design in DESIGNS]
    assert len(set(chosen)) == len(DESIGNS)
    assert Kernel().with_design("kick") == Kernel()


def test_kernels_are_values() -> None:
    assert hash(Kernel()) == hash(Kernel("v6.16"))
    changed = {Kernel(), Kernel().with_policy("zap", "once"), Kernel().with_("state-locks"), Kernel("v6.16")}
    assert len(changed) == 3


UNKNOWN: list[tuple[Callable[[], Kernel], str]] = [
    (lambda: Kernel("v1.0"), "no kernel 'v1.0'; there are: .*v6.16"),
    (lambda: Kernel().with_("nothing"), "no fix 'nothing'; there are: "),
    (lambda: Kernel().without("nothing"), "no fix 'nothing'"),
    (lambda: Kernel().without("state-locks"), "does not have the fix state-locks; it has: flush-rechecks-cpu"),
    (lambda: Kernel().with_policy("nowhere", "once"), "no call site 'nowhere'"),
    (lambda: Kernel().with_policy("map", "retry:"), "'retry:' cannot be used at call site map"),
    (lambda: Kernel().with_policy("map", "retry:-1"), "cannot be used"),
    (lambda: Kernel().with_policy("map", "retry:10001"), "cannot be used"),
    (lambda: Kernel().with_policy("map", "loop-on:NOTHING"), "cannot be used"),
    (lambda: Kernel().with_policy("map", "retry:N"), "cannot be used"),
    (lambda: Kernel().with_design("hope"), "no design 'hope'; there are: retry-exact, retry, "),
    (lambda: Kernel().with_policy("zap", "re-enter"), "cannot be used at call site zap; there are: kick"),
]


@pytest.mark.parametrize(("ask", "text"), UNKNOWN)
def test_unknown_names(ask: Callable[[], Kernel], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ask()
