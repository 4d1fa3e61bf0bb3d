"""A KVM_MEMORY_ENCRYPT_OP in progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septum.kvm.user_memory import UserPtr


class Cmd:
    """``struct kvm_tdx_cmd`` in the kernel: ``data`` is where userspace's structure is, ``hw_error`` is an output."""

    __slots__ = ("data", "flags", "hw_error", "id")

    def __init__(self, id_: int, flags: int = 0, data: UserPtr = 0, hw_error: int = 0) -> None:
        self.id = id_
        self.flags = flags
        self.data = data
        self.hw_error = hw_error
