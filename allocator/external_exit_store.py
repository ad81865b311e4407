"""External exits in the database: the address on the lease, and the releases that a provider has yet to hear of."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.store import Store
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "external_exits.sql")


@dataclass(frozen=True, slots=True)
class ExitRelease:
    """One external exit that is to be given back."""

    release_id: int
    provider: str
    allocation_key: UUID


class ExternalExitStore(Store):
    """Keeps what is ours of external exits. Raises: DatabaseUnavailable, by every method."""

    async def attach(self, organization_id: UUID, exits: Sequence[tuple[UUID, str, str]]) -> set[UUID]:
        """Notes exits (key, provider, address) on their leases; returns the keys of those that still live.

        The exits of the others are put among the releases, in the same transaction.
        """
        ordered = sorted(exits)

        async def work(connection: Connection) -> set[UUID]:
            keys, addresses = [key for key, _, _ in ordered], [address for _, _, address in ordered]
            rows = await connection.fetch(_SQL["attach_exits"], organization_id, keys, addresses)
            noted = {row["allocation_key"] for row in rows}
            if lost := [(provider, key) for key, provider, _ in ordered if key not in noted]:
                await connection.execute(
                    _SQL["enqueue_exit_releases"],
                    organization_id,
                    [provider for provider, _ in lost],
                    [key for _, key in lost],
                )
            return noted

        return await self.atomically(work)

    async def take_releases(self, providers: Sequence[str], at_most: int) -> list[ExitRelease]:
        """Takes due releases of these providers, of any tenant; nobody else has them until they are due again."""
        rows = await self.database.fetch(_SQL["take_exit_releases"], at_most, list(providers))
        return [ExitRelease(**row) for row in rows]

    async def delivered(self, releases: Sequence[ExitRelease]) -> None:
        """Forgets releases that their provider has heard of."""
        await self.database.execute(_SQL["delete_exit_releases"], [release.release_id for release in releases])

    async def pending(self) -> dict[str, int]:
        """Returns how many releases wait, by provider, of all organizations."""
        return {row["provider"]: row["releases"] for row in await self.database.fetch(_SQL["count_exit_releases"])}

    @contextlib.asynccontextmanager
    async def reconciling(self) -> AsyncIterator[Connection | None]:
        """Gives the connection that reconciles within the block; None when another replica's does."""
        async with self.database.connection() as connection:
            mine = bool(await connection.fetchval(_SQL["lock_reconciliation"]))
            try:
                yield connection if mine else None
            finally:
                if mine:
                    await connection.execute(_SQL["unlock_reconciliation"])

    async def sort_held(
        self, connection: Connection, keys: Sequence[UUID], grace_seconds: float
    ) -> tuple[list[UUID], list[UUID]]:
        """Returns which keys name live leases, and which name nothing although older than the grace; any tenant's."""
        rows = await connection.fetch(_SQL["sort_held"], keys, grace_seconds)
        live = [row["allocation_key"] for row in rows if row["live"]]
        return live, [row["allocation_key"] for row in rows if row["orphan"]]
