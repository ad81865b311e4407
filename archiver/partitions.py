"""Partitions ahead of the clock: made at start, daily and on request, and checked each time (ruling X-24)."""

from __future__ import annotations

import time
from datetime import date

import asyncpg
import structlog
import uuid_utils.compat as uuid7

from archiver import metrics
from archiver.errors import TableUnsuitable
from archiver.policies import Policies, Policy, check_table
from archiver.sources import Sources
from archiver.store import RunState, Store
from archiver.tables import PartitionedTable, read_table
from services.errors import DomainError
from services.partitions import Partition, ensure, planned

_log = structlog.get_logger("partitions")

JOB = "partitions"


class PartitionMaker:
    """Makes the partitions that policies want ahead.

    Args:
        store: The catalogue, which also tells the day.
        policies: What to make.
        sources: Where.
    """

    def __init__(self, store: Store, policies: Policies, sources: Sources) -> None:
        self._store = store
        self._policies = policies
        self._sources = sources

    async def make(self, names: list[str], actor: str, *, today: date | None = None) -> list[str]:
        """Makes what is missing, with a run on record, and returns the partitions made, with their schema.

        Safe to repeat and to run at once. One table that fails does not keep the others.

        Args:
            names: The policies; empty for all.
            actor: Who asks.
            today: The day; None for the database's, in UTC.

        Raises:
            PolicyNotFound: a name is not on record.
            TableUnsuitable: the table of a policy that was named does not suit it.
            DatabaseUnavailable: a database does not answer.
        """
        policies = await self._policies.named(names)
        today = today or await self._store.today()
        run_id = uuid7.uuid7()
        started = time.perf_counter()
        made: list[str] = []
        faults: list[tuple[Policy, Exception]] = []
        async with self._store.alive(run_id):
            await self._store.begin_run(run_id, JOB, actor)
            for policy in policies:
                try:
                    made += await self._make(policy, today)
                except (DomainError, asyncpg.PostgresError) as error:
                    metrics.FAILURES.labels(JOB, policy.name).inc()
                    _log.error("partitions cannot be made", policy=policy.name, exc_info=error)
                    faults.append((policy, error))
            state = RunState.FAILED if faults else RunState.SUCCEEDED
            message = "; ".join(f"{policy.name}: {error}" for policy, error in faults)
            await self._store.end_run(run_id, state, partitions=len(made), rows=0, bytes_written=0, message=message)
        metrics.RUN_SECONDS.labels(JOB).observe(time.perf_counter() - started)
        if faults and names:
            raise _refusal(*faults[0])
        if not faults:
            metrics.LAST_SUCCESS.labels(JOB).set_to_current_time()
        return made

    async def _make(self, policy: Policy, today: date) -> list[str]:
        async with self._sources.session(policy.source) as connection:
            table = await read_table(connection, policy.schema, policy.table)
            check_table(policy, table)
            wanted = planned(policy.schema, policy.table, policy.interval, today, ahead=policy.ahead)
            # By their days and not by their names, since somebody else may have named what stands.
            missing = [one for one in wanted if not table.covers(one.begin, one.end)]
            if table.partitions and wanted[0] in missing:
                metrics.REPAIRED.labels(policy.name).inc()
                _log.error("the current partition was missing", table=policy.qualified, partition=wanted[0].name)
            made = await ensure(connection, policy.schema, policy.table, missing)
            table = await read_table(connection, policy.schema, policy.table)
        metrics.AHEAD.labels(policy.name).set(ahead_of(table, wanted))
        return [f"{one.schema}.{one.name}" for one in made]


def ahead_of(table: PartitionedTable, wanted: list[Partition]) -> int:
    """Returns how many of the wanted partitions after the current one stand without a gap; -1 without the current."""
    for number, one in enumerate(wanted):
        if not table.covers(one.begin, one.end):
            return number - 1
    return len(wanted) - 1


def _refusal(policy: Policy, error: Exception) -> DomainError:
    if isinstance(error, DomainError):
        return error
    return TableUnsuitable(f"{policy.qualified}: {error}", policy=policy.name)
