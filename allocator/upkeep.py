"""What is done by the clock: days, partitions, old request ids, and the gauges."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from allocator import metrics
from services import requests
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.partitions import Partitions
    from services.postgres import Database

_SQL = queries("allocator", "upkeep.sql")
_log = structlog.get_logger("allocator.upkeep")

# Midnight comes at another moment for every time zone; a minute late is early enough, since a day's row is also made
# when it is first needed.
_ROUND_SECONDS = 60.0
_PARTITION_ROUNDS = 60
_GAUGE_SECONDS = 5.0


class Upkeep:
    """Keeps the tables ready."""

    def __init__(self, database: Database, store: AllocationStore, partitions: Partitions) -> None:
        self._database = database
        self._store = store
        self._partitions = partitions

    async def round(self) -> None:
        """Makes the rows of today for every organization and forgets old request ids. Safe to repeat and at once.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        for row in await self._database.fetch(_SQL["organizations"]):
            await self._store.ensure_tracking(row["organization_id"], None)
        async with self._database.connection() as connection:
            while await requests.forget_old(connection):
                continue

    async def rounds_for_ever(self) -> None:
        """Makes a round a minute, and partitions once an hour; waits while the database is away."""
        rounds = 0
        while True:
            try:
                if rounds % _PARTITION_ROUNDS == 0:
                    await self._partitions.ensure()
                await self.round()
                rounds += 1
            except DatabaseUnavailable as error:
                _log.warning("the upkeep waits for the database", error=error.message)
            await asyncio.sleep(_ROUND_SECONDS)

    async def measure(self) -> None:
        """Reads the gauges. Raises: DatabaseUnavailable."""
        row = await self._database.fetchrow(_SQL["gauges"])
        assert row is not None
        metrics.LIVE_LEASES.set(row["live_leases"])
        metrics.OVERDUE_LEASES.set(row["overdue_leases"])
        metrics.OUTBOX_PENDING.set(row["outbox_pending"])
        metrics.QUARANTINED.set(row["quarantined"])
        metrics.QUOTA_VIOLATIONS.set(row["quota_violations"])
        metrics.CAP_VIOLATIONS.set(row["cap_violations"])

    async def measure_for_ever(self) -> None:
        """Reads the gauges every few seconds; they keep their values while the database is away."""
        while True:
            try:
                await self.measure()
            except DatabaseUnavailable as error:
                _log.warning("the gauges wait for the database", error=error.message)
            await asyncio.sleep(_GAUGE_SECONDS)
