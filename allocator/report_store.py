"""Reports from the database. Every method reads, and is bound to one organization. Raises: DatabaseUnavailable."""

from __future__ import annotations

import json
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

from allocator.reports import BlockCount, ClientActivity, ClientPerformance, DashboardRow, SettingsEffect
from allocator.slots import Setting, Tracking
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "reports.sql")

# What one answer holds.
_MOST = 1000


class ReportStore:
    """Reads reports."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def today(self, organization_id: UUID) -> date:
        """Returns the day in the organization's time zone."""
        today: date = await self._database.fetchval(_SQL["today_of_organization"], organization_id)
        return today

    async def dashboard(
        self, organization_id: UUID, day: date, after: tuple[int, UUID] | None, size: int
    ) -> list[DashboardRow]:
        """Returns one day by completion, highest first."""
        rate, slot_id = after or (None, None)
        rows = await self._database.fetch(_SQL["page_of_dashboard"], organization_id, day, rate, slot_id, size)
        return [
            DashboardRow(
                row["slot_id"], row["keyword"], Tracking(*(row[name] for name in Tracking.__slots__)), row["rate"]
            )
            for row in rows
        ]

    async def client_performance(self, organization_id: UUID, day: date) -> list[ClientPerformance]:
        """Returns one day by client, the busiest first."""
        rows = await self._database.fetch(_SQL["client_performance"], organization_id, day, _MOST)
        return [ClientPerformance(**row) for row in rows]

    async def settings_effect(
        self, organization_id: UUID, names: tuple[str, ...], target: str | None
    ) -> list[SettingsEffect]:
        """Returns the last 7 days by settings, the best first; no names for all settings, None for any target."""
        rows = await self._database.fetch(_SQL["settings_effect"], organization_id, list(names), target, _MOST)
        return [
            SettingsEffect(_settings(row["settings"]), row["results"], row["succeeded"], row["mean_execution_ms"])
            for row in rows
        ]

    async def blocks(self, organization_id: UUID) -> list[BlockCount]:
        """Returns the last hour's blocks by type, most first."""
        rows = await self._database.fetch(_SQL["block_report"], organization_id, _MOST)
        return [BlockCount(**row) for row in rows]

    async def client_activity(
        self, organization_id: UUID, client_id: str | None, client_ip: str | None
    ) -> list[ClientActivity]:
        """Returns the last hour of a client, or of those at an address."""
        rows = await self._database.fetch(_SQL["client_activity"], organization_id, client_id, client_ip, _MOST)
        return [ClientActivity(**row) for row in rows]


def _settings(text: str) -> dict[str, Setting]:
    """Reads settings as jsonb holds them: a large double comes as a whole number with all its digits."""
    found: dict[str, Setting] = json.loads(text, parse_int=lambda digits: _number(int(digits)))
    return found


def _number(value: int) -> Setting:
    return value if -(2**63) <= value < 2**63 else float(value)
