"""Metadata field tables of TDX Module 1.5.01, and the encoding of their 64-bit field ids (`MD_FIELD_ID` in the ABI).

| bits | part | meaning |
| --- | --- | --- |
| 23:0 | field_code | place in the class; a VMCS encoding; for CPUID values see `FieldId.cpuid_leaf` |
| 33:32 | element_size_code | elements of 1 << code bytes |
| 37:34 | last_element_in_field | sequence headers: elements in each field, minus one |
| 46:38 | last_field_in_sequence | sequence headers: fields that follow, minus one |
| 50 | inc_size | consecutive elements are 1 (0) or 2 (1: VMCS) field codes apart |
| 51 | write_mask_valid | sequence headers: the first element is a write mask |
| 54:52 | context_code | `Context`; interface functions overwrite it with their own |
| 61:56 | class_code | group of fields |
| 63 | non_arch | may change between modules; plays no part in look-up |

All other bits are reserved and must be 0. One table entry stands for `fields` consecutive fields of `elements` elements
each. Look-up compares only class and field code, so a wrong size code, inc_size or non_arch does not matter for a
single element (`metadata_generic.c`).

The VP context is three tables in a row: the TD VMCS (class 0), TDVPS, and inside it, once per L2 VM at the place of
its entry L2_VMCS_n, the L2 VMCS fields (classes 36, 44 and 52). The last entries of the TD and VP contexts belong to
one L2 VM each and exist only if the TD has that many.

Masks tell which bits of an element someone may read or write; 0 means not at all. `special_read` and `special_write`
mark entries whose value the module computes, translates or checks field by field; the pair of table and entry name
says which.
"""

from septum.arch.metadata.field_id import (
    CPUID_VALUES_CLASS,
    NULL_FIELD_ID,
    Context,
    FieldId,
)
from septum.arch.metadata.order import (
    Element,
    Structure,
    all_ids,
    locate,
    next_id,
)
from septum.arch.metadata.tables import (
    MAX_ELEMENTS_IN_FIELD,
    MAX_FIELDS_IN_SEQUENCE,
    MAX_L2_VMS,
    Access,
    Attribute,
    Field,
    FieldTable,
    VmcsInit,
    field_table,
    sys_constants,
    td_vmcs_init,
)

__all__ = [
    "CPUID_VALUES_CLASS",
    "MAX_ELEMENTS_IN_FIELD",
    "MAX_FIELDS_IN_SEQUENCE",
    "MAX_L2_VMS",
    "NULL_FIELD_ID",
    "Access",
    "Attribute",
    "Context",
    "Element",
    "Field",
    "FieldId",
    "FieldTable",
    "Structure",
    "VmcsInit",
    "all_ids",
    "field_table",
    "locate",
    "next_id",
    "sys_constants",
    "td_vmcs_init",
]
