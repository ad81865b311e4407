"""Progress is the heartbeat: the leases of sessions that moved are renewed in rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

import structlog

from session_tracker.metrics import RENEWALS
from session_tracker.organizations import Organization, Organizations
from session_tracker.sessions import Lease, Session

_log = structlog.get_logger("leases")

# As many as the allocator takes in one call.
_MAX_LEASES = 1000


class AllocatorUnavailable(Exception):
    """The allocator did not answer, or refused the call as a whole."""


class LeaseRenewer(Protocol):
    """Renews leases at the allocator."""

    async def renew(self, organization_id: UUID, leases: Sequence[Lease]) -> list[str | None]:
        """Renews up to 1000 leases; returns for each None, or why it is lost, for people.

        Raises:
            AllocatorUnavailable: nothing is known of any of them.
        """


class Renewals:
    """Renews, every `interval_seconds`, the leases of the sessions that moved since the last round.

    A session that does not move is not renewed: its lease runs out and its work is handed out again. Neither is a
    stalled one whose worker still reports. When the allocator does not answer, the round ends and the next one tries
    again; leases run on meanwhile.
    """

    def __init__(self, organizations: Organizations, renewer: LeaseRenewer, interval_seconds: float) -> None:
        self._organizations = organizations
        self._renewer = renewer
        self._interval_seconds = interval_seconds

    async def loop(self) -> None:
        """Renews for ever."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.round()

    async def round(self) -> None:
        """Renews what moved since the last round; one organization's refusal does not hold up the others."""
        for organization in self._organizations:
            organization.settle()
        organizations = [organization for organization in self._organizations if organization.live.moved]
        failures = await asyncio.gather(*(self._renew_all(organization) for organization in organizations))
        reasons = [failure for failure in failures if failure]
        if reasons:
            _log.warning(
                "leases are not renewed now: the next round tries again",
                organizations=len(reasons),
                reason=reasons[0],
            )

    async def _renew_all(self, organization: Organization) -> str:
        """Renews what moved in one organization; returns why that could not be ended, or nothing."""
        moved, organization.live.moved = organization.live.moved, []
        for begin in range(0, len(moved), _MAX_LEASES):
            try:
                await self._renew(organization, moved[begin : begin + _MAX_LEASES])
            except AllocatorUnavailable as error:
                organization.live.moved += moved[begin:]
                return str(error)
        return ""

    async def _renew(self, organization: Organization, moved: list[Session]) -> None:
        # Ended sessions need no lease any more.
        asked = [
            (session, lease)
            for session in moved
            if (lease := session.lease) is not None
            and not session.owner
            and organization.sessions.get(session.session_id) is session
        ]
        if not asked:
            return
        try:
            answers = await self._renewer.renew(organization.organization_id, [lease for _, lease in asked])
        except AllocatorUnavailable:
            RENEWALS.labels("unavailable").inc(len(asked))
            raise
        for (session, lease), lost in zip(asked, answers, strict=True):
            if session.lease != lease:
                # It was registered again with another lease meanwhile, or has ended.
                continue
            # From here on, a report makes it due again.
            session.renewable = lost is None
            if lost is not None:
                organization.lose_lease(session, lost)
        refused = sum(lost is not None for lost in answers)
        RENEWALS.labels("refused").inc(refused)
        RENEWALS.labels("renewed").inc(len(answers) - refused)
