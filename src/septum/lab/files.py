"""Files that Septum writes: complete, or not there."""

from __future__ import annotations

from pathlib import Path

from septum.arch.errors import UsageError


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a name of its own first and renames it then, so that nobody ever sees a part of it.

    :raises UsageError: when the folder cannot be written to.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UsageError(f"{path}: cannot be written ({error.strerror}); change to a folder that can") from None
