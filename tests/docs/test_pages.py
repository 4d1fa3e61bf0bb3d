"""Every ``septum`` command in the README and in docs/ is run, and must print what the page shows."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import shared_data
from tests.docs.pages import Block, agrees, blocks, files

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRMWARE = "deb13-2025.02-OVMF.fd.xz"
"""Stands in for the OVMF.fd that the pages speak of: Debian's package ``ovmf``."""


def run(block: Block, folder: Path) -> list[tuple[int, str]]:
    """Runs a block's commands in one shell; their statuses and what they printed, stdout and stderr together."""
    script = "exec 2>&1\n" + "".join(
        f"{command.text}\n__status=$?; printf '\\0%s\\0' $__status; (exit $__status)\n" for command in block.commands
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    parts = done.stdout.split("\0")
    return [(int(status), printed) for printed, status in zip(parts[::2], parts[1::2], strict=False)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    found = blocks(page)
    for name, content in files(page).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    shared = shared_data()
    if shared is not None and any(block.mentions("OVMF.fd") for block in found):
        (tmp_path / "OVMF.fd").write_bytes(lzma.decompress((shared / "firmware" / FIRMWARE).read_bytes()))
    for block in found:
        if shared is None and block.mentions("OVMF.fd"):
            continue
        for command, (status, printed) in zip(block.commands, run(block, tmp_path), strict=True):
            place = f"{page.relative_to(ROOT)}:{command.line}: $ {command.text}"
            assert status == 0 or command.may_fail, f"{place}\nended with {status} and printed\n{printed}"
            if command.output:
                assert agrees(command.output, printed), f"{place}\nprinted\n{printed}"


def test_there_is_something_to_run() -> None:
    assert any(blocks(page) for page in PAGES)
