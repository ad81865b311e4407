"""Rows of slots on their way to the service and their answers on the way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import grpc

from muster.allocator.v1 import slot_pb2, slot_pb2_grpc
from muster.calls import Transport, item_error
from muster.errors import DeadlineExceeded, InvalidField, MusterError
from muster.slot_files import Row, refusal
from muster.slot_specs import SlotSpec, spec_message

# The contract's bound on rows that are sent and not yet answered.
_UNANSWERED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class ImportedSlot:
    """The answer to one row: the slot, created or standing, or why the row was refused.

    `row` is its number, in a file the line it begins on; `external_id` is empty when it could not be read.
    """

    row: int
    external_id: str
    slot_id: str
    created: bool
    error: MusterError | None


async def import_slots(transport: Transport, rows: Iterable[Row]) -> AsyncIterator[ImportedSlot]:
    """Sends rows and yields an answer to each; those that are no slots are answered here.

    Raises:
        ValueError: the rows themselves cannot be read; see `slot_files`.
        MusterError: the stream was refused or broke off; rows without an answer may have been taken.
    """
    stub = transport.stub(slot_pb2_grpc.SlotServiceStub)
    # Bounded by `room`: rows that are sent and not answered, or answered and not yet taken by the caller.
    answers: asyncio.Queue[ImportedSlot | BaseException | None] = asyncio.Queue()
    room = asyncio.Semaphore(_UNANSWERED_ROWS)
    names: dict[int, str] = {}
    # A batch may wait for a lock as long as one call.
    still = 2 * max(transport.policy.call_seconds, transport.policy.total_seconds)

    async def requests() -> AsyncIterator[slot_pb2.ImportSlotsRequest]:
        try:
            for row in rows:
                await room.acquire()
                message = _message(row)
                if isinstance(message, MusterError):
                    answers.put_nowait(ImportedSlot(row.number, row.external_id, "", False, message))
                else:
                    names[row.number] = row.external_id
                    yield message
        except Exception as error:
            # The call would end the stream as if the rows were at their end.
            answers.put_nowait(error)

    call = stub.ImportSlots(requests(), metadata=transport.metadata)

    async def read() -> None:
        try:
            while isinstance(answer := await call.read(), slot_pb2.ImportSlotsResponse):
                error = item_error(answer.error) if answer.HasField("error") else None
                name = names.pop(answer.row, "")
                answers.put_nowait(ImportedSlot(answer.row, name, answer.slot_id, answer.created, error))
            answers.put_nowait(None)
        except grpc.aio.AioRpcError as error:
            answers.put_nowait(transport.restored(error))

    reader = asyncio.create_task(read())
    try:
        while True:
            async with asyncio.timeout(still):
                answer = await answers.get()
            if answer is None:
                return
            if isinstance(answer, BaseException):
                raise answer
            room.release()
            yield answer
    except TimeoutError:
        raise DeadlineExceeded("DEADLINE_EXCEEDED", "", "the import's stream stands still: repeat it") from None
    finally:
        call.cancel()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def _message(row: Row) -> slot_pb2.ImportSlotsRequest | InvalidField:
    if not isinstance(row.spec, SlotSpec):
        return row.spec
    try:
        return slot_pb2.ImportSlotsRequest(row=row.number, spec=spec_message(row.spec))
    except (ValueError, TypeError) as error:
        return refusal("spec", str(error))
