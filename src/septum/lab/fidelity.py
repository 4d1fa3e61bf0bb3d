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
    figures: dict[str, Any] = {
        "vectors": {
            leaf: {
                "events": tally.events,
                "passed": tally.passed,
                "statuses": len({answer.partition(" ")[0] for answer in report.statuses[leaf]}),
            }
            for leaf, tally in sorted(report.by_leaf.items())
        },
        "contention": {
            name: _agreement(matrix.against(shared / "contention" / f"{name}.jsonl.gz", jobs=jobs))
            for name in CONTENTION
        },
    }
    if interleavings:
        figures["interleavings"] = {
            name: _agreement(matrix.every_interleaving(shared / "interleavings" / f"{name}.jsonl.gz", jobs=jobs))
            for name in INTERLEAVINGS
        }
    return figures


def _agreement(found: matrix.Agreement) -> dict[str, int]:
    return {"pairs": found.pairs, "agree": found.agree}


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
        f"**{passed:,} of {events:,}** recorded answers agree in every register ({100 * passed / events:.3f} %).",
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
        "| interface function | events | agree | different statuses |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {leaf} | {tally['events']:,} | {tally['passed']:,} | {tally['statuses']} |"
            for leaf, tally in vectors.items()
        ),
    ]
    return "\n".join(lines) + "\n"


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
