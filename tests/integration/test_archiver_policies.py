"""Policies, partitions ahead, run history, and every field of every call."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from muster.archiver.v1 import archive_pb2 as pb

from archiver.partitions import PartitionMaker
from archiver.policies import Policies
from archiver.sources import Sources
from archiver.store import Store
from services.call import Role
from services.config import PostgresConfig
from services.partitions import Interval
from services.postgres import Database
from tests.support.archive_tables import Client, EventTable, event_table, eventually, reason_of
from tests.support.postgres import PostgresServer
from tests.support.services import StartService

INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


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


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value), caught.value.details() or ""


async def test_a_policy_is_put_read_replaced_and_forgotten(client: Client, table: EventTable) -> None:
    first = await client.put()
    assert (first.ahead, first.organization_column, first.hot_retention_days) == (3, "organization_id", 30)
    second = await client.put(etag=first.etag, hot_retention_days=60)
    assert second.etag != first.etag
    stale = await refused(client.put(etag=first.etag, hot_retention_days=90))
    assert stale[:2] == (grpc.StatusCode.ABORTED, "STALE_VERSION")
    metadata = await client.service.metadata(Role.ADMIN)
    listed = await client.policies.ListPolicies(pb.ListPoliciesRequest(), metadata=metadata)
    assert list(listed.policies) == [second]
    assert (await refused(client.put(name="other_name")))[1] == "TABLE_UNSUITABLE"
    for _ in range(2):
        await client.policies.DeletePolicy(pb.DeletePolicyRequest(name="events"), metadata=metadata)
    assert (await refused(client.put(etag=second.etag)))[1] == "STALE_VERSION"
    assert (await client.put()).etag not in (first.etag, second.etag)


WRONG_FIELDS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"name": ""}, "policy.name"),
    ({"name": "Events"}, "policy.name"),
    ({"name": "9events"}, "policy.name"),
    ({"name": "e" * 64}, "policy.name"),
    ({"name": "events\n"}, "policy.name"),
    ({"source": ""}, "policy.source"),
    ({"source": "s" * 64}, "policy.source"),
    ({"source": "a b"}, "policy.source"),
    ({"table": ""}, "policy.table"),
    ({"table": "events"}, "policy.table"),
    ({"table": 'scratch."x"; DROP TABLE y'}, "policy.table"),
    ({"table": "s." + "t" * 64}, "policy.table"),
    ({"interval": pb.PARTITION_INTERVAL_UNSPECIFIED}, "policy.interval"),
    ({"interval": 9}, "policy.interval"),
    ({"ahead": 1}, "policy.ahead"),
    ({"ahead": 121}, "policy.ahead"),
    ({"hot_retention_days": 36_501}, "policy.hot_retention_days"),
    ({"cold_retention_days": 36_501}, "policy.cold_retention_days"),
    ({"etag": "x"}, "policy.etag"),
    ({"etag": "1" * 19}, "policy.etag"),
    ({"key_column": "k" * 64}, "policy.key_column"),
    ({"key_column": "a\x00b"}, "policy.key_column"),
    ({"organization_column": "o" * 64}, "policy.organization_column"),
)


async def test_each_field_of_a_policy(client: Client) -> None:
    for setting, field in WRONG_FIELDS:
        code, reason, words = await refused(client.put(**setting))
        assert (code, reason) == INVALID
        assert field in words
    metadata = await client.service.metadata(Role.ADMIN)
    assert not (await client.policies.ListPolicies(pb.ListPoliciesRequest(), metadata=metadata)).policies


UNSUITABLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {"source": "nowhere"}),
    ("", {"table": "scratch.nothing"}),
    ("CREATE TABLE scratch.plain (day date, organization_id uuid)", {"table": "scratch.plain"}),
    ("CREATE VIEW scratch.seen AS SELECT 1 AS one", {"table": "scratch.seen"}),
    (
        "CREATE TABLE scratch.listed (day date, organization_id uuid) PARTITION BY LIST (day)",
        {"table": "scratch.listed", "key_column": ""},
    ),
    (
        "CREATE TABLE scratch.two (day date, b date, organization_id uuid) PARTITION BY RANGE (day, b)",
        {"table": "scratch.two", "key_column": ""},
    ),
    (
        "CREATE TABLE scratch.number (n int, organization_id uuid) PARTITION BY RANGE (n)",
        {"table": "scratch.number", "key_column": ""},
    ),
    ("", {"key_column": "nothing"}),
    ("", {"organization_column": "nothing"}),
    ("", {"organization_column": "title"}),
    ("CREATE TABLE scratch.e1 PARTITION OF scratch.events FOR VALUES FROM ('2025-08-01') TO ('2025-09-01')", {}),
    ("CREATE TABLE scratch.e1 PARTITION OF scratch.events FOR VALUES FROM (MINVALUE) TO ('2025-09-01')", {}),
    (
        "CREATE TABLE scratch.e1 PARTITION OF scratch.events FOR VALUES FROM ('2025-08-04') TO ('2025-08-11') "
        "PARTITION BY LIST (tiny)",
        {},
    ),
)


async def test_unsuitable_tables(client: Client, table: EventTable) -> None:
    for prepare, setting in UNSUITABLE:
        if prepare:
            table.execute(prepare)
        code, reason, _ = await refused(client.put(**setting))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TABLE_UNSUITABLE")
        table.execute("DROP TABLE IF EXISTS scratch.e1")


async def test_each_field_of_the_other_calls(client: Client) -> None:
    admin = await client.service.metadata(Role.ADMIN)
    operator = await client.service.metadata(Role.OPERATOR)
    archive, queries = client.archive, client.query_stub

    async def first(call: Any) -> Any:
        return await anext(aiter(call))

    many = [f"p{number}" for number in range(1001)]
    for call, field in [
        (client.policies.PutPolicy(pb.PutPolicyRequest(), metadata=admin), "policy"),
        (client.policies.DeletePolicy(pb.DeletePolicyRequest(), metadata=admin), "name"),
        (client.policies.DeletePolicy(pb.DeletePolicyRequest(name="A"), metadata=admin), "name"),
        (archive.MakePartitions(pb.MakePartitionsRequest(policies=["A"]), metadata=admin), "policies[0]"),
        (archive.MakePartitions(pb.MakePartitionsRequest(policies=["a", "a"]), metadata=admin), "policies"),
        (archive.MakePartitions(pb.MakePartitionsRequest(policies=many), metadata=admin), "policies"),
        (first(archive.RunArchive(pb.RunArchiveRequest(policies=[""]), metadata=admin)), "policies[0]"),
        (archive.ListPartitions(pb.ListPartitionsRequest(), metadata=admin), "policy"),
        (archive.ListPartitions(pb.ListPartitionsRequest(policy="a.b"), metadata=admin), "policy"),
        (archive.ListRuns(pb.ListRunsRequest(job="other"), metadata=admin), "job"),
        (archive.ListRuns(pb.ListRunsRequest(page_size=1001), metadata=admin), "page_size"),
        (first(queries.Query(pb.QueryRequest(), metadata=operator)), "sql"),
        (first(queries.Query(pb.QueryRequest(sql="x" * 65_537), metadata=operator)), "sql"),
        (first(queries.Query(pb.QueryRequest(sql="SELECT '\x00'"), metadata=operator)), "sql"),
        (first(queries.Query(pb.QueryRequest(sql="SELECT 1", from_date="1.1.2025"), metadata=operator)), "from_date"),
        (first(queries.Query(pb.QueryRequest(sql="SELECT 1", to_date="2025-13-01"), metadata=operator)), "to_date"),
        (
            first(
                queries.Query(
                    pb.QueryRequest(sql="SELECT 1", from_date="2025-01-01", to_date="2025-01-01"), metadata=operator
                )
            ),
            "to_date",
        ),
        (
            first(queries.Query(pb.QueryRequest(sql="SELECT 1", max_scan_bytes=2**40 + 1), metadata=operator)),
            "max_scan_bytes",
        ),
        (first(queries.Query(pb.QueryRequest(sql="SELECT 1", max_rows=10_000_001), metadata=operator)), "max_rows"),
    ]:
        code, reason, words = await refused(call)
        assert (code, reason) == INVALID, field
        assert re.search(rf"(^|; ){re.escape(field)}: ", words), words
    for call in (
        archive.MakePartitions(pb.MakePartitionsRequest(policies=["nothing"]), metadata=admin),
        first(archive.RunArchive(pb.RunArchiveRequest(policies=["nothing"]), metadata=admin)),
        archive.ListPartitions(pb.ListPartitionsRequest(policy="nothing"), metadata=admin),
    ):
        assert (await refused(call))[:2] == (grpc.StatusCode.NOT_FOUND, "POLICY_NOT_FOUND")


async def test_who_may_call_what(client: Client) -> None:
    async def first(call: Any) -> Any:
        return await anext(aiter(call))

    def calls(**options: Any) -> list[tuple[Role, Any]]:
        return [
            (Role.ADMIN, client.policies.PutPolicy(pb.PutPolicyRequest(), **options)),
            (Role.ADMIN, client.policies.ListPolicies(pb.ListPoliciesRequest(), **options)),
            (Role.ADMIN, client.policies.DeletePolicy(pb.DeletePolicyRequest(), **options)),
            (Role.ADMIN, client.archive.MakePartitions(pb.MakePartitionsRequest(), **options)),
            (Role.ADMIN, first(client.archive.RunArchive(pb.RunArchiveRequest(), **options))),
            (Role.ADMIN, client.archive.ListPartitions(pb.ListPartitionsRequest(), **options)),
            (Role.ADMIN, client.archive.ListRuns(pb.ListRunsRequest(), **options)),
            (Role.OPERATOR, first(client.query_stub.Query(pb.QueryRequest(), **options))),
        ]

    for _, call in calls():
        assert (await refused(call))[:2] == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
    below = {Role.ADMIN: Role.OPERATOR, Role.OPERATOR: Role.WORKER}
    for needed in below:
        metadata = await client.service.metadata(below[needed])
        for role, call in calls(metadata=metadata):
            found = await refused(call)
            if role is needed:
                assert found[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_ALLOWED")
    for _, call in calls(metadata=await client.service.metadata(Role.ADMIN), timeout=0.0001):
        assert (await refused(call))[0] == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_run_history_pages(client: Client, table: EventTable) -> None:
    await eventually_ran(client)
    await client.put()
    admin = await client.service.metadata(Role.ADMIN)
    for _ in range(3):
        await client.archive.MakePartitions(pb.MakePartitionsRequest(), metadata=admin)
    await client.run()
    everything = await client.runs()
    assert [run.job for run in everything] == ["archive", "partitions", "partitions", "partitions", "partitions"]
    assert everything[-1].actor == "schedule"
    assert [run.partitions for run in everything] == [0, 0, 0, 4, 0]
    assert all(run.state == pb.RUN_STATE_SUCCEEDED for run in everything)
    assert all(run.duration.ToNanoseconds() > 0 for run in everything)
    paged: list[str] = []
    token = ""
    while True:
        page = await client.archive.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token), metadata=admin)
        paged += [run.run_id for run in page.runs]
        if not (token := page.next_page_token):
            break
        last = token
    assert paged == [run.run_id for run in everything]
    for request in (pb.ListRunsRequest(job="archive", page_token=last), pb.ListRunsRequest(page_token="damaged")):
        found = await refused(client.archive.ListRuns(request, metadata=admin))
        assert found[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


async def eventually_ran(client: Client) -> None:
    """Waits for the job that runs at start."""

    def ran() -> bool:
        with psycopg.connect(client.service.dsn) as connection:
            row = connection.execute("SELECT count(*) FROM archiver.runs WHERE state = 2").fetchone()
        return bool(row and row[0])

    await eventually(ran)


@pytest.mark.parametrize(
    ("interval", "today", "names"),
    [
        (Interval.MONTH, date(2025, 8, 31), ["2025_08", "2025_09", "2025_10", "2025_11"]),
        # The first of the month: what was made a day ago already holds it (ruling X-24).
        (Interval.MONTH, date(2025, 9, 1), ["2025_09", "2025_10", "2025_11", "2025_12"]),
        (Interval.WEEK, date(2025, 12, 31), ["2026_w01", "2026_w02", "2026_w03", "2026_w04"]),
        (Interval.DAY, date(2024, 2, 28), ["2024_02_28", "2024_02_29", "2024_03_01", "2024_03_02"]),
    ],
)
async def test_partitions_ahead(
    client: Client, table: EventTable, interval: Interval, today: date, names: list[str]
) -> None:
    numbers = {Interval.DAY: 1, Interval.WEEK: 2, Interval.MONTH: 3}
    await client.put(interval=numbers[interval])
    async with _maker(client, table) as maker:
        made = await maker.make(["events"], "test", today=today)
        assert made == [f"scratch.events_{name}" for name in names]
        assert await maker.make([], "test", today=today) == []
        # A hole in the middle, and the current one missing, are mended.
        table.execute(f"DROP TABLE scratch.events_{names[0]}, scratch.events_{names[2]}")
        mended = await maker.make(["events"], "test", today=today)
        assert mended == [f"scratch.events_{names[0]}", f"scratch.events_{names[2]}"]


async def test_partitions_under_other_names_are_known(client: Client, table: EventTable) -> None:
    table.execute(
        "CREATE TABLE scratch.p20250804 PARTITION OF scratch.events FOR VALUES FROM ('2025-08-04') TO ('2025-08-11')"
    )
    await client.put()
    async with _maker(client, table) as maker:
        made = await maker.make(["events"], "test", today=date(2025, 8, 6))
    assert made == ["scratch.events_2025_w33", "scratch.events_2025_w34", "scratch.events_2025_w35"]


async def test_declared_policies_and_defaults_are_put_at_start(
    start_service: StartService, table: EventTable, tmp_path: Path
) -> None:
    table.execute(
        "CREATE SCHEMA allocator; CREATE TABLE allocator.work_allocations "
        "(work_date date, allocation_key uuid, organization_id uuid) PARTITION BY RANGE (work_date)"
    )
    declared = {"name": "events", "source": "allocator", "table": "scratch.events", "interval": "month", "ahead": 5}
    settings: dict[str, Any] = {
        "sources": {"allocator": PostgresConfig.model_validate({"dsn": table.dsn})},
        "objects": {"folder": tmp_path / "objects"},
        "policies": [declared],
    }
    client = Client(await start_service("archiver", **settings))
    await eventually_ran(client)
    metadata = await client.service.metadata(Role.ADMIN)

    async def listed() -> dict[str, pb.Policy]:
        found = await client.policies.ListPolicies(pb.ListPoliciesRequest(), metadata=metadata)
        return {policy.name: policy for policy in found.policies}

    policies = await listed()
    assert set(policies) == {"events", "work_allocations"}
    allocations = policies["work_allocations"]
    assert (allocations.interval, allocations.hot_retention_days) == (pb.PARTITION_INTERVAL_WEEK, 7)
    assert allocations.key_column == "allocation_key"
    assert len(table.partitions()) == 6
    # One that was deleted does not come back with a restart.
    await client.policies.DeletePolicy(pb.DeletePolicyRequest(name="work_allocations"), metadata=metadata)
    again = Client(await start_service("archiver", database=client.service.database, **settings))
    await eventually_ran(again)
    assert set(await listed()) == {"events"}


def _maker(client: Client, table: EventTable) -> Any:
    @asynccontextmanager
    async def made() -> Any:
        database = await Database.connect(client.service.chassis.config.postgres, "test", search_path="archiver")
        try:
            store = Store(database)
            sources = Sources({"main": PostgresConfig.model_validate({"dsn": table.dsn})})
            yield PartitionMaker(store, Policies(store, sources), sources)
        finally:
            await database.close()

    return made()
