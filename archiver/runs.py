"""Runs of the archive job: one per table at a time, in the background, with a history.

A run takes the lock of every table it works on before it begins, on sessions that last as long as the run; a process
that dies gives them up by dying. Its events go to whoever asked for it, for as long as they listen.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from threading import Event as ThreadEvent
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
import uuid_utils.compat as uuid7

from archiver import metrics
from archiver.archives import Busy, Held, Mover, Stopped
from archiver.errors import RunInProgress, TableUnsuitable
from archiver.manifests import Manifests
from archiver.policies import Policies, Policy, check_table, past_retention
from archiver.sources import Sources
from archiver.store import Archive, RunState, Step, Store
from archiver.tables import SQL, PartitionedTable, TablePartition, read_table
from archiver.threads import Threads
from services.errors import DomainError
from services.objects import ObjectStore

if TYPE_CHECKING:
    from services.postgres import Connection

_log = structlog.get_logger("runs")

JOB = "archive"
# What a listener may lag behind; one that stops reading loses the newest events, never the run.
_EVENTS = 4096


class EventStep(IntEnum):
    """What an event tells: the steps of the contract."""

    SELECTED = 1
    COPIED = 2
    VERIFIED = 3
    PUBLISHED = 4
    DETACHED = 5
    DROPPED = 6
    SKIPPED = 7
    FAILED = 8


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event of a run; `partition` is empty when it is about the whole table."""

    run_id: UUID
    policy: str
    partition: str
    step: EventStep
    rows: int = 0
    bytes: int = 0
    message: str = ""


@dataclass(slots=True)
class _Tally:
    partitions: int = 0
    rows: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)


class ArchiveRun:
    """A run that has begun."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self._events: asyncio.Queue[RunEvent | None] = asyncio.Queue(_EVENTS)

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yields its events until it ends."""
        while (event := await self._events.get()) is not None:
            yield event

    def emit(self, event: RunEvent) -> None:
        """Tells an event; never waits."""
        if self._events.qsize() < _EVENTS - 1:
            self._events.put_nowait(event)

    def end(self) -> None:
        """Tells that there are no more events."""
        self._events.put_nowait(None)


@dataclass(frozen=True, slots=True)
class _Work:
    """A table of a run: its lock is held by `connection`."""

    policy: Policy
    table: PartitionedTable
    connection: Connection


class ArchiveRuns:
    """Begins runs and sees them through.

    Args:
        store: The catalogue.
        policies: What to archive.
        sources: Where from.
        objects: Where to.
        threads: For what blocks.
    """

    def __init__(
        self, store: Store, policies: Policies, sources: Sources, objects: ObjectStore, threads: Threads
    ) -> None:
        self._store = store
        self._policies = policies
        self._sources = sources
        self._objects = objects
        self._threads = threads
        self._stop = ThreadEvent()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, names: list[str], actor: str, *, dry_run: bool = False) -> ArchiveRun:
        """Begins a run, which goes on when the caller goes away.

        Args:
            names: The policies; empty for all.
            actor: Who asks: an API key's id, or `schedule`.
            dry_run: Only say what would be done; takes no lock and leaves no trace.

        Raises:
            PolicyNotFound: a name is not on record.
            TableUnsuitable: the table of a policy that was named does not suit it.
            RunInProgress: another run works on one of the tables.
            DatabaseUnavailable: a database does not answer.
        """
        policies = await self._policies.named(names)
        run = ArchiveRun(uuid7.uuid7())
        stack = AsyncExitStack()
        try:
            if not dry_run:
                await stack.enter_async_context(self._store.alive(run.run_id))
            sessions: dict[str, Connection] = {}
            works = []
            faults = []
            for policy in policies:
                try:
                    if policy.source not in sessions:
                        sessions[policy.source] = await stack.enter_async_context(self._sources.session(policy.source))
                    connection = sessions[policy.source]
                    table = await read_table(connection, policy.schema, policy.table)
                    check_table(policy, table)
                except TableUnsuitable as error:
                    if names:
                        raise
                    faults.append((policy, error.message))
                    continue
                if not dry_run and not await connection.fetchval(SQL["try_lock"], policy.qualified):
                    raise RunInProgress(f"another run works on {policy.qualified}", policy=policy.name)
                works.append(_Work(policy, table, connection))
            if not dry_run:
                await self._store.begin_run(run.run_id, JOB, actor)
        except BaseException:
            await stack.aclose()
            raise
        # A context of its own: the run outlives the call and its deadline.
        task = asyncio.create_task(
            self._carry_out(run, stack, works, faults, dry_run), name="archive run", context=contextvars.Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    async def close(self) -> None:
        """Lets the runs stop at their next recorded step, and waits for them."""
        self._stop.set()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _carry_out(
        self,
        run: ArchiveRun,
        stack: AsyncExitStack,
        works: list[_Work],
        faults: list[tuple[Policy, str]],
        dry_run: bool,
    ) -> None:
        started = time.perf_counter()
        tally = _Tally()
        try:
            async with stack:
                for policy, message in faults:
                    self._fail(run, tally, policy, "", message)
                for work in works:
                    try:
                        await self._work(run, tally, work, dry_run)
                    except Stopped as error:
                        tally.faults.append(str(error))
                        break
                    except Exception as error:
                        self._fail(run, tally, work.policy, "", _words(error), error)
                if not dry_run:
                    await self._record(run, tally, time.perf_counter() - started)
        except Exception as error:
            # Left on record as running, it is ended by the next run.
            _log.error("the end of a run cannot be recorded", run=str(run.run_id), exc_info=error)
        finally:
            run.end()

    async def _record(self, run: ArchiveRun, tally: _Tally, seconds: float) -> None:
        state = RunState.FAILED if tally.faults else RunState.SUCCEEDED
        message = "; ".join(tally.faults)
        await self._store.end_run(
            run.run_id,
            state,
            partitions=tally.partitions,
            rows=tally.rows,
            bytes_written=tally.bytes,
            message=message,
        )
        metrics.RUN_SECONDS.labels(JOB).observe(seconds)
        if state is RunState.SUCCEEDED:
            metrics.LAST_SUCCESS.labels(JOB).set_to_current_time()
        log = _log.error if tally.faults else _log.info
        log(
            "run ended",
            run=str(run.run_id),
            state=state.name.lower(),
            partitions=tally.partitions,
            rows=tally.rows,
            bytes=tally.bytes,
            seconds=round(seconds, 3),
            message=message,
        )

    async def _work(self, run: ArchiveRun, tally: _Tally, work: _Work, dry_run: bool) -> None:
        policy = work.policy
        today = await self._store.today()
        ready = {one.qualified: one for one in work.table.partitions if past_retention(policy, one.end, today)}
        open_ones = {archive.qualified: archive for archive in await self._store.open_archives(policy.name)}
        for archive in open_ones.values():
            # A detached partition is no partition of the table any more, but its way is not at its end.
            if archive.qualified not in ready and (archive.step >= Step.PUBLISHED):
                ready[archive.qualified] = TablePartition(
                    archive.schema_name, archive.partition, archive.from_date, archive.to_date, 0, 0, archive.rows
                )
        if work.table.default_bytes:
            message = "rows in the default partition have no range and stay"
            run.emit(RunEvent(run.run_id, policy.name, work.table.name, EventStep.SKIPPED, message=message))
        for partition in sorted(ready.values(), key=lambda one: one.begin):
            if policy.legal_hold:
                event = RunEvent(run.run_id, policy.name, partition.qualified, EventStep.SKIPPED, message="legal hold")
                run.emit(event)
                continue
            rows = partition.estimated_rows
            run.emit(RunEvent(run.run_id, policy.name, partition.qualified, EventStep.SELECTED, rows=rows))
            if not dry_run:
                await self._move(run, tally, work, partition)
        if not dry_run:
            await self._expire(work)

    async def _move(self, run: ArchiveRun, tally: _Tally, work: _Work, partition: TablePartition) -> None:
        policy = work.policy
        mover = Mover(self._store, self._sources, self._objects, self._threads, work.connection, policy, self._stop)
        archive = await self._store.open_archive(policy, partition, run.run_id)

        async def taken(at: Archive) -> None:
            step = EventStep(int(at.step))
            message = "rows changed since the copy: copied again" if at.step is Step.SELECTED else ""
            run.emit(RunEvent(run.run_id, policy.name, at.qualified, step, at.rows, at.bytes, message))

        try:
            archive = await mover.move(archive, taken)
        except Stopped:
            raise
        except Held as error:
            run.emit(RunEvent(run.run_id, policy.name, partition.qualified, EventStep.SKIPPED, message=str(error)))
            return
        except Exception as error:
            message = _words(error)
            self._fail(run, tally, policy, partition.qualified, message, error)
            await self._store.note_failure(archive, message)
            if work.connection.is_closed():
                # The lock went with the session: whatever comes next belongs to another run.
                raise
            return
        tally.partitions += 1
        tally.rows += archive.rows
        tally.bytes += archive.bytes
        metrics.ROWS.labels(policy.name).inc(archive.rows)
        metrics.BYTES.labels(policy.name).inc(archive.bytes)

    async def _expire(self, work: _Work) -> None:
        """Deletes cold files that have stayed as long as they should, and writes what an earlier run left unwritten."""
        policy = await self._store.find_policy(work.policy.name)
        keys = []
        if policy is not None and policy.cold_retention_days and not policy.legal_hold:
            # Forgotten first: a file that outlives its entry is only litter, the other way round is a hole.
            keys = await self._store.expire_files(policy.name, policy.cold_retention_days)
        await Manifests(self._store, self._objects).write(work.policy.name)
        await self._objects.delete(keys)

    def _fail(
        self,
        run: ArchiveRun,
        tally: _Tally,
        policy: Policy,
        partition: str,
        message: str,
        error: BaseException | None = None,
    ) -> None:
        tally.faults.append(f"{partition or policy.name}: {message}")
        metrics.FAILURES.labels(JOB, policy.name).inc()
        _log.error("archiving failed", policy=policy.name, partition=partition, message=message, exc_info=error)
        run.emit(RunEvent(run.run_id, policy.name, partition, EventStep.FAILED, message=message))


def _words(error: BaseException) -> str:
    """Returns what people are told of a failure."""
    if isinstance(error, DomainError):
        return error.message
    if isinstance(error, Busy):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:1000]
