"""Kernels as values: presets, fixes, policies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from septum.arch.errors import UsageError
from septum.kvm.contention import POLICIES
from septum.kvm.kernel import FIXES, SITES, Kernel, kernels


def test_presets() -> None:
    assert "v6.16" in kernels()
    assert Kernel() == Kernel("v6.16")
    for name in kernels():
        kernel = Kernel(name)
        assert kernel.policies.keys() == SITES.keys()
        assert all(policy in SITES[site].policies for site, policy in kernel.policies.items())
        assert kernel.fixes is not None
        assert kernel.fixes <= FIXES.keys()


def test_every_policy_has_code() -> None:
    """Those of faults and of accepts are in their handlers; the others wrap a SEAMCALL."""
    handlers = ("fault", "accept")
    named = {policy for site in SITES.values() if site.name not in handlers for policy in site.policies}
    assert named == POLICIES.keys()


def test_fixes() -> None:
    kernel = Kernel().with_("state-locks", "mr-extend-bugs-vm")
    assert kernel.has("state-locks")
    assert not Kernel().has("state-locks")
    assert kernel.without("mr-extend-bugs-vm", "state-locks") == Kernel()
    assert not Kernel().without("flush-rechecks-cpu").has("flush-rechecks-cpu")


def test_policies() -> None:
    kernel = Kernel().with_policy("zap", "once")
    assert kernel.policies["zap"] == "once"
    assert kernel != Kernel()
    assert kernel.with_policy("zap", "kick-and-retry-once") == Kernel()


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
    (lambda: Kernel().with_policy("zap", "re-enter"), "cannot be used at call site zap; there are: kick"),
]


@pytest.mark.parametrize(("ask", "text"), UNKNOWN)
def test_unknown_names(ask: Callable[[], Kernel], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ask()
