"""How far the model agrees with the real module, as figures that may only go up, and the page that shows them.

``python -m septum.lab.fidelity FOLDER`` runs everything recorded under FOLDER (vectors, contention, interleavings)
against the model, compares with the figures kept in the tests, and with ``--write`` renews them and docs/fidelity.md.
Without FOLDER it writes the page again from the figures and the source.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import septum
from septum.lab import matrix
from septum.lab.conform import conform_files

CONTENTION: Final = ("same-object", "init-and-lifecycle", "pairs")
INTERLEAVINGS: Final = (
    "pairs", "pairs_extra", "pairs_extra2", "programs", "rtmr", "servtd", "triples", "triples_extra",
)  # fmt: skip
FIGURES: Final = Path("tests/lab/fidelity.json")
PAGE: Final = Path("docs/fidelity.md")
NOTES: Final = Path("docs/fidelity-notes.md")


def measure(shared: Path, *, jobs: int = 1, interleavings: bool = True) -> dict[str, Any]:
    """Runs all recordings of a folder; the figures of :data:`FIGURES`."""
    files = sorted((shared / "vectors").glob("*/*.jsonl.gz"))
    report = conform_files(files, jobs=jobs, keep=0)
    pairs = {n: matrix.against(shared / "contention" / f"{n}.jsonl.gz", jobs=jobs) for n in CONTENTION}
    figures: dict[str, Any] = {
        "vectors": {
            leaf: {
                "events": tally.events,
                "passed": tally.passed,
                "statuses": sorted({answer.partition(" ")[0] for answer in report.statuses[leaf]}),
            }
            for leaf, tally in sorted(report.by_leaf.items())
        },
        "contention": _files(pairs),
        "contention by leaf": _by_leaf(pairs),
    }
    if interleavings:
        every = {
            n: matrix.every_interleaving(shared / "interleavings" / f"{n}.jsonl.gz", jobs=jobs) for n in INTERLEAVINGS
        }
        figures |= {"interleavings": _files(every), "interleavings by leaf": _by_leaf(every)}
    return figures


def _files(found: Mapping[str, matrix.Agreement]) -> dict[str, dict[str, int]]:
    return {name: {"pairs": agreement.pairs, "agree": agreement.agree} for name, agreement in found.items()}


def _by_leaf(found: Mapping[str, matrix.Agreement]) -> dict[str, dict[str, int]]:
    leaves = sorted({leaf for agreement in found.values() for leaf in agreement.by_leaf})
    counts = {leaf: [agreement.by_leaf.get(leaf, (0, 0)) for agreement in found.values()] for leaf in leaves}
    return {leaf: {"pairs": sum(n for n, _ in two), "agree": sum(n for _, n in two)} for leaf, two in counts.items()}


def worse(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What went down from ``kept`` to ``now``, in words."""
    found = []
    for part, names in kept.items():
        for name, figures in names.items():
            present = now.get(part, {}).get(name)
            if present is None:
                found.append(f"{part} {name}: is gone")
                continue
            good = "passed" if "passed" in figures else "agree"
            if present[good] < figures[good]:
                found.append(f"{part} {name}: {good} went from {figures[good]:,} to {present[good]:,}")
            if lost := sorted(set(figures.get("statuses", ())) - set(present.get("statuses", ()))):
                found.append(f"{part} {name}: no event has {', '.join(lost)} any more")
    return found


def page(figures: Mapping[str, Any], notes: str) -> str:
    """The Markdown of docs/fidelity.md."""
    vectors = figures["vectors"]
    events, passed = (sum(tally[key] for tally in vectors.values()) for key in ("events", "passed"))
    lines = [
        "# Fidelity",
        "",
        "This page is written by `python -m septum.lab.fidelity` from a run over recordings of the real TDX Module",
        "1.5.01; `tests/lab/fidelity.json` keeps its figures, and CI fails when one of them goes down.",
        "",
        f"**{passed:,} of {events:,}** recorded events agree in every register ({100 * passed / events:.3f} %).",
        "",
        *_agreements("Contention: call B while call A holds its k-th lock", figures["contention"], "pairs"),
        *_agreements(
            "Every interleaving: the set of outcomes equals the real one", figures.get("interleavings", {}), "scenarios"
        ),
        notes.strip(),
        "",
        "## Marked `unverified` in the source",
        "",
        *(f"- `{place}`: {text}" for place, text in unverified()),
        "",
        "## By interface function",
        "",
        "Events of vectors, pairs of calls of which the function is one, and scenarios of which every interleaving",
        "was compared. One figure: all agree; else agreeing of all. What sets the machine up (`write`, `set_tsc` ...)",
        "is an event too.",
        "",
        "| interface function | events | pairs | scenarios | statuses seen |",
        "| --- | ---: | ---: | ---: | --- |",
        *(_row(leaf, figures) for leaf in sorted({leaf for part in _BY_LEAF for leaf in figures.get(part, ())})),
    ]
    return "\n".join(lines) + "\n"


_BY_LEAF: Final = {"vectors": "events", "contention by leaf": "pairs", "interleavings by leaf": "pairs"}
"""The parts of the figures that are kept by interface function, and what they count."""


def _row(leaf: str, figures: Mapping[str, Any]) -> str:
    cells = []
    for part, counted in _BY_LEAF.items():
        tally = figures.get(part, {}).get(leaf)
        good = tally["passed" if counted == "events" else "agree"] if tally else 0
        cells.append("" if not tally else f"{good:,}" if good == tally[counted] else f"{good:,} of {tally[counted]:,}")
    statuses = figures["vectors"].get(leaf, {}).get("statuses", ())
    return f"| {leaf} | {' | '.join(cells)} | {', '.join(name for name in statuses if name != leaf)} |"


def _agreements(title: str, parts: Mapping[str, Mapping[str, int]], what: str) -> list[str]:
    rows = [f"| {name} | {tally['pairs']:,} | {tally['agree']:,} |" for name, tally in parts.items()]
    return [f"## {title}", "", f"| recording | {what} | agree |", "| --- | ---: | ---: |", *rows, ""]


def unverified() -> Iterator[tuple[str, str]]:
    """Every sentence of a docstring that says ``unverified``: where, and the sentence."""
    root = Path(septum.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path == Path(__file__):
            continue
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "unverified" in node.value:
                text = " ".join(node.value.split())
                for sentence in text.split(". "):
                    if "unverified" in sentence:
                        yield module, sentence.rstrip(".") + "."


def _main() -> int:
    import argparse  # noqa: PLC0415 -- only here
    import os  # noqa: PLC0415

    parser = argparse.ArgumentParser(prog="python -m septum.lab.fidelity", description="Measure the model's fidelity.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder with vectors, contention and interleavings")
    parser.add_argument("--write", action="store_true", help=f"renew {FIGURES} and {PAGE}")
    options = parser.parse_args()
    if options.folder is None:
        PAGE.write_text(page(json.loads(FIGURES.read_text()), NOTES.read_text()))
        return 0
    now = measure(options.folder, jobs=os.cpu_count() or 1)
    went_down = worse(json.loads(FIGURES.read_text()), now) if FIGURES.exists() else []
    print("\n".join(went_down) or "no figure went down")
    if options.write:
        FIGURES.write_text(json.dumps(now, indent=1) + "\n")
        PAGE.write_text(page(now, NOTES.read_text()))
    return 1 if went_down else 0


if __name__ == "__main__":
    raise SystemExit(_main())
