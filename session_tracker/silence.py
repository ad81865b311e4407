"""The loop that notices sessions which fell silent, and those whose end was never heard of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

import structlog

from services.errors import DatabaseUnavailable
from session_tracker.metrics import FORGOTTEN
from session_tracker.organizations import Organization, Organizations
from session_tracker.results import RecordedResult, end_by

_log = structlog.get_logger("silence")

# Well below the shortest default limit of 30 s, so that a state is late by a sixth of it at most.
INTERVAL_SECONDS = 5.0
# Sessions looked at in one go: below a millisecond, so that reports do not wait.
_SLICE_SESSIONS = 2000
_SUSPECTS_AT_ONCE = 1000


class RecordedResults(Protocol):
    """The results on record."""

    async def find_all(self, organization_id: UUID, session_ids: Sequence[str]) -> list[RecordedResult]:
        """Returns those of some sessions, in any order. Raises: DatabaseUnavailable."""


class Silence:
    """Marks the stalled and the lost, drops those lost for long, and lets finished ones leave.

    A replica may die between the commit of a result and telling the others: what becomes lost, is taken over, or falls
    silent when a replica has gone, is looked for among the results.

    Args:
        organizations: Whose sessions.
        results: The results on record.
    """

    def __init__(self, organizations: Organizations, results: RecordedResults) -> None:
        self._organizations = organizations
        self._results = results

    async def loop(self) -> None:
        """Looks at every session each `INTERVAL_SECONDS`, for ever."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Looks at every session once."""
        for organization in self._organizations:
            organization.settle()
            organization.expire()
            sessions = list(organization.sessions.values())
            for begin in range(0, len(sessions), _SLICE_SESSIONS):
                for session in sessions[begin : begin + _SLICE_SESSIONS]:
                    if organization.mark_silence(session):
                        FORGOTTEN.inc()
                await asyncio.sleep(0)
            organization.suspect_doubted()
            if organization.suspects:
                await self._end_unheard(organization)

    async def _end_unheard(self, organization: Organization) -> None:
        """Ends the suspects whose result is on record; waits for the next look while the database is away."""
        suspects, organization.suspects = organization.suspects, []
        for begin in range(0, len(suspects), _SUSPECTS_AT_ONCE):
            try:
                found = await self._results.find_all(
                    organization.organization_id, suspects[begin : begin + _SUSPECTS_AT_ONCE]
                )
            except DatabaseUnavailable as error:
                organization.suspects += suspects[begin:]
                _log.warning("lost sessions wait for the database", error=error.message)
                return
            for result in found:
                end_by(organization, result)
