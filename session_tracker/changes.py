"""The order of changes of one organization's sessions, and who waits for them."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterable

from session_tracker.sessions import Session

# Ends that a watcher which comes back may have missed. Beyond these it gets a snapshot.
_REMEMBERED_ENDS = 10_000


class Changes:
    """Numbers changes and notes for whoever follows which sessions changed: the latest state of each, never a queue.

    Args:
        settle: Brings reports that wait to be counted into this order; called before anything is read.

    Attributes:
        epoch: Names the life of this memory.
        offset: Grows by one with every change.
        dirty: Ids changed since the last `distribute`; only kept while somebody follows.
        stirred: Set when there is something to distribute; `distribute` clears it.
    """

    __slots__ = ("_ends", "_ends_forgotten_at", "_settle", "_subscribers", "dirty", "epoch", "offset", "stirred")

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self.epoch = secrets.token_hex(8)
        self.offset = 0
        self.dirty: set[str] = set()
        self.stirred = asyncio.Event()
        self._subscribers: list[set[str]] = []
        self._ends: deque[tuple[int, str]] = deque(maxlen=_REMEMBERED_ENDS)
        self._ends_forgotten_at = 0

    @property
    def watched(self) -> bool:
        """Whether anybody follows."""
        return bool(self._subscribers)

    def mark(self, session: Session) -> None:
        """Notes that a session changed."""
        self.offset += 1
        session.changed = self.offset
        self._stir(session.session_id)

    def end(self, session_id: str) -> None:
        """Notes that a session is live no more."""
        self.offset += 1
        if len(self._ends) == _REMEMBERED_ENDS:
            self._ends_forgotten_at = self._ends[0][0]
        self._ends.append((self.offset, session_id))
        self._stir(session_id)

    def _stir(self, session_id: str) -> None:
        if self._subscribers:
            self.dirty.add(session_id)
            self.stirred.set()

    def subscribe(self) -> set[str]:
        """Returns a set into which `distribute` puts the ids of changed and ended sessions, until `unsubscribe`."""
        self.distribute()
        pending: set[str] = set()
        self._subscribers.append(pending)
        return pending

    def unsubscribe(self, pending: set[str]) -> None:
        """Ends a subscription."""
        self._subscribers = [other for other in self._subscribers if other is not pending]

    def distribute(self) -> None:
        """Hands the ids changed since the last call to every subscriber.

        Reports note an id once, however many watch; the first watcher to wake shares it out.
        """
        self._settle()
        for pending in self._subscribers:
            pending.update(self.dirty)
        self.dirty.clear()
        self.stirred.clear()

    def after(self, offset: int, sessions: Iterable[Session]) -> set[str] | None:
        """Returns the ids of the sessions that changed or ended after an offset; None when that is not known any more.

        Costs a look at every session. Each watcher that comes back pays that once, where a ring of changes would be
        paid by every update, and at full speed would reach back over some hundredths of a second only.
        """
        self._settle()
        if not self._ends_forgotten_at <= offset <= self.offset:
            return None
        changed = {session.session_id for session in sessions if session.changed > offset}
        changed.update(session_id for at, session_id in self._ends if at > offset)
        return changed
