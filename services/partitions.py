"""Range partitions by day, week or month: their bounds, their names, and making the ones that are missing.

Used by the archiver for the tables of its policies, and by the owners of partitioned tables at start, so that a clock
that runs past the last partition never meets a table without room (ruling X-24).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Self

from services.postgres import queries

if TYPE_CHECKING:
    from services.postgres import Connection

_SQL = queries("services", "partitions.sql")


class Interval(Enum):
    """The length of a partition."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def begin(self, day: date) -> date:
        """Returns the first day of the partition that holds `day`; weeks begin on Monday."""
        if self is Interval.WEEK:
            return day - timedelta(days=day.weekday())
        return day.replace(day=1) if self is Interval.MONTH else day

    def after(self, begin: date) -> date:
        """Returns the first day of the partition after the one that begins on `begin`."""
        if self is Interval.MONTH:
            return (begin.replace(day=28) + timedelta(days=4)).replace(day=1)
        return begin + timedelta(days=7 if self is Interval.WEEK else 1)

    def label(self, begin: date) -> str:
        """Returns what a partition's name ends in: `2025_08`, `2025_w33` or `2025_08_14`."""
        if self is Interval.MONTH:
            return f"{begin:%Y_%m}"
        if self is Interval.WEEK:
            year, week, _ = begin.isocalendar()
            return f"{year}_w{week:02}"
        return f"{begin:%Y_%m_%d}"


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition: schema and name, and the days `begin` (included) to `end` (excluded)."""

    schema: str
    name: str
    begin: date
    end: date

    @classmethod
    def of(cls, schema: str, table: str, interval: Interval, day: date) -> Self:
        """Returns the partition of `table` that holds `day`."""
        begin = interval.begin(day)
        return cls(schema, f"{table}_{interval.label(begin)}", begin, interval.after(begin))


def planned(
    schema: str, table: str, interval: Interval, today: date, *, ahead: int, behind: int = 0
) -> list[Partition]:
    """Returns the partitions a table should have: `behind` before today's, today's, and `ahead` after it."""
    first = interval.begin(today)
    for _ in range(behind):
        first = interval.begin(first - timedelta(days=1))
    found = []
    for _ in range(behind + 1 + ahead):
        found.append(Partition.of(schema, table, interval, first))
        first = interval.after(first)
    return found


async def ensure(connection: Connection, schema: str, table: str, partitions: list[Partition]) -> list[Partition]:
    """Makes those of `partitions` that are missing, each in a transaction of its own, and returns them.

    Days are cut in UTC for timestamp columns. Others go on reading and writing the table meanwhile. Safe to run from
    several processes at once.

    Args:
        connection: A connection that owns the table, not in a transaction.
        schema: The table's schema.
        table: The partitioned table.
        partitions: The partitions it should have.
    """
    existing = {row["name"] for row in await connection.fetch(_SQL["partition_names"], schema, table)}
    made = []
    for partition in partitions:
        if partition.name in existing:
            continue
        async with connection.transaction():
            # One maker at a time: CREATE TABLE IF NOT EXISTS races with itself in the catalogue.
            await connection.execute(_SQL["lock_table_makers"], f"{schema}.{table}")
            await connection.execute("SET LOCAL timezone = 'UTC'")
            statements = await connection.fetchval(
                _SQL["create_partition"], schema, table, partition.name, partition.begin, partition.end
            )
            if statements is not None:
                await connection.execute(statements)
                made.append(partition)
    return made
