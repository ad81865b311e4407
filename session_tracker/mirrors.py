"""Sessions from elsewhere: those of other replicas, and those read back from checkpoints.

A session is owned by the replica that took its last report. Others hold a mirror, which they show but neither judge
silent, nor renew, nor checkpoint. Of two records of a session the one with the greater (sequence, revision) is newer; a
final one is newer than any other. Commands go by their own number, since any replica may give them.
"""

from __future__ import annotations

from datetime import UTC, datetime

from session_tracker.commands import Command
from session_tracker.live import Live
from session_tracker.records import Counters, Record
from session_tracker.sessions import COMPLETED, LOST, Lease, Registration, Session


class Mirrors:
    """Takes records of sessions into one organization's memory, and makes them."""

    __slots__ = ("_live",)

    def __init__(self, live: Live) -> None:
        self._live = live

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
            return True
        told = self._merge_command(session, record)
        if not self._is_newer(record.counters, session):
            if told:
                self._live.mark(session)
            return told
        self._describe(session, record)
        session.owner = owner
        self._count(session, record.counters, record.reason)
        session.since = self._reading(record.since_at)
        self._live.mark(session)
        return True

    def apply_counters(self, session_id: str, owner: str, counters: Counters) -> bool | None:
        """Takes the counters of another replica's session.

        Returns:
            Whether they were news; None when the session is not known here, or its state changed: ask for the whole.
        """
        session = self._live.sessions.get(session_id)
        if session is None:
            return None
        if not self._is_newer(counters, session):
            return False
        if counters.state != session.state:
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
        registration = Registration(
            session_id=record.session_id,
            stage=record.stage,
            total_pages=counters.total_pages,
            slot_id=record.slot_id,
            client_id=record.client_id,
            tags=record.tags,
            config_snapshot=record.config_snapshot,
            lease=Lease(record.allocation_key, record.lease_token) if record.allocation_key else None,
            checkpoint=record.checkpoint,
            traceparent=record.traceparent,
        )
        started_at = datetime.fromtimestamp(record.started_at, UTC)
        session = Session(registration, live.next_number(), started_at, live.clock.monotonic())
        session.sequence = counters.sequence
        session.current_page = counters.current_page
        session.products_found = counters.products_found
        session.errors_count = counters.errors_count
        session.reported = session.paged = self._reading(counters.reported_at)
        session.since = self._reading(record.since_at)
        self._describe(session, record)
        self._merge_command(session, record)
        return session

    def _describe(self, session: Session, record: Record) -> None:
        """Takes what is not a counter."""
        if record.stage != session.stage:
            session.stage = record.stage
            session.measured = 0
        session.reason = record.reason
        if record.allocation_key and record.lease_token != (session.lease.lease_token if session.lease else b""):
            session.lease = Lease(record.allocation_key, record.lease_token)
        if (
            record.errors_by_class
            or record.last_errors
            or record.pages_per_minute_limit
            or record.acknowledged_command
            or record.lease_refused
            or session.rarities.lease_refused
        ):
            rarities = session.own_rarities()
            rarities.errors_by_class = record.errors_by_class
            rarities.last_errors = record.last_errors
            rarities.acknowledged_command = max(rarities.acknowledged_command, record.acknowledged_command)
            rarities.lease_refused = record.lease_refused
            if rarities.command is None:
                rarities.pages_per_minute_limit = record.pages_per_minute_limit

    def _merge_command(self, session: Session, record: Record) -> bool:
        """Takes a record's command if it is newer, and tells the worker; returns whether it was."""
        command = record.command
        known = session.rarities
        if record.acknowledged_command > known.acknowledged_command:
            known = session.own_rarities()
            known.acknowledged_command = record.acknowledged_command
            if known.command is not None and 0 < known.command.number <= known.acknowledged_command:
                known.command = None
                self._live.commanded.discard(session.session_id)
        if command is None or not _replaces(command, known.command, known.acknowledged_command):
            return False
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
        if session.rebuilding:
            session.rebuilding = False
            live.awaited -= 1
        paced = counters.state == session.state and counters.total_pages == session.total_pages
        if counters.total_pages != session.total_pages:
            session.measured = 0
        # An end may come from a replica that had not heard the last report.
        session.sequence = max(session.sequence, counters.sequence)
        session.revision = counters.revision
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

    def _is_newer(self, counters: Counters, session: Session) -> bool:
        if session.state >= COMPLETED:
            return False
        if counters.state >= COMPLETED:
            return True
        if session.rebuilding:
            return counters.sequence >= session.sequence
        if session.noted:
            # Of what was reported here, `settle` has yet to raise the revision; the sequence says enough.
            return counters.sequence > session.sequence
        return (counters.sequence, counters.revision) > (session.sequence, session.revision)

    def _reading(self, at: float) -> float:
        """Returns the reading of the monotonic clock of a moment, which is not in the future."""
        clock = self._live.clock
        return clock.monotonic() - max(0.0, clock.wall().timestamp() - at)


def _replaces(command: Command, known: Command | None, acknowledged: int) -> bool:
    if known is not None and known.number == 0:
        return False
    if command.number == 0:
        return True
    return command.number > acknowledged and (known is None or command.number > known.number)
