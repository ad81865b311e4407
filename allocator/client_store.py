"""Organizations and clients in the database. Raises: DatabaseUnavailable, by every method."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from allocator import audit_store
from allocator.audit import Deed
from allocator.clients import SILENT_SECONDS, Client, ClientIdentity, ClientInstance
from allocator.errors import ClientNotFound
from allocator.lease_store import end_instance
from allocator.leases import Status
from allocator.store import Store
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "clients.sql")


class ClientStore(Store):
    """Keeps organizations, clients and their instances. Bound to one organization but where it says otherwise."""

    async def meet_organization(self, organization_id: UUID, time_zone: str) -> None:
        """Makes the organization known with its time zone."""
        await self.database.execute(_SQL["meet_organization"], organization_id, time_zone)

    async def meet(self, organization_id: UUID, client: ClientIdentity) -> None:
        """Registers a client and its instance, or updates them, in one statement."""
        await self.database.execute(
            _SQL["meet_client"],
            organization_id,
            client.client_id,
            client.client_name,
            client.client_ip,
            client.instance_number,
            client.user_folder_number,
        )

    async def note_holders(self, organization_id: UUID, holders: Collection[tuple[str, int]]) -> None:
        """Notes that instances live; unknown ones are passed over."""
        ordered = sorted(holders)
        await self.database.execute(
            _SQL["note_holders"], organization_id, [client for client, _ in ordered], [number for _, number in ordered]
        )

    async def heartbeat(self, organization_id: UUID, client_id: str) -> tuple[datetime, bool]:
        """Returns the clock and whether the client should drain; an unknown one should not."""
        row = await self.database.fetchrow(_SQL["heartbeat"], organization_id, client_id)
        assert row is not None
        return row["server_time"], row["draining"]

    async def page(self, organization_id: UUID, after: str | None, size: int, *, online: bool | None) -> list[Client]:
        """Returns clients by id, with their instances; only those that are `online`, or not, unless it is None."""
        async with self.database.connection() as connection:
            return await _clients(connection, organization_id, after, size, online=online)

    async def set_draining(self, organization_id: UUID, client_id: str, draining: bool, deed: Deed) -> Client:
        """Tells a client to drain, or to work again, with an audit entry; one transaction.

        Raises:
            ClientNotFound: there is no such client; nothing was written.
        """

        async def work(connection: Connection) -> Client:
            if await connection.fetchval(_SQL["set_draining"], organization_id, client_id, draining) is None:
                raise ClientNotFound(client_id)
            (client,) = await _clients(connection, organization_id, None, 1, only=client_id)
            resource = f"{client_id}: {'draining' if draining else 'not draining'}"
            await audit_store.append(connection, organization_id, deed, resource, {"draining": draining})
            return client

        return await self.atomically(work)

    async def goodbye(self, organization_id: UUID, client_id: str, instance_number: int) -> int:
        """Releases every live lease of an instance and forgets it, in one transaction; returns how many leases."""

        async def work(connection: Connection) -> int:
            released = await end_instance(connection, organization_id, client_id, instance_number, Status.RELEASED)
            await connection.execute(_SQL["forget_instance"], organization_id, client_id, instance_number)
            return len(released)

        return await self.atomically(work)

    async def silent_holders(
        self, silent_seconds: float, holds_none_seconds: float, at_most: int
    ) -> list[tuple[UUID, str, int]]:
        """Returns instances of all organizations that hold leases; silent for longer than the first, not the second."""
        rows = await self.database.fetch(_SQL["silent_holders"], silent_seconds, holds_none_seconds, at_most)
        return [(row["organization_id"], row["client_id"], row["instance_number"]) for row in rows]

    async def forget(self, silent_seconds: float, at_most: int) -> int:
        """Deletes instances and clients of all organizations that were silent for longer and hold nothing.

        Returns:
            How many rows went; at most `at_most` of each.
        """

        async def work(connection: Connection) -> int:
            tags = [
                await connection.execute(_SQL[statement], silent_seconds, at_most)
                for statement in ("forget_instances", "forget_clients")
            ]
            return sum(int(tag.rpartition(" ")[2]) for tag in tags)

        return await self.atomically(work)


async def _clients(
    connection: Connection,
    organization_id: UUID,
    after: str | None,
    size: int,
    *,
    online: bool | None = None,
    only: str | None = None,
) -> list[Client]:
    rows = await connection.fetch(_SQL["page_of_clients"], organization_id, after, size, online, only, SILENT_SECONDS)
    instances: dict[str, list[ClientInstance]] = {row["client_id"]: [] for row in rows}
    for row in await connection.fetch(_SQL["instances_of_clients"], organization_id, list(instances), SILENT_SECONDS):
        instances[row["client_id"]].append(ClientInstance(*list(row)[1:]))
    return [Client(**row, instances=tuple(instances[row["client_id"]])) for row in rows]
