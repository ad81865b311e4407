"""Live figures and allocations from the database; every method is bound to one organization and changes nothing.

Raises: DatabaseUnavailable.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.insight import AllocationRecord, Totals
from allocator.slots import Tracking
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "insight.sql")


class InsightStore:
    """Reads figures."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def totals(self, organization_id: UUID, available_units: int) -> Totals:
        """Returns the live figures, of one moment but for `available_units`, which are passed on."""
        row = await self._database.fetchrow(_SQL["totals"], organization_id)
        assert row is not None
        figures = {name: row[name] for name in Totals.__slots__ if name not in ("today", "available_units")}
        today = _tracking(row) if row["work_date"] is not None else None
        return Totals(**figures, today=today, available_units=available_units)

    async def allocations(
        self,
        organization_id: UUID,
        day: date,
        *,
        status: int | None,
        slot_id: UUID | None,
        before: UUID | None,
        size: int,
    ) -> list[AllocationRecord]:
        """Returns the allocations of one day, newest first; None for any status, any slot, from the newest."""
        rows = await self._database.fetch(
            _SQL["page_of_allocations"], organization_id, day, status, slot_id, before, size
        )
        return [AllocationRecord(**row) for row in rows]


def _tracking(row: Any) -> Tracking:
    return Tracking(*(row[name] for name in Tracking.__slots__))
