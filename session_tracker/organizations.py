"""One organization's sessions: their start, silence, commands and end; and all organizations."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

from session_tracker.clock import Clock
from session_tracker.commands import Command, CommandKind, Listener
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached, SessionNotFound
from session_tracker.intake import STALE, TAKEN, UNKNOWN, Batch, Handles, Intake
from session_tracker.live import Live
from session_tracker.mirrors import Mirrors
from session_tracker.records import Counters, Record
from session_tracker.rollups import Figures, Totals, together
from session_tracker.sessions import COMPLETED, LOST, RUNNING, STALLED, Registration, SavePoint, Session, State
from session_tracker.updates import Update

__all__ = ["STALE", "TAKEN", "UNKNOWN", "Batch", "Organization", "Organizations"]

# How long, and how many, completed ids are remembered so that a late worker does not start one again. This is a
# courtesy: the database decides when such a session is completed.
_COMPLETED_SECONDS = 600.0
_REMEMBERED_COMPLETED = 100_000


class Organization:
    """The sessions of one organization.

    Everything here runs on the event loop without waiting, so each method is atomic to every other.

    Attributes:
        live: The memory; for the parts of the engine.
        sessions: Live sessions, and finished ones until they leave, by id.
        changes: Their order, for watchers and others who follow.
        intake: Takes reports.
        store_rebuilding: Set while the store shared with other replicas is away or being read.
        suspects: Ids of sessions that may have ended unheard: who took their result may have died before it said so.
    """

    def __init__(self, organization_id: UUID, config: SessionsConfig, clock: Clock) -> None:
        self.organization_id = organization_id
        self.live = Live(config, clock)
        self.sessions = self.live.sessions
        self.changes = self.live.changes
        self.intake = Intake(self.live)
        self.store_rebuilding = False
        self.suspects: list[str] = []
        self._doubted_at = 0.0
        self._mirrors = Mirrors(self.live)
        self._config = config
        self._clock = clock
        self._completed: OrderedDict[str, float] = OrderedDict()
        self._finished: deque[tuple[float, Session]] = deque()

    def start(self, registration: Registration) -> Session:
        """Registers a session, or returns the live one of that id, after taking `progress` if that is newer.

        Another lease than the one that stands replaces it, also when that one was refused.

        Raises:
            SessionAlreadyCompleted: it was completed a short while ago.
            SessionLimitReached: there is no room for another.
        """
        session_id = registration.session_id
        now = self._clock.monotonic()
        self.expire()
        session = self.sessions.get(session_id)
        if session is not None and not session.finished:
            self._register_again(session, registration, now)
            return session
        if session is not None or session_id in self._completed:
            raise SessionAlreadyCompleted(session_id)
        if self.live.figures.live >= self._config.max_per_organization:
            raise SessionLimitReached(self._config.max_per_organization)
        session = Session(registration, self.live.next_number(), registration.started_at or self._clock.wall(), now)
        self.live.add(session)
        return session

    def _register_again(self, session: Session, registration: Registration, now: float) -> None:
        self.live.release(session)
        lease = registration.lease
        if lease is not None and lease != session.lease:
            session.lease = lease
            if session.rarities.lease_refused:
                rarities = session.own_rarities()
                rarities.lease_refused = False
                rarities.command = None
                self.live.commanded.discard(session.session_id)
            # Who has the lease renews it, and tells the other replicas of it.
            session.owner = ""
            self.live.mark(session)
        if registration.checkpoint is not None and session.save is None:
            session.save = SavePoint(registration.checkpoint, now)
            session.owner = ""
            self.live.mark(session)
        if registration.progress is not None:
            self.report([registration.progress])

    def report(self, updates: Sequence[Update], listener: Listener | None = None) -> Batch:
        """Takes updates, in order; all of them or, if one is malformed, none: the caller has checked them."""
        return self.intake.report(updates, listener)

    def handles(self) -> Handles:
        """Returns what names sessions on a new stream."""
        return Handles(self.live)

    def settle(self) -> None:
        """Brings roll-ups, pace and order up to the reports: to be done before sessions are read directly."""
        self.live.settle()

    def get(self, session_id: str) -> Session:
        """Returns a session, live or finished a short while ago.

        Raises:
            SessionNotFound: there is none of that id.
        """
        self.settle()
        session = self.sessions.get(session_id)
        if session is None:
            raise SessionNotFound(session_id)
        return session

    def after(self, session_id: str) -> Iterator[Session]:
        """Yields the sessions whose ids come after `session_id`, by id. For use without waiting in between."""
        return self.live.after(session_id)

    @property
    def rebuilding(self) -> bool:
        """Whether sessions may be missing, or known from a checkpoint only, until their workers report them."""
        return self.live.awaited > 0 or self.store_rebuilding

    @property
    def results_committed(self) -> int:
        """Final results since the process started."""
        return self.live.figures.results_committed

    def totals(self, slot_id: str = "") -> Totals:
        """Returns the figures of the organization, or of a slot; costs the same for any number of sessions."""
        self.settle()
        figures = self.live.slots.get(slot_id, Figures()) if slot_id else self.live.figures
        return figures.totals(self._clock.monotonic(), rebuilding=self.rebuilding)

    def count(self, state: State) -> int:
        """Returns the live sessions of a state."""
        return self.live.figures.by_state[state]

    def command(self, session: Session, kind: CommandKind, message: str, pages_per_minute: float = 0.0) -> bool:
        """Tells a session's worker something, at once on its stream and with every answer until it is carried out.

        A newer command replaces one that waits, except that nothing replaces a lost lease.

        Returns:
            Whether it will be told: not when the session is finished or its lease is lost.
        """
        if session.finished or session.rarities.lease_refused:
            return False
        self.live.release(session)
        rarities = session.own_rarities()
        waiting = rarities.command.number if rarities.command else 0
        # By the time of day: numbers go on growing after a restart, and of two replicas' the later command stands.
        number = max(waiting + 1, rarities.acknowledged_command + 1, int(self._clock.wall().timestamp() * 1000))
        if kind == CommandKind.SPEED_LIMIT:
            rarities.pages_per_minute_limit = pages_per_minute
        self._tell(session, Command(session.session_id, kind, message, number, pages_per_minute))
        return True

    def lose_lease(self, session: Session, message: str) -> None:
        """Makes a session lost whose lease was refused, and tells its worker to stop.

        It is still reported on, so that what becomes of the work can be seen, but stays lost: until it is completed,
        or registered again with another lease.
        """
        session.renewable = False
        if self.sessions.get(session.session_id) is session and not session.finished:
            self.live.release(session)
            session.own_rarities().lease_refused = True
            self.settle()
            self.live.enter(session, LOST, f"lease lost: {message}"[:256], self._clock.monotonic())
            self._tell(session, Command(session.session_id, CommandKind.LEASE_LOST, message))

    def _tell(self, session: Session, command: Command) -> None:
        session.own_rarities().command = command
        self.live.commanded.add(session.session_id)
        self.live.mark(session)
        if session.listener is not None:
            session.listener.tell(command)

    def complete(
        self,
        session_id: str,
        pages: int,
        state: State = State.COMPLETED,
        *,
        products: int | None = None,
        errors: int | None = None,
        reason: str = "",
    ) -> None:
        """Ends a session whose result is committed, if it is live, and remembers that it was completed.

        Its final state stays to be seen for a while.

        Args:
            session_id: Which.
            pages: Its pages by the result; what it had not reported counts for the rate.
            state: One of `FINAL_STATES`.
            products: Its products by the result; None for what it reported.
            errors: Its errors, likewise.
            reason: Why it ended so.
        """
        now = self._clock.monotonic()
        session = self.sessions.get(session_id)
        if session is not None and not session.finished:
            self.settle()
            rate = self.live.figures.rate
            rate.add(max(0, pages - session.current_page), now)
            # Whoever commits the result makes it known, whosever session it was.
            session.owner = ""
            self.live.finish(session, state, reason or f"its result was recorded: {state.name.lower()}")
            session.current_page = pages
            session.products_found = session.products_found if products is None else products
            session.errors_count = session.errors_count if errors is None else errors
            # Whoever commits the end owns it, and tells the other replicas.
            session.owner = ""
            self.live.mark(session)
            self._keep_finished(session, now)
        self._remember(session_id, now)

    def _keep_finished(self, session: Session, now: float) -> None:
        self._finished.append((now + self._config.finished_seconds, session))
        if len(self._finished) > self._config.max_per_organization:
            self._leave(self._finished.popleft()[1])

    def _remember(self, session_id: str, now: float) -> None:
        self._completed[session_id] = now + _COMPLETED_SECONDS
        self._completed.move_to_end(session_id)
        if len(self._completed) > _REMEMBERED_COMPLETED:
            self._completed.popitem(last=False)

    def drop(self, session_id: str) -> None:
        """Forgets a session at once, without a result."""
        session = self.sessions.get(session_id)
        if session is not None:
            self.live.remove(session)

    def expire(self) -> None:
        """Lets finished sessions leave whose time is over, and forgets completed ids of long ago."""
        now = self._clock.monotonic()
        while self._finished and self._finished[0][0] <= now:
            self._leave(self._finished.popleft()[1])
        while self._completed:
            session_id, until = next(iter(self._completed.items()))
            if until > now:
                break
            del self._completed[session_id]

    def _leave(self, session: Session) -> None:
        if self.sessions.get(session.session_id) is session:
            self.live.remove(session)

    def mark_silence(self, session: Session) -> bool:
        """Moves a session to stalled or lost, or forgets it, by how long it has been silent.

        Returns:
            Whether it was forgotten.
        """
        if session.finished or session.owner or self.sessions.get(session.session_id) is not session:
            return False
        self.settle()
        now = self._clock.monotonic()
        silent = now - session.reported
        if silent >= self._config.lost_after_seconds:
            if session.state != LOST:
                self.live.release(session)
                self.live.enter(session, LOST, f"no report for {silent:.0f} s", now)
                self.live.mark(session)
                self.suspects.append(session.session_id)
            elif silent >= self._config.lost_after_seconds + self._config.forget_lost_after_seconds:
                self.live.remove(session)
                return True
        elif session.state == RUNNING and now - session.paged >= max(
            # Ten of its own pages: a slow session is not a stalled one.
            self._config.stalled_after_seconds,
            10 * session.interval,
        ):
            self.live.release(session)
            pace = f" at {session.interval:.1f} s a page" if session.interval else ""
            self.live.enter(session, STALLED, f"no page for {now - session.paged:.0f} s{pace}", now)
            self.live.mark(session)
        return False

    def export(self, session: Session) -> Record:
        """Returns a session whole, as plain values."""
        self.settle()
        return self._mirrors.export(session)

    def counters(self, session: Session) -> Counters:
        """Returns what changes with every report of a session."""
        self.settle()
        return self._mirrors.counters(session)

    def name_replica(self, replica: str) -> None:
        """Says which of the replicas this process is."""
        self._mirrors.replica = replica

    def apply_remote(self, record: Record, owner: str) -> bool:
        """Takes another replica's session; returns whether it was news. See `Mirrors.apply`."""
        known = self.sessions.get(record.session_id)
        final = record.counters.state >= COMPLETED
        if known is None and record.session_id in self._completed:
            return False
        was_final = known is not None and known.finished
        if not self._mirrors.apply(record, owner):
            return False
        if final and not was_final:
            now = self._clock.monotonic()
            self._keep_finished(self.sessions[record.session_id], now)
            self._remember(record.session_id, now)
        return True

    def apply_counters(self, session_id: str, owner: str, counters: Counters) -> bool | None:
        """Takes the counters of another replica's session. See `Mirrors.apply_counters`."""
        if counters.state >= COMPLETED:
            return None
        return self._mirrors.apply_counters(session_id, owner, counters)

    def apply_command(self, record: Record) -> None:
        """Takes what a session was told elsewhere. See `Mirrors.apply_command`."""
        self.settle()
        self._mirrors.apply_command(record)

    def restore(self, record: Record) -> bool:
        """Takes a session from a checkpoint, as lost until it is reported; returns whether it was unknown here."""
        return record.session_id not in self._completed and self._mirrors.restore(record)

    def take_over(self, session: Session) -> None:
        """Makes another replica's session this one's: from here on it is judged, renewed and checkpointed here."""
        if session.owner and not session.finished:
            self.live.release(session)
            session.owner = ""
            self.live.mark(session)
            self.suspects.append(session.session_id)

    def doubt(self) -> None:
        """Notes that a replica is gone, which may have taken results of this one's sessions and told nobody."""
        self._doubted_at = self._clock.monotonic()

    def suspect_doubted(self) -> None:
        """Makes suspects of this replica's sessions that were not reported since a replica was found gone."""
        if self._doubted_at:
            self.settle()
            for session in self.sessions.values():
                if not session.finished and not session.owner and session.reported < self._doubted_at:
                    self.suspects.append(session.session_id)
            self._doubted_at = 0.0


class Organizations:
    """All organizations that were seen. They are few, and stay as long as the process.

    Attributes:
        on_new: Called with each organization when it is first seen.
    """

    def __init__(self, config: SessionsConfig, clock: Clock) -> None:
        self.on_new: list[Callable[[Organization], None]] = []
        self._config = config
        self._clock = clock
        self._known: dict[UUID, Organization] = {}

    def of(self, organization_id: UUID) -> Organization:
        """Returns an organization's sessions."""
        known = self._known.get(organization_id)
        if known is None:
            known = self._known[organization_id] = Organization(organization_id, self._config, self._clock)
            for seen in self.on_new:
                seen(known)
        return known

    def __iter__(self) -> Iterator[Organization]:
        return iter(list(self._known.values()))

    def count(self, state: State) -> int:
        """Returns the live sessions of a state in all organizations."""
        return sum(organization.count(state) for organization in self)

    def fleet(self) -> Totals:
        """Returns the figures of all organizations together."""
        return together(organization.totals() for organization in self)

    def wake_watchers(self) -> None:
        """Wakes everyone who waits for a change, so that they see the service drain."""
        for organization in self._known.values():
            organization.changes.stirred.set()
