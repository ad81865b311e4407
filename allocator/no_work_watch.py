"""Watches that "no work" is true: it proves of some answers, by the database, that they were not false.

A gauge cannot be read from the tables for this invariant, since a false answer leaves no trace there. So the answer is
watched as it is made: once a second, one of them is preceded by a snapshot and followed by a look for a slot whose row
had room in both, in the same version: it had room all the while, whoever was locking it. Only answers that say that no
slot has room are watched, since exits, targets and personas come and go without such a proof.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from allocator import metrics
from allocator.blockers import BlockerKind, NoWork
from allocator.explanation import Explanation
from services.postgres import queries

if TYPE_CHECKING:
    from allocator.explanation import Needs, Sources
    from allocator.standing_store import StandingStore
    from services.postgres import Database

_SQL = queries("allocator", "invariants.sql")
_log = structlog.get_logger("allocator.no_work")

_WATCH_SECONDS = 1.0
_NO_ROOM = (
    BlockerKind.NO_SLOT,
    BlockerKind.SLOT_INACTIVE,
    BlockerKind.SLOT_OUT_OF_DATE,
    BlockerKind.QUOTA_EXHAUSTED,
    BlockerKind.PACED,
)


class WatchedExplanation(Explanation):
    """An explanation, some of whose answers are checked.

    Args:
        store: Reads where slots stand.
        personas: Knows which needs of personas fail.
        external_exits: Knows which providers of external exits fail.
        database: The allocator's database.
    """

    def __init__(self, store: StandingStore, personas: Needs, external_exits: Sources, database: Database) -> None:
        super().__init__(store, personas, external_exits)
        self._database = database
        self._false = 0
        self._watched_at = 0.0
        metrics.VIOLATIONS.labels("false_no_work").set(0)

    async def no_work(self, organization_id: UUID, target: str | None, region: str | None) -> NoWork | None:
        """As of `Explanation`. Raises: DatabaseUnavailable."""
        now = time.monotonic()
        if region is not None or now < self._watched_at + _WATCH_SECONDS:
            return await super().no_work(organization_id, target, region)
        self._watched_at = now
        before = await self._database.fetchrow(_SQL["before_no_work"], organization_id)
        answer = await super().no_work(organization_id, target, region)
        if before is None or answer is None or answer.blocker not in _NO_ROOM:
            return answer
        open_slots = await self._database.fetchval(
            _SQL["after_no_work"], organization_id, before["work_date"], target, before["snapshot"], before["at"]
        )
        metrics.NO_WORK_WATCHED.inc()
        metrics.CHECKED_AT.labels("false_no_work").set_to_current_time()
        if open_slots:
            self._false += 1
            metrics.VIOLATIONS.labels("false_no_work").set(self._false)
            _log.error(
                "no work was said while slots had room",
                organization=str(organization_id),
                slots=open_slots,
                blocker=answer.blocker.name,
            )
        return answer
