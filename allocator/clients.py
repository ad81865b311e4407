"""Clients: the machines that work, and the processes on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "upkeep.sql")

# A client that calls thousands of times a second is noted once a second: online means within ten minutes.
_NOTED_SECONDS = 1.0
_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """Who speaks: a machine, its name for people ('' keeps the one on record), a process on it, its address."""

    client_id: str
    client_name: str
    instance_number: int
    user_folder_number: int
    client_ip: str


class Clients:
    """Registers organizations and clients at their first contact and notes that they live."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._zones: dict[UUID, str] = {}
        self._noted: dict[tuple[UUID, ClientIdentity], float] = {}

    async def meet_organization(self, organization_id: UUID, time_zone: str) -> None:
        """Makes the organization known with its time zone. Raises: DatabaseUnavailable."""
        if self._zones.get(organization_id) != time_zone:
            await self._database.execute(_SQL["meet_organization"], organization_id, time_zone)
            self._zones[organization_id] = time_zone

    async def meet(self, organization_id: UUID, client: ClientIdentity) -> None:
        """Registers a client, or updates it. Raises: DatabaseUnavailable."""
        now = time.monotonic()
        if self._noted.get((organization_id, client), 0.0) + _NOTED_SECONDS > now:
            return
        await self._database.execute(
            _SQL["meet_client"],
            organization_id,
            client.client_id,
            client.client_name,
            client.client_ip,
            client.instance_number,
            client.user_folder_number,
        )
        if len(self._noted) >= _REMEMBERED:
            self._noted.clear()
        self._noted[organization_id, client] = now

    async def heartbeat(self, organization_id: UUID, client: ClientIdentity) -> tuple[datetime, bool]:
        """Notes that a client lives; returns the database's clock and whether it should drain."""
        await self.meet(organization_id, client)
        row = await self._database.fetchrow(_SQL["heartbeat"], organization_id, client.client_id)
        assert row is not None
        return row["server_time"], row["draining"]
