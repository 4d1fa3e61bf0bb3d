"""The metadata interface: state of the module, of a TD and of a VCPU as fields with ids.

Which fields there are, who may read and write which of their bits, and in which order they follow each other is in
:mod:`septum.arch.metadata`. Here is what reading and writing them means:

- ``scope``: whose fields and for whom (:class:`Scope`), and looking an id up;
- ``storage``: where the model keeps each field;
- ``sys``, ``td``, ``vp``, ``l2``: fields that are computed, translated or checked one by one;
- ``elements`` and ``lists``: reading and writing one element, and making lists of many;
- ``import_list``, ``import_td``, ``import_cpuid``: writing such a list on the platform to which a TD migrates;
- ``answer``: the shape that all interface functions of this kind share.

Source: TDX Module 1.5.01, ``src/common/metadata_handlers/``.
"""

from septum.tdx.metadata.answer import answer_read, answer_write, clear_outputs
from septum.tdx.metadata.elements import next_field, read_element, write_element
from septum.tdx.metadata.import_list import Written, write_list
from septum.tdx.metadata.import_td import finish_immutable_state
from septum.tdx.metadata.lists import dump_list
from septum.tdx.metadata.scope import Scope, host_access

__all__ = [
    "Scope",
    "Written",
    "answer_read",
    "answer_write",
    "clear_outputs",
    "dump_list",
    "finish_immutable_state",
    "host_access",
    "next_field",
    "read_element",
    "write_element",
    "write_list",
]
