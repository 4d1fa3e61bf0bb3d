"""State on its way: pages of metadata lists under one MAC, for a whole TD or for a VCPU.

Immutable state is two lists after each other: fields of the module, then fields of the TD. What the pages hold is
unverified. Source: TDX Module 1.5.01, ``tdh_{export,import}_state_{immutable,td,vp}.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.metadata import NULL_FIELD_ID
from septum.arch.operands import Operand
from septum.arch.pages import PAGE_4K, PAGE_MASK
from septum.arch.status import Status, with_operand
from septum.tdx.call import check_shared_hpa
from septum.tdx.metadata import Scope, dump_list, write_list
from septum.tdx.migration.gpa_list import read_slot
from septum.tdx.outcome import check
from septum.tdx.state.migsc import Interrupted

if TYPE_CHECKING:
    from septum.tdx.call import HostCall
    from septum.tdx.migration.aes_gcm import AesGcm
    from septum.tdx.state.migsc import Stream

_RESERVED: Final = 0xFFF | 0b111 << 52
_LAST_SHIFT: Final = 55


class PageList(NamedTuple):
    """``page_list_info_t``, operand R9: a page of addresses of pages of the host."""

    raw: int
    pa: int
    last: int

    @classmethod
    def decode(cls, raw: int) -> PageList:
        """Takes the operand apart; nothing is checked."""
        return cls(raw, raw & PAGE_MASK, raw >> _LAST_SHIFT)

    def check_size(self, pages: int) -> None:
        """Whether there are at least so many pages, and no reserved bit is set.

        :raises Fail: OPERAND_INVALID with R9.
        """
        valid = self.last >= pages - 1 and not self.raw & _RESERVED
        check(valid, Status.TDX_OPERAND_INVALID, Operand.R9)

    def check_address(self, call: HostCall) -> None:
        """Whether the list is in the host's memory.

        :raises Fail: OPERAND_INVALID with R9.
        """
        check_shared_hpa(call, self.pa, PAGE_4K, Operand.R9)

    def page(self, call: HostCall, number: int, operand: Operand) -> int:
        """The address of a page, with its HKID.

        :raises Fail: OPERAND_INVALID with ``operand`` unless it is a page of the host.
        """
        pa = read_slot(call.module, self.pa, number)
        check_shared_hpa(call, pa, PAGE_4K, operand)
        return pa


class Progress(NamedTuple):
    """How far the lists are: which one, the field to go on with, pages done, and the message that they are."""

    message: AesGcm
    scope: int = 0
    field_id: int = NULL_FIELD_ID
    pages: int = 0
    error: tuple[int, int, int] = (0, 0, 0)
    """The first error in imported lists: status, RCX, RDX."""

    @classmethod
    def of(cls, stream: Stream, interrupted: Interrupted) -> Progress:
        """Where an interrupted call was."""
        message: AesGcm = stream.migsc.message
        return cls(message, interrupted.scope, interrupted.field_id, interrupted.processed, interrupted.error)

    def interrupt(self, call: HostCall, stream: Stream, operands: tuple[int, ...]) -> int:
        """Notes what is needed to resume."""
        migsc, rax = stream.migsc, call.regs.rax
        migsc.message = self.message
        migsc.interrupted = Interrupted(rax, operands, self.pages, self.scope, self.field_id, self.error)
        return Status.TDX_INTERRUPTED_RESUMABLE


def export_page(call: HostCall, scopes: Sequence[Scope], pages: PageList, at: Progress) -> tuple[Progress, bool]:
    """Writes the next page of the lists; returns how far they are then, and whether that is all.

    :raises Fail: OPERAND_INVALID with MIG_BUFF_LIST_ENTRY for a page that is not the host's, with R9 when there is no
        page for what is left.
    """
    pa = pages.page(call, at.pages, Operand.MIG_BUFF_LIST_ENTRY)
    dump = dump_list(scopes[at.scope], at.field_id, PAGE_4K)
    message, cipher = at.message.encrypt(dump.data.ljust(PAGE_4K, b"\0"))
    call.module.memory.set_page(call.module.pa_format.address(pa), cipher)
    at = Progress(message, at.scope, dump.next_id, at.pages + 1)
    if dump.status == Status.TDX_SUCCESS:
        if at.scope == len(scopes) - 1:
            return at, True
        at = at._replace(scope=at.scope + 1, field_id=NULL_FIELD_ID)
    check(at.pages <= pages.last, Status.TDX_OPERAND_INVALID, Operand.R9)
    return at, False


def import_page(
    call: HostCall, scopes: Sequence[Scope], pages: PageList, at: Progress, last_in_scope: Sequence[int]
) -> Progress:
    """Reads the next page of the lists and writes its fields; returns how far they are then.

    ``last_in_scope``: the number of each list's last page. An error in a list is not told here: until the MAC is known
    to be right, it may be an attacker's doing to learn what is in the page.

    :raises Fail: OPERAND_INVALID with PAGE for a page that is not the host's.
    """
    pa = pages.page(call, at.pages, Operand.PAGE)
    message, data = at.message.decrypt(call.module.memory.page(call.module.pa_format.address(pa)))
    error, size = at.error, int.from_bytes(data[:2], "little")
    if size > PAGE_4K:
        error = error if error[0] else (with_operand(Status.TDX_OPERAND_INVALID, Operand.PAGE), 0, 0)
        data = PAGE_4K.to_bytes(2, "little") + data[2:]
    is_last = at.pages == last_in_scope[at.scope]
    written = write_list(scopes[at.scope], at.field_id, data, is_last=is_last)
    if written.status != Status.TDX_SUCCESS and not error[0]:
        error = (written.status, *written.error)
    at = Progress(message, at.scope, written.next_id, at.pages + 1, error)
    if is_last and at.scope < len(scopes) - 1:
        at = at._replace(scope=at.scope + 1, field_id=NULL_FIELD_ID)
    return at
