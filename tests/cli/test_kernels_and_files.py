"""``septum run`` and ``explore``: which kernel, scenarios of a user's own file, and what came of many runs."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from septum.arch.errors import UsageError
from septum.kvm.kernel import FIXES, SITES, Kernel
from septum.lab.kernels import changed_kernel, kernel_and_policy, read_kernel
from tests.cli.calling import Septum

OWN = '''
from septum.core.cells import Shared
from septum.core.steps import Program, Task, step
from septum.lab.scenario import Parameter, scenario


class Counter(Shared):
    value: int = 0


@scenario(Parameter("most", 9, "the count that must not be passed"))
def counting(most):
    """Two tasks count.

    Nobody counts too far.
    """
    counter = Counter("counter")

    async def count():
        for _ in range(2):
            await step("count")
            counter.value += 1
            assert counter.value <= most, f"counted to {counter.value}"

    return [Program(Task("a", cpu=0), count), Program(Task("b", cpu=1), count)], []


@scenario()
def stuck():
    """Nobody ever ends."""

    async def spin():
        while True:
            await step("spin")

    return [Program(Task("a", cpu=0), spin)], []
'''


def test_a_file_of_ones_own(septum: Septum) -> None:
    (septum.home / "own.py").write_text(OWN)
    assert septum("explore", "own.py:counting", "--json").json["verdict"] == "proved"
    found = septum("explore", "own.py:counting", "--param", "most=3", "--json")
    assert found.status == 1
    assert (found.json["property"], found.json["scenario"]) == ("assertion", "own.py:counting")
    assert "counted to 4" in found.json["message"]
    assert found.json["counterexample"].startswith("counting-assertion-")
    replayed = septum("replay", found.json["counterexample"], "--json").json
    assert (replayed["same"], replayed["property"]) == (True, "assertion")


def test_runs_that_do_not_end(septum: Septum) -> None:
    (septum.home / "own.py").write_text(OWN)
    answer = septum("run", "own.py:stuck", "--max-steps", "50", "--times", "3", "--json")
    record = answer.json
    assert (answer.status, record["property"]) == (1, "every run ends")
    assert [(e["runs"], e["first_seed"]) for e in record["endings"]] == [(3, 0)]
    assert septum("replay", record["counterexample"], "--json").json["same"] is True


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        (None, "own.py", "no such file"),
        ("x = (", "own.py", "own.py:1: "),
        ("import nothing_like_this", "own.py", "own.py:1: ModuleNotFoundError"),
        ("x = 1", "own.py", "has no scenario"),
        (OWN, "own.py", "has no scenario ''; it has: counting, stuck"),
        (OWN, "own.py:other", "it has: counting, stuck"),
        (OWN.replace("return [Program", "return [1 / 0, Program"), "own.py:stuck", "ZeroDivisionError"),
    ],
)
def test_a_bad_file_is_one_line(septum: Septum, content: str | None, name: str, complaint: str) -> None:
    if content is not None:
        (septum.home / "own.py").write_text(content)
    assert complaint in septum("run", name).misuse()


def test_the_kernel_by_options(septum: Septum) -> None:
    plain = septum("run", "finalize-race", "--times", "30", "--json").json
    assert (plain["kernel"], plain["policy"], plain["verdict"]) == ("v6.16", None, "violated")
    assert plain["seamcalls"]["TDH.MR.FINALIZE"]["TDX_SUCCESS"] > 0
    assert sum(ending["runs"] for ending in plain["endings"]) == plain["executions"] == 30
    fixed = septum(
        "run", "finalize-race", "--times", "30", "--with", "state-locks", "--policy", "zap=once", "--json"
    ).json
    assert (fixed["kernel"], fixed["policy"], fixed["verdict"]) == ("v6.16,+state-locks", "zap=once", "sampled")
    assert {tuple(ending["results"]) for ending in fixed["endings"]} == {("main", "vCPU 1")}


@pytest.mark.parametrize(
    "options",
    [
        ("finalize-race", "--kernel", "v1.0"),
        ("finalize-race", "--with", "nothing"),
        ("finalize-race", "--without", "state-locks"),
        ("finalize-race", "--policy", "nothing"),
        ("finalize-race", "--policy", "nowhere=once"),
        ("finalize-race", "--param", "kernel=v6.16,huh"),
        ("abba", "--kernel", "v6.16"),
    ],
)
def test_a_kernel_that_cannot_be_is_one_line(septum: Septum, options: tuple[str, ...]) -> None:
    septum("run", *options).misuse()


@given(st.text() | st.lists(st.sampled_from([*FIXES, *SITES, "v6.16", "once", ",", "+", "-", "="])).map("".join))
def test_any_text_is_a_kernel_or_a_misuse(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(read_kernel(text), Kernel)


def test_changes_add_up() -> None:
    text = changed_kernel(
        "v6.16", fixes=["state-locks"], without=["flush-rechecks-cpu"], policies=["kick-without-flag"]
    )
    kernel = read_kernel(text)
    assert kernel.has("state-locks")
    assert not kernel.has("flush-rechecks-cpu")
    assert kernel.policies["block"] == "kick-without-flag"
    assert kernel_and_policy(text) == ("v6.16,+state-locks,-flush-rechecks-cpu", "zap=kick-without-flag")
