"""General-purpose registers of one SEAMCALL or TDCALL, as the caller left them and as the callee leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: In the order of their numbers; RSP is not an operand of any leaf.
GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
U64: Final = (1 << 64) - 1
_RSP: Final = 4
GPR_BIT: Final = tuple(1 << (i if i < _RSP else i + 1) for i in range(len(GPR_NAMES)))
"""Bit of each register of ``GPR_NAMES`` in the mask of TDG.VP.VMCALL."""


class Regs:
    """Fifteen 64-bit registers, all 0 unless given."""

    __slots__ = GPR_NAMES
    rax: int
    rcx: int
    rdx: int
    rbx: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int

    def __init__(
        self, rax: int = 0, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0, r10: int = 0, r11: int = 0
    ) -> None:
        self.rax, self.rcx, self.rdx, self.r8, self.r9, self.r10, self.r11 = rax, rcx, rdx, r8, r9, r10, r11
        self.rbx = self.rbp = self.rsi = self.rdi = self.r12 = self.r13 = self.r14 = self.r15 = 0

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Regs:
        """Registers from a mapping of lower-case names."""
        regs = cls()
        for name, value in values.items():
            setattr(regs, name, value)
        return regs

    @classmethod
    def from_tuple(cls, values: tuple[int, ...]) -> Regs:
        """Registers from 15 values in the order of :data:`GPR_NAMES`."""
        regs = cls.__new__(cls)
        (
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10, regs.r11,
            regs.r12, regs.r13, regs.r14, regs.r15,
        ) = values  # fmt: skip
        return regs

    def to_tuple(self) -> tuple[int, ...]:
        """The 15 values in the order of :data:`GPR_NAMES`."""
        return (
            self.rax, self.rcx, self.rdx, self.rbx, self.rbp, self.rsi, self.rdi, self.r8, self.r9, self.r10, self.r11,
            self.r12, self.r13, self.r14, self.r15,
        )  # fmt: skip

    def copy(self, other: Regs) -> None:
        """Takes over all values of other registers."""
        for name in GPR_NAMES:
            setattr(self, name, getattr(other, name))

    def values(self) -> dict[str, int]:
        """All registers by name."""
        return dict(zip(GPR_NAMES, self.to_tuple(), strict=True))

    def __repr__(self) -> str:
        return "Regs(" + ", ".join(f"{n}={v:#x}" for n, v in self.values().items() if v) + ")"
