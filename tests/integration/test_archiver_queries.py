"""Queries over hot and cold rows: what they see, what they read, what they are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from muster.archiver.v1 import archive_pb2 as pb

from services.call import Role
from services.partitions import Interval
from tests.support.archive_tables import Client, EventTable, event_table, old_day, reason_of
from tests.support.postgres import PostgresServer
from tests.support.services import StartService


@pytest.fixture
def table(postgres_server: PostgresServer) -> Iterator[EventTable]:
    name = postgres_server.create_database("events")
    with event_table(postgres_server.dsn(name)) as made:
        yield made
    postgres_server.drop_database(name)


@pytest.fixture
async def client(start_service: StartService, table: EventTable, tmp_path: Path) -> Client:
    """Two cold weeks and the hot one of today, 100 rows each for acme and 50 for another organization."""
    service = await start_service(
        "archiver", sources={"main": {"dsn": table.dsn}}, objects={"folder": tmp_path / "objects"}
    )
    client = Client(service)
    acme, other = await service.organization_id("acme"), await service.organization_id("other")
    today = table.execute("SELECT (now() AT TIME ZONE 'UTC')::date")[0][0]
    for day in (old_day(Interval.WEEK, ago=2), old_day(Interval.WEEK, ago=1), today):
        partition = table.add_partition(Interval.WEEK, day)
        table.add_rows(partition, 100, [acme])
        table.add_rows(partition, 50, [other])
    table.execute("UPDATE scratch.events SET title = 'SECRET' WHERE organization_id = %(other)s", other=other)
    await client.put()
    await client.run()
    return client


async def refused(client: Client, sql: str, **settings: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.query(sql, **settings)
    return caught.value.code(), reason_of(caught.value), caught.value.details() or ""


async def test_hot_and_cold_are_one_table_of_the_callers_own_rows(client: Client) -> None:
    sql = "SELECT count(*) AS n, count(DISTINCT event_key) AS k, count(DISTINCT organization_id) AS o FROM events"
    found = await client.query(sql)
    assert found.table.to_pylist() == [{"n": 300, "k": 300, "o": 1}]
    statistics = found.statistics
    assert (statistics.cold_files, statistics.hot_partitions, statistics.rows) == (2, 1, 1)
    assert statistics.scanned_bytes > 0
    theirs = await client.query("SELECT count(*) AS n, min(title) AS t FROM events", organization="other")
    assert theirs.table.to_pylist() == [{"n": 150, "t": "SECRET"}]
    nobody = await client.query("SELECT count(*) AS n FROM events", organization="third")
    assert nobody.table.to_pylist() == [{"n": 0}]
    assert nobody.statistics.cold_files == 0


async def test_days_bound_rows_and_reading(client: Client, table: EventTable) -> None:
    first = old_day(Interval.WEEK, ago=2)
    bounded = await client.query(
        "SELECT min(day) AS a, max(day) AS b FROM events",
        from_date=f"{first + timedelta(days=2)}",
        to_date=f"{first + timedelta(days=4)}",
    )
    assert bounded.table.to_pylist() == [{"a": first + timedelta(days=2), "b": first + timedelta(days=3)}]
    statistics = bounded.statistics
    assert (statistics.cold_files, statistics.cold_files_pruned, statistics.hot_partitions) == (1, 1, 0)
    hot = await client.query("SELECT count(*) AS n FROM events", from_date=f"{first + timedelta(days=21)}")
    assert (hot.statistics.cold_files, hot.statistics.cold_files_pruned, hot.statistics.hot_partitions) == (0, 2, 1)
    assert hot.table.to_pylist() == [{"n": 100}]


SHAPES = (
    "SELECT e.event_key FROM events e JOIN events f USING (event_key) WHERE e.middle > 50",
    "SELECT event_key FROM events WHERE middle > (SELECT avg(middle) FROM events WHERE middle > 0)",
    "WITH few AS (SELECT * FROM events LIMIT 5) SELECT title, tags FROM few UNION ALL SELECT title, tags FROM few",
    "SELECT (SELECT max(large) FROM events) AS m, tiny FROM EVENTS WHERE EXISTS (SELECT 1 FROM events x)",
    'SELECT "title" FROM "events" WHERE title IN (SELECT title FROM events WHERE code = \'v5\')',
    "SELECT 1 AS one",
)


async def test_shapes_of_select_read_every_column_they_need(client: Client) -> None:
    for sql in SHAPES:
        found = await client.query(sql)
        assert found.table.num_rows > 0
        assert "SECRET" not in str(found.table.to_pylist())


async def test_each_hot_row_equals_its_cold_self(client: Client, table: EventTable) -> None:
    key = table.execute("SELECT event_key::text FROM scratch.events WHERE middle = 7 AND title IS NOT NULL LIMIT 1")[0][
        0
    ]
    found = await client.query(f"SELECT middle, net, took, mood FROM events WHERE event_key = '{key}'")
    assert found.table.to_pylist() == [{"middle": 7, "net": "10.1.0.0/16", "took": "P7DT14H", "mood": "busy"}]


async def test_rows_are_cut_and_said_to_be(client: Client) -> None:
    cut = await client.query("SELECT event_key FROM events", max_rows=10)
    assert (cut.table.num_rows, cut.statistics.rows, cut.statistics.truncated) == (10, 10, True)
    whole = await client.query("SELECT event_key FROM events", max_rows=300)
    assert (whole.table.num_rows, whole.statistics.truncated) == (300, False)


async def test_a_large_answer_comes_in_small_messages(client: Client) -> None:
    found = await client.query("SELECT repeat(title, 1000) AS t FROM events CROSS JOIN generate_series(1, 5)")
    assert found.table.num_rows == 1500
    assert found.table.nbytes > 4 * 2**20


async def test_cost_is_refused_before_reading(client: Client) -> None:
    code, reason, words = await refused(client, "SELECT * FROM events", max_scan_bytes=1000)
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUERY_TOO_COSTLY")
    assert "1000" in words


REFUSED = (
    ("SELECT * FROM nothing", "POLICY_NOT_FOUND"),
    ("SELECT * FROM scratch.events", "POLICY_NOT_FOUND"),
    ("SELECT * FROM information_schema.tables", "POLICY_NOT_FOUND"),
    ("SELECT * FROM '/etc/passwd'", "POLICY_NOT_FOUND"),
    ("SELECT * FROM 's3://bucket/key.parquet'", "POLICY_NOT_FOUND"),
    ("SELECT nothing FROM events", "QUERY_INVALID"),
    ("SELECT", "QUERY_INVALID"),
    ("not sql at all", "QUERY_INVALID"),
    ("SELECT 1; SELECT 2", "QUERY_INVALID"),
    ("SELECT 1; DROP TABLE events", "QUERY_INVALID"),
    ("DROP TABLE events", "QUERY_INVALID"),
    ("CREATE TABLE x AS SELECT * FROM events", "QUERY_INVALID"),
    ("CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '/etc/passwd'", "QUERY_INVALID"),
    ("COPY events TO '/tmp/stolen.parquet'", "QUERY_INVALID"),
    ("COPY (SELECT 1) TO '/tmp/stolen.parquet'", "QUERY_INVALID"),
    ("INSERT INTO events SELECT * FROM events", "QUERY_INVALID"),
    ("SET datafusion.catalog.information_schema = true", "QUERY_INVALID"),
    ("SHOW TABLES", "QUERY_INVALID"),
    ("EXPLAIN SELECT * FROM events", "QUERY_INVALID"),
    ("EXPLAIN ANALYZE SELECT * FROM events", "QUERY_INVALID"),
    ("DESCRIBE events", "QUERY_INVALID"),
    ("PREPARE p AS SELECT 1", "QUERY_INVALID"),
    ("SELECT input_file_name() FROM events", "QUERY_INVALID"),
    ("SELECT * FROM read_csv('/etc/passwd')", "QUERY_INVALID"),
    ("SELECT 1 / (middle - middle) FROM events", "QUERY_INVALID"),
    ("SELECT CAST(title AS int) FROM events", "QUERY_INVALID"),
)


async def test_anything_else_is_refused(client: Client) -> None:
    for sql, reason in REFUSED:
        code, found, words = await refused(client, sql)
        assert found == reason, words
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert "SECRET" not in words
        assert "/tmp/" not in words.replace("'/tmp/stolen.parquet'", "")
        assert not Path("/tmp/stolen.parquet").exists()


CONDITIONS = (
    "true",
    "1=1 OR organization_id <> organization_id",
    "organization_id IS NOT NULL OR title = 'SECRET'",
    "title = 'SECRET'",
    "CAST(CASE WHEN title = 'SECRET' THEN title ELSE '1' END AS int) >= 0",
    "1 / (CASE WHEN title = 'SECRET' THEN 0 ELSE 1 END) = 1",
)


async def test_no_condition_reaches_other_organizations(client: Client) -> None:
    for condition in CONDITIONS:
        found = await client.query(f"SELECT count(*) AS n FROM events WHERE title = 'SECRET' AND ({condition})")
        assert found.table.to_pylist() == [{"n": 0}]


async def test_damaged_and_missing_files_are_noticed(client: Client) -> None:
    folder = client.service.chassis.config.objects.folder
    stored = sorted(folder.rglob("*.parquet"))
    whole = {path: path.read_bytes() for path in stored}
    for path in stored:
        flipped = bytearray(whole[path])
        flipped[len(flipped) // 3] ^= 1
        path.write_bytes(flipped)
    assert (await refused(client, "SELECT * FROM events"))[:2] == (grpc.StatusCode.DATA_LOSS, "ARCHIVE_CORRUPT")
    for path in stored:
        path.write_bytes(whole[path])
    assert (await client.query("SELECT * FROM events")).statistics.rows == 300
    for path in stored:
        path.unlink()
    assert (await refused(client, "SELECT * FROM events"))[:2] == (grpc.StatusCode.DATA_LOSS, "ARCHIVE_CORRUPT")
    assert (await client.query("SELECT 1 AS one")).table.num_rows == 1


async def test_newer_columns_are_null_in_older_files_and_dropped_ones_stay(client: Client, table: EventTable) -> None:
    table.execute("ALTER TABLE scratch.events ADD COLUMN newer text DEFAULT 'new', DROP COLUMN wall")
    found = await client.query("SELECT newer, count(*) AS n, count(wall) AS w FROM events GROUP BY newer ORDER BY n")
    assert found.table.to_pylist() == [{"newer": "new", "n": 100, "w": 0}, {"newer": None, "n": 200, "w": 200}]


async def test_cold_rows_outlive_their_table(client: Client, table: EventTable) -> None:
    day = old_day(Interval.WEEK, ago=2)
    table.execute("DROP TABLE scratch.events")
    found = await client.query("SELECT count(*) AS n FROM events")
    assert found.table.to_pylist() == [{"n": 200}]
    cut = await client.query("SELECT count(DISTINCT day) AS n FROM events", to_date=f"{day + timedelta(days=3)}")
    assert cut.table.to_pylist() == [{"n": 3}]


async def test_a_query_keeps_no_lock_and_a_cancelled_one_ends(client: Client, table: EventTable) -> None:
    call = client.query_stub.Query(
        pb.QueryRequest(sql="SELECT max(value) FROM generate_series(1, 1000000000000)"),
        metadata=await client.service.metadata(Role.OPERATOR),
        timeout=1,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(10):
        assert (await client.query("SELECT count(*) AS n FROM events")).table.to_pylist() == [{"n": 300}]
    with psycopg.connect(table.dsn, autocommit=True) as connection:
        connection.execute("SET lock_timeout = '1s'")
        connection.execute("ALTER TABLE scratch.events ADD COLUMN free boolean")


async def test_the_source_is_away(client: Client, table: EventTable, postgres_server: PostgresServer) -> None:
    name = table.dsn.rpartition("/")[2].partition("?")[0]
    with psycopg.connect(postgres_server.superuser_dsn, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            code, reason, _ = await refused(client, "SELECT count(*) FROM events")
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
