"""Final results in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from services.postgres import Database, queries
from session_tracker.results import RecordedResult, Result
from session_tracker.sessions import State

if TYPE_CHECKING:
    import asyncpg

_SQL = queries("session_tracker", "results.sql")


class PostgresResults:
    """The table `crawling_results`. Every method raises `DatabaseUnavailable` when the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, results: Sequence[Result]) -> list[tuple[RecordedResult, bool]]:
        """Records what is not on record yet.

        One statement, so the new rows are committed together or not at all; safe to repeat. When an organization's
        session stands twice in `results`, or two replicas record it at once, one of them wins and all are answered
        with its row.

        Returns:
            For each, in order: what is on record, and whether this entry is what was recorded.
        """
        rows = await self._database.fetch(
            _SQL["record_results"],
            [result.organization_id for result in results],
            [result.session_id for result in results],
            [result.state.name.lower() for result in results],
            [result.stage for result in results],
            [result.total_pages for result in results],
            [result.products_found for result in results],
            [result.errors_count for result in results],
            [result.started_at for result in results],
            [result.config_snapshot or None for result in results],
            [result.slot_id for result in results],
            [result.client_id for result in results],
            [result.message for result in results],
        )
        fresh = {(row["organization_id"], row["session_id"]) for row in rows}
        found = {(row["organization_id"], row["session_id"]): _recorded(row) for row in rows}
        others = {key for result in results if (key := (result.organization_id, result.session_id)) not in found}
        if others:
            # A statement of its own: rows that another replica committed meanwhile are not seen by the first one.
            rows = await self._database.fetch(
                _SQL["find_results"], [key[0] for key in others], [key[1] for key in others]
            )
            found |= {(row["organization_id"], row["session_id"]): _recorded(row) for row in rows}
        answers = []
        for result in results:
            key = (result.organization_id, result.session_id)
            answers.append((found[key], key in fresh))
            fresh.discard(key)
        return answers

    async def find(self, organization_id: UUID, session_id: str) -> RecordedResult | None:
        """Returns the result on record of a session, or None."""
        row = await self._database.fetchrow(_SQL["find_results"], [organization_id], [session_id])
        return None if row is None else _recorded(row)

    async def find_all(self, organization_id: UUID, session_ids: Sequence[str]) -> list[RecordedResult]:
        """Returns the results on record of some sessions, in any order."""
        rows = await self._database.fetch(_SQL["find_results"], [organization_id] * len(session_ids), session_ids)
        return [_recorded(row) for row in rows]

    async def list(
        self,
        organization_id: UUID,
        *,
        state: State | None,
        slot_id: str,
        client_id: str = "",
        not_before: datetime | None,
        before: datetime | None,
        after: tuple[datetime, str] | None,
        limit: int,
    ) -> list[RecordedResult]:
        """Returns a page of an organization's results, newest first.

        Args:
            organization_id: Whose.
            state: Only of this state.
            slot_id: Only of this slot; empty for any.
            client_id: Only of this client; empty for any.
            not_before: Only completed at or after this moment.
            before: Only completed before this moment.
            after: `completed_at` and `session_id` of the last row before the page.
            limit: The most rows.
        """
        arguments = [
            organization_id,
            state.name.lower() if state else None,
            not_before,
            before,
            after[0] if after else None,
            after[1] if after else None,
            limit,
        ]
        if slot_id:
            rows = await self._database.fetch(_SQL["list_results_of_slot"], *arguments, slot_id, client_id or None)
        elif client_id:
            rows = await self._database.fetch(_SQL["list_results_of_client"], *arguments, client_id)
        else:
            rows = await self._database.fetch(_SQL["list_results"], *arguments)
        return [_recorded(row) for row in rows]


def _recorded(row: asyncpg.Record) -> RecordedResult:
    return RecordedResult(
        organization_id=row["organization_id"],
        session_id=row["session_id"],
        state=State[row["status"].upper()],
        stage=row["stage"],
        total_pages=row["total_pages"],
        products_found=row["products_found"],
        errors_count=row["errors_count"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        execution_time_seconds=row["execution_time_seconds"],
        config_snapshot=row["config_snapshot"] or "",
        slot_id=row["slot_id"],
        client_id=row["client_id"],
        message=row["message"],
    )
