"""The way to cold storage, on real PostgreSQL and both engines of the object store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from muster.archiver.v1 import archive_pb2 as pb

from services.partitions import Interval
from tests.support.archive_tables import Client, EventTable, event_table, old_day
from tests.support.postgres import PostgresServer
from tests.support.s3 import S3Server, make_bucket
from tests.support.services import StartService

WAY = [
    pb.ARCHIVE_STEP_SELECTED,
    pb.ARCHIVE_STEP_COPIED,
    pb.ARCHIVE_STEP_VERIFIED,
    pb.ARCHIVE_STEP_PUBLISHED,
    pb.ARCHIVE_STEP_DETACHED,
    pb.ARCHIVE_STEP_DROPPED,
]


@pytest.fixture
def table(postgres_server: PostgresServer) -> Iterator[EventTable]:
    name = postgres_server.create_database("events")
    with event_table(postgres_server.dsn(name)) as made:
        yield made
    postgres_server.drop_database(name)


@pytest.fixture
async def client(start_service: StartService, table: EventTable, tmp_path: Path) -> AsyncIterator[Client]:
    service = await start_service(
        "archiver", sources={"main": {"dsn": table.dsn}}, objects={"folder": tmp_path / "objects"}
    )
    yield Client(service)


@pytest.fixture(params=["local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param == "local":
        # Characters that mean something in a URL or a glob.
        yield {"folder": tmp_path / "a folder [1] 100%?*#é"}
        return
    server: S3Server = request.getfixturevalue("s3_server")
    with make_bucket(server) as bucket:
        yield {
            "engine": "s3",
            "endpoint": server.endpoint,
            "bucket": bucket,
            "prefix": "some/prefix",
            "access_key": server.access_key,
            "secret_key": server.secret_key,
        }


async def test_every_value_comes_back(start_service: StartService, table: EventTable, objects: dict[str, Any]) -> None:
    service = await start_service("archiver", sources={"main": {"dsn": table.dsn}}, objects=objects)
    client = Client(service)
    acme, other = await service.organization_id("acme"), await service.organization_id("other")
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 200_000, [acme, other, None])
    await client.put()
    sql = "SELECT * FROM events ORDER BY event_key"
    everything = {"max_rows": 1_000_000}
    hot = await client.query(sql, **everything)
    assert hot.statistics.hot_partitions >= 1
    assert hot.statistics.cold_files == 0

    started = time.perf_counter()
    events = await client.run()
    seconds = time.perf_counter() - started
    assert [event.step for event in events] == WAY, events
    assert events[-1].rows == 200_000
    print(f"archived 200,000 rows of 26 columns in {seconds:.2f} s: {200_000 / seconds:,.0f} rows/s")  # noqa: T201
    assert f"scratch.{old.name}" not in table.partitions()
    assert old.name not in table.relations()

    cold = await client.query(sql, **everything)
    assert cold.statistics.cold_files == 1
    assert cold.statistics.rows == hot.statistics.rows == 66_666
    assert cold.table.equals(hot.table) or cold.table.schema == hot.table.schema
    for name in hot.table.column_names:
        # As text, since NaN is not equal to itself.
        assert str(cold.table[name].to_pylist()) == str(hot.table[name].to_pylist()), name
    listed = await client.partitions()
    assert sum(file.rows for file in listed.cold) == 200_000
    assert {file.partition for file in listed.cold} == {f"scratch.{old.name}"}
    assert UUID(int=0) not in {acme, other}
