"""Fingerprints: PostgreSQL's and the file's are equal for any values, and notice any change."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import psycopg
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archiver.copies import CopyPlan, copy_partition
from archiver.fingerprints import of_file
from archiver.sources import Sources
from archiver.tables import SQL, read_table
from services.config import PostgresConfig
from tests.support.postgres import PostgresServer

ORGANIZATIONS = [UUID(int=1), UUID(int=2), None]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
ROW = st.tuples(
    st.sampled_from(ORGANIZATIONS),
    st.none() | st.uuids(),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.floats(allow_nan=True),
    st.none() | st.booleans(),
    st.none() | st.datetimes(),
    st.none() | st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**8), max_value=10**8),
    st.none() | TEXT,
    st.none() | st.binary(max_size=40),
    st.none() | st.lists(st.none() | TEXT, max_size=4),
)


@pytest.fixture(scope="module")
def database(postgres_server: PostgresServer) -> Iterator[str]:
    name = postgres_server.create_database("fingerprints")
    dsn = postgres_server.dsn(name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE t (day date DEFAULT '2025-01-01', organization_id uuid, k uuid, n bigint, f float8, "
            "b boolean, at timestamp, price numeric(12,3), title text, raw bytea, tags text[]) PARTITION BY RANGE (day)"
        )
        connection.execute("CREATE TABLE t1 PARTITION OF t FOR VALUES FROM ('2025-01-01') TO ('2025-01-02')")
    yield dsn
    postgres_server.drop_database(name)


@given(rows=st.lists(ROW, max_size=12), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_both_sides_agree_and_a_change_is_noticed(database: str, rows: list[Any], data: st.DataObject) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("TRUNCATE t")
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO t (organization_id, k, n, f, b, at, price, title, raw, tags) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                rows,
            )
    sources = Sources({"main": PostgresConfig.model_validate({"dsn": database})})
    async with sources.session("main") as session:
        table = await read_table(session, "public", "t")
        reads = [column.read_sql for column in table.columns]
        names = [column.name for column in table.columns]
        copy = await session.fetchval(SQL["copy_statement"], "public", "t1", reads, names, "organization_id", "k")
        fingerprint = await session.fetchval(
            SQL["fingerprint_statement"],
            "public",
            "t1",
            [column.hash_sql for column in table.columns],
            reads,
            [column.is_text for column in table.columns],
            "organization_id",
            table.columns[2].hash_sql,
        )
    plan = CopyPlan(copy, fingerprint, table.columns, "organization_id", "k", {})
    with tempfile.TemporaryDirectory() as folder:
        copies = copy_partition(database, plan, Path(folder), Event())
        assert sum(one.fingerprint.rows for one in copies) == len(rows)
        assert {one.organization_id for one in copies} == {row[0] for row in rows}
        for one in copies:
            assert of_file(one.file, one.columns, "k").difference(one.fingerprint) == ""
        if copies:
            changed = data.draw(st.sampled_from(copies))
            stored = pq.read_table(changed.file)
            name = data.draw(st.sampled_from([name for name in names if name not in ("k", "organization_id", "day")]))
            values = stored[name].to_pylist()
            turned = [*values[1:], values[0]]
            keys = stored["k"].to_pylist()
            # Values that change rows; those of rows without a key are tied to nothing and may.
            if None not in keys and str(turned) != str(values) and len(set(keys)) == len(keys):
                number = stored.column_names.index(name)
                array = stored[name].combine_chunks().take([*range(1, len(values)), 0])
                pq.write_table(stored.set_column(number, stored.field(number), array), changed.file)
                assert of_file(changed.file, changed.columns, "k").difference(changed.fingerprint) != ""
