"""Sessions from elsewhere: those of other replicas, and those read back from checkpoints.

A session is owned by the replica that took its last report. Others hold a mirror, which they show but neither judge
silent, nor renew, nor checkpoint. Of two records of a session the one with the greater (final, sequence, revision,
owner) is newer and replaces all of the other: no two that differ are equal in these, so that replicas agree in whatever
order they hear. Counters alone are news about what the same owner described before, and about nothing else.

Commands go by their own number, since any replica may give them, and so does what is known to be carried out. Who knows
more of that than a newer record, or a later report than the one who ended a session, makes the session its own again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from sys import intern

from session_tracker.commands import Command
from session_tracker.live import Live
from session_tracker.records import Counters, Record
from session_tracker.sessions import COMPLETED, LOST, Lease, Registration, Session


class Mirrors:
    """Takes records of sessions into one organization's memory, and makes them.

    Attributes:
        replica: This process among the replicas; empty when it is alone.
    """

    __slots__ = ("_live", "replica")

    def __init__(self, live: Live) -> None:
        self._live = live
        self.replica = ""

    def counters(self, session: Session) -> Counters:
        """Returns what changes with every report."""
        return Counters(
            sequence=session.sequence,
            revision=session.revision,
            state=session.state,
            current_page=session.current_page,
            total_pages=session.total_pages,
            products_found=session.products_found,
            errors_count=session.errors_count,
            reported_at=self._live.clock.moment(session.reported).timestamp(),
        )

    def export(self, session: Session) -> Record:
        """Returns a session whole."""
        rarities = session.rarities
        lease = session.lease
        return Record(
            session_id=session.session_id,
            counters=self.counters(session),
            since_at=self._live.clock.moment(session.since).timestamp(),
            reason=session.reason,
            stage=session.stage,
            started_at=session.started_at.timestamp(),
            slot_id=session.slot_id,
            client_id=session.client_id,
            tags=session.tags,
            config_snapshot=session.config_snapshot,
            traceparent=session.traceparent,
            allocation_key=lease.allocation_key if lease else "",
            lease_token=lease.lease_token if lease else b"",
            checkpoint=session.save.policy if session.save else None,
            errors_by_class=rarities.errors_by_class,
            last_errors=rarities.last_errors,
            command=rarities.command,
            pages_per_minute_limit=rarities.pages_per_minute_limit,
            acknowledged_command=rarities.acknowledged_command,
            lease_refused=rarities.lease_refused,
        )

    def apply(self, record: Record, owner: str) -> bool:
        """Takes a record of another replica's session; returns whether it was news.

        Args:
            record: As it came.
            owner: The replica that took its last report, not empty.
        """
        session = self._live.sessions.get(record.session_id)
        if session is None:
            session = self._make(record)
            session.owner = owner
            session.revision = record.counters.revision
            session.state = record.counters.state
            self._live.add(session)
            if session.state >= COMPLETED:
                self._live.finish(session, session.state, record.reason)
                session.since = self._reading(record.since_at)
            return True
        self._release(session)
        newer = self._is_newer(record.counters, owner, session)
        told = self._merge_command(session, record, newer=newer)
        if not newer:
            if told:
                self._live.mark(session)
            return told
        self._describe(session, record)
        session.owner = owner
        self._count(session, record.counters, record.reason)
        session.since = self._reading(record.since_at)
        if (
            session.sequence > record.counters.sequence
            or session.rarities.acknowledged_command > record.acknowledged_command
        ):
            # The other replicas, and `owner` among them, may not know this; it is news to them as this one's session.
            session.owner = ""
        self._live.mark(session)
        return True

    def apply_command(self, record: Record) -> None:
        """Takes from a record, which may be old, what its session was told and has carried out, and nothing else."""
        session = self._live.sessions.get(record.session_id)
        if session is not None:
            self._release(session)
            if self._merge_command(session, record, newer=False):
                self._live.mark(session)

    def apply_counters(self, session_id: str, owner: str, counters: Counters) -> bool | None:
        """Takes the counters of another replica's session.

        Returns:
            Whether they were news; None when the session is not known here as that owner's, or its state changed: ask
            for the whole.
        """
        session = self._live.sessions.get(session_id)
        if session is None:
            return None
        self._release(session)
        if not self._is_newer(counters, owner, session):
            return False
        if counters.state != session.state or owner != session.owner:
            return None
        session.owner = owner
        self._count(session, counters, session.reason)
        self._live.mark(session, described=False)
        return True

    def restore(self, record: Record) -> bool:
        """Takes a session from a checkpoint, as lost until it is reported; returns whether it was unknown here."""
        if record.session_id in self._live.sessions:
            return False
        session = self._make(record)
        session.state = LOST
        session.reason = "known from its checkpoint: not reported since"
        session.rebuilding = True
        now = self._live.clock.monotonic()
        # Its silence begins now: its worker could not report while nobody listened.
        session.reported = session.paged = session.since = now
        if session.save is not None:
            session.save.page = session.current_page
        self._live.add(session)
        # What any replica knows of it at first hand is newer than this.
        session.revision = 0
        return True

    def _make(self, record: Record) -> Session:
        live = self._live
        counters = record.counters
        session = Session(_registration(record), live.next_number(), _moment(record.started_at), live.clock.monotonic())
        session.sequence = counters.sequence
        session.current_page = counters.current_page
        session.products_found = counters.products_found
        session.errors_count = counters.errors_count
        session.reported = session.paged = self._reading(counters.reported_at)
        session.since = self._reading(record.since_at)
        self._merge_command(session, record, newer=True)
        self._describe(session, record)
        return session

    def _describe(self, session: Session, record: Record) -> None:
        """Takes what is not a counter; the record's command was merged before."""
        live = self._live
        if record.stage != session.stage:
            session.stage = intern(record.stage)
            session.measured = 0
        session.reason = record.reason
        if _identity(record) != (
            session.started_at,
            session.slot_id,
            session.client_id,
            session.tags,
            session.config_snapshot,
            session.traceparent,
        ):
            # It was started at two replicas at once, each time anew.
            counted = session.slot_id != record.slot_id and not session.finished and record.session_id in live.sessions
            if counted:
                live.leave_slot(session)
            session.identify(_registration(record), _moment(record.started_at))
            if counted:
                live.enter_slot(session)
        lease = Lease(record.allocation_key, record.lease_token) if record.allocation_key else None
        if lease != session.lease:
            session.lease = lease
        known = session.rarities
        final = record.counters.state >= COMPLETED
        # A command that waits here is newer than the record's, and so is the limit that it set.
        limit = record.pages_per_minute_limit if final or known.command is None else known.pages_per_minute_limit
        described = record.errors_by_class, record.last_errors, limit, record.lease_refused
        if described != (known.errors_by_class, known.last_errors, known.pages_per_minute_limit, known.lease_refused):
            rarities = session.own_rarities()
            rarities.errors_by_class, rarities.last_errors, rarities.pages_per_minute_limit, _ = described
            rarities.lease_refused = record.lease_refused

    def _merge_command(self, session: Session, record: Record, *, newer: bool) -> bool:
        """Takes what a record says of commands, as far as it is news, and tells the worker; returns whether any was.

        Args:
            session: Live or finished.
            record: Of it.
            newer: Whether the record is newer than the session; an older one does not say that the lease is lost.
        """
        command = record.command
        known = session.rarities
        if session.finished and not newer:
            return False
        if newer and not record.lease_refused and known.command is not None and known.command.number == 0:
            # It has another lease by now.
            session.own_rarities().command = None
            self._live.commanded.discard(session.session_id)
        news = record.acknowledged_command > known.acknowledged_command
        if news:
            known = session.own_rarities()
            known.acknowledged_command = record.acknowledged_command
            if known.command is not None and 0 < known.command.number <= known.acknowledged_command:
                known.command = None
                self._live.commanded.discard(session.session_id)
        if (
            command is None
            or session.finished
            or not (command.number or newer)
            or not _replaces(command, known.command, known.acknowledged_command)
        ):
            return news
        rarities = session.own_rarities()
        rarities.command = command
        rarities.pages_per_minute_limit = record.pages_per_minute_limit
        if session.session_id in self._live.sessions:
            self._live.commanded.add(session.session_id)
        if session.listener is not None:
            session.listener.tell(command)
        return True

    def _count(self, session: Session, counters: Counters, reason: str) -> None:
        """Takes newer counters into the roll-ups."""
        live = self._live
        # An end may come from a replica that had not heard the last report.
        session.sequence = max(session.sequence, counters.sequence)
        session.revision = counters.revision
        if session.finished:
            # Counted no more: two replicas ended it, and one of them is believed.
            session.state = counters.state
            session.current_page = counters.current_page
            session.total_pages = counters.total_pages
            session.products_found = counters.products_found
            session.errors_count = counters.errors_count
            session.reported = self._reading(counters.reported_at)
            return
        if session.rebuilding:
            session.rebuilding = False
            live.awaited -= 1
        paced = counters.state == session.state and counters.total_pages == session.total_pages
        if counters.total_pages != session.total_pages:
            session.measured = 0
        session.current_page = counters.current_page
        session.total_pages = counters.total_pages
        session.products_found = counters.products_found
        session.errors_count = counters.errors_count
        session.reported = self._reading(counters.reported_at)
        gained = live.count(session, paced=paced)
        if gained > 0:
            live.figures.rate.add(gained, live.clock.monotonic())
        if counters.state >= COMPLETED:
            live.finish(session, counters.state, reason)
        elif counters.state != session.state:
            live.enter(session, counters.state, reason, live.clock.monotonic())

    def _release(self, session: Session) -> None:
        """Brings a session up to what was reported here, and so to its owner, before it is compared or changed."""
        self._live.release(session)
        if session.noted:
            self._live.settle()

    def _is_newer(self, counters: Counters, owner: str, session: Session) -> bool:
        return (counters.state >= COMPLETED, counters.sequence, counters.revision, owner) > (
            session.state >= COMPLETED,
            session.sequence,
            session.revision,
            session.owner or self.replica,
        )

    def _reading(self, at: float) -> float:
        """Returns the reading of the monotonic clock of a moment, which is not in the future."""
        clock = self._live.clock
        return clock.monotonic() - max(0.0, clock.wall().timestamp() - at)


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def _identity(record: Record) -> tuple[object, ...]:
    return (
        _moment(record.started_at),
        record.slot_id,
        record.client_id,
        record.tags,
        record.config_snapshot,
        record.traceparent,
    )


def _registration(record: Record) -> Registration:
    return Registration(
        session_id=record.session_id,
        stage=record.stage,
        total_pages=record.counters.total_pages,
        slot_id=record.slot_id,
        client_id=record.client_id,
        tags=record.tags,
        config_snapshot=record.config_snapshot,
        lease=Lease(record.allocation_key, record.lease_token) if record.allocation_key else None,
        checkpoint=record.checkpoint,
        traceparent=record.traceparent,
    )


def _replaces(command: Command, known: Command | None, acknowledged: int) -> bool:
    if known is not None and known.number == 0:
        return False
    if command.number == 0:
        return True
    return command.number > acknowledged and (known is None or command.number > known.number)
