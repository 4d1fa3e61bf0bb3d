"""The lines of the model of the TDX Module at which a lock is taken or promoted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import septum.tdx


def lines_with_locks() -> Iterator[tuple[Path, tuple[str, int]]]:
    """Files, each with the name and line of one place."""
    for path in Path(septum.tdx.__file__).parent.rglob("*.py"):
        if path.name == "held.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Await) and isinstance(call := node.value, ast.Call):
                method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                if method in ("take", "promote"):
                    yield path, (path.name, node.lineno)


def is_of_migration(path: Path) -> bool:
    """Whether only migration comes here, for which nothing was recorded."""
    return "migration" in f"{path.parent.name}/{path.name}"
