"""One organization's live sessions, with the roll-ups and the order of changes kept beside them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from sys import intern
from uuid import UUID

from session_tracker.changes import Changes
from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached, SessionNotFound
from session_tracker.rate import Rate
from session_tracker.sessions import (
    LIVE_STATES,
    LOST,
    RUNNING,
    STALLED,
    LeaseLost,
    Listener,
    Registration,
    Session,
    State,
    Update,
)

# Verdicts, as the contract numbers them.
TAKEN, STALE, UNKNOWN = 1, 2, 3

# How long, and how many, completed ids are remembered so that a late worker does not start one again. This is a
# courtesy: the database decides when such a session is completed.
_COMPLETED_SECONDS = 600.0
_REMEMBERED_COMPLETED = 100_000


@dataclass(frozen=True, slots=True)
class Batch:
    """What was done with a batch of updates.

    Attributes:
        verdicts: `TAKEN`, `STALE` or `UNKNOWN` for each update.
        commands: For the workers of these sessions; none is named twice.
    """

    verdicts: list[int]
    commands: list[LeaseLost]


@dataclass(frozen=True, slots=True)
class Totals:
    """An organization's live figures."""

    live: int
    by_state: dict[State, int]
    pages: int
    products: int
    errors: int
    pages_per_second: float
    results_committed: int


class Organization:
    """The live sessions of one organization.

    Everything here runs on the event loop without waiting, so each method is atomic to every other.

    Attributes:
        sessions: The live ones, by id.
        changes: Their order, for watchers.
        moved: Those with a lease that moved since the last round of renewals.
        results_committed: Final results since the process started.
    """

    def __init__(self, organization_id: UUID, config: SessionsConfig, clock: Clock) -> None:
        self.organization_id = organization_id
        self.sessions: dict[str, Session] = {}
        self.changes = Changes()
        self.moved: list[Session] = []
        self.results_committed = 0
        self._config = config
        self._clock = clock
        self._by_state = [0] * (max(State) + 1)
        self._pages = self._products = self._errors = 0
        self._rate = Rate()
        self._sorted_ids: list[str] | None = []
        self._completed: OrderedDict[str, float] = OrderedDict()

    def start(self, registration: Registration) -> Session:
        """Registers a session, or returns the live one of that id, after taking `progress` if that is newer.

        Raises:
            SessionAlreadyCompleted: it was completed a short while ago.
            SessionLimitReached: there is no room for another.
        """
        session_id = registration.session_id
        session = self.sessions.get(session_id)
        if session is not None:
            if registration.progress is not None:
                self.report([registration.progress])
            return session
        now = self._clock.monotonic()
        self._drop_old_completed(now)
        if session_id in self._completed:
            raise SessionAlreadyCompleted(session_id)
        if len(self.sessions) >= self._config.max_per_organization:
            raise SessionLimitReached(self._config.max_per_organization)
        session = Session(registration, registration.started_at or self._clock.wall(), now)
        self.sessions[session_id] = session
        self._sorted_ids = None
        self._by_state[session.state] += 1
        self._pages += session.current_page
        self._products += session.products_found
        self._errors += session.errors_count
        self.changes.mark(session)
        return session

    def report(self, updates: Sequence[Update], listener: Listener | None = None) -> Batch:
        """Takes updates, in order; all of them or, if one is malformed, none: the caller has checked them.

        This is the hot path: one pass, local names, and work only for what changed.
        """
        now = self._clock.monotonic()
        sessions = self.sessions
        changes = self.changes
        dirty = changes.dirty if changes.watched else None
        offset = changes.offset
        pages = products = errors = rated = 0
        verdicts: list[int] = []
        verdict = verdicts.append
        commands: dict[str, LeaseLost] = {}
        for update in updates:
            session = sessions.get(update.session_id)
            if session is None:
                verdict(UNKNOWN)
                continue
            if session.command is not None:
                commands[session.session_id] = session.command
            sequence = update.sequence
            if sequence <= session.sequence:
                verdict(STALE)
                continue
            verdict(TAKEN)
            session.sequence = sequence
            session.reported = now
            session.listener = listener

            total = update.total_pages
            if total != session.total_pages:
                if session.total_pages:
                    # What was reckoned for another amount of work is not a forecast for this one.
                    session.measured = 0
                session.total_pages = total
            page = update.current_page
            gained = page - session.current_page
            state = update.state or RUNNING
            paced = state == session.state or self._enter(session, state, gained, now)
            if gained:
                session.current_page = page
                pages += gained
                if gained > 0:
                    rated += gained
                    if paced:
                        session.measure(gained, now)
            count = update.products_found
            if count != session.products_found:
                products += count - session.products_found
                session.products_found = count
            count = update.errors_count
            if count != session.errors_count:
                errors += count - session.errors_count
                session.errors_count = count
            stage = update.stage
            if stage and stage != session.stage:
                session.stage = intern(stage)
            if session.renewable and session.state != STALLED:
                session.renewable = False
                self.moved.append(session)
            offset += 1
            session.changed = offset
            if dirty is not None:
                dirty.add(session.session_id)
        self._pages += pages
        self._products += products
        self._errors += errors
        if rated:
            self._rate.add(rated, now)
        if offset != changes.offset:
            changes.offset = offset
            if dirty is not None:
                changes.stirred.set()
        return Batch(verdicts, list(commands.values()))

    def _enter(self, session: Session, state: int, gained: int, now: float) -> bool:
        """Moves a session to the state it reports; returns whether the time since its last page is pace."""
        if session.state == STALLED:
            # A report without a page is no progress; leaving on it would only flap.
            if state == RUNNING and gained <= 0:
                return False
            self._set_state(session, state)
            return True
        self._set_state(session, state)
        session.paged = now
        return False

    def _set_state(self, session: Session, state: int) -> None:
        self._by_state[session.state] -= 1
        self._by_state[state] += 1
        session.state = state

    def get(self, session_id: str) -> Session:
        """Returns a live session.

        Raises:
            SessionNotFound: there is none of that id.
        """
        session = self.sessions.get(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        return session

    def after(self, session_id: str) -> Iterator[Session]:
        """Yields the live sessions whose ids come after `session_id`, by id. For use without waiting in between."""
        if self._sorted_ids is None:
            # Nearly sorted where ids grow with time, as allocation keys do, which makes this almost linear.
            self._sorted_ids = sorted(self.sessions)
        ids = self._sorted_ids
        for index in range(bisect_right(ids, session_id), len(ids)):
            yield self.sessions[ids[index]]

    def totals(self) -> Totals:
        """Returns the figures; costs the same for any number of sessions."""
        return Totals(
            live=len(self.sessions),
            by_state={state: self._by_state[state] for state in LIVE_STATES},
            pages=self._pages,
            products=self._products,
            errors=self._errors,
            pages_per_second=self._rate.per_second(self._clock.monotonic()),
            results_committed=self.results_committed,
        )

    def count(self, state: State) -> int:
        """Returns the live sessions of a state."""
        return self._by_state[state]

    def complete(self, session_id: str, pages: int) -> None:
        """Forgets a session whose result is committed, if it is live, and remembers that it was completed.

        Args:
            session_id: Which.
            pages: Its pages by the result; what it had not reported counts for the rate.
        """
        now = self._clock.monotonic()
        session = self.sessions.get(session_id)
        if session is not None:
            self._rate.add(max(0, pages - session.current_page), now)
            self._remove(session)
        self._completed[session_id] = now + _COMPLETED_SECONDS
        self._completed.move_to_end(session_id)
        if len(self._completed) > _REMEMBERED_COMPLETED:
            self._completed.popitem(last=False)

    def mark_silence(self, session: Session) -> bool:
        """Moves a session to stalled or lost, or forgets it, by how long it has been silent.

        Returns:
            Whether it was forgotten.
        """
        now = self._clock.monotonic()
        if self.sessions.get(session.session_id) is not session:
            return False
        silent = now - session.reported
        if silent >= self._config.lost_after_seconds:
            if session.state != LOST:
                self._set_state(session, LOST)
                self.changes.mark(session)
            elif silent >= self._config.lost_after_seconds + self._config.forget_lost_after_seconds:
                self._remove(session)
                return True
        elif session.state == RUNNING and now - session.paged >= max(
            # Ten of its own pages: a slow session is not a stalled one.
            self._config.stalled_after_seconds,
            10 * session.interval,
        ):
            self._set_state(session, STALLED)
            self.changes.mark(session)
        return False

    def lose_lease(self, session: Session, message: str) -> None:
        """Tells a session's worker to stop: at once on its stream, and with every answer to a report of it."""
        session.lease = None
        session.renewable = False
        if self.sessions.get(session.session_id) is session:
            session.command = LeaseLost(session.session_id, message)
            if session.listener is not None:
                session.listener.tell(session.command)

    def _remove(self, session: Session) -> None:
        del self.sessions[session.session_id]
        self._sorted_ids = None
        self._by_state[session.state] -= 1
        self._pages -= session.current_page
        self._products -= session.products_found
        self._errors -= session.errors_count
        self.changes.end(session.session_id)

    def _drop_old_completed(self, now: float) -> None:
        while self._completed:
            session_id, until = next(iter(self._completed.items()))
            if until > now:
                break
            del self._completed[session_id]


class Organizations:
    """All organizations that were seen. They are few, and stay as long as the process."""

    def __init__(self, config: SessionsConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._known: dict[UUID, Organization] = {}

    def of(self, organization_id: UUID) -> Organization:
        """Returns an organization's sessions."""
        known = self._known.get(organization_id)
        if known is None:
            known = self._known[organization_id] = Organization(organization_id, self._config, self._clock)
        return known

    def __iter__(self) -> Iterator[Organization]:
        return iter(list(self._known.values()))

    def count(self, state: State) -> int:
        """Returns the live sessions of a state in all organizations."""
        return sum(organization.count(state) for organization in self)

    def wake_watchers(self) -> None:
        """Wakes everyone who waits for a change, so that they see the service drain."""
        for organization in self._known.values():
            organization.changes.stirred.set()
