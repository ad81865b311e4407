"""Partitioned tables for the archiver's tests, in a database of their own, and queries as a client makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any
from uuid import UUID

import grpc
import obstore
import psycopg
import pyarrow as pa
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from muster.archiver.v1 import archive_pb2 as pb
from muster.archiver.v1 import archive_pb2_grpc
from obstore.exceptions import BaseError

from services.call import Role
from services.partitions import Interval, Partition
from tests.support.s3 import S3Server, make_bucket
from tests.support.services import RunningService

# Every kind of column there is; values at the edge of their types stand among them.
_TABLE = """
CREATE SCHEMA scratch;
CREATE TYPE scratch.mood AS ENUM ('calm', 'busy');
CREATE TABLE scratch.events (
  day date NOT NULL, event_key uuid NOT NULL, organization_id uuid, tiny smallint, middle integer, large bigint,
  ratio real, share double precision, is_blocked boolean, at timestamptz, wall timestamp, price numeric(12,3),
  exact numeric, settings jsonb, raw json, title text, code varchar(20), fixed char(5), digest bytea, tags text[],
  numbers integer[], address inet, net cidr, took interval, clock time, mood scratch.mood
) PARTITION BY RANGE (day);
"""
_ROWS = """
INSERT INTO scratch.events
SELECT %(begin)s::date + g %% %(days)s, gen_random_uuid(), (%(organizations)s::uuid[])[1 + g %% %(count)s],
  CASE g %% 3 WHEN 0 THEN -32768 WHEN 1 THEN 32767 ELSE g %% 30000 END,
  CASE g %% 5 WHEN 0 THEN -2147483648 ELSE g END,
  CASE g %% 7 WHEN 0 THEN 9223372036854775807 WHEN 1 THEN -9223372036854775808 ELSE g * 1000000007::bigint END,
  CASE g %% 11 WHEN 0 THEN 'NaN' WHEN 1 THEN '-Infinity' ELSE g / 3.0 END,
  CASE g %% 11 WHEN 0 THEN '-0' WHEN 1 THEN 1e-300 ELSE g / 7.0 END,
  CASE g %% 3 WHEN 0 THEN NULL ELSE g %% 2 = 0 END,
  timestamptz '2024-12-31 23:59:59.999999+00' + g * interval '1.000001 s', timestamp '1969-12-31' + g * interval '1 ms',
  CASE g %% 4 WHEN 0 THEN -999999999.999 ELSE g / 8.0 END, CASE g %% 4 WHEN 0 THEN 'NaN' ELSE g / 3.0 END,
  CASE g %% 6 WHEN 0 THEN NULL ELSE jsonb_build_object('b', g, 'a', jsonb_build_array(1, NULL, 'é')) END,
  json_build_object('x', g), CASE g %% 9 WHEN 0 THEN '' WHEN 1 THEN NULL
  WHEN 2 THEN E'쿠팡 \\U0001F600 "quoted"\\n\\\\' ELSE 'text ' || g END,
  'v' || g %% 100, 'c', CASE g %% 8 WHEN 0 THEN ''::bytea WHEN 1 THEN NULL ELSE decode(md5(g::text), 'hex') END,
  CASE g %% 5 WHEN 0 THEN '{}'::text[] WHEN 1 THEN NULL ELSE ARRAY['a,b', NULL, g::text] END, ARRAY[g, -g],
  CASE g %% 2 WHEN 0 THEN inet '10.0.0.1' ELSE inet '10.1.2.3/16' END, cidr '10.1.0.0/16', g * interval '1 day 2 hours',
  time '23:59:59.999', (ARRAY['calm', 'busy'])[1 + g %% 2]::scratch.mood
FROM generate_series(1, %(rows)s) g
"""
ORGANIZATION_COLUMN = "organization_id"


@dataclass(frozen=True, slots=True)
class EventTable:
    """The table `scratch.events` of a database."""

    dsn: str

    def execute(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        """Runs a statement in a transaction of its own and returns its rows."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("SET timezone = 'UTC'")
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def add_partition(self, interval: Interval, day: date) -> Partition:
        """Makes the partition that holds a day."""
        one = Partition.of("scratch", "events", interval, day)
        self.execute(
            f"CREATE TABLE scratch.{one.name} PARTITION OF scratch.events "
            f"FOR VALUES FROM ('{one.begin}') TO ('{one.end}')"
        )
        return one

    def add_rows(self, partition: Partition, rows: int, organizations: list[UUID | None]) -> None:
        """Adds generated rows to a partition, in turn for each organization."""
        self.execute(
            _ROWS,
            begin=partition.begin,
            days=(partition.end - partition.begin).days,
            organizations=organizations,
            count=len(organizations),
            rows=rows,
        )

    def partitions(self) -> list[str]:
        """Returns the names of its partitions."""
        found = self.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'scratch.events'::regclass ORDER BY 1"
        )
        return [name for (name,) in found]

    def relations(self) -> list[str]:
        """Returns the names of the relations beside it, attached or not."""
        found = self.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'scratch'::regnamespace AND relkind = 'r' ORDER BY 1"
        )
        return [name for (name,) in found]


@contextmanager
def event_table(dsn: str) -> Iterator[EventTable]:
    """Makes the table, without partitions, in an empty database."""
    table = EventTable(dsn)
    table.execute(_TABLE)
    yield table


def old_day(interval: Interval, *, ago: int = 1, retention_days: int = 30) -> date:
    """Returns a day of the `ago`-th partition that is wholly past its retention, counted back from today."""
    day = date.today() - timedelta(days=retention_days)
    begin = interval.begin(day)
    for _ in range(ago):
        begin = interval.begin(begin - timedelta(days=1))
    return begin


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer of a query."""

    table: pa.Table
    statistics: pb.QueryStatistics


class Client:
    """Calls an archiver as an administrator and as an operator of an organization."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.policies = archive_pb2_grpc.PolicyServiceStub(service.channel)
        self.archive = archive_pb2_grpc.ArchiveServiceStub(service.channel)
        self.query_stub = archive_pb2_grpc.QueryServiceStub(service.channel)

    async def put(self, **settings: Any) -> pb.Policy:
        """Puts the policy of the table."""
        policy = pb.Policy(
            **{
                "name": "events",
                "source": "main",
                "table": "scratch.events",
                "interval": pb.PARTITION_INTERVAL_WEEK,
                "hot_retention_days": 30,
                "key_column": "event_key",
                **settings,
            }
        )
        metadata = await self.service.metadata(Role.ADMIN)
        response = await self.policies.PutPolicy(pb.PutPolicyRequest(policy=policy), metadata=metadata)
        return response.policy

    async def run(self, *policies: str, dry_run: bool = False) -> list[pb.RunArchiveResponse]:
        """Runs the archive job and returns its events."""
        metadata = await self.service.metadata(Role.ADMIN)
        request = pb.RunArchiveRequest(policies=policies, dry_run=dry_run)
        return [event async for event in self.archive.RunArchive(request, metadata=metadata)]

    async def partitions(self, policy: str = "events") -> pb.ListPartitionsResponse:
        """Lists hot partitions and cold files."""
        metadata = await self.service.metadata(Role.ADMIN)
        return await self.archive.ListPartitions(pb.ListPartitionsRequest(policy=policy), metadata=metadata)

    async def runs(self, job: str = "") -> list[pb.Run]:
        """Lists the newest runs."""
        metadata = await self.service.metadata(Role.ADMIN)
        return list((await self.archive.ListRuns(pb.ListRunsRequest(job=job), metadata=metadata)).runs)

    async def query(self, sql: str, organization: str = "acme", **settings: Any) -> Answered:
        """Asks a query and reads its answer whole."""
        metadata = await self.service.metadata(Role.OPERATOR, organization)
        stream = bytearray()
        statistics = None
        call = self.query_stub.Query(pb.QueryRequest(sql=sql, **settings), metadata=metadata)
        async for message in call:
            assert len(message.arrow_ipc) <= 2**20
            stream += message.arrow_ipc
            if message.HasField("statistics"):
                statistics = message.statistics
        assert statistics is not None
        with pa.ipc.open_stream(bytes(stream)) as reader:
            return Answered(reader.read_all(), statistics)


async def eventually(holds: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Waits until a condition holds, and fails when it does not in time."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.02)


def answers_ranges(server: S3Server) -> bool:
    """Tells whether the server sends a part of an object as S3 does; `rclone serve s3` says 200 instead of 206."""
    with make_bucket(server, "ranges") as bucket:
        store = server.store(bucket)
        obstore.put(store, "object", b"0123456789")
        try:
            return bytes(obstore.get_range(store, "object", start=2, end=4)) == b"23"
        except BaseError:
            return False


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Returns the ErrorInfo reason of a failed call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""
