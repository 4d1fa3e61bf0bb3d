"""Migration streams and sessions: the operand that names a stream, its lock, its messages, interrupted functions.

Source: TDX Module 1.5.01, ``src/common/helpers/migration.{h,c}``, and what the functions in
``src/vmm_dispatcher/migration_api_calls`` have in common.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from septum.arch.op_state import OpState
from septum.arch.operands import Operand
from septum.arch.status import FATAL, Status
from septum.core.trylocks import Mode
from septum.tdx.call import lock_free_page
from septum.tdx.migration.aes_gcm import AesGcm
from septum.tdx.outcome import Fail, check
from septum.tdx.vcpu import atomic

if TYPE_CHECKING:
    from septum.tdx.call import HostCall, LockedPage
    from septum.tdx.migration.mbmd import Mbmd
    from septum.tdx.module import Module
    from septum.tdx.state.migsc import Interrupted, Stream
    from septum.tdx.state.td import Td

MIN_MIGS: Final = 2
"""A session needs the backward stream and a forward one."""
BACKWARD: Final = 0


class StreamOperand(NamedTuple):
    """``migs_index_and_cmd_t``, operand R10."""

    stream: int
    reserved: int
    command: bool
    """Resume an interrupted call; of TDH.EXPORT.TRACK: the last bundle in order is out."""

    @classmethod
    def decode(cls, raw: int) -> StreamOperand:
        """Takes the operand apart; nothing is checked."""
        return cls(raw & 0xFFFF, raw >> 16 & 0x7FFF_FFFF_FFFF, bool(raw >> 63))


def check_first_stream(call: HostCall) -> bool:
    """For functions that work on forward stream 0 only. Returns the command bit.

    :raises Fail: OPERAND_INVALID with R10.
    """
    operand = StreamOperand.decode(call.regs.r10)
    check(not operand.stream and not operand.reserved, Status.TDX_OPERAND_INVALID, Operand.R10)
    return operand.command


def check_forward_stream(call: HostCall, td: Td) -> StreamOperand:
    """For functions that work on any forward stream.

    :raises Fail: OPERAND_INVALID with R10.
    """
    operand = StreamOperand.decode(call.regs.r10)
    valid = not operand.reserved and operand.stream < td.tdcs.num_migs - 1
    check(valid, Status.TDX_OPERAND_INVALID, Operand.R10)
    return operand


async def lock_sessions(call: HostCall, td: Td, mode: Mode) -> None:
    """Takes the lock on the TD's migration as a whole.

    :raises Fail: OPERAND_BUSY with MIG.
    """
    await call.locks.take(td.mig_lock, mode, Operand.MIG)


async def lock_forward(call: HostCall, td: Td, index: int = 0) -> Stream:
    """``migsc_lock`` of a forward stream.

    :raises Fail: OPERAND_BUSY with MIGSC.
    """
    return await _lock(call, td.stream(index + 1))


async def lock_backward(call: HostCall, td: Td) -> Stream:
    """``migsc_lock`` of the backward stream.

    :raises Fail: OPERAND_BUSY with MIGSC.
    """
    return await _lock(call, td.stream(BACKWARD))


async def _lock(call: HostCall, stream: Stream) -> Stream:
    await call.locks.take(stream.lock, Mode.EXCLUSIVE, Operand.MIGSC)
    return stream


async def lock_new_page(call: HostCall, pa: int, operand: Operand) -> LockedPage:
    """A page that belongs to nobody, locked exclusively. On failure what was locked on the way goes first of all.

    :raises Fail: as :func:`~septum.tdx.call.lock_free_page`.
    """
    mark = call.locks.mark()
    try:
        return await lock_free_page(call, pa, operand)
    except Fail:
        await call.locks.release_since(mark)
        raise


# -- sessions --------------------------------------------------------------------------------------------------------


def new_encryption_key(module: Module, td: Td) -> None:
    """Makes the key for what the next session of the TD exports.

    :raises Fail: RND_NO_ENTROPY; then there is no key.
    """
    words = module.hardware.random_256()
    td.tdcs.mig_enc_key = words or (0, 0, 0, 0)
    check(words is not None, Status.TDX_RND_NO_ENTROPY)


def begin_session(call: HostCall, td: Td) -> None:
    """The keys become those of the session, all streams are as new, and counting starts at 0.

    :raises Fail: MIGRATION_DECRYPTION_KEY_NOT_SET unless a migration TD has set one since the last session began,
        RND_NO_ENTROPY when there is none for the key of the session after this.
    """
    tdcs = td.tdcs
    check(tdcs.mig_dec_key_set, Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET)
    tdcs.mig_enc_working_key = tdcs.mig_enc_key
    words = call.module.hardware.random_256()
    if words is None:
        raise Fail(Status.TDX_RND_NO_ENTROPY)
    tdcs.mig_enc_key = words
    tdcs.mig_dec_working_key = tdcs.mig_dec_key
    tdcs.mig_dec_key_set = False
    tdcs.mig_working_version = tdcs.mig_version
    tdcs.mig_epoch = tdcs.total_mb_count = 0
    forget_streams(td)


def forget_streams(td: Td) -> None:
    """No stream, forward or backward, is initialised any more."""
    for index in range(td.tdcs.num_migs):
        td.stream(index).migsc.initialised = False


def init_stream(stream: Stream, key: tuple[int, ...]) -> None:
    """``migsc_init``: the stream's first use in a session."""
    migsc = stream.migsc
    migsc.key = struct.pack("<4Q", *key)
    migsc.iv_counter = migsc.next_mb_counter = migsc.expected_mb_counter = 0
    migsc.interrupted = None
    migsc.initialised = True


def init_if_needed(stream: Stream, key: tuple[int, ...]) -> None:
    """:func:`init_stream`, unless the stream was used before."""
    if not stream.migsc.initialised:
        init_stream(stream, key)


async def count_bundle(td: Td) -> None:
    """One bundle more in the session, counted atomically: streams work at the same time."""
    await atomic("TOTAL_MB_COUNT")
    td.tdcs.total_mb_count += 1


@contextmanager
def failing_import(td: Td) -> Iterator[None]:
    """Whatever fails here fails the import for good: the TD can only be torn down, and the status says so."""
    try:
        yield
    except Fail as fail:
        td.tdcs.op_state = OpState.FAILED_IMPORT
        raise Fail(fail.status | FATAL) from None


# -- messages --------------------------------------------------------------------------------------------------------


def message(stream: Stream, iv_counter: int, migs_index: int) -> AesGcm:
    """``reset_to_next_iv``: a message under the stream's key that has not begun yet."""
    return AesGcm(stream.migsc.key, struct.pack("<QHH", iv_counter, migs_index, 0))


def next_message(stream: Stream, migs_index: int) -> AesGcm:
    """A message that is sent: under an IV that was never used before, also by a call that came to nothing."""
    stream.migsc.iv_counter += 1
    return message(stream, stream.migsc.iv_counter, migs_index)


def sealed(stream: Stream, mbmd: Mbmd, migs_index: int = 0) -> Mbmd:
    """A bundle's header that is a message of its own, on its way out: with IV counter and MAC."""
    mac = next_message(stream, migs_index).with_aad(mbmd.authenticated()).tag()
    return mbmd._replace(migs_index=migs_index, iv_counter=stream.migsc.iv_counter, mac=mac)


def is_genuine(stream: Stream, mbmd: Mbmd, migs_index: int = 0) -> bool:
    """Whether such a header comes from where it says."""
    return message(stream, mbmd.iv_counter, migs_index).with_aad(mbmd.authenticated()).tag() == mbmd.mac


# -- interrupted functions -------------------------------------------------------------------------------------------


def take_interrupted(stream: Stream) -> Interrupted:
    """What was interrupted on a stream; it can be resumed only once.

    :raises Fail: MIGRATION_STREAM_STATE_INCORRECT, INVALID_RESUMPTION.
    """
    check(stream.migsc.initialised, Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    found, stream.migsc.interrupted = stream.migsc.interrupted, None
    if found is None:
        raise Fail(Status.TDX_INVALID_RESUMPTION)
    return found


def check_same_call(call: HostCall, interrupted: Interrupted, operands: tuple[int, ...]) -> None:
    """Whether this call is the one that was interrupted.

    :raises Fail: INVALID_RESUMPTION.
    """
    same = (interrupted.function, interrupted.operands) == (call.regs.rax, operands)
    check(same, Status.TDX_INVALID_RESUMPTION)
