"""The archiver's own tables: policies, runs, archives and cold files.

Every method is one statement or one transaction and raises `DatabaseUnavailable` when the database does not answer.
What queries may read is decided by these tables alone; the manifests on the object store are copies of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime
from enum import IntEnum
from typing import Any
from uuid import UUID

import asyncpg
import uuid_utils.compat as uuid7

from archiver.columns import Column, from_json, to_json
from archiver.copies import Copy
from archiver.errors import StaleVersion
from archiver.fingerprints import Fingerprint
from archiver.policies import Policy
from archiver.tables import TablePartition
from services.partitions import Interval
from services.postgres import Database, queries

_SQL = queries("archiver", "archiver.sql")


class Step(IntEnum):
    """Where a partition stands on its way; each is on record before the next is begun."""

    SELECTED = 1
    COPIED = 2
    VERIFIED = 3
    PUBLISHED = 4
    DETACHED = 5
    DROPPED = 6


class RunState(IntEnum):
    """Where a run stands."""

    RUNNING = 1
    SUCCEEDED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Archive:
    """A partition on its way to cold storage: `rows` and `bytes` are those of its files."""

    archive_id: UUID
    policy: str
    schema_name: str
    partition: str
    from_date: date
    to_date: date
    step: Step
    rows: int
    bytes: int

    @property
    def qualified(self) -> str:
        """The partition with its schema."""
        return f"{self.schema_name}.{self.partition}"


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """A file of an archive that is on its way, with what PostgreSQL said of its rows."""

    key: str
    organization_id: UUID | None
    size_bytes: int
    sha256: bytes
    columns: tuple[Column, ...]
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class ColdFile:
    """A published file. `detached` says that its partition is known to be no longer part of the table."""

    key: str
    organization_id: UUID | None
    partition: str
    detached: bool
    from_date: date
    to_date: date
    rows: int
    size_bytes: int
    sha256: bytes
    columns: tuple[Column, ...]
    published_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """A run on record; times are the database's."""

    run_id: UUID
    job: str
    state: RunState
    actor: str
    started_at: datetime
    ended_at: datetime | None
    partitions: int
    rows: int
    bytes: int
    message: str


class Store:
    """The archiver's tables.

    Args:
        database: As the role that owns the schema.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def today(self) -> date:
        """Returns the database's day, in UTC: retention is counted from it."""
        today: date = await self._database.fetchval(_SQL["today"])
        return today

    # Policies.

    async def list_policies(self) -> list[Policy]:
        """Returns all policies, by name."""
        return [_policy(row) for row in await self._database.fetch(_SQL["list_policies"])]

    async def find_policy(self, name: str) -> Policy | None:
        """Returns a policy, or None."""
        row = await self._database.fetchrow(_SQL["find_policy"], name)
        return None if row is None else _policy(row)

    async def put_policy(self, policy: Policy, based_on: int | None) -> int:
        """Makes or replaces a policy and returns its version.

        Raises:
            StaleVersion: it does not stand at `based_on`.
            asyncpg.UniqueViolationError: its table has a policy under another name.
        """
        version: int | None = await self._database.fetchval(
            _SQL["put_policy"],
            policy.name,
            policy.source,
            policy.schema,
            policy.table,
            policy.interval.value,
            policy.ahead,
            policy.hot_retention_days,
            policy.cold_retention_days,
            policy.legal_hold,
            policy.key_column,
            policy.organization_column,
            policy.partition_column,
            based_on,
        )
        if version is None:
            raise StaleVersion(
                "the policy changed since it was read: read it again and repeat", policy=policy.name, etag=str(based_on)
            )
        return version

    async def delete_policy(self, name: str) -> None:
        """Deletes a policy; deleting twice is no error."""
        await self._database.execute(_SQL["delete_policy"], name)

    async def was_offered(self, name: str) -> bool:
        """Whether a default policy was put once."""
        return bool(await self._database.fetchval(_SQL["was_offered"], name))

    async def offer_default(self, name: str) -> None:
        """Notes that a default policy was put."""
        await self._database.execute(_SQL["offer_default"], name)

    # Runs.

    @asynccontextmanager
    async def alive(self, run_id: UUID) -> AsyncIterator[None]:
        """Holds, for the block, the lock that says the run's process is alive."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["lock_run"], run_id)
            try:
                yield
            finally:
                if not connection.is_closed():
                    await connection.execute(_SQL["unlock_run"], run_id)

    async def begin_run(self, run_id: UUID, job: str, actor: str) -> None:
        """Puts a run on record, as running, and ends those whose process is gone. The caller holds `alive`."""
        await self._database.execute(_SQL["end_lost_runs"])
        await self._database.execute(_SQL["begin_run"], run_id, job, actor)

    async def end_run(
        self, run_id: UUID, state: RunState, *, partitions: int, rows: int, bytes_written: int, message: str
    ) -> None:
        """Ends a run."""
        await self._database.execute(
            _SQL["end_run"], run_id, int(state), partitions, rows, bytes_written, message[:4000]
        )

    async def list_runs(self, job: str, after: UUID | None, limit: int) -> list[Run]:
        """Returns up to `limit` runs, newest first, that follow `after`; `job` empty for all."""
        rows = await self._database.fetch(_SQL["list_runs"], job, after, limit)
        return [Run(**{**row, "state": RunState(row["state"])}) for row in rows]

    async def last_run_began(self, job: str) -> datetime | None:
        """Returns when a run of a job last began."""
        began: datetime | None = await self._database.fetchval(_SQL["last_run_began"], job)
        return began

    async def last_success(self, job: str) -> datetime | None:
        """Returns when a job last succeeded."""
        ended: datetime | None = await self._database.fetchval(_SQL["last_success"], job)
        return ended

    # Archives. A run holds its table's lock, so no two work on one archive.

    async def open_archive(self, policy: Policy, partition: TablePartition, run_id: UUID) -> Archive:
        """Begins the way of a partition, or takes it up where it was left."""
        row = await self._database.fetchrow(
            _SQL["open_archive"],
            uuid7.uuid7(),
            policy.name,
            policy.source,
            partition.schema,
            partition.name,
            partition.begin,
            partition.end,
            run_id,
        )
        assert row is not None
        return _archive(row)

    async def open_archives(self, policy: str) -> list[Archive]:
        """Returns the partitions of a policy that are on their way, by lower bound."""
        return [_archive(row) for row in await self._database.fetch(_SQL["open_archives"], policy)]

    async def note_failure(self, archive: Archive, message: str) -> None:
        """Notes why an attempt failed."""
        await self._database.execute(_SQL["note_archive"], archive.archive_id, message[:4000])

    async def archive_files(self, archive: Archive) -> list[ArchiveFile]:
        """Returns the files of an archive, published or not."""
        rows = await self._database.fetch(_SQL["archive_files"], archive.archive_id)
        return [
            ArchiveFile(
                row["key"],
                row["organization_id"],
                row["size_bytes"],
                row["sha256"],
                from_json(row["columns"]),
                Fingerprint.from_json(row["fingerprint"]),
            )
            for row in rows
        ]

    async def plan_files(self, archive: Archive, copies: list[tuple[str, Copy]]) -> None:
        """Replaces the files of an archive by ones that are about to be uploaded, so that no upload is ever unknown."""
        async with self._database.transaction() as connection:
            await connection.execute(_SQL["forget_files"], archive.archive_id)
            for key, copy in copies:
                await connection.execute(
                    _SQL["insert_file"],
                    key,
                    archive.archive_id,
                    archive.policy,
                    copy.organization_id,
                    archive.from_date,
                    archive.to_date,
                    copy.fingerprint.rows,
                    copy.size_bytes,
                    copy.sha256,
                    to_json(copy.columns),
                    copy.fingerprint.to_json(),
                )

    async def forget_files(self, archive: Archive) -> None:
        """Forgets the files of an archive, once they are deleted."""
        await self._database.execute(_SQL["forget_files"], archive.archive_id)

    async def step(self, archive: Archive, step: Step) -> Archive:
        """Takes an archive from where it stands to another step.

        PUBLISHED publishes its files and opens the next manifest, in the same transaction; SELECTED takes them back.

        Raises:
            RuntimeError: the archive does not stand there any more, so that somebody else has it.
        """
        async with self._database.transaction() as connection:
            taken = await connection.fetchval(_SQL["step_archive"], archive.archive_id, int(archive.step), int(step))
            if taken is None:
                raise RuntimeError(f"{archive.qualified} is no longer at the step {archive.step.name}")
            if step is Step.PUBLISHED:
                await connection.execute(_SQL["publish_files"], archive.archive_id)
                await connection.execute(_SQL["next_manifest"], archive.policy)
            elif step is Step.SELECTED:
                await connection.execute(_SQL["unpublish_files"], archive.archive_id)
                if archive.step is Step.PUBLISHED:
                    await connection.execute(_SQL["next_manifest"], archive.policy)
            sums = await connection.fetchrow(_SQL["sum_archive"], archive.archive_id)
        assert sums is not None
        return Archive(
            archive.archive_id,
            archive.policy,
            archive.schema_name,
            archive.partition,
            archive.from_date,
            archive.to_date,
            step,
            int(sums["rows"]),
            int(sums["bytes"]),
        )

    # Cold files and manifests.

    async def published_files(self, policy: str) -> list[ColdFile]:
        """Returns the published files of a policy, of all organizations, by lower bound."""
        return [_cold_file(row) for row in await self._database.fetch(_SQL["published_files"], policy)]

    async def readable_files(self, policy: str, organization_id: UUID) -> list[ColdFile]:
        """Returns the published files that hold rows of one organization, by lower bound."""
        return [_cold_file(row) for row in await self._database.fetch(_SQL["readable_files"], policy, organization_id)]

    async def expire_files(self, policy: str, days: int) -> list[str]:
        """Forgets the files published more than `days` ago and returns their keys, for the store to delete."""
        async with self._database.transaction() as connection:
            keys = [row["key"] for row in await connection.fetch(_SQL["expire_files"], policy, days)]
            if keys:
                await connection.execute(_SQL["next_manifest"], policy)
        return keys

    async def unwritten_manifest(self, policy: str) -> int | None:
        """Returns the number of the newest manifest if it is not on the object store yet."""
        number: int | None = await self._database.fetchval(_SQL["unwritten_manifest"], policy)
        return number

    async def manifest_written(self, policy: str, number: int) -> None:
        """Notes that a manifest is on the object store."""
        await self._database.execute(_SQL["manifest_written"], policy, number)


def _policy(row: asyncpg.Record) -> Policy:
    return Policy(
        row["name"],
        row["source"],
        row["schema_name"],
        row["table_name"],
        Interval(row["interval"]),
        row["ahead"],
        row["hot_retention_days"],
        row["cold_retention_days"],
        row["legal_hold"],
        row["key_column"],
        row["organization_column"],
        row["version"],
        row["partition_column"],
    )


def _archive(row: asyncpg.Record) -> Archive:
    return Archive(**{**row, "step": Step(row["step"])})


def _cold_file(row: asyncpg.Record) -> ColdFile:
    values: dict[str, Any] = {**row, "columns": from_json(row["columns"])}
    return ColdFile(**values)
