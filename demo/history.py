"""Two months of generated history: old partitions of the allocator's largest table, to be archived.

The rows are made by the database itself, deterministically, so that what the archive must hold is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import asyncpg

from services.partitions import Interval, ensure, planned

SCHEMA, TABLE = "allocator", "work_allocations"
ROWS = 210_000
WEEKS = 9

# Keys are UUIDv7 whose time lies within the work date, as the allocator makes them. $1 organization, $2 first day,
# $3 days, $4 rows.
_FILL = """
INSERT INTO work_allocations (organization_id, work_date, allocation_key, slot_id, client_id, instance_number,
  lease_token, status, allocated_at, expires_at, ended_at, recorded_at)
SELECT $1::uuid, (moment AT TIME ZONE 'UTC')::date,
  (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || '7' || substr(digest, 1, 3)
    || '8' || substr(digest, 4, 15))::uuid,
  md5('slot ' || row % 40)::uuid, 'pc-' || row % 4 + 1, row % 8, md5('token ' || row)::uuid, status,
  moment, moment + interval '5 minutes', moment + interval '1 second' * (5 + row % 60),
  CASE WHEN status <= 4 THEN moment + interval '1 second' * (5 + row % 60) END
FROM generate_series(0, $4::bigint - 1) row,
  LATERAL (SELECT $2::date::timestamp AT TIME ZONE 'UTC' + interval '1 day' * ($3::int * row::float8 / $4)) m(moment),
  LATERAL (SELECT md5(row::text)) d(digest),
  LATERAL (SELECT (CASE WHEN row % 20 = 0 THEN 5 WHEN row % 33 = 0 THEN 4 WHEN row % 12 = 0 THEN 3 ELSE 2 END)
    ::smallint) s(status)
"""
_COUNT = "SELECT work_date, status, count(*) AS rows FROM work_allocations WHERE work_date < $1 GROUP BY 1, 2"


@dataclass(frozen=True, slots=True)
class History:
    """What was generated.

    Attributes:
        partitions: The names of the partitions that hold it.
        first_day: The first day.
        end_day: The day after the last.
        rows: Rows by day and status.
    """

    partitions: tuple[str, ...]
    first_day: date
    end_day: date
    rows: dict[tuple[date, int], int]

    @property
    def total(self) -> int:
        """All rows."""
        return sum(self.rows.values())


async def generate(dsn: str, organization_id: str) -> History:
    """Makes the back-dated partitions and fills them.

    Args:
        dsn: The database, as the role that owns the table.
        organization_id: Whose history.
    """
    connection = await asyncpg.connect(dsn)
    try:
        today: date = await connection.fetchval("SELECT (now() AT TIME ZONE 'UTC')::date")
        # The allocator keeps last week's partition for keys from before midnight; history ends before it.
        end = Interval.WEEK.begin(today) - timedelta(weeks=1)
        begin = end - timedelta(weeks=WEEKS)
        weeks = planned(SCHEMA, TABLE, Interval.WEEK, today, ahead=0, behind=WEEKS + 2)
        wanted = [week for week in weeks if begin <= week.begin and week.end <= end]
        await ensure(connection, SCHEMA, TABLE, wanted)
        await connection.execute(_FILL, organization_id, begin, (end - begin).days, ROWS, timeout=120)
        rows = await connection.fetch(_COUNT, end)
    finally:
        await connection.close()
    by_day = {(row["work_date"], row["status"]): row["rows"] for row in rows}
    return History(tuple(week.name for week in wanted), begin, end, by_day)
