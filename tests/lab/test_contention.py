"""Contention: recorded pairs agree, the matrix says what the module does, and a broken lock is noticed."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from septum.arch.errors import UsageError
from septum.arch.sept import TDEL
from septum.core.trylocks import Mode, SeptEntryLock, Sharex, Taken
from septum.lab import contention, interleavings, matrix
from septum.lab.starts import runner_for


@pytest.mark.parametrize("name", ["same-object", "init-and-lifecycle"])
def test_recorded_pairs_agree(shared: Path, name: str) -> None:
    found = matrix.against(shared / "contention" / f"{name}.jsonl.gz")
    assert found.differ == []
    assert found.pairs == found.agree > 90


def test_a_sample_of_all_pairs_agrees(shared: Path) -> None:
    runner = runner_for()
    pairs = list(islice(contention.pairs_of(shared / "contention" / "pairs.jsonl.gz"), 0, None, 20))
    assert len(pairs) > 300
    assert [found for pair in pairs for found in contention.compare(runner, pair)] == []


@pytest.mark.slow
def test_all_pairs_agree(shared: Path) -> None:
    assert matrix.against(shared / "contention" / "pairs.jsonl.gz", jobs=2).differ == []


@pytest.mark.parametrize("name", ["rtmr", "triples", "servtd"])
def test_recorded_interleavings_agree(shared: Path, name: str) -> None:
    found = matrix.every_interleaving(shared / "interleavings" / f"{name}.jsonl.gz")
    assert found.differ == []
    assert found.pairs == found.agree >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "pairs_extra", "pairs_extra2", "programs", "triples_extra"])
def test_all_interleavings_agree(shared: Path, name: str) -> None:
    assert matrix.every_interleaving(shared / "interleavings" / f"{name}.jsonl.gz", jobs=2).differ == []


def scenario_named(shared: Path, name: str, level: str) -> dict[str, object]:
    for file in ("pairs", "pairs_extra"):
        for scenario in interleavings.scenarios_of(shared / "interleavings" / f"{file}.jsonl.gz"):
            if (scenario["name"], scenario["level"]) == (name, level):
                return scenario
    raise AssertionError(f"{name} at {level} is not among the recordings")


def test_the_module_can_be_made_to_halt_by_two_host_calls(shared: Path) -> None:
    """AUG writes the entry before it sets the PAMT's page type; RELOCATE of the same page in between is fatal."""
    scenario = scenario_named(shared, "PAGE.AUG/4K|PAGE.RELOCATE|same_gpa", "op")
    machine = runner_for().machine_at("prefix/all_states")
    outcomes, _states = interleavings.explore(machine, scenario)
    assert any(json.loads(outcome).get("halt") for outcome in outcomes)


@pytest.mark.parametrize("broken", ["entry lock never busy", "tree lock never busy", "no host priority"])
def test_a_broken_lock_is_noticed(shared: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    entry_attempt, tree_attempt = SeptEntryLock._attempt, Sharex._attempt

    async def entry(self: SeptEntryLock, mode: Mode, guest: bool) -> Taken:
        word = self.words[self.key]
        if broken == "entry lock never busy":
            self.words.store(self.key, word & ~TDEL)
            return await entry_attempt(self, mode, guest)
        taken = await entry_attempt(self, mode, guest)
        if taken is Taken.BUSY and not guest and broken == "no host priority":
            self.words.store(self.key, word)
        return taken

    async def tree(self: Sharex, mode: Mode, guest: bool) -> Taken:
        if broken == "tree lock never busy" and self.label == "SEPT_TREE":
            return Taken.YES
        return await tree_attempt(self, mode, guest)

    monkeypatch.setattr(SeptEntryLock, "_attempt", entry)
    monkeypatch.setattr(Sharex, "_attempt", tree)
    monkeypatch.setattr(Sharex, "release_now", lambda self, mode: None)
    scenario = scenario_named(
        shared,
        "ACCEPT4K|BLOCK4K|same_gpa" if broken != "tree lock never busy" else "AUG4K|BLOCK4K|same_gpa",
        "op",
    )
    assert not interleavings.compare(runner_for(), scenario).agrees


def test_the_matrix_has_the_conflicts_that_kvm_works_around() -> None:
    conflicts = {(c.a, c.b, c.answer) for c in matrix.model_matrix()}
    for a, b, answer in (
        ("PAGE.AUG/4K", "RANGE.BLOCK/4K", "TDX_OPERAND_BUSY(SEPT_TREE)"),
        ("VP.ENTER", "TRACK", "TDX_OPERAND_BUSY(TD_EPOCH)"),
        ("TRACK", "VP.ENTER", "TDX_OPERAND_BUSY(TD_EPOCH)"),
        ("VP.ENTER", "VP.FLUSH", "TDX_OPERAND_BUSY(RCX)"),
        ("MR.EXTEND", "VP.CREATE", "TDX_OPERAND_BUSY(RDX)"),
    ):
        assert (a, b, answer) in conflicts
    assert not any(c[:2] == ("PAGE.AUG/4K", "PAGE.AUG/2M") for c in conflicts), "shared locks do not conflict"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}'])
def test_files_that_are_no_recordings_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text + "\n")
    for read in (contention.pairs_of, interleavings.scenarios_of):
        with pytest.raises(UsageError, match=r"x\.jsonl: line 1: "):
            list(read(path))
    with pytest.raises(UsageError, match="there is no such file"):
        list(contention.pairs_of(tmp_path / "absent"))
    with pytest.raises(UsageError, match="this is a folder"):
        list(contention.pairs_of(tmp_path))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"A": 1}\n' * 100)[:-20])
    with pytest.raises(UsageError, match=r"x\.jsonl\.gz: line \d+: "):
        list(contention.pairs_of(path))
