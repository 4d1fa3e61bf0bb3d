"""Files and file descriptors: what keeps a VM alive.

A file is released when its last reference goes. References dropped inside the kernel do that only when the thread
returns to userspace (``task_work``), when it holds no locks any more.
Source: Linux 6.16, ``fs/file_table.c``, ``fs/file.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from errno import EBADF
from typing import TYPE_CHECKING, Any, Final

from septum.core.cells import Fixed, Shared, SharedMap
from septum.core.steps import Step, current_task

if TYPE_CHECKING:
    from septum.kvm.host import Host

FIRST_FD: Final = 3
"""0 to 2 are the terminal."""

Release = Callable[[Any], Coroutine[Step, None, None]]


class File(Shared):
    """``struct file``: what it stands for (``private_data``), how it is released, and its reference count."""

    kind: str
    private_data: Any
    release: Release
    refs: int = 1


def get_file_active(file: File | None) -> File | None:
    """``get_file_active``: the file with one more reference; None if it is being released."""
    if file is None or not file.refs:
        return None
    file.refs += 1
    return file


def fput(host: Host, file: File) -> None:
    """``fput``: drops a reference; the last one has the caller release the file on its way to userspace."""
    file.refs -= 1
    if not file.refs:
        name = current_task().name
        host.task_work[name] = (*host.task_work[name], file)


async def task_work_run(host: Host) -> None:
    """``task_work_run``: releases what the current task was the last to use."""
    name = current_task().name
    while files := host.task_work.pop(name, ()):
        for file in files:
            await file.release(file.private_data)


class FileTable(Fixed):
    """``struct files_struct`` of one process."""

    def __init__(self, name: str) -> None:
        self._files: SharedMap[int, File] = SharedMap(f"{name}.fds", iterated=True)

    def install(self, file: File) -> int:
        """``fd_install`` with the lowest free descriptor."""
        fd = FIRST_FD
        while fd in self._files:
            fd += 1
        self._files[fd] = file
        return fd

    def get(self, fd: int) -> File | None:
        """``fget``: the file with one more reference; None for -EBADF."""
        return get_file_active(self._files[fd])

    def peek(self, fd: int) -> File | None:
        """The file, for reports: no reference is taken."""
        return self._files[fd]

    def close(self, host: Host, fd: int) -> int:
        """``close``: 0 or -EBADF."""
        file = self._files.pop(fd, None)
        if file is None:
            return -EBADF
        fput(host, file)
        return 0

    def open_fds(self) -> list[int]:
        """All descriptors, ascending."""
        return [fd for fd, _ in self._files.sorted_items()]
