"""Intervals of partitions: their bounds and names, and making them on a real table."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import date, timedelta
from itertools import pairwise

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.partitions import Interval, Partition, ensure, planned
from tests.support.postgres import PostgresServer

DAYS = st.dates(date(1970, 1, 8), date(9990, 1, 1))


@pytest.mark.parametrize(
    ("interval", "day", "name", "begin", "end"),
    [
        (Interval.DAY, date(2024, 2, 29), "t_2024_02_29", date(2024, 2, 29), date(2024, 3, 1)),
        (Interval.WEEK, date(2025, 8, 17), "t_2025_w33", date(2025, 8, 11), date(2025, 8, 18)),
        # The last days of December may belong to the first week of the next year, and the other way round.
        (Interval.WEEK, date(2024, 12, 31), "t_2025_w01", date(2024, 12, 30), date(2025, 1, 6)),
        (Interval.WEEK, date(2027, 1, 2), "t_2026_w53", date(2026, 12, 28), date(2027, 1, 4)),
        (Interval.MONTH, date(2025, 8, 31), "t_2025_08", date(2025, 8, 1), date(2025, 9, 1)),
        (Interval.MONTH, date(2025, 12, 31), "t_2025_12", date(2025, 12, 1), date(2026, 1, 1)),
    ],
)
def test_partition_of_a_day(interval: Interval, day: date, name: str, begin: date, end: date) -> None:
    assert Partition.of("s", "t", interval, day) == Partition("s", name, begin, end)


@given(interval=st.sampled_from(Interval), day=DAYS)
def test_each_day_has_one_partition_and_they_meet(interval: Interval, day: date) -> None:
    one = Partition.of("s", "t", interval, day)
    assert one.begin <= day < one.end
    following = Partition.of("s", "t", interval, one.end)
    assert following.begin == one.end
    assert following.name != one.name
    assert Partition.of("s", "t", interval, one.end - timedelta(days=1)) == one


@given(interval=st.sampled_from(Interval), day=DAYS, ahead=st.integers(0, 40), behind=st.integers(0, 1))
def test_planned_is_a_row_without_gaps(interval: Interval, day: date, ahead: int, behind: int) -> None:
    row = planned("s", "t", interval, day, ahead=ahead, behind=behind)
    assert len(row) == ahead + behind + 1
    assert row[behind].begin <= day < row[behind].end
    assert all(one.end == following.begin for one, following in pairwise(row))
    assert len({one.name for one in row}) == len(row)


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[str]:
    name = postgres_server.create_database("partitions")
    yield postgres_server.dsn(name)
    postgres_server.drop_database(name)


@pytest.mark.parametrize("column", ["date", "timestamptz", "timestamp"])
async def test_ensure_makes_what_is_missing_once(database: str, column: str) -> None:
    connection = await asyncpg.connect(database, server_settings={"timezone": "Asia/Seoul"})
    try:
        await connection.execute(f'CREATE TABLE "Odd name" (at {column}) PARTITION BY RANGE (at)')
        wanted = planned("public", "Odd name", Interval.MONTH, date(2025, 12, 31), ahead=3)
        assert await ensure(connection, "public", "Odd name", wanted[:2]) == wanted[:2]
        assert await ensure(connection, "public", "Odd name", wanted) == wanted[2:]
        assert await ensure(connection, "public", "Odd name", wanted) == []
        # The first and the last moment of the row, in UTC, find their partitions; the one after does not.
        await connection.execute("SET timezone = 'UTC'")
        await connection.execute("""INSERT INTO "Odd name" VALUES ('2025-12-01'), ('2026-03-31 23:59:59.999')""")
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("""INSERT INTO "Odd name" VALUES ('2026-04-01')""")
    finally:
        await connection.close()


async def test_ensure_by_two_at_once(database: str) -> None:
    connections = [await asyncpg.connect(database) for _ in range(4)]
    try:
        await connections[0].execute("CREATE TABLE t (day date) PARTITION BY RANGE (day)")
        wanted = planned("public", "t", Interval.DAY, date(2025, 1, 1), ahead=5)
        made = await asyncio.gather(*(ensure(connection, "public", "t", wanted) for connection in connections))
        assert sorted(one.name for part in made for one in part) == sorted(one.name for one in wanted)
    finally:
        for connection in connections:
            await connection.close()
