"""Weekly statistics in the database."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.store import Store
from allocator.weekly import WeekOfClient
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("allocator", "weekly.sql")

# A week of tens of millions of results takes minutes on a slow disk.
_COMPUTE_SECONDS = 600.0


class WeeklyStore(Store):
    """Computes and reads weekly statistics."""

    async def due(self, at_most: int) -> list[tuple[UUID, date]]:
        """Returns organizations and the Mondays of their weeks that are to be computed, the newest first.

        Over all organizations, as the clock's work.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        return [tuple(row) for row in await self.database.fetch(_SQL["weeks_due"], at_most)]

    async def compute(self, organization_id: UUID, week: date) -> None:
        """Computes one week in one statement, in place of what stands; safe to repeat and at once.

        What stands is kept if the archive has taken results of the week since.

        Args:
            organization_id: The tenant.
            week: The Monday of a week that is over.

        Raises:
            DatabaseUnavailable: the database does not answer, or not within 10 minutes.
        """

        async def work(connection: Connection) -> None:
            await connection.execute(_SQL["compute_week"], organization_id, week, timeout=_COMPUTE_SECONDS)

        await self.atomically(work)

    async def page(
        self,
        organization_id: UUID,
        day: date | None,
        client_id: str | None,
        after: tuple[date, str] | None,
        size: int,
    ) -> list[WeekOfClient]:
        """Returns weeks, the newest first, by client within each; weeks of which nothing came are left out.

        Args:
            organization_id: The tenant.
            day: Only the week of this day; None for all.
            client_id: Only this client; None for all.
            after: The week and client after which the page begins; None for the first page.
            size: How many rows.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        week, client = after or (None, None)
        rows = await self.database.fetch(_SQL["page_of_weeks"], organization_id, day, client_id, week, client, size)
        return [WeekOfClient(**row) for row in rows]
