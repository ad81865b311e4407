"""The loop that notices sessions which fell silent."""

from __future__ import annotations

import asyncio

from session_tracker.metrics import FORGOTTEN
from session_tracker.organizations import Organizations

# Well below the shortest default limit of 30 s, so that a state is late by a sixth of it at most.
INTERVAL_SECONDS = 5.0
# Sessions looked at in one go: below a millisecond, so that reports do not wait.
_SLICE_SESSIONS = 2000


class Silence:
    """Marks the stalled and the lost, drops those lost for long, and lets finished ones leave."""

    def __init__(self, organizations: Organizations) -> None:
        self._organizations = organizations

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
