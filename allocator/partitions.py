"""The allocator's partitioned tables: it makes their partitions itself, so that none is ever missing."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

import asyncpg
import structlog

from services import partitions
from services.partitions import Interval, Partition
from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Database

_SQL = queries("allocator", "upkeep.sql")
_log = structlog.get_logger("allocator.partitions")

SCHEMA = "allocator"
TABLES: dict[str, Interval] = {
    "work_slots_history": Interval.MONTH,
    "daily_work_tracking": Interval.MONTH,
    "exit_toggle_logs": Interval.MONTH,
    "work_allocations": Interval.WEEK,
    "work_results": Interval.MONTH,
    "product_results": Interval.MONTH,
    "client_activity_logs": Interval.WEEK,
    "audit_log": Interval.MONTH,
}
# Three intervals ahead outlast any pause of the service short of weeks; one behind serves organizations whose day
# began before UTC's did, and leases that straddle the turn.
_AHEAD, _BEHIND = 3, 1


class Partitions:
    """Makes the partitions that should stand around today, and those that live leases will need when they end."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def missing(self) -> int:
        """Returns how many partitions from today's on do not stand. Raises: DatabaseUnavailable."""
        today: date = await self._database.fetchval(_SQL["today"])
        standing = {row["name"] for row in await self._database.fetch(_SQL["standing_partitions"], SCHEMA)}
        return sum(
            partition.name not in standing
            for table, interval in TABLES.items()
            for partition in partitions.planned(SCHEMA, table, interval, today, ahead=_AHEAD)
        )

    async def ensure(self) -> bool:
        """Makes what is missing. Safe to run from several replicas at once.

        A table whose partitions cannot be made, which is logged, does not keep the others.

        Returns:
            Whether all stand.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        today: date = await self._database.fetchval(_SQL["today"])
        days: list[date] = [row["work_date"] for row in await self._database.fetch(_SQL["days_of_leases"])]
        whole = True
        async with self._database.connection() as connection:
            for table, interval in TABLES.items():
                wanted = partitions.planned(SCHEMA, table, interval, today, ahead=_AHEAD, behind=_BEHIND)
                if table == "work_allocations":
                    # Leases outlive any downtime, and the archive may have taken their week meanwhile.
                    held = {Partition.of(SCHEMA, table, interval, day) for day in days}
                    wanted += sorted(held.difference(wanted), key=lambda one: one.begin)
                try:
                    for made in await partitions.ensure(connection, SCHEMA, table, wanted):
                        _log.info("partition made", partition=made.name)
                except asyncpg.PostgresError as error:
                    # A connection that is lost fails the next statement, as one that is closed.
                    whole = False
                    _log.error("partitions cannot be made", table=table, exc_info=error)
            # A partitioned table cannot hand its fill factor down.
            for row in await connection.fetch(_SQL["loosen_tracking"], SCHEMA):
                await connection.execute(row["statement"])
        return whole
