"""Leases: the right to a unit of work until a moment, and how it is renewed, given back and taken away.

granted ──submit──> succeeded | failed | blocked
   ├── its holder releases it, or says goodbye ──> released
   └── expires_at passes, or others end it ──> expired ──late result, room left──> succeeded | failed | blocked

Others end a lease when an operator revokes it or declares its holder dead, or its holder fell silent. The holder may be
at work all the same: its result is late then, and not lost.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import structlog
import uuid_utils.compat as uuids

from allocator.errors import AllocationNotFound, LeaseAgeExceeded, LeaseLost, LeaseTokenMismatch
from allocator.metrics import ENDED
from services.errors import DatabaseUnavailable, DomainError

if TYPE_CHECKING:
    from allocator.availability import Availability
    from allocator.clients import Clients
    from allocator.lease_store import LeaseStore

_log = structlog.get_logger("allocator.leases")

_SWEEP_LEASES = 1000


class Status(IntEnum):
    """Where an allocation stands, as in the contract and in the database."""

    LEASED = 1
    SUCCEEDED = 2
    FAILED = 3
    BLOCKED = 4
    EXPIRED = 5
    RELEASED = 6


class PersonaUse(IntEnum):
    """What the persona store is told at check-in, as in its contract and in the outbox."""

    NOT_USED = 1
    SUCCEEDED = 2
    FAILED = 3
    BLOCKED = 4


class LeaseName(NamedTuple):
    """A lease and the token that proves it."""

    key: UUID
    token: UUID


@dataclass(frozen=True, slots=True)
class Renewal:
    """A lease that was renewed: until when, and who holds it."""

    expires_at: datetime
    client_id: str
    instance_number: int


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A row of a live lease, locked.

    `is_live` is whether it has not run out by the database's clock, `exit_returns` whether its exit's use returns
    however it ends. `exit_provider` is '' but for an external exit, and `exit_ip` until that one's address is known.
    """

    allocation_key: UUID
    lease_token: UUID
    work_date: date
    slot_id: UUID
    exit_id: UUID | None
    exit_epoch: int | None
    needs_persona: bool
    persona_id: UUID | None
    client_id: str
    instance_number: int
    traceparent: str | None
    granted_at: datetime
    expires_at: datetime
    renewable_until: datetime
    is_live: bool
    target: str
    exit_returns: bool
    exit_provider: str
    exit_ip: str


@dataclass(frozen=True, slots=True)
class EndedAllocation:
    """An allocation on record whose lease has ended."""

    allocation_key: UUID
    lease_token: UUID
    work_date: date
    slot_id: UUID
    exit_id: UUID | None
    persona_id: UUID | None
    client_id: str
    instance_number: int
    traceparent: str | None
    status: int
    late: bool
    recorded_at: datetime | None
    quarantined: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """How one locked lease ends."""

    lease: HeldLease
    status: Status
    late: bool = False
    use: PersonaUse = PersonaUse.NOT_USED


def new_key() -> UUID:
    """Returns a fresh allocation key, whose time names its partition."""
    return uuids.uuid7()


def new_token() -> UUID:
    """Returns 16 random bytes; a UUID only because that is how PostgreSQL stores them in 16."""
    return UUID(bytes=secrets.token_bytes(16))


def work_dates(keys: Sequence[UUID]) -> list[date]:
    """Returns the days that allocations with these keys can count on.

    A UUIDv7 holds milliseconds since 1970 in its first 48 bits, and a day somewhere on earth is within one of UTC's.
    """
    days = set()
    for key in keys:
        milliseconds = key.int >> 80
        # Keys are the callers' word: one far away names no partition.
        if milliseconds < 253_370_000_000_000:
            day = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)).date()
            days |= {day + timedelta(days=offset) for offset in (-1, 0, 1) if day > date(1970, 1, 2)}
    return sorted(days)


def refusal(name: LeaseName, held: HeldLease | None, ended: EndedAllocation | None) -> DomainError:
    """Returns why a lease cannot be renewed or released."""
    found = held or ended
    if found is None:
        return AllocationNotFound(name.key)
    if found.lease_token != name.token:
        return LeaseTokenMismatch(name.key)
    if ended is not None:
        return LeaseLost(name.key, Status(ended.status).name.lower())
    assert held is not None
    if not held.is_live:
        return LeaseLost(name.key, "expired")
    return LeaseAgeExceeded(name.key)


def exit_returns(leases: Sequence[HeldLease]) -> Counter[tuple[UUID, int]]:
    """Counts the uses that leases give back, by exit and epoch."""
    return Counter(
        (lease.exit_id, lease.exit_epoch)
        for lease in leases
        if lease.exit_id is not None and lease.exit_epoch is not None
    )


class Leases:
    """Renews and ends leases.

    Args:
        store: The database.
        availability: Is told of units that came back.
        clients: Is told whose leases are renewed.
        duration_seconds: How long a lease lasts from its renewal.
        sweep_seconds: How often expired leases are looked for.
    """

    def __init__(
        self,
        store: LeaseStore,
        availability: Availability,
        clients: Clients,
        *,
        duration_seconds: float,
        sweep_seconds: float,
    ) -> None:
        self._store = store
        self._availability = availability
        self._clients = clients
        self._duration_seconds = duration_seconds
        self._sweep_seconds = sweep_seconds

    async def renew(self, organization_id: UUID, names: Sequence[LeaseName]) -> list[datetime | DomainError]:
        """Returns the new expiry of each lease, or why it has none.

        AllocationNotFound, LeaseLost, LeaseTokenMismatch and LeaseAgeExceeded refuse single leases.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        renewed = await self._store.renew(organization_id, sorted(set(names), key=_by_key), self._duration_seconds)
        if renewed:
            # After the commit: a renewal stands even if it could not be noted as a sign of life.
            holders = {(renewal.client_id, renewal.instance_number) for renewal in renewed.values()}
            await self._clients.heard_of(organization_id, holders)
        lost = [name for name in names if name not in renewed]
        found = await self._store.find(organization_id, [name.key for name in lost]) if lost else {}
        return [
            renewed[name].expires_at if name in renewed else refusal(name, *found.get(name.key, (None, None)))
            for name in names
        ]

    async def release(self, organization_id: UUID, names: Sequence[LeaseName], reason: str) -> list[DomainError | None]:
        """Gives units back; returns for each None, or why not: AllocationNotFound, LeaseLost, LeaseTokenMismatch."""
        released, others = await self._store.release(organization_id, list(dict.fromkeys(names)))
        self.gave_back(organization_id, len(released), Status.RELEASED)
        if reason and released:
            _log.info("leases released", leases=len(released), reason=reason)
        answers: list[DomainError | None] = []
        for name in names:
            held, ended = others.get(name.key, (None, None))
            again = ended is not None and ended.lease_token == name.token and ended.status == Status.RELEASED
            answers.append(None if name in released or again else refusal(name, held, ended))
        return answers

    async def free_silent(
        self, organization_id: UUID, client_id: str, instance_number: int, silent_seconds: float
    ) -> int:
        """Ends every lease of an instance that was silent for longer; returns how many."""
        freed = await self._store.expire_silent(organization_id, client_id, instance_number, silent_seconds)
        self.gave_back(organization_id, freed, Status.EXPIRED)
        return freed

    async def sweep(self) -> int:
        """Ends the leases that ran out; returns how many. Safe to run from several replicas at once.

        An organization whose rows stay locked is left for the next round; the others are swept.

        Raises:
            DatabaseUnavailable: the database does not say whose leases ran out.
        """
        swept = 0
        for organization_id in await self._store.organizations_to_sweep():
            try:
                swept += await self._sweep_organization(organization_id)
            except DatabaseUnavailable as error:
                _log.warning("the sweep passes over", organization=str(organization_id), error=error.message)
        return swept

    async def _sweep_organization(self, organization_id: UUID) -> int:
        swept = 0
        while True:
            expired = await self._store.expire(organization_id, _SWEEP_LEASES)
            self.gave_back(organization_id, expired, Status.EXPIRED)
            swept += expired
            if expired < _SWEEP_LEASES:
                return swept

    async def sweep_for_ever(self) -> None:
        """Sweeps every `sweep_seconds`; waits while the database is away."""
        while True:
            try:
                await self.sweep()
            except DatabaseUnavailable as error:
                _log.warning("the sweep waits for the database", error=error.message)
            await asyncio.sleep(self._sweep_seconds)

    def gave_back(self, organization_id: UUID, count: int, status: Status) -> None:
        """Notes that units came back."""
        if count:
            ENDED.labels(status.name.lower()).inc(count)
            self._availability.outdate(organization_id)


def _by_key(name: LeaseName) -> UUID:
    return name.key
