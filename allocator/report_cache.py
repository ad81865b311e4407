"""Reports kept for a while, so that many who look at the same one cost one reading."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

Report = TypeVar("Report")

# How old a report may be when nothing on this replica says that it has changed.
TOTALS_SECONDS = 1.0
DASHBOARD_SECONDS = 60.0
STATISTICS_SECONDS = 300.0

# A bound on memory; a console asks for a handful of reports.
_REPORTS = 64
_ORGANIZATIONS = 1024
# Under a steady stream of writes every report is always outdated, and one that is kept for a second soon is anyway. One
# that takes longer than this to read is read again only after ten times as long, so that looking at it cannot take the
# database's time from the work itself.
_CHEAP_SECONDS = 0.1
_DEAR_SHARE = 0.1


@dataclass(slots=True)
class _Reading:
    """One reading, under way or done; `seconds` is how long it took."""

    task: asyncio.Task[Any]
    # The count of writes when it began: it shows what was written before.
    writes: int
    begun: float
    seconds: float | None = None

    def serves(self, writes: int, ttl_seconds: float, now: float) -> bool:
        """Whether a caller who comes now may have it."""
        if self.task.done() and (self.task.cancelled() or self.task.exception() is not None):
            return False
        if self.seconds is None:
            return self.writes == writes
        kept_seconds = ttl_seconds if self.writes == writes else 0.0
        if self.seconds > _CHEAP_SECONDS:
            kept_seconds = max(kept_seconds, self.seconds / _DEAR_SHARE)
        return now < self.begun + kept_seconds


@dataclass(slots=True)
class _Organization:
    """What is kept for one organization, the least lately used first."""

    writes: int = 0
    readings: OrderedDict[Hashable, _Reading] = field(default_factory=OrderedDict)


class ReportCache:
    """Keeps what was read: per organization and question, for a limited time or until the next write on this replica.

    What took long to read is kept for ten times as long, whatever is written and however young it should be.

    Those who ask while a reading is under way share it, or the next one if something was written since it began. A
    reading that fails is not kept; those who share it get its error.
    """

    def __init__(self) -> None:
        self._organizations: OrderedDict[UUID, _Organization] = OrderedDict()

    def outdate(self, organization_id: UUID) -> None:
        """Notes a write: what was read before is read again when somebody asks. Costs a look-up."""
        if (known := self._organizations.get(organization_id)) is not None:
            known.writes += 1

    async def get(
        self,
        organization_id: UUID,
        question: Hashable,
        ttl_seconds: float,
        read: Callable[[], Awaitable[Report]],
    ) -> Report:
        """Returns the answer to a question, read if need be.

        Args:
            organization_id: The tenant.
            question: The report's name and everything that its contents depend on.
            ttl_seconds: How old the answer may be, unless it is dear.
            read: Reads it. Runs outside the call, since others may wait for it longer than this caller does.

        Raises:
            BaseException: what `read` raised.
        """
        kept = self._of(organization_id)
        while True:
            reading = kept.readings.get(question)
            if reading is not None and reading.serves(kept.writes, ttl_seconds, time.monotonic()):
                break
            if reading is None or reading.task.done():
                reading = kept.readings[question] = self._begin(kept, read)
                if len(kept.readings) > _REPORTS:
                    kept.readings.popitem(last=False)
                break
            # Something was written since it began. One reading at a time, however fast the writes come.
            await asyncio.wait([reading.task])
        kept.readings.move_to_end(question)
        answer: Report = await asyncio.shield(reading.task)
        return answer

    @staticmethod
    def _begin(kept: _Organization, read: Callable[[], Awaitable[Report]]) -> _Reading:
        async def run() -> Report:
            return await read()

        task = asyncio.create_task(run(), name="report", context=Context())
        reading = _Reading(task, kept.writes, time.monotonic())

        def note(done: asyncio.Task[Report]) -> None:
            reading.seconds = time.monotonic() - reading.begun
            if not done.cancelled():
                # Taken note of even if everybody who waited for it has gone.
                done.exception()

        task.add_done_callback(note)
        return reading

    def _of(self, organization_id: UUID) -> _Organization:
        kept = self._organizations.get(organization_id)
        if kept is None:
            kept = self._organizations[organization_id] = _Organization()
            if len(self._organizations) > _ORGANIZATIONS:
                self._organizations.popitem(last=False)
        self._organizations.move_to_end(organization_id)
        return kept
