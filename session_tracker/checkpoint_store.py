"""Checkpoints in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from services.postgres import Database, queries
from session_tracker.records import Counters, Record, whole
from session_tracker.sessions import LOST

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


def _record(row: asyncpg.Record) -> Record:
    counters = Counters(
        sequence=int(row["sequence"]),
        revision=0,
        state=LOST,
        current_page=row["current_page"],
        total_pages=row["total_pages"],
        products_found=row["products_found"],
        errors_count=row["errors_count"],
        reported_at=row["reported_at"].timestamp(),
    )
    return whole(row["described"], counters)
