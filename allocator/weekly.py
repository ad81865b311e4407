"""What came of the weeks that are over, by client: computed once a week is over, kept when its results have gone."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING

import structlog

from services.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from allocator.weekly_store import WeeklyStore

_log = structlog.get_logger("allocator.weekly")

# Mondays begin at another moment for every time zone.
_ROUND_SECONDS = 60.0
_AT_ONCE = 1000
# A week of tens of millions of results takes the database many seconds: computing may take this share of the time.
_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class WeekOfClient:
    """What came of a week; `week` is its Monday, `client_id` is '' for the organization as a whole."""

    week: date
    client_id: str
    results: int
    succeeded: int
    failed: int
    blocked: int
    execution_ms: int
    computed_at: datetime


class WeeklyStatistics:
    """Computes weeks. Replicas may do so at once."""

    def __init__(self, store: WeeklyStore) -> None:
        self._store = store

    async def round(self) -> int:
        """Computes the weeks that are due, up to a thousand; returns how many.

        After a downtime that is every week that was missed and whose results are still at hand (90 days).

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        due = await self._store.due(_AT_ONCE)
        for organization_id, week in due:
            begun = time.monotonic()
            await self._store.compute(organization_id, week)
            await asyncio.sleep((time.monotonic() - begun) * (1 / _SHARE - 1))
        return len(due)

    async def rounds_for_ever(self) -> None:
        """Makes a round a minute; waits while the database is away."""
        while True:
            try:
                if computed := await self.round():
                    _log.info("weeks computed", weeks=computed)
            except DatabaseUnavailable as error:
                _log.warning("the weekly statistics wait for the database", error=error.message)
            await asyncio.sleep(_ROUND_SECONDS)
