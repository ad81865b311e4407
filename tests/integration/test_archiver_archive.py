"""The way to cold storage, on real PostgreSQL and both engines of the object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from muster.archiver.v1 import archive_pb2 as pb

from archiver.store import Archive, Step, Store
from services.call import Role
from services.partitions import Interval, Partition
from tests.support.archive_tables import (
    Client,
    EventTable,
    answers_ranges,
    event_table,
    eventually,
    old_day,
    reason_of,
)
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
async def client(start_service: StartService, table: EventTable, tmp_path: Path) -> Client:
    service = await start_service(
        "archiver", sources={"main": {"dsn": table.dsn}}, objects={"folder": tmp_path / "objects"}
    )
    return Client(service)


@pytest.fixture(params=["local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param == "local":
        # Characters that mean something in a URL or a glob.
        yield {"folder": tmp_path / "a folder [1] 100%?*#é"}
        return
    server: S3Server = request.getfixturevalue("s3_server")
    if not answers_ranges(server):
        pytest.skip(f"{server.kind} answers ranges with a status that no S3 client takes")
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
    sql = "SELECT * FROM events WHERE middle % 50 = 1 ORDER BY event_key"
    hot = await client.query(sql)
    assert hot.statistics.hot_partitions >= 1
    assert hot.statistics.cold_files == 0

    events = await client.run()
    assert [event.step for event in events] == WAY, events
    assert events[-1].rows == 200_000
    assert f"scratch.{old.name}" not in table.partitions()
    assert old.name not in table.relations()
    listed = await client.partitions()
    assert sum(file.rows for file in listed.cold) == 200_000
    assert {file.partition for file in listed.cold} == {f"scratch.{old.name}"}
    assert events[-1].bytes == sum(file.size_bytes for file in listed.cold)

    cold = await client.query(sql)
    assert cold.statistics.cold_files == 1
    assert cold.statistics.rows == hot.statistics.rows > 1000
    assert cold.table.schema == hot.table.schema
    for name in hot.table.column_names:
        # As text, since NaN is not equal to itself.
        assert str(cold.table[name].to_pylist()) == str(hot.table[name].to_pylist()), name
    counted = (await client.query("SELECT count(*) AS n, count(DISTINCT event_key) AS k FROM events")).table.to_pylist()
    assert counted == [{"n": 66_666, "k": 66_666}]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("recorded", [False, True], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize("step", list(Step)[1:])
async def test_killed_at_any_step(
    client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch, step: Step, recorded: bool
) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 300, [acme])
    await client.put()
    record = Store.step
    kills = 1

    async def killing(store: Store, archive: Archive, to: Step) -> Archive:
        nonlocal kills
        # A row is seen exactly once at any moment: before, at and after each step.
        assert await _counted(client) == (300, 300)
        if to is step and kills:
            kills -= 1
            if recorded:
                await record(store, archive, to)
            raise Killed
        taken = await record(store, archive, to)
        assert await _counted(client) == (300, 300)
        return taken

    monkeypatch.setattr(Store, "step", killing)
    events = await client.run()
    assert events[-1].step == pb.ARCHIVE_STEP_FAILED, events
    assert await _counted(client) == (300, 300)
    events = await client.run()
    assert pb.ARCHIVE_STEP_FAILED not in {event.step for event in events}, events
    assert await _counted(client) == (300, 300)
    assert old.name not in table.relations()
    listed = await client.partitions()
    assert [file.rows for file in listed.cold] == [300]
    assert [run.state for run in await client.runs("archive")] == [pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED]
    keys = {path.name for path in _objects(client).rglob("*.parquet")}
    assert keys == {Path(file.key).name for file in listed.cold}, "nothing is left of broken attempts"


async def test_late_rows_are_copied_before_the_detach(
    client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 100, [acme])
    await client.put()
    record = Store.step
    late = ["INSERT", "UPDATE"]

    async def slow(store: Store, archive: Archive, to: Step) -> Archive:
        taken = await record(store, archive, to)
        if to is Step.PUBLISHED and late:
            if late.pop(0) == "INSERT":
                table.add_rows(old, 1, [acme])
            else:
                table.execute("UPDATE scratch.events SET title = 'late' WHERE middle = 7")
        return taken

    monkeypatch.setattr(Store, "step", slow)
    steps = [event.step for event in await client.run()]
    assert steps == [*WAY[:4], *WAY[:4], *WAY], "copied again for each change"
    found = await client.query("SELECT count(*) AS n, count(CASE WHEN title = 'late' THEN 1 END) AS late FROM events")
    assert found.table.to_pylist() == [{"n": 101, "late": 1}]


async def test_late_rows_after_the_drop_get_a_file_of_their_own(client: Client, table: EventTable) -> None:
    acme = await client.service.organization_id()
    day = old_day(Interval.WEEK)
    table.add_rows(table.add_partition(Interval.WEEK, day), 100, [acme])
    await client.put()
    await client.run()
    table.add_rows(table.add_partition(Interval.WEEK, day), 7, [acme])
    found = await client.query("SELECT count(*) AS n FROM events")
    assert found.table.to_pylist() == [{"n": 107}]
    assert (found.statistics.cold_files, found.statistics.hot_partitions) == (1, 1 + 0)
    assert [event.step for event in await client.run()] == WAY
    listed = await client.partitions()
    assert sorted(file.rows for file in listed.cold) == [7, 100]
    assert await _counted(client) == (107, 107)
    manifests = sorted(_objects(client).rglob("manifest-*.json"))
    assert [len(json.loads(path.read_text())["files"]) for path in manifests] == [1, 2]
    newest = json.loads(manifests[-1].read_text())
    for file in newest["files"]:
        stored = (_objects(client) / file["key"]).read_bytes()
        assert hashlib.sha256(stored).hexdigest() == file["sha256"]


@pytest.mark.parametrize("kind", ["timestamptz", "timestamp", "date"])
async def test_months_of_ninety_days_by_any_partition_column(client: Client, table: EventTable, kind: str) -> None:
    acme = await client.service.organization_id()
    first = Partition.of("scratch", "logs", Interval.MONTH, old_day(Interval.MONTH, retention_days=90))
    table.execute(f"CREATE TABLE scratch.logs (at {kind}, n int, organization_id uuid) PARTITION BY RANGE (at)")
    table.execute(
        f"CREATE TABLE scratch.{first.name} PARTITION OF scratch.logs "
        f"FOR VALUES FROM ('{first.begin}') TO ('{first.end}')"
    )
    table.execute(
        "INSERT INTO scratch.logs SELECT %(begin)s::date + (n - 1) * interval '12 hours', n, %(acme)s "
        "FROM generate_series(1, 56) n",
        begin=first.begin,
        acme=acme,
    )
    await client.put(
        name="logs",
        table="scratch.logs",
        interval=pb.PARTITION_INTERVAL_MONTH,
        hot_retention_days=90,
        key_column="",
    )
    days = {"from_date": f"{first.begin + timedelta(days=1)}", "to_date": f"{first.begin + timedelta(days=3)}"}
    sql = "SELECT min(n) AS a, max(n) AS b FROM logs"
    hot = (await client.query(sql, **days)).table.to_pylist()
    assert hot == [{"a": 3, "b": 6}]
    assert [event.step for event in await client.run("logs")] == WAY
    assert (await client.query(sql, **days)).table.to_pylist() == hot
    assert (await client.query(sql)).table.to_pylist() == [{"a": 1, "b": 56}]


async def test_a_busy_partition_is_left_for_the_next_run(
    client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 10, [acme])
    await client.put()
    monkeypatch.setattr("archiver.archives._DETACH_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("archiver.archives._LOCK_TIMEOUT_MS", 5)
    with psycopg.connect(table.dsn) as writer:
        writer.execute(f"UPDATE scratch.{old.name} SET title = 'uncommitted'")
        events = await client.run()
        assert events[-1].step == pb.ARCHIVE_STEP_FAILED
        assert "in use" in events[-1].message
        assert await _counted(client) == (10, 10)
        writer.rollback()
    assert [event.step for event in await client.run()] == [WAY[0], *WAY[4:]]
    assert await _counted(client) == (10, 10)


async def test_a_damaged_upload_is_noticed_and_nothing_is_dropped(
    client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 100, [acme])
    await client.put()
    record = Store.step
    damages = 1

    async def damaging(store: Store, archive: Archive, to: Step) -> Archive:
        nonlocal damages
        if to is Step.COPIED and damages:
            damages -= 1
            (stored,) = _objects(client).rglob("*.parquet")
            content = bytearray(stored.read_bytes())
            content[len(content) // 2] ^= 1
            stored.write_bytes(content)
        return await record(store, archive, to)

    monkeypatch.setattr(Store, "step", damaging)
    events = await client.run()
    assert [event.step for event in events] == [*WAY[:2], pb.ARCHIVE_STEP_FAILED]
    assert "SHA-256" in events[-1].message
    assert old.name in table.relations()
    assert [event.step for event in await client.run()] == WAY
    assert await _counted(client) == (100, 100)


async def test_in_window_held_and_dry(client: Client, table: EventTable) -> None:
    acme = await client.service.organization_id()
    # Ends exactly when the hot window begins; the next one holds the window's first day.
    today = table.execute("SELECT (now() AT TIME ZONE 'UTC')::date")[0][0]
    edge = table.add_partition(Interval.DAY, today - timedelta(days=31))
    inside = table.add_partition(Interval.DAY, today - timedelta(days=30))
    current = table.add_partition(Interval.DAY, today)
    table.execute("CREATE TABLE scratch.events_default PARTITION OF scratch.events DEFAULT")
    for one in (edge, inside, current):
        table.add_rows(one, 10, [acme])
    before = table.relations()
    await client.put(interval=pb.PARTITION_INTERVAL_DAY, hot_retention_days=30)

    dry = await client.run(dry_run=True)
    assert [(event.step, event.partition) for event in dry] == [(pb.ARCHIVE_STEP_SELECTED, f"scratch.{edge.name}")]
    assert table.relations() == before
    assert await client.runs("archive") == []
    assert not list(_objects(client).rglob("*.parquet"))

    await client.put(interval=pb.PARTITION_INTERVAL_DAY, hot_retention_days=30, legal_hold=True)
    assert [event.step for event in await client.run()] == [pb.ARCHIVE_STEP_SKIPPED]
    assert table.relations() == before

    await client.put(interval=pb.PARTITION_INTERVAL_DAY, hot_retention_days=0)
    assert await client.run() == []

    await client.put(interval=pb.PARTITION_INTERVAL_DAY, hot_retention_days=30)
    await client.run()
    assert set(before) - set(table.relations()) == {edge.name}
    assert await _counted(client) == (30, 30)


async def test_a_hold_set_on_the_way_stops_it(
    client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 10, [acme])
    await client.put()
    record = Store.step

    async def holding(store: Store, archive: Archive, to: Step) -> Archive:
        if to is Step.PUBLISHED:
            await client.put(legal_hold=True)
        return await record(store, archive, to)

    monkeypatch.setattr(Store, "step", holding)
    events = await client.run()
    assert [event.step for event in events] == [*WAY[:4], pb.ARCHIVE_STEP_SKIPPED]
    assert old.name in table.relations()
    assert await _counted(client) == (10, 10)


async def test_two_runs_at_once(client: Client, table: EventTable, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await client.service.organization_id()
    table.add_rows(table.add_partition(Interval.WEEK, old_day(Interval.WEEK)), 10, [acme])
    await client.put()
    record = Store.step
    refused = []

    async def meeting(store: Store, archive: Archive, to: Step) -> Archive:
        if to is Step.COPIED:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.run()
            refused.append((caught.value.code(), reason_of(caught.value)))
        return await record(store, archive, to)

    monkeypatch.setattr(Store, "step", meeting)
    assert [event.step for event in await client.run()] == WAY
    assert refused == [(grpc.StatusCode.ABORTED, "RUN_IN_PROGRESS")]
    assert [run.state for run in await client.runs("archive")] == [pb.RUN_STATE_SUCCEEDED]


async def test_the_run_goes_on_when_the_caller_goes_away(client: Client, table: EventTable) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 5000, [acme])
    await client.put()
    call = client.archive.RunArchive(pb.RunArchiveRequest(), metadata=await client.service.metadata(Role.ADMIN))
    first = await call.read()
    assert isinstance(first, pb.RunArchiveResponse)
    assert first.step == pb.ARCHIVE_STEP_SELECTED
    call.cancel()
    await eventually(lambda: old.name not in table.relations())
    assert await _counted(client) == (5000, 5000)


async def test_a_lost_run_is_ended_by_the_next(client: Client, table: EventTable) -> None:
    table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    await client.put()
    with psycopg.connect(client.service.dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO archiver.runs (run_id, job, actor) "
            "VALUES ('018bcfe5-6800-7000-8000-000000000000', 'archive', 'x')"
        )
    assert [event.step for event in await client.run()] == WAY, "an empty partition goes the same way, without a file"
    newest, lost = await client.runs("archive")
    assert newest.state == pb.RUN_STATE_SUCCEEDED
    assert newest.partitions == 1
    assert (lost.state, lost.message.split(":")[0]) == (pb.RUN_STATE_FAILED, "interrupted")
    assert (await client.partitions()).cold == []


async def test_a_fault_of_one_table_does_not_keep_the_others(client: Client, table: EventTable) -> None:
    acme = await client.service.organization_id()
    old = table.add_partition(Interval.WEEK, old_day(Interval.WEEK))
    table.add_rows(old, 10, [acme])
    table.execute("CREATE TABLE scratch.aside (LIKE scratch.events) PARTITION BY RANGE (day)")
    await client.put()
    await client.put(name="aside", table="scratch.aside")
    table.execute("DROP TABLE scratch.aside")
    events = await client.run()
    assert [event.step for event in events] == [pb.ARCHIVE_STEP_FAILED, *WAY]
    assert [run.state for run in await client.runs("archive")] == [pb.RUN_STATE_FAILED]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.run("aside")
    assert reason_of(caught.value) == "TABLE_UNSUITABLE"


async def test_cold_files_expire_unless_held(client: Client, table: EventTable) -> None:
    acme = await client.service.organization_id()
    table.add_rows(table.add_partition(Interval.WEEK, old_day(Interval.WEEK)), 10, [acme])
    await client.put(cold_retention_days=10)
    await client.run()
    with psycopg.connect(client.service.dsn, autocommit=True) as connection:
        connection.execute("UPDATE archiver.cold_files SET published_at = now() - interval '11 days'")
    await client.put(cold_retention_days=10, legal_hold=True)
    await client.run()
    assert len((await client.partitions()).cold) == 1
    await client.put(cold_retention_days=10)
    await client.run()
    assert (await client.partitions()).cold == []
    assert not list(_objects(client).rglob("*.parquet"))


async def _counted(client: Client) -> tuple[int, int]:
    """Returns how many rows a query sees, and how many different ones."""
    found = await client.query("SELECT count(*) AS n, count(DISTINCT event_key) AS k FROM events")
    (row,) = found.table.to_pylist()
    return row["n"], row["k"]


def _objects(client: Client) -> Path:
    folder: Path = client.service.chassis.config.objects.folder
    return folder
