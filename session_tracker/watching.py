"""Filters over live sessions, and a watcher's view: a snapshot, then changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass

from session_tracker.metrics import WATCHERS
from session_tracker.organizations import Organization
from session_tracker.sessions import Session

# A message of so many sessions stays below 200 KB.
PIECE_SESSIONS = 500


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects sessions; what is empty does not bind."""

    states: frozenset[int] = frozenset()
    slot_id: str = ""
    client_id: str = ""
    stage: str = ""
    tag: str = ""

    def matches(self, session: Session) -> bool:
        """Whether all that is set holds."""
        return (
            (not self.states or session.state in self.states)
            and (not self.slot_id or session.slot_id == self.slot_id)
            and (not self.client_id or session.client_id == self.client_id)
            and (not self.stage or session.stage == self.stage)
            and (not self.tag or self.tag in session.tags)
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of what a watcher is sent.

    Attributes:
        offset: From where the watcher can go on if it gets nothing after this piece.
        snapshot: It forgets what it holds, before taking this piece.
        sessions: As they stand at this moment: to be read before the next piece is asked for.
        removed: Ended, or matching no more.
    """

    offset: int
    snapshot: bool
    sessions: list[Session]
    removed: list[str]


class Watch:
    """One watcher of an organization's sessions.

    Between two pieces it holds at most one id per session, however slow the watcher is.

    Args:
        organization: Whose.
        filter: Which.
        interval_seconds: The least time between two answers; changes in between are merged.
        draining: Set when the service stops; the watch then ends.
    """

    def __init__(
        self, organization: Organization, filter: Filter, interval_seconds: float, draining: asyncio.Event
    ) -> None:
        self._sessions = organization.sessions
        self._changes = organization.changes
        self._filter = filter
        self._interval_seconds = interval_seconds
        self._draining = draining
        self._shown: set[str] = set()
        self._pending: set[str] = set()

    async def pieces(self, epoch: str, offset: int) -> AsyncIterator[Piece]:
        """Yields what to send, from `epoch` and `offset` on where that is possible, until the service drains.

        The first piece comes at once, even with nothing in it, and tells the watcher where it stands.
        """
        self._pending = self._changes.subscribe()
        WATCHERS.inc()
        try:
            sent = self._changes.offset
            changed = self._changes.after(offset, self._sessions.values()) if epoch == self._changes.epoch else None
            if changed is None:
                for piece in self._cut(self._matching(), 0, sent, snapshot=True):
                    yield piece
            else:
                # What matches and did not change since is what the watcher holds.
                self._shown = set(self._matching())
                self._shown |= changed
                for piece in self._cut(list(changed), offset, sent, snapshot=False):
                    yield piece
            while await self._stirred():
                before, sent = sent, self._changes.offset
                ids = list(self._pending)
                self._pending.clear()
                for piece in self._cut(ids, before, sent, snapshot=False):
                    if piece.sessions or piece.removed:
                        yield piece
        finally:
            WATCHERS.dec()
            self._changes.unsubscribe(self._pending)

    async def _stirred(self) -> bool:
        """Waits out the interval and then for a change; returns whether there is one, rather than the end."""
        if self._interval_seconds:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), self._interval_seconds)
        while not self._draining.is_set():
            self._changes.distribute()
            if self._pending:
                return True
            # Draining sets `stirred` too: see Organizations.wake_watchers.
            await self._changes.stirred.wait()
        return False

    def _matching(self) -> list[str]:
        matches = self._filter.matches
        return [session.session_id for session in self._sessions.values() if matches(session)]

    def _cut(self, ids: list[str], before: int, after: int, *, snapshot: bool) -> Iterator[Piece]:
        """Yields pieces of the sessions named, as they stand when each piece is made.

        Only the last carries the offset `after`: a watcher that is cut off earlier goes on from `before`, and so misses
        nothing.
        """
        for begin in range(0, max(1, len(ids)), PIECE_SESSIONS):
            found: list[Session] = []
            removed: list[str] = []
            for session_id in ids[begin : begin + PIECE_SESSIONS]:
                session = self._sessions.get(session_id)
                if session is not None and self._filter.matches(session):
                    self._shown.add(session_id)
                    found.append(session)
                elif session_id in self._shown:
                    self._shown.discard(session_id)
                    removed.append(session_id)
            last = begin + PIECE_SESSIONS >= len(ids)
            yield Piece(after if last else before, snapshot and begin == 0, found, removed)
