"""Work slots: what is to be done, how often and when."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from muster import values
from muster.allocator.v1 import slot_pb2, slot_pb2_grpc
from muster.calls import Transport, item_error
from muster.errors import DeadlineExceeded, MusterError
from muster.values import Setting

# The contract's bound on rows that are sent and not yet answered.
_UNANSWERED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class PersonaNeed:
    """Which personas may do a slot's work; without criteria any active one.

    Attributes:
        tags: It must have them all, up to 16.
        region: Its region; empty for any.
        min_aging_level: 0 to 100.
        cool_down_seconds: How long it must have rested, up to a year.
    """

    tags: Sequence[str] = ()
    region: str = ""
    min_aging_level: int = 0
    cool_down_seconds: int = 0


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What an operator says of a slot.

    Attributes:
        keyword: What to work on, 1 to 200 characters.
        start_date: The first day of work.
        end_date: The last day of work.
        daily_quota: The most units a day, 1 to 1,000,000.
        code: A code of the site's own, up to 64 characters.
        target: What politeness and health are kept by, up to 128 characters.
        settings: For the worker, opaque to the service: up to 64, 16 KiB in all.
        is_active: Whether work is handed out.
        priority: Higher goes first, -1000 to 1000.
        weight: The share among slots of equal priority, 1 to 1000; 0 means 1.
        without_exit: Whether a unit needs no exit.
        persona: Which personas may do the work; None when it needs none.
        external_id: An external site's id, unique in the organization, up to 128 characters.
    """

    keyword: str
    start_date: date
    end_date: date
    daily_quota: int
    code: str = ""
    target: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    is_active: bool = True
    priority: int = 0
    weight: int = 0
    without_exit: bool = False
    persona: PersonaNeed | None = None
    external_id: str = ""


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
class ImportedSlot:
    """The answer to one row: the slot, created or standing, or why the row was refused."""

    row: int
    slot_id: str
    created: bool
    error: MusterError | None


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

    async def create(self, spec: SlotSpec) -> Slot:
        """Makes a slot.

        Raises:
            SlotExists: another slot has its `external_id`.
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.CreateSlotRequest(request_id=str(uuid.uuid4()), spec=_spec_message(spec))
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
        self, *, target: str = "", is_active: bool | None = None, keyword_prefix: str = "", page_size: int = 100
    ) -> AsyncIterator[Slot]:
        """Yields the organization's slots by id, page after page.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = slot_pb2.ListSlotsRequest(
            page_size=page_size, target=target, is_active=is_active, keyword_prefix=keyword_prefix
        )
        async for answer in self._transport.pages(self._stub.ListSlots, request):
            for slot in answer.slots:
                yield _slot(slot)

    async def update(
        self, slot_id: str, spec: SlotSpec, fields: Sequence[str], *, etag: str = "", reason: str = ""
    ) -> Slot:
        """Changes the named fields of a slot. Live leases keep what they were given.

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
            spec=_spec_message(spec),
            update_mask=FieldMask(paths=fields),
            etag=etag,
            reason=reason,
        )
        # A second update after a lost answer would meet its own etag, or write a second history row.
        answer = await self._transport.call(self._stub.UpdateSlot, request, idempotent=False)
        return _slot(answer.slot)

    async def import_rows(self, rows: Iterable[tuple[int, SlotSpec]]) -> AsyncIterator[ImportedSlot]:
        """Sends rows with their numbers and yields the answer to each, in the order in which they come.

        Needs an `external_id` in every row, which makes it safe to send the same rows again after an error.

        Raises:
            MusterError: the stream was refused or broke off; rows without an answer may have been taken.
        """
        room = asyncio.Semaphore(_UNANSWERED_ROWS)

        async def requests() -> AsyncIterator[slot_pb2.ImportSlotsRequest]:
            for row, spec in rows:
                await room.acquire()
                yield slot_pb2.ImportSlotsRequest(row=row, spec=_spec_message(spec))

        call = self._stub.ImportSlots(requests(), metadata=self._transport.metadata)
        try:
            while True:
                async with asyncio.timeout(self._transport.policy.total_seconds):
                    answer = await call.read()
                if not isinstance(answer, slot_pb2.ImportSlotsResponse):
                    return
                room.release()
                error = item_error(answer.error) if answer.HasField("error") else None
                yield ImportedSlot(answer.row, answer.slot_id, answer.created, error)
        except TimeoutError:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "", "the import's stream stands still: repeat it") from None
        except grpc.aio.AioRpcError as error:
            raise self._transport.restored(error) from None
        finally:
            call.cancel()

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


def _spec_message(spec: SlotSpec) -> slot_pb2.SlotSpec:
    need = spec.persona
    return slot_pb2.SlotSpec(
        keyword=spec.keyword,
        code=spec.code,
        target=spec.target,
        start_date=spec.start_date.isoformat(),
        end_date=spec.end_date.isoformat(),
        daily_quota=spec.daily_quota,
        settings=values.setting_values(spec.settings),
        is_active=spec.is_active,
        priority=spec.priority,
        weight=spec.weight,
        without_exit=spec.without_exit,
        persona=slot_pb2.PersonaNeed(
            tags=need.tags,
            region=need.region,
            min_aging_level=need.min_aging_level,
            cool_down_seconds=need.cool_down_seconds,
        )
        if need is not None
        else None,
        external_id=spec.external_id,
    )


def _slot(message: slot_pb2.Slot) -> Slot:
    spec, need = message.spec, message.spec.persona
    return Slot(
        slot_id=message.slot_id,
        spec=SlotSpec(
            keyword=spec.keyword,
            start_date=date.fromisoformat(spec.start_date),
            end_date=date.fromisoformat(spec.end_date),
            daily_quota=spec.daily_quota,
            code=spec.code,
            target=spec.target,
            settings=values.plain_settings(spec.settings),
            is_active=spec.is_active,
            priority=spec.priority,
            weight=spec.weight,
            without_exit=spec.without_exit,
            persona=PersonaNeed(tuple(need.tags), need.region, need.min_aging_level, need.cool_down_seconds)
            if spec.HasField("persona")
            else None,
            external_id=spec.external_id,
        ),
        etag=message.etag,
        created_at=values.required_moment(message, "created_at"),
        updated_at=values.required_moment(message, "updated_at"),
        today=tracking(message.today) if message.HasField("today") else None,
    )
