"""What is done by the clock: days, partitions, old request ids."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from allocator import metrics
from allocator.target_store import TargetStore
from services import requests
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.allocation_store import AllocationStore
    from allocator.partitions import Partitions
    from services.postgres import Database

_SQL = queries("allocator", "upkeep.sql")
_log = structlog.get_logger("allocator.upkeep")

# Midnight comes at another moment for every time zone; a minute late is early enough, since a day's rows are also made
# when they are first needed.
_ROUND_SECONDS = 60.0
_PARTITION_ROUNDS = 60
# How long before its midnight a day's rows are begun: enough for ten rounds, and for millions of slots in one of them.
_AHEAD_SECONDS = 600.0
# Longer than rows of a day stay hot by default (30 days).
_TRACKED_DAYS = 60


class Upkeep:
    """Keeps the tables ready."""

    def __init__(self, database: Database, store: AllocationStore, partitions: Partitions) -> None:
        self._database = database
        self._store = store
        self._partitions = partitions

    async def round(self) -> None:
        """Makes the rows of each organization's day, and soon before midnight of its next; forgets what is old.

        Safe to repeat and at once.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        for row in await self._database.fetch(_SQL["days_to_track"], _AHEAD_SECONDS):
            while not await self._store.track_day(row["organization_id"], row["work_date"]):
                continue
        await self._database.execute(_SQL["forget_tracked_days"], _TRACKED_DAYS)
        await TargetStore(self._database, self._partitions).forget()
        async with self._database.connection() as connection:
            while await requests.forget_old(connection):
                continue
        metrics.UPKEEP_AT.set_to_current_time()

    async def rounds_for_ever(self) -> None:
        """Makes a round a minute, and partitions once an hour, or until all stand; waits while the database is away."""
        rounds = 0
        while True:
            try:
                if rounds == 0 and await self._partitions.ensure():
                    rounds = _PARTITION_ROUNDS
                await self.round()
                rounds = max(0, rounds - 1)
            except DatabaseUnavailable as error:
                _log.warning("the upkeep waits for the database", error=error.message)
            await asyncio.sleep(_ROUND_SECONDS)
