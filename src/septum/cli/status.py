"""``septum status``: a completion status of the TDX Module in words."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from septum.cli.main import BAD, GOOD
from septum.cli.options import Json, Quiet
from septum.cli.output import show


def status(
    code: Annotated[str, typer.Argument(metavar="CODE", help="A number such as 0x8000020000000092, or a name.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say what a TDX completion status means.

    Its name and class, the operand or other thing that it is about, and whether the same call can succeed when it is
    made again. Exit status 1 when neither TDX Module 1.5.01 nor Linux has such a status.
    """
    from septum.arch.status import code_by_name, decode
    from septum.report.tables import facts

    number = read_number(code)
    told = decode(code_by_name(code) if number is None else number)
    # A name alone says nothing about operands; only a number has details.
    about, operand = (None, None) if number is None else (told.detail_text, told.operand)
    record = {
        "code": f"{told.code:#018x}",
        "name": told.name,
        "class": told.status_class,
        "operand": operand,
        "details": told.details,
        "meaning": about,
        "error": told.error,
        "recoverable": told.recoverable,
        "fatal": told.fatal,
        "known": told.known,
    }
    words = {"class": told.status_class}
    if about:
        words["about"] = about
    if told.error:
        words["made again"] = "the same call may succeed" if told.recoverable else "the same call fails again"
    if told.fatal:
        words["fatal"] = "the TD is lost and can only be torn down"
    title = f"{told.name} ({told.code:#018x})" if told.known else f"{told.code:#018x}: not a status that is known"
    brief = f"{told.name}, {about}" if about else told.name
    show(record, brief, [facts(words, title)], as_json=as_json, quiet=quiet)
    return GOOD if told.known else BAD


def read_number(text: str) -> int | None:
    """The number that ``text`` writes, in decimal or hexadecimal; None when it writes none."""
    digits = text.strip().replace("_", "")
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", digits) or re.fullmatch(r"[0-9a-fA-F]{16}", digits):
        # Log lines sometimes leave the 0x out; no status is sixteen decimal digits long.
        return int(digits, 16)
    return int(digits) if re.fullmatch(r"[0-9]{1,20}", digits) else None
