"""The gRPC services of policies and jobs: they translate and validate, and leave the rest to the domain."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from uuid import UUID

from muster.archiver.v1 import archive_pb2 as pb
from muster.archiver.v1 import archive_pb2_grpc

from archiver.errors import PolicyNotFound
from archiver.partitions import PartitionMaker
from archiver.policies import Policies, Policy
from archiver.runs import ArchiveRuns
from archiver.sources import Sources
from archiver.store import Run, Store
from archiver.tables import read_table
from services import pages
from services.call import current
from services.errors import InvalidPageToken
from services.partitions import Interval
from services.status import Context
from services.validate import Checks

_POLICY_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}\Z")
_TABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\.[A-Za-z_][A-Za-z0-9_]{0,62}\Z")
_INTERVALS = {
    pb.PARTITION_INTERVAL_DAY: Interval.DAY,
    pb.PARTITION_INTERVAL_WEEK: Interval.WEEK,
    pb.PARTITION_INTERVAL_MONTH: Interval.MONTH,
}
_NUMBERS = {interval: number for number, interval in _INTERVALS.items()}
_JOBS = ("", "archive", "partitions")
_LONGEST_RETENTION_DAYS = 36_500
_MOST_NAMES = 1000


class PolicyServicer(archive_pb2_grpc.PolicyServiceServicer):
    """Administers policies.

    Args:
        policies: The policies on record.
    """

    def __init__(self, policies: Policies) -> None:
        self._policies = policies

    async def PutPolicy(self, request: pb.PutPolicyRequest, context: Context) -> pb.PutPolicyResponse:
        """Makes or replaces a policy."""
        checks = Checks()
        if not request.HasField("policy"):
            checks.fail("policy", "required")
        given = request.policy
        _check_name(checks, "policy.name", given.name)
        checks.identifier("policy.source", given.source, max_length=63)
        if not _TABLE.match(given.table):
            checks.fail("policy.table", "required: a table with its schema, such as allocator.work_allocations")
        checks.choice("policy.interval", given.interval, _INTERVALS, "DAY, WEEK and MONTH")
        checks.number("policy.ahead", given.ahead or 3, least=3, most=120)
        for field in ("hot_retention_days", "cold_retention_days"):
            checks.number(f"policy.{field}", getattr(given, field), least=0, most=_LONGEST_RETENTION_DAYS)
        based_on = None
        if given.etag:
            if given.etag.isascii() and given.etag.isdecimal() and len(given.etag) <= 18:
                based_on = int(given.etag)
            else:
                checks.fail("policy.etag", "must be the etag that was read, or empty")
        checks.text("policy.key_column", given.key_column, max_length=63)
        checks.text("policy.organization_column", given.organization_column, max_length=63)
        checks.done()
        schema, _, table = given.table.partition(".")
        policy = Policy(
            given.name,
            given.source,
            schema,
            table,
            _INTERVALS[given.interval],
            given.ahead or 3,
            given.hot_retention_days,
            given.cold_retention_days,
            given.legal_hold,
            given.key_column,
            given.organization_column or "organization_id",
        )
        return pb.PutPolicyResponse(policy=_policy(await self._policies.put(policy, based_on)))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: Context) -> pb.ListPoliciesResponse:
        """Reads all policies."""
        return pb.ListPoliciesResponse(policies=[_policy(policy) for policy in await self._policies.all()])

    async def DeletePolicy(self, request: pb.DeletePolicyRequest, context: Context) -> pb.DeletePolicyResponse:
        """Forgets a policy."""
        checks = Checks()
        _check_name(checks, "name", request.name)
        checks.done()
        await self._policies.delete(request.name)
        return pb.DeletePolicyResponse()


class ArchiveServicer(archive_pb2_grpc.ArchiveServiceServicer):
    """Runs the jobs and reads their history.

    Args:
        store: The catalogue.
        policies: The policies on record.
        sources: The databases of their tables.
        maker: The job `partitions`.
        runs: The job `archive`.
    """

    def __init__(
        self, store: Store, policies: Policies, sources: Sources, maker: PartitionMaker, runs: ArchiveRuns
    ) -> None:
        self._store = store
        self._policies = policies
        self._sources = sources
        self._maker = maker
        self._runs = runs

    async def MakePartitions(self, request: pb.MakePartitionsRequest, context: Context) -> pb.MakePartitionsResponse:
        """Makes the partitions ahead that are missing."""
        names = _names(list(request.policies))
        return pb.MakePartitionsResponse(created=await self._maker.make(names, current().principal.key_id))

    async def RunArchive(self, request: pb.RunArchiveRequest, context: Context) -> AsyncIterator[pb.RunArchiveResponse]:
        """Moves partitions past their hot retention to cold storage."""
        names = _names(list(request.policies))
        run = await self._runs.begin(names, current().principal.key_id, dry_run=request.dry_run)
        async for event in run.events():
            yield pb.RunArchiveResponse(
                run_id=str(event.run_id),
                policy=event.policy,
                partition=event.partition,
                step=pb.ArchiveStep.ValueType(int(event.step)),
                rows=event.rows,
                bytes=event.bytes,
                message=event.message,
            )

    async def ListPartitions(self, request: pb.ListPartitionsRequest, context: Context) -> pb.ListPartitionsResponse:
        """Reads the hot partitions of a table and its cold files."""
        checks = Checks()
        _check_name(checks, "policy", request.policy)
        checks.done()
        policy = await self._store.find_policy(request.policy)
        if policy is None:
            raise PolicyNotFound(f"there is no policy {request.policy!r}", policy=request.policy)
        async with self._sources.session(policy.source) as connection:
            table = await read_table(connection, policy.schema, policy.table)
        response = pb.ListPartitionsResponse()
        for one in table.partitions:
            response.hot.add(
                name=one.qualified,
                from_date=f"{one.begin}",
                to_date=f"{one.end}",
                size_bytes=one.size_bytes,
                estimated_rows=one.estimated_rows,
            )
        for file in await self._store.published_files(policy.name):
            response.cold.add(
                key=file.key,
                partition=file.partition,
                from_date=f"{file.from_date}",
                to_date=f"{file.to_date}",
                rows=file.rows,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                published_at=file.published_at,
            )
        return response

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Pages through the run history, newest first."""
        checks = Checks()
        if request.job not in _JOBS:
            checks.fail("job", "must be archive, partitions or empty")
        size = checks.page(request.page_size)
        checks.done()
        scope = f"ListRuns {request.job}"
        position = pages.decode(request.page_token, scope)
        found = await self._store.list_runs(request.job, _run_id(position), size + 1)
        more = len(found) > size
        token = pages.encode([str(found[size - 1].run_id)], scope) if more else ""
        return pb.ListRunsResponse(runs=[_run(run) for run in found[:size]], next_page_token=token)


def _check_name(checks: Checks, field: str, name: str) -> None:
    if not _POLICY_NAME.match(name):
        checks.fail(field, "required: 1 to 63 characters of a-z 0-9 _, beginning with a letter")


def _names(names: list[str]) -> list[str]:
    """Returns the policies of a request, checked. Raises: InvalidField."""
    checks = Checks()
    checks.count("policies", names, least=0, most=_MOST_NAMES)
    checks.unique("policies", names)
    for number, name in enumerate(names):
        _check_name(checks, f"policies[{number}]", name)
    checks.done()
    return names


def _run_id(position: list[str | int] | None) -> UUID | None:
    # Its digest says that the token is of this method and these filters, not that it was not made by hand.
    if position is None:
        return None
    try:
        (text,) = position
        return UUID(str(text))
    except ValueError:
        raise InvalidPageToken("page_token was not given for this request: begin again without one") from None


def _policy(policy: Policy) -> pb.Policy:
    return pb.Policy(
        name=policy.name,
        source=policy.source,
        table=policy.qualified,
        interval=_NUMBERS[policy.interval],
        ahead=policy.ahead,
        hot_retention_days=policy.hot_retention_days,
        cold_retention_days=policy.cold_retention_days,
        legal_hold=policy.legal_hold,
        etag=str(policy.version),
        key_column=policy.key_column,
        organization_column=policy.organization_column,
    )


def _run(run: Run) -> pb.Run:
    message = pb.Run(
        run_id=str(run.run_id),
        job=run.job,
        state=pb.RunState.ValueType(int(run.state)),
        partitions=run.partitions,
        rows=run.rows,
        bytes=run.bytes,
        message=run.message,
        actor=run.actor,
    )
    message.started_at.FromDatetime(run.started_at)
    if run.ended_at is not None:
        message.ended_at.FromDatetime(run.ended_at)
        message.duration.FromTimedelta(run.ended_at - run.started_at)
    return message
