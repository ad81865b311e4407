"""Two months of generated history: old partitions of the allocator's largest table, to be archived.

The rows are made by the database itself, deterministically, so that what the archive must hold is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import asyncpg

from services.partitions import Interval, ensure, planned

SCHEMA, TABLE = "allocator", "work_allocations"
ROWS = 200_000
DAYS = 60


@dataclass(frozen=True, slots=True)
class History:
    """What was generated: the partitions and, for each day, the rows."""

    partitions: tuple[str, ...]
    rows_by_day: dict[date, int]

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(self.rows_by_day.values())


async def generate(dsn: str, organization_id: str, statement: str) -> History:
    """Makes the back-dated partitions and fills them.

    Args:
        dsn: The database, as the role that owns the table.
        organization_id: Whose history.
        statement: The INSERT: $1 organization, $2 first day, $3 days, $4 rows.
    """
    connection = await asyncpg.connect(dsn)
    try:
        today: date = await connection.fetchval("SELECT (now() AT TIME ZONE 'UTC')::date")
        # The last full week stays hot; history ends before it.
        end = Interval.WEEK.begin(today) - timedelta(days=7)
        begin = Interval.WEEK.begin(end - timedelta(days=DAYS))
        wanted = [
            partition
            for partition in planned(SCHEMA, TABLE, Interval.WEEK, today, ahead=0, behind=12)
            if begin <= partition.begin and partition.end <= end
        ]
        await ensure(connection, SCHEMA, TABLE, wanted)
        days = (end - begin).days
        await connection.execute(statement, organization_id, begin, days, ROWS, timeout=120)
        rows = await connection.fetch(
            f"SELECT work_date, count(*) AS rows FROM {TABLE} WHERE work_date < $1 GROUP BY work_date",  # noqa: S608
            end,
        )
    finally:
        await connection.close()
    return History(tuple(partition.name for partition in wanted), {row["work_date"]: row["rows"] for row in rows})
