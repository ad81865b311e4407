"""Archive policies, partitions, runs, and queries over hot and cold rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import IntEnum

from muster import values
from muster.archiver.v1 import archive_pb2, archive_pb2_grpc
from muster.calls import Transport

# A query over cold files, and a run over months of partitions, take minutes.
_QUERY_SECONDS = 600.0
_PARTITION_SECONDS = 60.0


class PartitionInterval(IntEnum):
    """The length of a partition; a week begins on Monday."""

    UNSPECIFIED = 0
    DAY = 1
    WEEK = 2
    MONTH = 3


class ArchiveStep(IntEnum):
    """A step of a partition's way to cold storage."""

    UNSPECIFIED = 0
    SELECTED = 1
    COPIED = 2
    VERIFIED = 3
    PUBLISHED = 4
    DETACHED = 5
    DROPPED = 6
    SKIPPED = 7
    FAILED = 8


class RunState(IntEnum):
    """Where a run stands; RUNNING also after it was killed and before it is taken up again."""

    UNSPECIFIED = 0
    RUNNING = 1
    SUCCEEDED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Policy:
    """How a table is partitioned and how long its rows stay hot.

    Attributes:
        name: Also the table's name in queries: 1 to 63 of `a-z 0-9 _`, beginning with a letter.
        source: The database, by its name in the service's configuration.
        table: With its schema, such as `allocator.work_allocations`.
        interval: The length of its partitions.
        ahead: Partitions to keep ahead of the clock, 3 to 120; 0 means 3.
        hot_retention_days: How long a partition stays after its end; 0 means for ever.
        cold_retention_days: How long its cold file stays; 0 means for ever.
        legal_hold: While set, nothing of the table is dropped.
        etag: Changes with every put; when putting, the version the change is based on.
        key_column: For which a Bloom filter is written; empty for none.
        organization_column: Binds a row to its organization; empty means `organization_id`.
    """

    name: str
    source: str
    table: str
    interval: PartitionInterval
    ahead: int = 0
    hot_retention_days: int = 0
    cold_retention_days: int = 0
    legal_hold: bool = False
    etag: str = ""
    key_column: str = ""
    organization_column: str = ""


@dataclass(frozen=True, slots=True)
class ArchiveEvent:
    """One step of a run; `message` says why a partition was skipped or failed."""

    run_id: str
    policy: str
    partition: str
    step: ArchiveStep
    rows: int
    bytes: int
    message: str


@dataclass(frozen=True, slots=True)
class HotPartition:
    """A partition in PostgreSQL; `to_date` is the day after its last."""

    name: str
    from_date: str
    to_date: str
    size_bytes: int
    estimated_rows: int


@dataclass(frozen=True, slots=True)
class ColdFile:
    """A verified Parquet file; `to_date` is the day after its partition's last."""

    key: str
    partition: str
    from_date: str
    to_date: str
    rows: int
    size_bytes: int
    sha256: bytes
    published_at: datetime


@dataclass(frozen=True, slots=True)
class Partitions:
    """A table's hot partitions and its cold files, by lower bound."""

    hot: tuple[HotPartition, ...]
    cold: tuple[ColdFile, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job; `ended_at` and `duration` are None while it runs."""

    run_id: str
    job: str
    state: RunState
    started_at: datetime
    ended_at: datetime | None
    duration: timedelta | None
    partitions: int
    rows: int
    bytes: int
    message: str
    actor: str


@dataclass(frozen=True, slots=True)
class QueryStatistics:
    """What a query read; `truncated` says that `max_rows` cut the answer."""

    rows: int
    cold_files: int
    cold_files_pruned: int
    hot_partitions: int
    scanned_bytes: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class QueryPiece:
    """The next bytes of an Arrow IPC stream; the last piece carries the statistics."""

    arrow_ipc: bytes
    statistics: QueryStatistics | None


class Archive:
    """`client.archive`: role admin; queries also operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def _policies(self) -> archive_pb2_grpc.PolicyServiceAsyncStub:
        return self._transport.stub(archive_pb2_grpc.PolicyServiceStub)

    @property
    def _stub(self) -> archive_pb2_grpc.ArchiveServiceAsyncStub:
        return self._transport.stub(archive_pb2_grpc.ArchiveServiceStub)

    @property
    def _queries(self) -> archive_pb2_grpc.QueryServiceAsyncStub:
        return self._transport.stub(archive_pb2_grpc.QueryServiceStub)

    async def put_policy(self, policy: Policy) -> Policy:
        """Makes or replaces the policy of a table and returns it as stored.

        Raises:
            TableUnsuitable: the table is missing or not partitioned by range, or its source is not configured.
            StaleVersion: the policy changed since its etag.
            MusterError: it was refused, or did not succeed in time.
        """
        message = archive_pb2.Policy(
            name=policy.name,
            source=policy.source,
            table=policy.table,
            interval=archive_pb2.PartitionInterval.ValueType(policy.interval),
            ahead=policy.ahead,
            hot_retention_days=policy.hot_retention_days,
            cold_retention_days=policy.cold_retention_days,
            legal_hold=policy.legal_hold,
            etag=policy.etag,
            key_column=policy.key_column,
            organization_column=policy.organization_column,
        )
        # With an etag, a second put after a lost answer would meet the etag of the first.
        answer = await self._transport.call(
            self._policies.PutPolicy, archive_pb2.PutPolicyRequest(policy=message), idempotent=not policy.etag
        )
        return _policy(answer.policy)

    async def policies(self) -> tuple[Policy, ...]:
        """Reads all policies, by name.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        answer = await self._transport.call(self._policies.ListPolicies, archive_pb2.ListPoliciesRequest())
        return tuple(_policy(policy) for policy in answer.policies)

    async def delete_policy(self, name: str) -> None:
        """Forgets a policy; partitions and cold files stay.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        await self._transport.call(self._policies.DeletePolicy, archive_pb2.DeletePolicyRequest(name=name))

    async def make_partitions(self, policies: Sequence[str] = ()) -> tuple[str, ...]:
        """Makes the partitions ahead that are missing, of the named policies or of all, and returns their names.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = archive_pb2.MakePartitionsRequest(policies=policies)
        answer = await self._transport.call(self._stub.MakePartitions, request, call_seconds=_PARTITION_SECONDS)
        return tuple(answer.created)

    async def run(self, policies: Sequence[str] = (), *, dry_run: bool = False) -> AsyncIterator[ArchiveEvent]:
        """Moves partitions past their hot retention to cold storage and yields a step at a time.

        Leaving the iteration does not end the run.

        Raises:
            RunInProgress: another run works on the same table.
            MusterError: it was refused or broke off; the run itself goes on, and a next one takes up what is left.
        """
        request = archive_pb2.RunArchiveRequest(policies=policies, dry_run=dry_run)
        async for event in self._transport.stream(self._stub.RunArchive, request):
            yield ArchiveEvent(
                event.run_id,
                event.policy,
                event.partition,
                values.member(ArchiveStep, event.step),
                event.rows,
                event.bytes,
                event.message,
            )

    async def partitions(self, policy: str) -> Partitions:
        """Reads the hot partitions of a table and its cold files.

        Raises:
            NotFound: there is no such policy.
            MusterError: it was refused, or did not succeed in time.
        """
        request = archive_pb2.ListPartitionsRequest(policy=policy)
        answer = await self._transport.call(self._stub.ListPartitions, request)
        hot = tuple(
            HotPartition(item.name, item.from_date, item.to_date, item.size_bytes, item.estimated_rows)
            for item in answer.hot
        )
        cold = tuple(
            ColdFile(
                item.key,
                item.partition,
                item.from_date,
                item.to_date,
                item.rows,
                item.size_bytes,
                item.sha256,
                values.required_moment(item, "published_at"),
            )
            for item in answer.cold
        )
        return Partitions(hot, cold)

    async def runs(self, *, job: str = "", page_size: int = 100) -> AsyncIterator[Run]:
        """Yields the run history of a job (`archive` or `partitions`) or of both, newest first.

        Raises:
            MusterError: it was refused, or did not succeed in time.
        """
        request = archive_pb2.ListRunsRequest(job=job, page_size=page_size)
        async for answer in self._transport.pages(self._stub.ListRuns, request):
            for run in answer.runs:
                yield _run(run)

    async def query(
        self,
        sql: str,
        *,
        from_date: date | None = None,
        to_date: date | None = None,
        max_scan_bytes: int = 0,
        max_rows: int = 0,
    ) -> AsyncIterator[QueryPiece]:
        """Runs one SELECT over the tables of policies and yields an Arrow IPC stream in pieces.

        Args:
            sql: Its tables are the names of policies.
            from_date: Only rows from this day on; None for the first.
            to_date: Only rows before this day; None for the last.
            max_scan_bytes: The most bytes to read; 0 means 1 GiB.
            max_rows: The most rows to answer; 0 means 10,000.

        Raises:
            QueryInvalid: it cannot be planned.
            QueryTooCostly: it would read more than it may.
            MusterError: it was refused or broke off.
        """
        request = archive_pb2.QueryRequest(
            sql=sql,
            from_date=from_date.isoformat() if from_date else "",
            to_date=to_date.isoformat() if to_date else "",
            max_scan_bytes=max_scan_bytes,
            max_rows=max_rows,
        )
        async for piece in self._transport.stream(self._queries.Query, request, seconds=_QUERY_SECONDS):
            told = piece.statistics
            statistics = None
            if piece.HasField("statistics"):
                statistics = QueryStatistics(
                    told.rows,
                    told.cold_files,
                    told.cold_files_pruned,
                    told.hot_partitions,
                    told.scanned_bytes,
                    told.truncated,
                )
            yield QueryPiece(piece.arrow_ipc, statistics)


def _policy(message: archive_pb2.Policy) -> Policy:
    return Policy(
        name=message.name,
        source=message.source,
        table=message.table,
        interval=values.member(PartitionInterval, message.interval),
        ahead=message.ahead,
        hot_retention_days=message.hot_retention_days,
        cold_retention_days=message.cold_retention_days,
        legal_hold=message.legal_hold,
        etag=message.etag,
        key_column=message.key_column,
        organization_column=message.organization_column,
    )


def _run(message: archive_pb2.Run) -> Run:
    return Run(
        run_id=message.run_id,
        job=message.job,
        state=values.member(RunState, message.state),
        started_at=values.required_moment(message, "started_at"),
        ended_at=values.moment(message, "ended_at"),
        duration=values.interval(message, "duration"),
        partitions=message.partitions,
        rows=message.rows,
        bytes=message.bytes,
        message=message.message,
        actor=message.actor,
    )
