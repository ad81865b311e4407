"""Slots in the database. Every method is bound to one organization. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import uuid_utils.compat as uuids

from allocator.errors import SlotExists, SlotNotFound, StaleVersion
from allocator.slots import Pacing, PersonaNeed, Slot, SlotChange, SlotFilter, SlotSpec, Tracking, changed
from allocator.store import Store
from services import requests
from services.errors import DomainError, InvalidField
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "slots.sql")

_PACINGS = {Pacing.ASAP: 1, Pacing.EVEN: 2}
_PACING_OF = {number: pacing for pacing, number in _PACINGS.items()}


class SlotStore(Store):
    """Keeps slots and their history."""

    async def create(self, organization_id: UUID, request_id: UUID, digest: bytes, spec: SlotSpec) -> Slot:
        """Makes a slot, once for a request id and once for an external id; a repetition gets the slot that stands.

        Raises:
            SlotExists: the external id stands for a slot with other contents.
            RequestIdReused: the request id stands for another request.
        """

        async def work(connection: Connection) -> Slot:
            made = await requests.claim(connection, organization_id, "CreateSlot", request_id, digest)
            if made is not None:
                (slot,) = await _read(connection, organization_id, [UUID(bytes=made)])
                return slot
            ((answer, _),) = await _create(connection, organization_id, [spec])
            if isinstance(answer, DomainError):
                raise answer
            await requests.record(connection, organization_id, "CreateSlot", request_id, answer.bytes)
            (slot,) = await _read(connection, organization_id, [answer])
            return slot

        return await self.atomically(work)

    async def create_many(
        self, organization_id: UUID, specs: Sequence[SlotSpec]
    ) -> list[tuple[UUID | DomainError, bool]]:
        """Makes slots with external ids in one transaction; each stands for itself.

        Returns:
            For each the slot's id, or SlotExists, and whether this call made it.
        """

        async def work(connection: Connection) -> list[tuple[UUID | DomainError, bool]]:
            return await _create(connection, organization_id, specs)

        return await self.atomically(work)

    async def get(self, organization_id: UUID, slot_id: UUID) -> Slot:
        """Returns a slot. Raises: SlotNotFound."""
        async with self.database.connection() as connection:
            found = await _read(connection, organization_id, [slot_id])
        if not found:
            raise SlotNotFound(slot_id)
        return found[0]

    async def page(self, organization_id: UUID, after: UUID | None, size: int, wanted: SlotFilter) -> list[Slot]:
        """Returns slots by id."""
        name, key = "page_of_slots", []
        if wanted.external_id:
            name, key = "page_of_slots_by_external_id", [wanted.external_id, wanted.code]
        elif wanted.code:
            name, key = "page_of_slots_by_code", [wanted.code]
        filters = (wanted.target, wanted.is_active, wanted.keyword_prefix)
        async with self.database.connection() as connection:
            rows = await connection.fetch(_SQL[name], organization_id, after, size, *filters, *key)
            return await _read(connection, organization_id, [row["slot_id"] for row in rows])

    async def update(
        self, organization_id: UUID, slot_id: UUID, given: dict[str, Any], *, etag: str, actor: str, reason: str
    ) -> Slot:
        """Changes the given fields and writes a history row, in one transaction. Changing nothing writes nothing.

        The rows of today and of days made ahead follow; a quota not below the units that count against it.

        Args:
            organization_id: The tenant.
            slot_id: The slot.
            given: New values by the names of `SlotSpec`.
            etag: The version the change is based on; '' for any.
            actor: The id of the API key.
            reason: For the history.

        Raises:
            SlotNotFound: there is no such slot.
            StaleVersion: the slot changed meanwhile, and is not as this change would leave it.
            InvalidField: the new values do not go together with those that stand.
        """

        async def work(connection: Connection) -> Slot:
            # Before the slot, as whoever makes a day's rows does.
            days = await _hold_days(connection, organization_id)
            if await connection.fetchval(_SQL["lock_slot"], organization_id, slot_id) is None:
                raise SlotNotFound(slot_id)
            (slot,) = await _read(connection, organization_id, [slot_id])
            spec, difference = changed(slot.spec, given)
            if difference is None:
                return slot
            if etag and etag != slot.etag:
                raise StaleVersion(slot_id, slot.etag)
            if contradictions := spec.contradictions():
                raise InvalidField(contradictions)
            await connection.execute(_SQL["update_slot"], organization_id, slot_id, *_values(spec))
            await connection.execute(_SQL["follow_slots"], organization_id, days, [slot_id])
            await connection.execute(
                _SQL["insert_change"], organization_id, slot_id, uuids.uuid7(), actor, reason, difference
            )
            (slot,) = await _read(connection, organization_id, [slot_id])
            return slot

        return await self.atomically(work)

    async def history(
        self, organization_id: UUID, slot_id: UUID, before: tuple[datetime, UUID] | None, size: int
    ) -> list[SlotChange]:
        """Returns the changes of a slot, newest first. Raises: SlotNotFound."""
        at, change_id = before or (None, None)
        async with self.database.connection() as connection:
            if not await _read(connection, organization_id, [slot_id]):
                raise SlotNotFound(slot_id)
            rows = await connection.fetch(_SQL["page_of_changes"], organization_id, slot_id, at, change_id, size)
        return [SlotChange(*row) for row in rows]


async def _create(
    connection: Connection, organization_id: UUID, specs: Sequence[SlotSpec]
) -> list[tuple[UUID | DomainError, bool]]:
    days = await _hold_days(connection, organization_id)
    ids = [uuids.uuid7() for _ in specs]
    digests = [spec.sha256() for spec in specs]
    values = [
        (slot_id, spec.external_id or None, *_values(spec), digest)
        for slot_id, spec, digest in zip(ids, specs, digests, strict=True)
    ]
    rows = await connection.fetch(
        _SQL["insert_slots"], organization_id, *(list(column) for column in zip(*values, strict=True))
    )
    made = {row["slot_id"] for row in rows}
    if made:
        await connection.execute(_SQL["follow_slots"], organization_id, days, sorted(made))
    repeated = [spec.external_id for slot_id, spec in zip(ids, specs, strict=True) if slot_id not in made]
    standing: dict[str, Slot] = {}
    if repeated:
        rows = await connection.fetch(_SQL["slots_by_external_id"], organization_id, repeated)
        slots = await _read(connection, organization_id, [row["slot_id"] for row in rows])
        standing = {slot.spec.external_id: slot for slot in slots}
    answers: list[tuple[UUID | DomainError, bool]] = []
    for slot_id, spec, digest in zip(ids, specs, digests, strict=True):
        if slot_id in made:
            answers.append((slot_id, True))
        elif (slot := standing[spec.external_id]).answers(digest):
            answers.append((slot.slot_id, False))
        else:
            answers.append((SlotExists(spec.external_id, slot.slot_id), False))
    return answers


async def _hold_days(connection: Connection, organization_id: UUID) -> list[date]:
    """Returns the days whose rows follow a slot: today, and those that were begun ahead; held until the commit."""
    await connection.execute(_SQL["note_days"], organization_id)
    today, *later = await connection.fetch(_SQL["hold_days"], organization_id)
    return [today["work_date"], *(row["work_date"] for row in later if row["begun"])]


def _values(spec: SlotSpec) -> tuple[Any, ...]:
    """Returns the columns that an update may change, in the order of the statements."""
    return (
        spec.keyword,
        spec.code,
        spec.target,
        spec.start_date,
        spec.end_date,
        spec.daily_quota,
        json.dumps(spec.settings, ensure_ascii=False),
        spec.is_active,
        spec.priority,
        spec.weight,
        spec.without_exit,
        spec.persona.to_json() if spec.persona else None,
        _PACINGS[spec.pacing],
        spec.exit_region,
        spec.exit_provider,
    )


async def _read(connection: Connection, organization_id: UUID, ids: Sequence[UUID]) -> list[Slot]:
    rows = await connection.fetch(_SQL["slots_by_id"], organization_id, ids)
    return [
        Slot(
            slot_id=row["slot_id"],
            spec=SlotSpec(
                keyword=row["keyword"],
                code=row["code"],
                target=row["target"],
                start_date=row["start_date"],
                end_date=row["end_date"],
                daily_quota=row["daily_quota"],
                settings=json.loads(row["settings"]),
                is_active=row["is_active"],
                priority=row["priority"],
                weight=row["weight"],
                without_exit=row["without_exit"],
                persona=PersonaNeed.from_json(row["persona_need"]),
                external_id=row["external_id"] or "",
                pacing=_PACING_OF[row["pacing"]],
                exit_region=row["exit_region"],
                exit_provider=row["exit_provider"],
            ),
            version=row["version"],
            spec_sha256=row["spec_sha256"],
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            today=Tracking(*(row[name] for name in Tracking.__slots__)) if row["quota"] is not None else None,
        )
        for row in rows
    ]
