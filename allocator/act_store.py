"""Operators' acts in the database.

Every act is one transaction: the claim of its request id, what it does, its answer for a retry, and its audit entry. An
act that is only tried does all but the claim, the answer and the entry, and is rolled back. Raises: DatabaseUnavailable
and RequestIdReused, by every method.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator import audit_store
from allocator.acts import Act, Items, Refusal, Released, Reopened
from allocator.audit import listed
from allocator.clients import SILENT_SECONDS
from allocator.errors import AllocationNotFound, ClientNotFound, LeaseLost, SlotDayNotFound, SlotNotFound
from allocator.lease_store import end_instance, find_ended, give_back, lock_leases
from allocator.leases import Status
from allocator.store import Store
from services import requests
from services.errors import DomainError, FieldViolation, InvalidField
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.partitions import Partitions
    from allocator.quarantine_store import QuarantineStore
    from services.postgres import Connection, Database

_SQL = queries("allocator", "acts.sql")

_EXAMPLES = 100


@dataclass(frozen=True, slots=True)
class _Done:
    """What an act did: its answer and what it changed, JSON objects, and what it was done to."""

    answer: dict[str, Any]
    resource: str
    changed: dict[str, Any]


class _TriedError(Exception):
    """Ends the transaction of an act that was only tried."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__()
        self.answer = answer


class ActStore(Store):
    """Does acts. Every method returns the answer, and whether it changed anything now.

    Args:
        database: The allocator's database.
        partitions: Makes a partition that is found missing.
        quarantine: Settles late results.
    """

    def __init__(self, database: Database, partitions: Partitions, quarantine: QuarantineStore) -> None:
        super().__init__(database, partitions)
        self._quarantined = quarantine

    async def revoke_leases(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> tuple[Items, bool]:
        """Ends leases whose token nobody shows."""

        async def work(connection: Connection) -> _Done:
            held = await lock_leases(connection, organization_id, keys)
            ended = await find_ended(connection, organization_id, [key for key in keys if key not in held])
            live = [lease for lease in held.values() if lease.is_live]
            await give_back(connection, organization_id, live, Status.EXPIRED)
            refused: dict[UUID, DomainError] = {}
            for key in keys:
                if key in held and not held[key].is_live:
                    refused[key] = LeaseLost(key, "expired")
                elif key in ended:
                    refused[key] = LeaseLost(key, Status(ended[key].status).name.lower())
                elif key not in held:
                    refused[key] = AllocationNotFound(key)
            return _items(refused, "leases", [lease.allocation_key for lease in live])

        return await self._items(organization_id, act, work)

    async def release_by_age(
        self,
        organization_id: UUID,
        act: Act,
        *,
        older_than_seconds: float,
        slot_id: UUID | None,
        client_id: str | None,
        at_most: int,
    ) -> tuple[Released, bool]:
        """Ends the oldest live leases that match."""

        async def work(connection: Connection) -> _Done:
            rows = await connection.fetch(
                _SQL["leases_by_age"], organization_id, older_than_seconds, slot_id, client_id, at_most
            )
            held = await lock_leases(connection, organization_id, [row["allocation_key"] for row in rows])
            live = [lease for lease in held.values() if lease.is_live]
            await give_back(connection, organization_id, live, Status.EXPIRED)
            ended = [lease.allocation_key for lease in live]
            keys = [str(key) for key in ended]
            remaining = rows[0]["matching"] - len(rows) if rows else 0
            answer = {"released": len(live), "examples": keys[:_EXAMPLES], "remaining": remaining}
            return _Done(answer, listed(ended, "leases"), {"released": keys})

        answer, changed = await self._perform(organization_id, act, work)
        examples = tuple(UUID(key) for key in answer["examples"])
        return Released(answer["released"], examples, answer["remaining"]), changed

    async def declare_dead(
        self, organization_id: UUID, act: Act, client_id: str, instance_number: int
    ) -> tuple[int, bool]:
        """Ends the leases of an instance and counts it as offline. Raises: ClientNotFound."""

        async def work(connection: Connection) -> _Done:
            ended = await end_instance(connection, organization_id, client_id, instance_number, Status.EXPIRED)
            found = await connection.fetchval(
                _SQL["silence_instance"], organization_id, client_id, instance_number, SILENT_SECONDS
            )
            if found is None:
                raise ClientNotFound(client_id, instance_number)
            resource = f"{client_id} instance {instance_number}, {listed(ended, 'leases')}"
            return _Done({"released": len(ended)}, resource, {"released": [str(key) for key in ended]})

        answer, changed = await self._perform(organization_id, act, work)
        return answer["released"], changed

    async def reopen_quota(
        self, organization_id: UUID, act: Act, slot_id: UUID, work_date: date | None, units: int
    ) -> tuple[Reopened, bool]:
        """Raises a day's quota. Raises: InvalidField, SlotNotFound, SlotDayNotFound."""

        async def work(connection: Connection) -> _Done:
            today: date = await connection.fetchval(_SQL["today_of_organization"], organization_id)
            day = work_date or today
            if day < today:
                raise InvalidField([FieldViolation("work_date", f"must be today, {today}, or later")])
            if not await connection.fetchval(_SQL["has_slot"], organization_id, slot_id):
                raise SlotNotFound(slot_id)
            if day == today:
                await connection.execute(_SQL["track_slot"], organization_id, day, slot_id)
            row = await connection.fetchrow(_SQL["reopen_quota"], organization_id, day, slot_id, units)
            if row is None:
                raise SlotDayNotFound(slot_id, str(day))
            resource = f"{slot_id} on {day}: quota {row['quota_before']} to {row['quota']}"
            return _Done(dict(row), resource, dict(row))

        answer, changed = await self._perform(organization_id, act, work)
        return Reopened(**answer), changed

    async def accept_quarantined(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> tuple[Items, bool]:
        """Records results that were in quarantine."""
        return await self._settle(organization_id, act, keys, self._quarantined.accept)

    async def discard_quarantined(self, organization_id: UUID, act: Act, keys: Sequence[UUID]) -> tuple[Items, bool]:
        """Gives results up that were in quarantine."""
        return await self._settle(organization_id, act, keys, self._quarantined.discard)

    async def _settle(
        self,
        organization_id: UUID,
        act: Act,
        keys: Sequence[UUID],
        decide: Callable[[Connection, UUID, Sequence[UUID]], Awaitable[Mapping[UUID, DomainError | None]]],
    ) -> tuple[Items, bool]:
        async def work(connection: Connection) -> _Done:
            decided = await decide(connection, organization_id, keys)
            refused = {key: error for key, error in decided.items() if error is not None}
            done = [key for key in keys if key not in refused]
            return _items(refused, "quarantined results", done)

        return await self._items(organization_id, act, work)

    async def _items(
        self, organization_id: UUID, act: Act, work: Callable[[Connection], Awaitable[_Done]]
    ) -> tuple[Items, bool]:
        answer, changed = await self._perform(organization_id, act, work)
        refused = {UUID(key): Refusal(*refusal) for key, refusal in answer["refused"].items()}
        return Items(answer["done"], refused), changed

    async def _perform(
        self, organization_id: UUID, act: Act, work: Callable[[Connection], Awaitable[_Done]]
    ) -> tuple[dict[str, Any], bool]:
        """Returns the answer of an act, as JSON would give it back, and whether it was done now."""
        action = act.deed.action

        async def whole(connection: Connection) -> tuple[dict[str, Any], bool]:
            if act.dry_run:
                raise _TriedError((await work(connection)).answer)
            stored = await requests.claim(connection, organization_id, action, act.request_id, act.deed.request_sha256)
            if stored is not None:
                return json.loads(stored), False
            done = await work(connection)
            answer = json.dumps(done.answer).encode()
            await requests.record(connection, organization_id, action, act.request_id, answer)
            await audit_store.append(connection, organization_id, act.deed, done.resource, done.changed)
            return done.answer, True

        try:
            return await self.atomically(whole)
        except _TriedError as tried:
            return tried.answer, False


def _items(refused: Mapping[UUID, DomainError], what: str, done: Sequence[UUID]) -> _Done:
    answer = {
        "done": len(done),
        "refused": {str(key): [error.reason, error.message, error.metadata] for key, error in refused.items()},
    }
    return _Done(answer, listed(done, what), {"keys": [str(key) for key in done]})
