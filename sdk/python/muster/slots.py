"""Work slots: what is to be done, how often and when."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from google.protobuf.field_mask_pb2 import FieldMask

from muster import values
from muster.allocator.v1 import slot_pb2, slot_pb2_grpc
from muster.calls import Transport
from muster.slot_files import Row, read_csv, read_jsonl
from muster.slot_import import ImportedSlot, import_slots
from muster.slot_specs import SlotSpec, plain_spec, spec_message


@dataclass(frozen=True, slots=True)
class DailyTracking:
    """The units of one slot, or of all, on one work date."""

    work_date: str
    quota: int
    allocated: int
    succeeded: int
    failed: int
    blocked: int
    expired: int
    released: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A work slot; `today` is None when nothing was allocated today, and `etag` changes with every update."""

    slot_id: str
    spec: SlotSpec
    etag: str
    created_at: datetime
    updated_at: datetime
    today: DailyTracking | None


@dataclass(frozen=True, slots=True)
class SlotChange:
    """One change of a slot; `difference` maps a field to its old and new value."""

    changed_at: datetime
    actor: str
    reason: str
    difference: Mapping[str, Any]


class Slots:
    """`client.slots`: work slots. Role: operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _stub(self) -> slot_pb2_grpc.SlotServiceAsyncStub:
        return self._transport.stub(slot_pb2_grpc.SlotServiceStub)

    async def create(self, spec: SlotSpec, *, request_id: str = "") -> Slot:
        """Makes a slot.

        Args:
            spec: What it is to be.
            request_id: A UUID, to ask again after a lost answer within 24 hours; empty makes a fresh one.

        Raises:
            SlotExists: another slot has its `external_id`.
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.CreateSlotRequest(request_id=request_id or str(uuid.uuid4()), spec=spec_message(spec))
        answer = await self._transport.call(self._stub.CreateSlot, request)
        return _slot(answer.slot)

    async def get(self, slot_id: str) -> Slot:
        """Reads a slot.

        Raises:
            NotFound: the organization has no such slot.
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._stub.GetSlot, slot_pb2.GetSlotRequest(slot_id=slot_id))
        return _slot(answer.slot)

    async def list(
        self,
        *,
        target: str = "",
        is_active: bool | None = None,
        keyword_prefix: str = "",
        code: str = "",
        external_id: str = "",
        page_size: int = 100,
    ) -> AsyncIterator[Slot]:
        """Yields the organization's slots by id, page after page; an empty filter shows any.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.ListSlotsRequest(
            page_size=page_size,
            target=target,
            is_active=is_active,
            keyword_prefix=keyword_prefix,
            code=code,
            external_id=external_id,
        )
        async for answer in self._transport.pages(self._stub.ListSlots, request):
            for slot in answer.slots:
                yield _slot(slot)

    async def update(
        self, slot_id: str, spec: SlotSpec, fields: Sequence[str], *, etag: str = "", reason: str = ""
    ) -> Slot:
        """Changes the named fields of a slot. Live leases keep what they were given.

        Safe to repeat: a slot that is so already stays, and gets no second row of history.

        Args:
            slot_id: Which.
            spec: The new values.
            fields: Which fields of `spec` to take, such as `daily_quota`.
            etag: The version the change is based on; empty for whatever stands.
            reason: For the history, up to 256 characters.

        Raises:
            StaleVersion: the slot changed since `etag`.
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.UpdateSlotRequest(
            slot_id=slot_id,
            spec=spec_message(spec),
            update_mask=FieldMask(paths=fields),
            etag=etag,
            reason=reason,
        )
        answer = await self._transport.call(self._stub.UpdateSlot, request)
        return _slot(answer.slot)

    async def pause(self, slot_id: str, *, reason: str = "") -> Slot:
        """Switches a slot off. Live leases go on.

        Raises:
            NotFound: the organization has no such slot.
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.PauseSlotRequest(slot_id=slot_id, reason=reason)
        return _slot((await self._transport.call(self._stub.PauseSlot, request)).slot)

    async def resume(self, slot_id: str, *, reason: str = "") -> Slot:
        """Switches a slot on again.

        Raises:
            NotFound: the organization has no such slot.
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.ResumeSlotRequest(slot_id=slot_id, reason=reason)
        return _slot((await self._transport.call(self._stub.ResumeSlot, request)).slot)

    def import_rows(self, rows: Iterable[tuple[int, SlotSpec]]) -> AsyncIterator[ImportedSlot]:
        """Sends rows with their numbers and yields the answer to each, in the order in which they come.

        Needs an `external_id` in every row, which makes it safe to send the same rows again after an error. At most
        1,000 rows are in memory at a time.

        Raises:
            MusterError: the stream was refused or broke off; rows without an answer may have been taken.
        """
        return import_slots(self._transport, (Row(number, spec.external_id, spec) for number, spec in rows))

    def import_csv(self, file: BinaryIO) -> AsyncIterator[ImportedSlot]:
        """Makes the slots of a CSV file, as `import_rows` does; its rows are named by the lines they begin on.

        The first line names the columns: the fields of `SlotSpec`, of which external_id, keyword, start_date, end_date
        and daily_quota are required; a column `setting.<name>` for each setting; and `persona.tags` (apart by spaces),
        `persona.region`, `persona.min_aging_level` and `persona.cool_down_seconds`, or `persona` (true or false) for a
        persona without criteria. An empty cell says nothing.

        A setting's cell is what JSON reads in it, if that is true, false, a number or a text in double quotes, and else
        the text itself. In a column `setting.<name>:bool`, `:int`, `:double` or `:text` it is always of that type.

        A row that is no slot, or whose external_id stands in the file before, is answered with `InvalidField` and
        stops no other. External ids are kept in memory for that: about 100 bytes for each.

        Args:
            file: In UTF-8, opened in binary mode.

        Raises:
            ValueError: the first line is not usable, such as for an unknown column; nothing was sent.
            MusterError: the stream was refused or broke off; rows without an answer may have been taken.
        """
        return import_slots(self._transport, read_csv(file))

    def import_jsonl(self, file: BinaryIO) -> AsyncIterator[ImportedSlot]:
        """Makes the slots of a file with a JSON object in each line, as `import_csv` does.

        An object has the fields of `SlotSpec`, with `settings` as an object, whose values keep their JSON types, and
        `persona` as an object of the fields of `PersonaNeed` or true for one without criteria.

        Args:
            file: In UTF-8, opened in binary mode.

        Raises:
            MusterError: the stream was refused or broke off; rows without an answer may have been taken.
        """
        return import_slots(self._transport, read_jsonl(file))

    async def history(self, slot_id: str, *, page_size: int = 100) -> AsyncIterator[SlotChange]:
        """Yields the changes of a slot, newest first.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.ListSlotHistoryRequest(slot_id=slot_id, page_size=page_size)
        async for answer in self._transport.pages(self._stub.ListSlotHistory, request):
            for change in answer.changes:
                yield SlotChange(
                    values.required_moment(change, "changed_at"),
                    change.actor,
                    change.reason,
                    json.loads(change.difference_json or "{}"),
                )


def tracking(message: slot_pb2.DailyTracking) -> DailyTracking:
    """Returns a day's counters."""
    return DailyTracking(
        message.work_date,
        message.quota,
        message.allocated,
        message.succeeded,
        message.failed,
        message.blocked,
        message.expired,
        message.released,
    )


def _slot(message: slot_pb2.Slot) -> Slot:
    return Slot(
        slot_id=message.slot_id,
        spec=plain_spec(message.spec),
        etag=message.etag,
        created_at=values.required_moment(message, "created_at"),
        updated_at=values.required_moment(message, "updated_at"),
        today=tracking(message.today) if message.HasField("today") else None,
    )
