"""Intervals of partitions: their bounds and names, and making them on a real table."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import date, timedelta
from itertools import pairwise
from typing import Any

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


async def test_readers_and_writers_of_the_table_go_on_while_a_partition_is_made(database: str) -> None:
    # Whoever has to wait for another fails soon.
    connections = [await asyncpg.connect(database, server_settings={"lock_timeout": "1000"}) for _ in range(3)]
    try:
        reader, writer, maker = connections
        await maker.execute("CREATE TABLE t (day date PRIMARY KEY) PARTITION BY RANGE (day)")
        today, tomorrow = planned("public", "t", Interval.DAY, date(2025, 1, 1), ahead=1)
        await ensure(maker, "public", "t", [today])
        async with reader.transaction(), writer.transaction():
            await reader.fetch("SELECT FROM t")
            await writer.execute("INSERT INTO t VALUES ('2025-01-01')")
            assert await ensure(maker, "public", "t", [today, tomorrow]) == [tomorrow]
            await writer.execute("INSERT INTO t VALUES ('2025-01-02')")
        assert await reader.fetchval("SELECT count(*) FROM t") == 2
    finally:
        for connection in connections:
            await connection.close()


_TABLE = """
CREATE TABLE events (
  organization_id uuid NOT NULL,
  day date,
  units integer NOT NULL DEFAULT 3 CHECK (units > 0),
  twice integer GENERATED ALWAYS AS (units * 2) STORED,
  name text COLLATE "C" DEFAULT 'x',
  note text,
  CONSTRAINT few CHECK (units < 1000)
) PARTITION BY RANGE (day);
ALTER TABLE events ADD PRIMARY KEY (organization_id, day);
CREATE INDEX ON events (name DESC, lower(note)) INCLUDE (units) WHERE units > 1;
CREATE UNIQUE INDEX ON events (day, units);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
CREATE TRIGGER watch BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION nothing();
"""
_SHAPE = (
    """SELECT attname, atttypid::regtype, attnotnull, attidentity::text, attgenerated::text, attcollation,
      attstorage::text, attislocal, attinhcount, pg_get_expr(adbin, adrelid) FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attrelid = $1::regclass AND attnum > 0""",
    """SELECT contype::text, pg_get_constraintdef(oid) AS definition, conislocal, coninhcount, conparentid > 0
    FROM pg_constraint WHERE conrelid = $1::regclass""",
    """SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition, inhparent::regclass::text
    FROM pg_index LEFT JOIN pg_inherits ON inhrelid = indexrelid WHERE indrelid = $1::regclass""",
    "SELECT tgname, tgenabled::text, tgparentid > 0 FROM pg_trigger WHERE tgrelid = $1::regclass",
    "SELECT relispartition, reloptions, reltablespace, relkind::text FROM pg_class WHERE oid = $1::regclass",
)


async def _shape(connection: asyncpg.Connection[asyncpg.Record], table: str) -> list[set[tuple[Any, ...]]]:
    """Everything that makes a table what it is, by what its own name does not matter to."""
    found = []
    for statement in _SHAPE:
        rows = await connection.fetch(statement, table)
        found.append({tuple(str(value).replace(table, "it") for value in row) for row in rows})
    return found


async def test_a_partition_is_as_postgresql_itself_would_make_it(database: str) -> None:
    """With the table's own columns, indexes, constraints and triggers: what is done to the table reaches them."""
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(_TABLE)
        if connection.get_server_version().major >= 17:
            await connection.execute("ALTER TABLE events ADD number bigint GENERATED ALWAYS AS IDENTITY")
        (wanted,) = planned("public", "events", Interval.DAY, date(2025, 1, 1), ahead=0)
        await ensure(connection, "public", "events", [wanted])
        await connection.execute(
            "CREATE TABLE events_by_itself PARTITION OF events FOR VALUES FROM ('2025-01-02') TO ('2025-01-03')"
        )
        assert await _shape(connection, wanted.name) == await _shape(connection, "events_by_itself")
        await connection.execute("ALTER TABLE events DROP CONSTRAINT few")
        await connection.execute(
            "INSERT INTO events (organization_id, day, units) VALUES (gen_random_uuid(), $1, 1000)", wanted.begin
        )
    finally:
        await connection.close()
