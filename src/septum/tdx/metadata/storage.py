"""Where the model keeps the elements of each table entry.

A field that interface functions act upon is an attribute of the TD's or VCPU's records, under the field's name in
lower case: an integer, or, for a field of several elements, a tuple, bytes (one element for every 8) or a tuple of
bytes. VMCS fields are in ``Vp.vmcs``. All other fields are in ``Td.fields`` and ``Vp.fields``, keyed by name and
element number. Fields of one kind have another place: :data:`_ELSEWHERE`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from septum.arch.metadata import Element, Structure
from septum.core.cells import cells_of
from septum.tdx.metadata.scope import Scope
from septum.tdx.registers import GPR_NAMES
from septum.tdx.state.td import FIRST_L2_SEPT_ROOT_PAGE, SEPT_ROOT_PAGE, Tdcs, Tdr
from septum.tdx.state.vp import L2_VM_SHIFT, Tdvps, VeInfo

QWORD = 8
ALL_ONES = (1 << 64) - 1


class Store(NamedTuple):
    """How to read and write the elements of one table entry, by element number."""

    read: Callable[[Scope, int], int]
    write: Callable[[Scope, int, int], None]


def read(scope: Scope, element: Element) -> int:
    """What the module has stored in an element."""
    if element.structure is Structure.VMCS:
        return scope.of_vp.vmcs[element.vm << L2_VM_SHIFT | element.offset]
    return store(element.structure, element.field.name).read(scope, element.number)


def write(scope: Scope, element: Element, value: int) -> None:
    """Stores an element."""
    if element.structure is Structure.VMCS:
        scope.of_vp.vmcs.store(element.vm << L2_VM_SHIFT | element.offset, value)
    else:
        store(element.structure, element.field.name).write(scope, element.number, value)


@cache
def store(structure: Structure, name: str) -> Store:
    """The place of a field of TDR, TDCS or TDVPS."""
    special = _ELSEWHERE.get(name)
    if special is not None:
        return special
    record, owner = _RECORDS[structure]
    attribute = name.lower()
    if attribute in cells_of(record):
        return _attribute(owner, attribute, record._defaults.get(attribute, 0))
    return _sparse("vp" if structure is Structure.TDVPS else "td", name)


def _attribute(owner: Callable[[Scope], Any], name: str, default: object) -> Store:
    if isinstance(default, bytes):
        return _packed(owner, name)
    if not isinstance(default, tuple):
        return _scalar(owner, name)
    return _packed_rows(owner, name) if default and isinstance(default[0], bytes) else _row(owner, name)


def _scalar(owner: Callable[[Scope], Any], name: str) -> Store:
    """An integer; elements after the first do not exist for the model and are 0."""

    def get(scope: Scope, number: int) -> int:
        return 0 if number else int(getattr(owner(scope), name))

    def put(scope: Scope, number: int, value: int) -> None:
        if not number:
            setattr(owner(scope), name, value)

    return Store(get, put)


def _row(owner: Callable[[Scope], Any], name: str) -> Store:
    """A tuple of integers; elements beyond its end are 0."""

    def get(scope: Scope, number: int) -> int:
        row = getattr(owner(scope), name)
        return int(row[number]) if number < len(row) else 0

    def put(scope: Scope, number: int, value: int) -> None:
        row = getattr(owner(scope), name)
        row += (0,) * (number - len(row))
        setattr(owner(scope), name, (*row[:number], value, *row[number + 1 :]))

    return Store(get, put)


def _packed(owner: Callable[[Scope], Any], name: str) -> Store:
    """Bytes, eight to an element."""

    def get(scope: Scope, number: int) -> int:
        return int.from_bytes(getattr(owner(scope), name)[QWORD * number : QWORD * (number + 1)], "little")

    def put(scope: Scope, number: int, value: int) -> None:
        setattr(owner(scope), name, _with_qword(getattr(owner(scope), name), number, value))

    return Store(get, put)


def _with_qword(row: bytes, number: int, value: int) -> bytes:
    return row[: QWORD * number] + value.to_bytes(QWORD, "little") + row[QWORD * (number + 1) :]


def _packed_rows(owner: Callable[[Scope], Any], name: str) -> Store:
    """A tuple of bytes of equal length, eight to an element."""

    def get(scope: Scope, number: int) -> int:
        rows = getattr(owner(scope), name)
        row, place = divmod(number, len(rows[0]) // QWORD)
        return int.from_bytes(rows[row][QWORD * place : QWORD * (place + 1)], "little")

    def put(scope: Scope, number: int, value: int) -> None:
        rows = getattr(owner(scope), name)
        row, place = divmod(number, len(rows[0]) // QWORD)
        setattr(owner(scope), name, (*rows[:row], _with_qword(rows[row], place, value), *rows[row + 1 :]))

    return Store(get, put)


def _sparse(owner: str, name: str, at_rest: int = 0) -> Store:
    """Entries of ``fields``; ``at_rest`` is what an element that nobody wrote holds."""

    def get(scope: Scope, number: int) -> int:
        return int(getattr(scope, owner).fields[name, number]) ^ at_rest

    def put(scope: Scope, number: int, value: int) -> None:
        getattr(scope, owner).fields.store((name, number), value ^ at_rest)

    return Store(get, put)


def _read_only(name: str) -> Callable[[Scope, int, int], None]:
    def put(scope: Scope, number: int, value: int) -> None:
        raise AssertionError(f"{name} cannot be written as metadata")

    return put


def _sept_root(page: int, name: str) -> Store:
    """The entries of a Secure EPT root page, which are where all entries of the L1 VM or of L2 VMs are."""

    def get(scope: Scope, number: int) -> int:
        root = scope.module.pa_format.address(scope.of_td.tdr.tdcx_pa[page])
        entries = scope.module.sept if page == SEPT_ROOT_PAGE else scope.module.sept_l2
        return entries[root + QWORD * number]

    return Store(get, _read_only(name))


def _gpr(register: str) -> Store:
    place = GPR_NAMES.index(register)

    def get(scope: Scope, number: int) -> int:
        return scope.of_vp.tdvps.gprs[place]

    def put(scope: Scope, number: int, value: int) -> None:
        tdvps = scope.of_vp.tdvps
        tdvps.gprs = (*tdvps.gprs[:place], value, *tdvps.gprs[place + 1 :])

    return Store(get, put)


def _ve_info(part: str) -> Store:
    place = VeInfo._fields.index(part)

    def put(scope: Scope, number: int, value: int) -> None:
        scope.of_vp.tdvps.ve_info = scope.of_vp.tdvps.ve_info._replace(**{part: value})

    return Store(lambda scope, number: int(scope.of_vp.tdvps.ve_info[place]), put)


_RECORDS: dict[Structure, tuple[type[Any], Callable[[Scope], Any]]] = {
    Structure.TDR: (Tdr, lambda scope: scope.of_td.tdr),
    Structure.TDCS: (Tdcs, lambda scope: scope.of_td.tdcs),
    Structure.TDVPS: (Tdvps, lambda scope: scope.of_vp.tdvps),
}
_ELSEWHERE: dict[str, Store] = {
    "MIGSC_LINKS": Store(lambda scope, number: scope.of_td.stream(number).link, _read_only("MIGSC_LINKS")),
    "SEPT_ROOT": _sept_root(SEPT_ROOT_PAGE, "SEPT_ROOT"),
    **{f"L2_SEPT_ROOT_{vm}": _sept_root(FIRST_L2_SEPT_ROOT_PAGE + vm - 1, f"L2_SEPT_ROOT_{vm}") for vm in (1, 2, 3)},
    **{register.upper(): _gpr(register) for register in GPR_NAMES},
    **{part.upper(): _ve_info(part) for part in VeInfo._fields},
    # TDH.VP.ADDCX fills the pages of L2 MSR bitmaps with ones.
    **{f"L2_{kind}_{vm}": _sparse("vp", f"L2_{kind}_{vm}", ALL_ONES)
       for kind in ("MSR_BITMAPS", "SHADOW_MSR_BITMAPS") for vm in (1, 2, 3)},
}  # fmt: skip
