"""The memory of one organization: its sessions, and what is kept beside them with every change."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from session_tracker.changes import Changes
from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.eta import measure
from session_tracker.rollups import Figures
from session_tracker.series import add
from session_tracker.sessions import COMPLETED, GONE, LOST, STALLED, Session

if TYPE_CHECKING:
    from session_tracker.convoys import Convoy

# How long a report may wait to be counted. Sessions that report faster are counted once for many reports, which is what
# makes a report cheap; below the default interval of a watch that would gain little, above it the pace would blur.
_SETTLE_SECONDS = 0.2

# Numbers that many sessions count to, each kept once in memory instead of once for each counter of each session.
_COMMON = list(range(16_384))


class Live:
    """Sessions, roll-ups, order of changes, and what waits to be counted.

    Everything here runs on the event loop without waiting, so each method is atomic to every other.

    Attributes:
        sessions: Live ones, and finished ones until they leave, by id.
        changes: Their order, for watchers and others who follow.
        figures: The organization's roll-ups.
        slots: The same for each slot with a live session.
        noted: Sessions reported since they were last counted, oldest first.
        waiting: Convoys with a batch that is not applied yet, oldest first; ended ones may be among them.
        moved: Those with a lease that moved since the last round of renewals.
        unsaved: Important sessions that changed since their last checkpoint.
        dropped: Ids of important sessions that left without a result.
        commanded: Ids of the sessions with a command that waits.
        awaited: How many are known from a checkpoint only.
    """

    __slots__ = (
        "_due",
        "_ids",
        "_left",
        "_left_waiting",
        "_numbers",
        "_unordered",
        "awaited",
        "changes",
        "clock",
        "commanded",
        "config",
        "dropped",
        "figures",
        "moved",
        "noted",
        "sessions",
        "slots",
        "unsaved",
        "waiting",
    )

    def __init__(self, config: SessionsConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.sessions: dict[str, Session] = {}
        self.changes = Changes(self.settle)
        self.figures = Figures()
        self.slots: dict[str, Figures] = {}
        self.noted: deque[Session] = deque()
        self.waiting: deque[Convoy] = deque()
        self.moved: list[Session] = []
        self.unsaved: dict[str, Session] = {}
        self.dropped: set[str] = set()
        self.commanded: set[str] = set()
        self.awaited = 0
        self._numbers = 0
        self._due = 0.0
        self._left = 0
        self._left_waiting = 0
        self._ids: list[str] = []
        self._unordered: list[str] = []

    def next_number(self) -> int:
        """Returns a number that no session of this memory had."""
        self._numbers += 1
        return self._numbers

    def add(self, session: Session) -> None:
        """Takes a session into memory, with the counters it has."""
        self.sessions[session.session_id] = session
        self._unordered.append(session.session_id)
        session.counted_page = session.current_page
        session.counted_products = session.products_found
        session.counted_errors = session.errors_count
        self.enter_slot(session)
        self.figures.join(session)
        if session.rebuilding:
            self.awaited += 1
        if session.rarities.command is not None:
            self.commanded.add(session.session_id)
        self.mark(session)

    def enter_slot(self, session: Session) -> None:
        """Counts a session, as it is counted already, in the roll-ups of its slot, if it has one."""
        if session.slot_id:
            session.slot = self.slots.get(session.slot_id)
            if session.slot is None:
                session.slot = self.slots[session.slot_id] = Figures()
            session.slot.join(session)

    def leave_slot(self, session: Session) -> None:
        """Undoes `enter_slot`."""
        slot = session.slot
        if slot is not None:
            slot.leave(session)
            if not slot.live:
                del self.slots[session.slot_id]
            session.slot = None

    def after(self, session_id: str) -> Iterator[Session]:
        """Yields the sessions whose ids come after `session_id`, by id. For use without waiting in between.

        Ids are put in order when they are asked for: new ones at the end of the ordered ones sort in linear time, ended
        ones are passed over until they are more than the others.
        """
        self.settle()
        ids = self._ids
        if self._unordered:
            ids += self._unordered
            self._unordered.clear()
            ids.sort()
        if len(ids) > 2 * len(self.sessions) + 1000:
            ids[:] = sorted(self.sessions)
        last = ""
        for index in range(bisect_right(ids, session_id), len(ids)):
            name = ids[index]
            # An id that ended and was started again stands twice.
            if name != last and (session := self.sessions.get(name)) is not None:
                yield session
            last = name

    def release(self, session: Session) -> None:
        """Brings a session up to its last report and out of its convoy: to be done before it is changed otherwise."""
        if session.convoy is not None:
            session.convoy.dissolve()

    def mark(self, session: Session, *, described: bool = True) -> None:
        """Notes that a session changed, and whether in more than its counters. It must have been released before."""
        assert session.convoy is None
        self.changes.mark(session)
        if described:
            session.described = session.changed
        if not session.owner:
            session.revision += 1
            if session.save is not None:
                self._unsaved(session, self.clock.monotonic())

    def _unsaved(self, session: Session, at: float) -> None:
        if session.save is not None and session.session_id not in self.unsaved:
            self.unsaved[session.session_id] = session
            session.save.unsaved_since = at

    def enter(self, session: Session, state: int, reason: str, now: float) -> None:
        """Moves a session to another state at `now`; the caller released it before, and marks it."""
        assert session.convoy is None
        self.figures.by_state[session.state] -= 1
        self.figures.by_state[state] += 1
        if session.slot is not None:
            session.slot.by_state[session.state] -= 1
            session.slot.by_state[state] += 1
        session.state = state
        session.since = now
        session.reason = reason

    def finish(self, session: Session, state: int, reason: str) -> None:
        """Moves a session to a final state, in which it counts no more; the caller marks it."""
        self.release(session)
        self._leave_figures(session)
        session.state = state
        session.since = self.clock.monotonic()
        session.reason = reason
        session.listener = None
        session.lease = None
        self.unsaved.pop(session.session_id, None)
        # Its row is deleted with the result.
        session.save = None

    def remove(self, session: Session) -> None:
        """Takes a session out of memory."""
        self.release(session)
        if session.state < COMPLETED:
            self._leave_figures(session)
            if session.save is not None and not session.owner:
                self.unsaved.pop(session.session_id, None)
                self.dropped.add(session.session_id)
        del self.sessions[session.session_id]
        session.sequence = GONE
        self.changes.end(session.session_id)

    def _leave_figures(self, session: Session) -> None:
        self.count(session)
        self.figures.leave(session)
        self.leave_slot(session)
        if session.rebuilding:
            session.rebuilding = False
            self.awaited -= 1
        self.commanded.discard(session.session_id)

    def settle_in_passing(self, now: float, reports: int) -> None:
        """Counts, every so often, what was reported, in slices of a few times `reports`.

        So no call waits for all sessions to be counted, and those that report often are counted once for many reports.
        """
        if self._left <= 0 and self._left_waiting <= 0:
            if now < self._due:
                return
            self._due = now + _SETTLE_SECONDS
            self._left = len(self.noted)
            self._left_waiting = len(self.waiting)
        most = 4 * reports + 16
        while self._left_waiting > 0 and most > 0:
            self._left_waiting -= 1
            convoy = self.waiting.popleft()
            most -= len(convoy.sessions)
            self._left += len(convoy.sessions)
            convoy.apply()
        most = min(most, self._left)
        if most > 0:
            self._left -= most
            self._settle(most)

    def settle(self) -> None:
        """Applies and counts all that was reported: to be done before anything of it is read."""
        if self.waiting:
            self._left_waiting = 0
            while self.waiting:
                self.waiting.popleft().apply()
        if self.noted:
            self._left = 0
            self._settle(len(self.noted))

    def _settle(self, most: int) -> None:
        noted = self.noted
        changes = self.changes
        dirty = changes.dirty if changes.watched else None
        offset = changes.offset
        rated = 0
        last = 0.0
        for _ in range(min(most, len(noted))):
            session = noted.popleft()
            session.noted = False
            if session.sequence == GONE or session.state >= COMPLETED:
                continue
            offset += 1
            session.changed = offset
            if dirty is not None:
                dirty.add(session.session_id)
            if session.owner:
                # What it shows besides counters may not be what its owner until now has said last.
                session.owner = ""
                session.described = offset
            if session.save is not None:
                self._unsaved(session, session.reported)
            if session.sequence < len(_COMMON):
                session.sequence = _COMMON[session.sequence]
            gained = self.count(session)
            if gained > 0:
                rated += gained
                last = session.reported
        changes.offset = offset
        if rated:
            self.figures.rate.add(rated, last)

    def count(self, session: Session, *, paced: bool = True) -> int:
        """Brings the roll-ups, the pace, the series and the renewals up to a session's counters.

        Args:
            session: Whose.
            paced: Whether the time since its last page tells of its pace.

        Returns:
            Pages gained; below 0 when they fell. The caller adds them to the organization's rate.
        """
        figures, slot = self.figures, session.slot
        page = session.current_page
        gained = page - session.counted_page
        if gained:
            if page < len(_COMMON):
                session.current_page = page = _COMMON[page]
            session.counted_page = page
            figures.pages += gained
            if slot is not None:
                slot.pages += gained
            if gained > 0:
                at = session.reported
                if slot is not None:
                    slot.rate.add(gained, at)
                session.series = add(session.series, gained, at)
                if paced:
                    measure(session, gained, at)
                else:
                    session.paged = at
        count = session.products_found
        if count != session.counted_products:
            more = count - session.counted_products
            if count < len(_COMMON):
                session.products_found = count = _COMMON[count]
            session.counted_products = count
            figures.products += more
            if slot is not None:
                slot.products += more
        count = session.errors_count
        if count != session.counted_errors:
            more = count - session.counted_errors
            if count < len(_COMMON):
                session.errors_count = count = _COMMON[count]
            session.counted_errors = count
            figures.errors += more
            if slot is not None:
                slot.errors += more
        if session.renewable and not session.owner and session.state != STALLED and session.state != LOST:
            session.renewable = False
            self.moved.append(session)
        return gained
