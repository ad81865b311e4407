"""Reports from the database. Every method reads, and is bound to one organization. Raises: DatabaseUnavailable."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any
from uuid import UUID

from allocator.explanation import ExitStanding, SlotStanding
from allocator.insight import AllocationRecord, DashboardRow, Totals
from allocator.slots import Tracking
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "insight.sql")


class InsightStore:
    """Reads figures."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def standing(
        self, organization_id: UUID, slot_id: UUID | None, target: str | None, region: str | None
    ) -> tuple[SlotStanding, ExitStanding]:
        """Returns how far slots and exits come; None for any slot, target or region."""
        async with self._database.connection() as connection:
            slots = await connection.fetchrow(_SQL["slot_standing"], organization_id, slot_id, target)
            exits = await connection.fetchrow(_SQL["exit_standing"], organization_id, region)
        assert slots is not None
        assert exits is not None
        return SlotStanding(*_plain(slots)), ExitStanding(*_plain(exits))

    async def totals(self, organization_id: UUID) -> Totals:
        """Returns the live figures, of one moment."""
        row = await self._database.fetchrow(_SQL["totals"], organization_id)
        assert row is not None
        figures = {name: row[name] for name in Totals.__slots__ if name != "today"}
        return Totals(**figures, today=_tracking(row) if row["work_date"] is not None else None)

    async def dashboard(
        self, organization_id: UUID, day: date | None, after: tuple[int, UUID] | None, size: int
    ) -> list[DashboardRow]:
        """Returns one day by completion, highest first; None for today."""
        rate, slot_id = after or (None, None)
        rows = await self._database.fetch(_SQL["page_of_dashboard"], organization_id, day, rate, slot_id, size)
        return [DashboardRow(row["slot_id"], row["keyword"], _tracking(row), row["rate"]) for row in rows]

    async def allocations(
        self,
        organization_id: UUID,
        day: date | None,
        *,
        status: int | None,
        slot_id: UUID | None,
        before: UUID | None,
        size: int,
    ) -> list[AllocationRecord]:
        """Returns the allocations of one day, newest first; None for today, any status, any slot."""
        rows = await self._database.fetch(
            _SQL["page_of_allocations"], organization_id, day, status, slot_id, before, size
        )
        return [AllocationRecord(**row) for row in rows]


def _plain(row: Any) -> list[Any]:
    """An aggregate over no rows is NULL where its type is an array."""
    return [() if value is None else tuple(value) if isinstance(value, list) else value for value in row]


def _tracking(row: Any) -> Tracking:
    return Tracking(*(row[name] for name in Tracking.__slots__))
