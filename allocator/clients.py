"""Clients: the machines that work, and the processes on them.

unknown ──any call──> online ──10 min of silence──> offline ──30 days, nothing held──> unknown
An instance that was silent for longer than ten minutes, or was declared dead, holds no leases. One that says goodbye is
unknown at once, and its client is not missed unless another instance of it fell silent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

import structlog

from services.call import Principal, current
from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.client_store import ClientStore
    from allocator.leases import Leases

_log = structlog.get_logger("allocator.clients")

_Key = TypeVar("_Key")

# The documents' bound for "offline".
SILENT_SECONDS = 600.0
# The documents' bound for "idle".
_IDLE_SECONDS = 30 * 86400.0

# A client that calls thousands of times a second is noted twice a minute: online means within ten minutes.
_NOTED_SECONDS = 30.0
# Trackers renew every lease every 30 s; who renews is noted half as often.
_RENEWAL_NOTED_SECONDS = 60.0
# A renewal may have gone unnoted for so long, and an instance must really have been silent for ten minutes.
_DEAD_SECONDS = SILENT_SECONDS + _RENEWAL_NOTED_SECONDS
# A lease lasts an hour at most from its grant or renewal, both signs of life: who was silent for longer holds none that
# lives, and is not looked at again and again until it is forgotten.
_HOLDS_NONE_SECONDS = 7200.0
_REMEMBERED = 100_000
_DEAD_ROUND_SECONDS = 5.0
_DEAD_AT_ONCE = 200
_FORGOTTEN_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Who speaks: a machine, its name for people ('' keeps the one on record), a process on it, its address."""

    client_id: str
    client_name: str
    instance_number: int
    user_folder_number: int
    client_ip: str


@dataclass(frozen=True, slots=True)
class ClientInstance:
    """A process on record; `leases` are the live ones it holds."""

    instance_number: int
    user_folder_number: int
    last_seen_at: datetime
    online: bool
    leases: int


@dataclass(frozen=True, slots=True)
class Client:
    """A machine on record, with up to 1000 of its instances; `leases` are the live ones of them all."""

    client_id: str
    client_name: str
    client_ip: str
    draining: bool
    first_seen_at: datetime
    last_seen_at: datetime
    online: bool
    leases: int
    instances: tuple[ClientInstance, ...]


class Clients:
    """Registers organizations and clients at their first contact and notes that they live."""

    def __init__(self, store: ClientStore) -> None:
        self._store = store
        self._zones: dict[UUID, str] = {}
        self._noted: dict[tuple[UUID, ClientIdentity], float] = {}
        self._renewed: dict[tuple[UUID, str, int], float] = {}

    async def caller(self) -> Principal:
        """Returns who makes the call in hand, once its organization is known here. Raises: DatabaseUnavailable."""
        principal = current().principal
        await self.meet_organization(principal.organization_id, principal.time_zone)
        return principal

    async def meet_organization(self, organization_id: UUID, time_zone: str) -> None:
        """Makes the organization known with its time zone. Raises: DatabaseUnavailable."""
        if self._zones.get(organization_id) != time_zone:
            await self._store.meet_organization(organization_id, time_zone)
            self._zones[organization_id] = time_zone

    async def meet(self, organization_id: UUID, client: ClientIdentity) -> None:
        """Registers a client, or updates it. Raises: DatabaseUnavailable."""
        now = time.monotonic()
        # Without a default of 0: on a machine that started a moment ago the clock has not reached a second.
        noted = self._noted.get((organization_id, client))
        if noted is not None and noted + _NOTED_SECONDS > now:
            return
        # Before the database has it, so that concurrent calls of one client note it once.
        _remember(self._noted, (organization_id, client), now)
        try:
            await self._store.meet(organization_id, client)
        except BaseException:
            self._noted.pop((organization_id, client), None)
            raise

    async def heard_of(self, organization_id: UUID, holders: Collection[tuple[str, int]]) -> None:
        """Notes that instances live because their leases are renewed, by themselves or on their behalf.

        Args:
            organization_id: The tenant.
            holders: Client ids and instance numbers.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        now = time.monotonic()
        due = []
        for client_id, instance_number in set(holders):
            noted = self._renewed.get((organization_id, client_id, instance_number))
            if noted is None or noted + _RENEWAL_NOTED_SECONDS <= now:
                due.append((client_id, instance_number))
        if not due:
            return
        await self._store.note_holders(organization_id, due)
        for client_id, instance_number in due:
            _remember(self._renewed, (organization_id, client_id, instance_number), now)

    async def goodbye(self, organization_id: UUID, client_id: str, instance_number: int) -> int:
        """Releases the leases of an instance that ends, and forgets it; returns how many leases."""
        released = await self._store.goodbye(organization_id, client_id, instance_number)
        self.forget(organization_id, client_id, instance_number)
        return released

    async def heartbeat(self, organization_id: UUID, client_id: str) -> tuple[datetime, bool]:
        """Returns the database's clock, and whether a client should drain."""
        return await self._store.heartbeat(organization_id, client_id)

    def forget(self, organization_id: UUID, client_id: str, instance_number: int) -> None:
        """Sees to it that an instance's next sign of life is noted. Other replicas may take half a minute to do so."""
        for key in [
            key
            for key in self._noted
            if key[0] == organization_id and (key[1].client_id, key[1].instance_number) == (client_id, instance_number)
        ]:
            del self._noted[key]
        self._renewed.pop((organization_id, client_id, instance_number), None)


class SilentClients:
    """Frees the leases of instances that fell silent, and forgets clients that are idle. Replicas may do so at once.

    Args:
        store: The database.
        leases: Frees.
    """

    def __init__(self, store: ClientStore, leases: Leases) -> None:
        self._store = store
        self._leases = leases

    async def round(self) -> int:
        """Declares the silent dead and forgets the idle; returns how many leases were freed.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        freed = 0
        for organization_id, client_id, instance_number in await self._store.silent_holders(
            _DEAD_SECONDS, _HOLDS_NONE_SECONDS, _DEAD_AT_ONCE
        ):
            try:
                ended = await self._leases.free_silent(organization_id, client_id, instance_number, _DEAD_SECONDS)
            except DatabaseUnavailable as error:
                # A row of one organization that stays locked must not keep the leases of all others.
                _log.warning("a silent instance is passed over", client=client_id, error=error.message)
                continue
            if ended:
                _log.info(
                    "an instance is silent: its leases are freed",
                    organization=str(organization_id),
                    client=client_id,
                    instance=instance_number,
                    leases=ended,
                )
            freed += ended
        while await self._store.forget(_IDLE_SECONDS, _FORGOTTEN_AT_ONCE):
            continue
        return freed

    async def rounds_for_ever(self) -> None:
        """Makes a round every few seconds; waits while the database is away."""
        while True:
            try:
                await self.round()
            except DatabaseUnavailable as error:
                _log.warning("silent clients wait for the database", error=error.message)
            await asyncio.sleep(_DEAD_ROUND_SECONDS)


def _remember(memory: dict[_Key, float], key: _Key, now: float) -> None:
    if len(memory) >= _REMEMBERED:
        memory.clear()
    memory[key] = now
