"""Important sessions outlive the loss of memory: where they stand is saved while they run.

What is lost when the process is killed is what came after the last checkpoint: at most what its session's policy allows
(so many pages or seconds), and what came within one look at what is due and one commit after that. A process that ends
in good order saves all that changed, and loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol
from uuid import UUID

import structlog

from services.errors import DatabaseUnavailable
from session_tracker import records
from session_tracker.checkpoint_store import Checkpoint
from session_tracker.clock import Clock
from session_tracker.metrics import CHECKPOINT_AGE, CHECKPOINT_OVERDUE, CHECKPOINTS
from session_tracker.organizations import Organization, Organizations
from session_tracker.records import Record
from session_tracker.sessions import Session

_log = structlog.get_logger("checkpoints")

# Some 200 KB and 10 ms of the database.
_MAX_BATCH = 500


class CheckpointStore(Protocol):
    """Where checkpoints stand."""

    async def save(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Saves some sessions. Raises: DatabaseUnavailable."""

    async def forget(self, sessions: Sequence[tuple[UUID, str]]) -> None:
        """Deletes the checkpoints of some sessions. Raises: DatabaseUnavailable."""

    def read(self) -> AsyncIterator[tuple[UUID, Record]]:
        """Yields the sessions on record that have no result yet. Raises: DatabaseUnavailable."""


class Checkpoints:
    """Saves, every `interval_seconds`, the important sessions that are due, and reads them back at the start."""

    def __init__(
        self, organizations: Organizations, store: CheckpointStore, clock: Clock, interval_seconds: float
    ) -> None:
        self._organizations = organizations
        self._store = store
        self._clock = clock
        self._interval_seconds = interval_seconds
        CHECKPOINT_AGE.set_function(self._age)
        CHECKPOINT_OVERDUE.set_function(self._overdue)

    async def restore(self) -> None:
        """Reads the sessions on record back, as lost until their workers report them.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        count = 0
        async for organization_id, record in self._store.read():
            count += self._organizations.of(organization_id).restore(record)
        if count:
            CHECKPOINTS.labels("restored").inc(count)
            _log.info("important sessions were read back from their checkpoints", sessions=count)

    async def loop(self) -> None:
        """Saves for ever."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.round()

    async def close(self) -> None:
        """Saves all that changed, since the process ends."""
        await self.round(everything=True)

    async def round(self, *, everything: bool = False) -> None:
        """Saves what is due, or everything that changed. When the database is away, the next round tries again."""
        try:
            for organization in self._organizations:
                organization.settle()
                await self._forget(organization)
                now = self._clock.monotonic()
                due = [
                    session
                    for session in organization.live.unsaved.values()
                    if session.save is not None and (everything or session.save.due(session.current_page, now))
                ]
                for begin in range(0, len(due), _MAX_BATCH):
                    await self._save(organization, due[begin : begin + _MAX_BATCH])
        except DatabaseUnavailable as error:
            CHECKPOINTS.labels("failed").inc()
            _log.warning("checkpoints are not saved now: the next round tries again", reason=error.message)

    async def _save(self, organization: Organization, sessions: Sequence[Session]) -> None:
        organization.settle()
        now = self._clock.monotonic()
        batch: list[Checkpoint] = []
        stood: list[tuple[Session, int, int, int]] = []
        for session in sessions:
            save = session.save
            # Finished while an earlier batch was saved, or taken over by another replica.
            if save is None or session.owner:
                continue
            described = records.described(organization.export(session)) if save.described != session.described else ""
            batch.append(
                Checkpoint(organization.organization_id, session.session_id, described, organization.counters(session))
            )
            stood.append((session, session.changed, session.described, session.current_page))
        if not batch:
            return
        await self._store.save(batch)
        organization.settle()
        CHECKPOINTS.labels("saved").inc(len(batch))
        ended: list[tuple[UUID, str]] = []
        for session, changed, described_at, page in stood:
            save = session.save
            if save is None:
                # Its result was committed meanwhile, and perhaps before this checkpoint was.
                ended.append((organization.organization_id, session.session_id))
                continue
            save.at, save.page, save.described, save.unsaved_since = now, page, described_at, now
            if session.changed == changed:
                organization.live.unsaved.pop(session.session_id, None)
        if ended:
            await self._store.forget(ended)

    async def _forget(self, organization: Organization) -> None:
        dropped = organization.live.dropped
        while dropped:
            ids = sorted(dropped)[:_MAX_BATCH]
            await self._store.forget([(organization.organization_id, session_id) for session_id in ids])
            dropped.difference_update(ids)

    def _age(self) -> float:
        now = self._clock.monotonic()
        return max((now - session.save.unsaved_since for session in self._unsaved() if session.save), default=0.0)

    def _overdue(self) -> float:
        now = self._clock.monotonic()
        return max(
            (
                now - max(session.save.unsaved_since, session.save.at + session.save.policy.every_seconds)
                for session in self._unsaved()
                if session.save and session.save.due(session.current_page, now)
            ),
            default=0.0,
        )

    def _unsaved(self) -> list[Session]:
        return [session for organization in self._organizations for session in organization.live.unsaved.values()]
