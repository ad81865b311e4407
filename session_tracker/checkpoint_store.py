"""Checkpoints in PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from services.postgres import Database, queries
from session_tracker.commands import Command
from session_tracker.records import Counters, Record
from session_tracker.sessions import LOST, CheckpointPolicy, ErrorEntry

if TYPE_CHECKING:
    import asyncpg

_SQL = queries("session_tracker", "checkpoints.sql")
_PAGE_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A session to be saved: `described` is empty when what is on record of it, but for the counters, stands."""

    organization_id: UUID
    session_id: str
    described: str
    counters: Counters


class PostgresCheckpoints:
    """The table `session_checkpoints`. Every method raises `DatabaseUnavailable` when the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Saves some sessions, each once, together or not at all. What is on record with a greater sequence stands."""
        counters = [checkpoint.counters for checkpoint in checkpoints]
        await self._database.execute(
            _SQL["save_checkpoints"],
            [checkpoint.organization_id for checkpoint in checkpoints],
            [checkpoint.session_id for checkpoint in checkpoints],
            [checkpoint.described for checkpoint in checkpoints],
            [Decimal(saved.sequence) for saved in counters],
            [saved.current_page for saved in counters],
            [saved.total_pages for saved in counters],
            [saved.products_found for saved in counters],
            [saved.errors_count for saved in counters],
            [datetime.fromtimestamp(saved.reported_at, UTC) for saved in counters],
        )

    async def forget(self, sessions: Sequence[tuple[UUID, str]]) -> None:
        """Deletes the checkpoints of some sessions."""
        await self._database.execute(
            _SQL["forget_checkpoints"], [key[0] for key in sessions], [key[1] for key in sessions]
        )

    async def read(self) -> AsyncIterator[tuple[UUID, Record]]:
        """Yields the sessions on record that have no result yet, with their organizations."""
        await self._database.execute(_SQL["forget_completed_checkpoints"])
        after: tuple[UUID, str] = UUID(int=0), ""
        while True:
            rows = await self._database.fetch(_SQL["read_checkpoints"], *after, _PAGE_ROWS)
            for row in rows:
                if row["described"]:
                    yield row["organization_id"], _record(row)
            if len(rows) < _PAGE_ROWS:
                return
            after = rows[-1]["organization_id"], rows[-1]["session_id"]


def describe(record: Record) -> str:
    """Returns all of a record but its counters, as JSON."""
    policy, command = record.checkpoint, record.command
    return json.dumps(
        {
            "state": record.counters.state,
            "since_at": record.since_at,
            "reason": record.reason,
            "stage": record.stage,
            "started_at": record.started_at,
            "slot_id": record.slot_id,
            "client_id": record.client_id,
            "tags": record.tags,
            "config_snapshot": record.config_snapshot,
            "traceparent": record.traceparent,
            "allocation_key": record.allocation_key,
            "lease_token": record.lease_token.hex(),
            "checkpoint": [policy.every_pages, policy.every_seconds] if policy else None,
            "errors_by_class": record.errors_by_class,
            "last_errors": [[error.at, error.error_class, error.message, error.page] for error in record.last_errors],
            "command": [command.kind, command.message, command.number, command.pages_per_minute] if command else None,
            "pages_per_minute_limit": record.pages_per_minute_limit,
            "acknowledged_command": record.acknowledged_command,
            "lease_refused": record.lease_refused,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _record(row: asyncpg.Record) -> Record:
    session_id, given = row["session_id"], json.loads(row["described"])
    reported_at = row["reported_at"].timestamp()
    counters = Counters(
        sequence=int(row["sequence"]),
        revision=0,
        state=LOST,
        current_page=row["current_page"],
        total_pages=row["total_pages"],
        products_found=row["products_found"],
        errors_count=row["errors_count"],
        reported_at=reported_at,
    )
    return Record(
        session_id=session_id,
        counters=counters,
        since_at=reported_at,
        reason="",
        stage=given["stage"],
        started_at=given["started_at"],
        slot_id=given["slot_id"],
        client_id=given["client_id"],
        tags=tuple(given["tags"]),
        config_snapshot=given["config_snapshot"],
        traceparent=given["traceparent"],
        allocation_key=given["allocation_key"],
        lease_token=bytes.fromhex(given["lease_token"]),
        checkpoint=CheckpointPolicy(*given["checkpoint"]) if given["checkpoint"] else None,
        errors_by_class=tuple((name, count) for name, count in given["errors_by_class"]),
        last_errors=tuple(ErrorEntry(*error) for error in given["last_errors"]),
        command=Command(session_id, *given["command"]) if given["command"] else None,
        pages_per_minute_limit=given["pages_per_minute_limit"],
        acknowledged_command=given["acknowledged_command"],
        lease_refused=given["lease_refused"],
    )
