"""Results in quarantine in the database. Every function is bound to one organization.

A row is in quarantine while its allocation is `quarantined`; both change in one transaction. `accept` and `discard` run
in the transaction of their caller, and lock the rows in quarantine before those of allocations and days, each by key.
Whether accepted or discarded, its worker is answered as the first time when it submits the result again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.errors import QuarantinedResultNotFound
from allocator.lease_store import lock_tracking
from allocator.leases import work_dates
from allocator.quarantine import QuarantinedResult
from services.errors import DomainError
from services.postgres import queries

if TYPE_CHECKING:
    import asyncpg

    from services.postgres import Connection, Database

_SQL = queries("allocator", "quarantine.sql")


class QuarantineStore:
    """Reads and settles what is in quarantine."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, organization_id: UUID, slot_id: UUID | None, after: UUID | None, size: int, most_bytes: int
    ) -> tuple[list[QuarantinedResult], bool]:
        """Returns results by allocation key, which is by the time when their units were handed out, the oldest first.

        Args:
            organization_id: The tenant.
            slot_id: Only of this slot; None for any.
            after: The allocation key after which the page begins; None for the first page.
            size: The most results.
            most_bytes: Of their texts; one result is shown however large it is.

        Returns:
            The results, and whether there may be more.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        rows = await self._database.fetch(_SQL["page_of_quarantine"], organization_id, slot_id, after, size, most_bytes)
        more = len(rows) == size or bool(rows and len(rows) < rows[0]["found"])
        return [QuarantinedResult(*(row[name] for name in QuarantinedResult.__slots__)) for row in rows], more

    async def accept(
        self, connection: Connection, organization_id: UUID, keys: Sequence[UUID]
    ) -> dict[UUID, DomainError | None]:
        """Records results after all, as late: result, products, counters and the end of their allocations.

        Where a day has no room left its quota grows by as many units as are needed. The activity log has had its rows
        since they came.

        Args:
            connection: In the caller's transaction.
            organization_id: The tenant.
            keys: Of their allocations.

        Returns:
            For each key None, or QuarantinedResultNotFound; also for one that was settled before.
        """
        rows = await _lock(connection, organization_id, keys)
        found = [row["allocation_key"] for row in rows]
        if found:
            await connection.execute(_SQL["lock_allocations"], organization_id, found, work_dates(found))
            await lock_tracking(connection, organization_id, [(row["work_date"], row["slot_id"]) for row in rows])
            await connection.execute(_SQL["accept_results"], organization_id, found)
        return _answers(keys, found)

    async def discard(
        self, connection: Connection, organization_id: UUID, keys: Sequence[UUID]
    ) -> dict[UUID, DomainError | None]:
        """Gives results up: their allocations stay expired. Arguments and answers as of `accept`."""
        rows = await _lock(connection, organization_id, keys)
        found = [row["allocation_key"] for row in rows]
        if found:
            await connection.execute(_SQL["lock_allocations"], organization_id, found, work_dates(found))
            await connection.execute(_SQL["discard_results"], organization_id, found)
        return _answers(keys, found)


async def _lock(connection: Connection, organization_id: UUID, keys: Sequence[UUID]) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await connection.fetch(_SQL["lock_quarantine"], organization_id, keys)
    return rows


def _answers(keys: Sequence[UUID], found: Sequence[UUID]) -> dict[UUID, DomainError | None]:
    settled = set(found)
    return {key: None if key in settled else QuarantinedResultNotFound(key) for key in keys}
