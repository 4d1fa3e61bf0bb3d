"""The entries of the five field tables, who may read and write them, and other values that come as tables."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, Flag
from functools import cache, cached_property

from septum.arch.data import read_table
from septum.arch.metadata.field_id import FieldId

MAX_L2_VMS = 3
MAX_ELEMENTS_IN_FIELD = 16
MAX_FIELDS_IN_SEQUENCE = 512


class Access(Enum):
    """Who reads or writes; a host's rights depend on ATTRIBUTES.DEBUG of the TD (of SYS fields: `HOST`)."""

    HOST = "host"
    HOST_DEBUG = "host, debug TD"
    GUEST = "guest"
    SERVICE_TD = "service TD"
    EXPORT_IMMUTABLE = "export of immutable state"
    EXPORT_MUTABLE = "export of mutable state"
    IMPORT_IMMUTABLE = "import of immutable state"
    IMPORT_MUTABLE = "import of mutable state"


class Attribute(Flag):
    """What a field's value is (address kinds are checked on writes), and to which VMs it applies."""

    HPA = 0x01
    GPA = 0x02
    PRIVATE = 0x04
    SHARED = 0x08
    VM_L1 = 0x10
    VM_L2 = 0x20


_EXPORTED_IMMUTABLE = frozenset({"IE", "IES", "IEME", "IESME"})
_IMPORTED: Mapping[Access, frozenset[str]] = {
    Access.IMPORT_IMMUTABLE: frozenset({"MB", "CB", "MBO", "CBO", "IB", "IBS"}),
    Access.IMPORT_MUTABLE: frozenset({"ME", "CE", "MEO", "CEO", "IE", "IES", "IEME", "IESME"}),
}
_REQUIRED: Mapping[Access, frozenset[str]] = {
    Access.IMPORT_IMMUTABLE: frozenset({"MB", "CB"}),
    Access.IMPORT_MUTABLE: frozenset({"ME", "CE", "IESME"}),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One table entry: `fields` consecutive fields of `elements` elements each."""

    name: str
    id: FieldId
    fields: int
    elements: int
    offset: int
    """Bytes from the start of the structure to the first element; 0 for SYS and VMCS fields."""
    attributes: Attribute
    host_read: int
    host_write: int
    debug_read: int
    debug_write: int
    guest_read: int
    guest_write: int
    migtd_read: int
    migtd_write: int
    export_mask: int
    import_mask: int
    mig_export: str
    """Migration kind on export: `MB` (immutable), `ME` (mutable) or empty."""
    mig_import: str
    """Migration kind on import: M or C (set or compare), B or E (immutable or mutable), O (optional); I: initialised
    locally, S: by special code. Empty: never imported."""
    special_read: bool
    special_write: bool

    @property
    def element_size(self) -> int:
        """Bytes."""
        return 1 << self.id.element_size_code

    @property
    def element_mask(self) -> int:
        """All bits of an element."""
        return (1 << 8 * self.element_size) - 1

    @property
    def stride(self) -> int:
        """Field codes from one element to the next."""
        return self.id.inc_size + 1

    @property
    def codes(self) -> range:
        """All field codes the entry answers to, those between the elements of a VMCS field included."""
        first = self.id.field_code
        return range(first, first + self.fields * self.elements * self.stride)

    def starts_field(self, field_id: FieldId) -> bool:
        """Whether the id names the first element of a field, as sequences need (`md_is_id_start_of_field`)."""
        steps, between = divmod(field_id.field_code - self.id.field_code, self.stride)
        return not between and steps % self.elements == 0

    def read_mask(self, access: Access) -> int:
        """Readable bits (`md_get_rd_wr_mask`)."""
        match access:
            case Access.HOST:
                return self.host_read
            case Access.HOST_DEBUG:
                return self.debug_read
            case Access.GUEST:
                return self.guest_read
            case Access.SERVICE_TD:
                return self.migtd_read
            case Access.EXPORT_IMMUTABLE:
                exported = self.mig_export == "MB" or self.mig_import in _EXPORTED_IMMUTABLE
                return self.export_mask if exported else 0
            case Access.EXPORT_MUTABLE:
                return self.export_mask if self.mig_export == "ME" else 0
            case Access.IMPORT_IMMUTABLE | Access.IMPORT_MUTABLE:
                return (1 << 64) - 1

    def write_mask(self, access: Access) -> int:
        """Writable bits (`md_get_rd_wr_mask`)."""
        match access:
            case Access.HOST:
                return self.host_write
            case Access.HOST_DEBUG:
                return self.debug_write
            case Access.GUEST:
                return self.guest_write
            case Access.SERVICE_TD:
                return self.migtd_write
            case Access.EXPORT_IMMUTABLE | Access.EXPORT_MUTABLE:
                return 0
            case Access.IMPORT_IMMUTABLE | Access.IMPORT_MUTABLE:
                return self.import_mask if self.mig_import in _IMPORTED[access] else 0

    def is_required(self, access: Access) -> bool:
        """Whether an import fails without this field (`is_required_entry`)."""
        return self.mig_import in _REQUIRED.get(access, ())


class FieldTable:
    """The entries of one table in the module's order."""

    def __init__(self, name: str, entries: tuple[Field, ...], per_l2_vm: int) -> None:
        self.name = name
        self.entries = entries
        self._per_l2_vm = per_l2_vm

    def length(self, l2_vms: int) -> int:
        """Entries that exist for a TD with `l2_vms` L2 VMs."""
        return len(self.entries) - self._per_l2_vm * (MAX_L2_VMS - l2_vms)

    @cached_property
    def _by_class(self) -> Mapping[int, tuple[list[int], list[int]]]:
        """Class code -> first field codes and indexes of its entries, in ascending order."""
        classes: dict[int, tuple[list[int], list[int]]] = {}
        for index, entry in enumerate(self.entries):
            starts, indexes = classes.setdefault(entry.id.class_code, ([], []))
            starts.append(entry.id.field_code)
            indexes.append(index)
        return classes

    def find(self, class_code: int, field_code: int, l2_vms: int = 0) -> int | None:
        """Index of the entry that answers to a class and field code (`md_find_entry_idx`)."""
        starts, indexes = self._by_class.get(class_code, ([], []))
        position = bisect_right(starts, field_code) - 1
        if position < 0:
            return None
        index = indexes[position]
        found = field_code in self.entries[index].codes and index < self.length(l2_vms)
        return index if found else None

    def named(self, name: str) -> Field:
        """The entry of that name. Raises KeyError if there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, Field]:
        return {entry.name: entry for entry in self.entries}


_MASKS = (
    "host_read",
    "host_write",
    "debug_read",
    "debug_write",
    "guest_read",
    "guest_write",
    "migtd_read",
    "migtd_write",
    "export_mask",
    "import_mask",
)


def _parse(row: list[str]) -> Field:
    name, raw, fields, elements, offset, attributes, *masks, mig_export, mig_import, special = row
    field_id = FieldId(int(raw, 16))
    full = (1 << (8 << field_id.element_size_code)) - 1
    letters = {"h": 0x01, "g": 0x02, "p": 0x04, "s": 0x08, "A": 0x10, "B": 0x20, ".": 0}
    bits = [0 if mask == "." else full if mask == "*" else int(mask, 16) for mask in masks]
    return Field(
        name=name,
        id=field_id,
        fields=int(fields),
        elements=int(elements),
        offset=int(offset, 16),
        attributes=Attribute(sum(letters[letter] for letter in attributes)),
        **dict(zip(_MASKS, bits, strict=True)),
        mig_export=mig_export.strip("."),
        mig_import=mig_import.strip("."),
        special_read="r" in special,
        special_write="w" in special,
    )


@cache
def field_table(name: str) -> FieldTable:
    """The table `sys`, `td`, `vp` (TDVPS), `td_vmcs` or `l2_vmcs`."""
    per_l2_vm = {"td": 1, "vp": 3}.get(name, 0)
    return FieldTable(name, tuple(map(_parse, read_table(f"metadata/{name}"))), per_l2_vm)


@cache
def sys_constants() -> Mapping[str, int]:
    """SYS fields whose value is the same wherever module 1.5.01 runs: name -> value.

    The other SYS fields depend on the platform, on hand-off data, or on the CPUID tables. BUILD_DATE and BUILD_NUM are
    those of the build that the recorded vectors were made with.
    """
    return {name: int(value, 16) for name, value in read_table("metadata/sys_constants")}


@dataclass(frozen=True, slots=True)
class VmcsInit:
    """The value TDH.VP.INIT gives to a field of every VMCS of the vCPU, L1 or L2 (`td_vmcs_init.c`)."""

    encoding: int
    value: int
    migrated: bool
    """Part of the migrated state, hence not initialised on import."""


@cache
def td_vmcs_init() -> tuple[VmcsInit, ...]:
    """Initial VMCS field values in the order they are written; all others are 0 or depend on the TD or the host.

    ENCLV-exiting (0x2036) is written only if the execution controls enable it.
    """
    return tuple(
        VmcsInit(int(encoding, 16), int(value, 16), migrated == "y")
        for encoding, value, migrated, _ in read_table("metadata/td_vmcs_init")
    )
