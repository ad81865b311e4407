"""What the metrics show of the whole service, read by loops of their own so that a scrape costs nothing."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from allocator import metrics
from allocator.clients import SILENT_SECONDS
from allocator.store import fetch_whole
from services.errors import DatabaseUnavailable
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.partitions import Partitions
    from services.postgres import Database

_SQL = queries("allocator", "gauges.sql")
_log = structlog.get_logger("allocator.gauges")

_SECONDS = 5.0
_SLOW_SECONDS = 60.0
# With millions of slots or leases a reading takes seconds: it may take this share of the time.
_SHARE = 0.01


class Gauges:
    """Reads the gauges."""

    def __init__(self, database: Database, partitions: Partitions) -> None:
        self._database = database
        self._partitions = partitions

    async def measure(self) -> None:
        """Reads what is cheap. Raises: DatabaseUnavailable."""
        row = await fetch_whole(self._database, _SQL["gauges"])
        metrics.LIVE_LEASES.set(row["live_leases"])
        metrics.OVERDUE_LEASES.set(row["overdue_leases"])
        metrics.OUTBOX_PENDING.set(row["outbox_pending"])
        metrics.OUTBOX_SECONDS.set(row["outbox_seconds"])
        metrics.QUARANTINED.set(row["quarantined"])

    async def measure_clients(self) -> None:
        """Reads which clients are there, and which partitions are not. Raises: DatabaseUnavailable."""
        row = await fetch_whole(self._database, _SQL["clients"], SILENT_SECONDS)
        metrics.CLIENTS.labels("online").set(row["clients_online"])
        metrics.CLIENTS.labels("offline").set(row["clients_offline"])
        metrics.PARTITIONS_MISSING.set(await self._partitions.missing())

    async def measure_slots(self) -> None:
        """Reads what may take seconds. Raises: DatabaseUnavailable."""
        row = await fetch_whole(self._database, _SQL["active_slots"])
        metrics.ACTIVE_SLOTS.set(row["active_slots"])

    async def measure_for_ever(self) -> None:
        """Reads the gauges again and again; they keep their values while the database is away."""
        # Each for itself: what is slow makes only itself rare.
        readings = (
            (self.measure, _SECONDS),
            (self.measure_clients, _SLOW_SECONDS),
            (self.measure_slots, _SLOW_SECONDS),
        )
        due = [0.0] * len(readings)
        while True:
            for number, (read, seconds) in enumerate(readings):
                begun = time.monotonic()
                if begun < due[number]:
                    continue
                period = seconds
                try:
                    await read()
                except DatabaseUnavailable as error:
                    _log.warning("the gauges wait for the database", error=error.message)
                    period = _SECONDS
                # What was given up took its share too.
                due[number] = begun + max(period, (time.monotonic() - begun) / _SHARE)
            await asyncio.sleep(max(0.0, min(due) - time.monotonic()))
