"""Packaged tables of architecture facts and their reader.

A table is a text file of tab-separated columns; its first line names the columns. Numbers are hexadecimal unless the
module that loads a table says otherwise. Files are read when a table is first used, never at import.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def read_table(name: str) -> list[list[str]]:
    """The rows of table `name` (a path below this folder, without `.tsv`), without the line of column names."""
    lines = (FOLDER / f"{name}.tsv").read_text(encoding="ascii").splitlines()
    return [line.split("\t") for line in lines[1:]]
