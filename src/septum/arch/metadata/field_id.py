"""The encoding of 64-bit metadata field ids; the table of their parts is in the package's docstring."""

from __future__ import annotations

from enum import IntEnum

from septum.arch.cpuid import SUBLEAF_NA

CPUID_VALUES_CLASS = 20
"""Class of the TDCS field CPUID_VALUES, whose field codes hold leaf and sub-leaf."""

_CONTEXT_BITS = 0b111 << 52
_RESERVED_BITS = 1 << 62 | 1 << 55 | 0b111 << 47 | 0xFF << 24
_PARTS: dict[str, tuple[int, int]] = {  # name -> lowest bit, mask
    "field_code": (0, 0xFF_FFFF),
    "element_size_code": (32, 0x3),
    "last_element_in_field": (34, 0xF),
    "last_field_in_sequence": (38, 0x1FF),
    "inc_size": (50, 0x1),
    "write_mask_valid": (51, 0x1),
    "context_code": (52, 0x7),
    "class_code": (56, 0x3F),
    "non_arch": (63, 0x1),
}


class Context(IntEnum):
    """Scope of a field: the module, a TD (TDR and TDCS), a vCPU (TDVPS and its VMCSs)."""

    SYS = 0
    TD = 1
    VP = 2


class FieldId(int):
    """A field id with its parts; a plain integer otherwise."""

    __slots__ = ()

    def _part(self, name: str) -> int:
        shift, mask = _PARTS[name]
        return self >> shift & mask

    @property
    def field_code(self) -> int:
        return self & 0xFF_FFFF

    @property
    def element_size_code(self) -> int:
        return self._part("element_size_code")

    @property
    def last_element_in_field(self) -> int:
        return self._part("last_element_in_field")

    @property
    def last_field_in_sequence(self) -> int:
        return self._part("last_field_in_sequence")

    @property
    def inc_size(self) -> int:
        return self._part("inc_size")

    @property
    def write_mask_valid(self) -> int:
        return self._part("write_mask_valid")

    @property
    def context_code(self) -> int:
        return self._part("context_code")

    @property
    def class_code(self) -> int:
        return self._part("class_code")

    @property
    def non_arch(self) -> int:
        return self._part("non_arch")

    @property
    def reserved(self) -> int:
        """The reserved bits, in place."""
        return self & _RESERVED_BITS

    def replace(self, **parts: int) -> FieldId:
        """A copy with some parts changed; a value too wide for its part is cut, as a bit field cuts it."""
        raw = int(self)
        for name, value in parts.items():
            shift, mask = _PARTS[name]
            raw = raw & ~(mask << shift) | (value & mask) << shift
        return FieldId(raw)

    @classmethod
    def of(cls, **parts: int) -> FieldId:
        """An id made of the named parts, all others 0."""
        return cls(0).replace(**parts)

    @property
    def is_null(self) -> bool:
        """All ones but for the context code: "before the first field" as input, "no more fields" as output."""
        return self | _CONTEXT_BITS == NULL_FIELD_ID

    @property
    def is_single_element(self) -> bool:
        """Whether it can name one element (`md_check_as_single_element_id`)."""
        return not (self.reserved or self.last_element_in_field or self.last_field_in_sequence)

    def is_sequence_header(self, context: Context, *, write: bool) -> bool:
        """Whether it can head a sequence in a metadata list (`md_check_as_sequence_header`)."""
        return self.context_code == context and not self.reserved and (write or not self.write_mask_valid)

    @property
    def cpuid_leaf(self) -> tuple[int, int]:
        """Leaf and sub-leaf of an id of class `CPUID_VALUES_CLASS`.

        Field code: element (0), sub-leaf (7:1), no sub-leaf (8), leaf (15:9), bit 31 of the leaf (16), reserved.
        """
        code = self.field_code
        leaf = (code >> 16 & 1) << 31 | code >> 9 & 0x7F
        return leaf, SUBLEAF_NA if code & 0x100 else code >> 1 & 0x7F

    def with_cpuid_leaf(self, leaf: int, subleaf: int, element: int = 0) -> FieldId:
        """A copy that names another leaf, sub-leaf (or `SUBLEAF_NA`) and element (0: EBX:EAX, 1: EDX:ECX)."""
        code = self.field_code & ~0x1_FFFF | (leaf >> 31) << 16 | (leaf & 0x7F) << 9 | (subleaf & 0x7F) << 1 | element
        return self.replace(field_code=code | (0x100 if subleaf == SUBLEAF_NA else 0))


NULL_FIELD_ID = FieldId((1 << 64) - 1)
