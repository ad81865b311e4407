"""The way of one partition to cold storage: copy, verify, publish, detach, drop.

    SELECTED ─copy─> COPIED ─verify─> VERIFIED ─publish─> PUBLISHED ─detach─> DETACHED ─drop─> DROPPED
       ^                │ the file is not what was copied     │ rows changed since the copy
       └────────────────┴─────────────────────────────────────┘

Each step is recorded when it is done and can be repeated when it is not, so a run that is killed at any point is gone
on with by the next. The partition is detached in the transaction that proves it equal to the verified files, while
nobody can write to it, and that transaction leaves a mark on it; only a relation with the mark is ever dropped.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg
import structlog
import uuid_utils.compat as uuid7

from archiver import metrics
from archiver.copies import Copy, CopyPlan, Interrupted, copy_partition, sha256_of
from archiver.errors import ArchiveCorrupt
from archiver.fingerprints import Fingerprint, of_file, of_sums
from archiver.manifests import PREFIX, Manifests
from archiver.policies import Policy, past_retention
from archiver.sources import Sources
from archiver.store import Archive, ArchiveFile, Step, Store
from archiver.tables import SQL, PartitionedTable, read_table
from archiver.threads import Threads
from services.objects import ObjectStore

if TYPE_CHECKING:
    from services.postgres import Connection

_log = structlog.get_logger("archives")

# Longer waits would hold up the writers that queue behind us.
_LOCK_TIMEOUT_MS = 250
_DETACH_ATTEMPTS = 20
_DETACH_PAUSE_SECONDS = 0.25
# A partition that is written to all the time is not old; the next run tries again.
_COPIES_PER_RUN = 3
_READ_CHUNK_BYTES = 4 * 2**20


class Stopped(Exception):
    """The process is stopping; the archive stands at a recorded step."""


class Held(Exception):
    """A legal hold, or a longer retention, was set while the partition was on its way."""


class Busy(Exception):
    """The partition could not be had to ourselves, or did not stop changing."""


class Mover:
    """Moves the partitions of one table, within one run, which holds the table's lock.

    Args:
        store: The catalogue.
        sources: The databases.
        objects: Where files go.
        threads: For what blocks.
        connection: The session that holds the table's lock: what it cannot do any more, nobody does.
        policy: Whose partitions.
        stop: Set when the process is stopping.
    """

    def __init__(
        self,
        store: Store,
        sources: Sources,
        objects: ObjectStore,
        threads: Threads,
        connection: Connection,
        policy: Policy,
        stop: Event,
    ) -> None:
        self._store = store
        self._dsn = sources.dsn(policy.source)
        self._objects = objects
        self._manifests = Manifests(store, objects)
        self._threads = threads
        self._connection = connection
        self._policy = policy
        self._stop = stop

    async def move(self, archive: Archive, taken: Callable[[Archive], Awaitable[None]]) -> Archive:
        """Takes a partition from where it stands to the end of its way.

        Args:
            archive: From `Store.open_archive`.
            taken: Called after each step, when it is on record.

        Returns:
            The archive, dropped.

        Raises:
            Stopped, Held, Busy: it stands at a recorded step, for the next run.
            ArchiveCorrupt: what was uploaded is not what was copied; it is copied anew by the next run.
            CopyFailed, ObjectStoreUnavailable, asyncpg.PostgresError, OSError: a part did not do its part.
        """
        copies = 0
        while archive.step is not Step.DROPPED:
            if self._stop.is_set():
                raise Stopped("the service is stopping; the next run goes on from here")
            if archive.step is Step.SELECTED:
                copies += 1
                if copies > _COPIES_PER_RUN:
                    raise Busy(f"rows kept changing through {_COPIES_PER_RUN} copies")
            started = time.perf_counter()
            before = archive.step
            archive = await self._next(archive)
            metrics.STEP_SECONDS.labels(before.name.lower()).observe(time.perf_counter() - started)
            await taken(archive)
        return archive

    async def _next(self, archive: Archive) -> Archive:
        match archive.step:
            case Step.SELECTED:
                return await self._copy(archive)
            case Step.COPIED:
                return await self._verify(archive)
            case Step.VERIFIED:
                published = await self._store.step(archive, Step.PUBLISHED)
                await self._manifests.write(self._policy.name)
                return published
            case Step.PUBLISHED:
                await self._manifests.write(self._policy.name)
                return await self._detach(archive)
            case _:
                return await self._drop(archive)

    async def _copy(self, archive: Archive) -> Archive:
        await self._forget(archive)
        table = await read_table(self._connection, self._policy.schema, self._policy.table)
        plan = await self._plan(archive, table)
        with tempfile.TemporaryDirectory(prefix="muster-archive-") as folder:
            try:
                copies = await self._threads.run(copy_partition, self._dsn, plan, Path(folder), self._stop)
            except Interrupted:
                raise Stopped("the service is stopping; the next run copies again") from None
            copy_id = uuid7.uuid7()
            keyed = [(_key(archive, copy_id, copy), copy) for copy in copies]
            # On record before the upload, so that the next attempt knows what to delete.
            await self._store.plan_files(archive, keyed)
            for key, copy in keyed:
                await self._objects.put_file(key, copy.file)
        return await self._store.step(archive, Step.COPIED)

    async def _verify(self, archive: Archive) -> Archive:
        for file in await self._store.archive_files(archive):
            fault = await self._fault(file)
            if fault:
                await self._store.step(archive, Step.SELECTED)
                raise ArchiveCorrupt(f"{file.key} is not what was copied: {fault}", key=file.key)
        return await self._store.step(archive, Step.VERIFIED)

    async def _fault(self, file: ArchiveFile) -> str:
        """Reads an object again and says what is wrong with it; empty when nothing is."""
        with tempfile.TemporaryDirectory(prefix="muster-verify-") as folder:
            local = Path(folder) / "file.parquet"
            with local.open("wb") as opened:
                async for piece in self._objects.stream(file.key, _READ_CHUNK_BYTES):
                    await asyncio.to_thread(opened.write, piece)
            if await self._threads.run(sha256_of, local) != file.sha256:
                return f"its SHA-256 differs, {local.stat().st_size} bytes against {file.size_bytes}"
            read = await self._threads.run(of_file, local, file.columns, self._tie_column(file))
        return read.difference(file.fingerprint)

    def _tie_column(self, file: ArchiveFile) -> str:
        names = [column.name for column in file.columns]
        return self._policy.key_column if self._policy.key_column in names else names[0]

    async def _detach(self, archive: Archive) -> Archive:
        for _ in range(_DETACH_ATTEMPTS):
            if self._stop.is_set():
                raise Stopped("the service is stopping; the next run detaches")
            try:
                fault = await self._try_detach(archive)
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                await asyncio.sleep(_DETACH_PAUSE_SECONDS)
                continue
            if fault:
                _log.info("rows changed since the copy", partition=archive.qualified, difference=fault)
                return await self._store.step(archive, Step.SELECTED)
            return await self._store.step(archive, Step.DETACHED)
        raise Busy(f"{archive.qualified} is in use: no lock within {_DETACH_ATTEMPTS} attempts")

    async def _try_detach(self, archive: Archive) -> str:
        """Detaches the partition if it equals its files, or says where it differs."""
        async with self._connection.transaction():
            await self._connection.execute(SQL["lock_timeout"], str(_LOCK_TIMEOUT_MS))
            state = await self._state(archive)
            if state is None or (state["mark"] == _mark(archive) and not state["attached"]):
                # A run that was killed right after this transaction; or somebody dropped what is published.
                return ""
            if not state["attached"]:
                raise Held(f"{archive.qualified} was detached by somebody else: attach it again, or drop it")
            await self._refuse_when_held(archive)
            await self._run("lock_writers_out_statement", archive.schema_name, archive.partition)
            fault = await self._difference(archive)
            if fault:
                return fault
            await self._run("mark_statement", archive.schema_name, archive.partition, _mark(archive))
            names = (self._policy.schema, self._policy.table, archive.schema_name, archive.partition)
            await self._run("detach_statement", *names)
        return ""

    async def _difference(self, archive: Archive) -> str:
        """Says where the partition, locked against writers, differs from its verified files; empty when it does not."""
        table = await read_table(self._connection, self._policy.schema, self._policy.table)
        plan = await self._plan(archive, table)
        rows = await self._connection.fetch(plan.fingerprint_statement)
        now = {
            UUID(row["organization"]) if row["organization"] else None: of_sums(plan.columns, row["rows"], row["sums"])
            for row in rows
        }
        verified = {file.organization_id: file.fingerprint for file in await self._store.archive_files(archive)}
        return _set_difference(now, verified)

    async def _drop(self, archive: Archive) -> Archive:
        for _ in range(_DETACH_ATTEMPTS):
            try:
                async with self._connection.transaction():
                    await self._connection.execute(SQL["lock_timeout"], str(_LOCK_TIMEOUT_MS))
                    state = await self._state(archive)
                    # Without the mark it is another relation: ours is gone, and this one was made for late rows.
                    if state is not None and state["mark"] == _mark(archive) and not state["attached"]:
                        await self._refuse_when_held(archive)
                        await self._run("drop_statement", archive.schema_name, archive.partition)
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                await asyncio.sleep(_DETACH_PAUSE_SECONDS)
                continue
            return await self._store.step(archive, Step.DROPPED)
        raise Busy(f"{archive.qualified} is in use: no lock within {_DETACH_ATTEMPTS} attempts")

    async def _refuse_when_held(self, archive: Archive) -> None:
        policy = await self._store.find_policy(self._policy.name)
        if policy is None or policy.legal_hold:
            raise Held("a legal hold was set" if policy else "the policy was deleted")
        if archive.step < Step.DETACHED and not past_retention(policy, archive.to_date, await self._store.today()):
            raise Held("the hot retention was lengthened")

    async def _state(self, archive: Archive) -> asyncpg.Record | None:
        return await self._connection.fetchrow(SQL["relation_state"], archive.schema_name, archive.partition)

    async def _run(self, name: str, *names: str) -> None:
        """Has PostgreSQL write a statement with these names quoted, and runs it."""
        await self._connection.execute(await self._connection.fetchval(SQL[name], *names))

    async def _plan(self, archive: Archive, table: PartitionedTable) -> CopyPlan:
        columns, policy = table.columns, self._policy
        tie = table.column(policy.key_column) or columns[0]
        reads = [column.read_sql for column in columns]
        names = [column.name for column in columns]
        place = (archive.schema_name, archive.partition)
        copy = await self._connection.fetchval(
            SQL["copy_statement"], *place, reads, names, policy.organization_column, policy.key_column
        )
        fingerprint = await self._connection.fetchval(
            SQL["fingerprint_statement"],
            *place,
            [column.hash_sql for column in columns],
            reads,
            [column.is_text for column in columns],
            policy.organization_column,
            tie.hash_sql,
        )
        metadata = {
            "muster.format": "1",
            "muster.policy": policy.name,
            "muster.partition": archive.qualified,
            "muster.from_date": f"{archive.from_date}",
            "muster.to_date": f"{archive.to_date}",
        }
        return CopyPlan(copy, fingerprint, columns, policy.organization_column, policy.key_column, metadata)

    async def _forget(self, archive: Archive) -> None:
        """Deletes what an earlier attempt wrote."""
        files = await self._store.archive_files(archive)
        if files:
            await self._objects.delete([file.key for file in files])
            await self._store.forget_files(archive)


def _key(archive: Archive, copy_id: UUID, copy: Copy) -> str:
    organization = copy.organization_id or "none"
    return f"{PREFIX}/{archive.policy}/{archive.from_date}/{archive.partition}-{copy_id}-{organization}.parquet"


def _mark(archive: Archive) -> str:
    return f"muster archive {archive.archive_id}: equal to its cold files when it was detached; to be dropped"


def _set_difference(now: dict[UUID | None, Fingerprint], verified: dict[UUID | None, Fingerprint]) -> str:
    """Says where the fingerprints of each organization's rows differ."""
    if now.keys() != verified.keys():
        return f"rows of {len(now)} organizations against {len(verified)}, or of others"
    for organization, fingerprint in now.items():
        if fault := fingerprint.difference(verified[organization]):
            return f"organization {organization}: {fault}"
    return ""
