"""Taking reports: the hot path. One pass for a batch, and no more for a report than to store what it says.

What follows from it (roll-ups, pace, order of changes) waits for `Live.settle`, except when a report changes more than
counters: then all of it is brought up to date at once, since a state says how the time before it counts. Batches of a
stream that report the same sessions again and again do less still: see `session_tracker.convoys`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from sys import intern

from session_tracker.commands import Command, Listener
from session_tracker.convoys import LEAST_SESSIONS, Convoy
from session_tracker.live import Live
from session_tracker.packed_bytes import PackedBytes
from session_tracker.sessions import COMPLETED, GONE, RUNNING, STALLED, Session
from session_tracker.updates import Update

# Verdicts, as the contract numbers them.
TAKEN, STALE, UNKNOWN = 1, 2, 3

_STATE_REASONS = {2: "reported running", 3: "reported paused", 4: "reported rate limited"}


@dataclass(frozen=True, slots=True)
class Batch:
    """What was done with a batch of updates.

    Attributes:
        verdicts: `TAKEN`, `STALE` or `UNKNOWN` for each update.
        commands: For the workers of these sessions; none is named twice.
    """

    verdicts: list[int]
    commands: list[Command]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The same of packed updates: how many were taken and stale, and the sessions that are unknown.

    Attributes:
        plain: All were taken, and changed nothing but counters.
    """

    taken: int
    stale: int
    unknown: list[str]
    commands: list[Command]
    plain: bool


class Handles:
    """The sessions that one stream has named, by the order of their names.

    A session may be started, or leave memory, after it was named: then its place is looked up again by its name.
    """

    __slots__ = ("_last", "convoys", "live", "names", "sessions")

    def __init__(self, live: Live) -> None:
        self.live = live
        self.names: list[str] = []
        self.sessions: list[Session | None] = []
        self.convoys: dict[bytes, Convoy] = {}
        # Of the last batch that began with a handle, the handles as a hash: so at most one for each name.
        self._last: dict[int, int] = {}

    def add(self, names: Iterable[str]) -> None:
        """Names further sessions, which need not be live."""
        known = self.live.sessions
        for name in names:
            session = known.get(name)
            # The string that is in memory already, where there is one.
            self.names.append(session.session_id if session is not None else name)
            self.sessions.append(session)

    def again(self, handle: int) -> Session | None:
        """Looks a session up by its name, to be reported."""
        session = self.live.sessions.get(self.names[handle])
        self.sessions[handle] = session
        if session is not None:
            self.live.release(session)
        return session

    def release(self, handles: Sequence[int]) -> None:
        """Brings sessions up to their last reports, before they are reported one by one."""
        sessions, live = self.sessions, self.live
        for handle in handles:
            session = sessions[handle]
            if session is not None and session.convoy is not None:
                live.release(session)

    def gather(self, handles: Sequence[int], batch: PackedBytes) -> None:
        """Makes a convoy of the sessions of a batch, if it is the second with these handles.

        Args:
            handles: Of the batch.
            batch: Was taken, and changed nothing but counters.
        """
        if len(handles) < LEAST_SESSIONS:
            return
        seen = hash(batch.handle)
        if self._last.get(handles[0]) != seen:
            self._last[handles[0]] = seen
            return
        sessions = [session for handle in handles if (session := self.sessions[handle]) is not None]
        with suppress(ValueError):
            Convoy(self.live, sessions, batch, self.convoys)

    def close(self) -> None:
        """Applies what waits, since the stream ends."""
        for convoy in list(self.convoys.values()):
            convoy.dissolve()

    def held(self, handles: Sequence[int], counter: str) -> list[int]:
        """Returns a counter of some sessions as it stands; 0 for those that are not live."""
        found = []
        for handle in handles:
            session = self.sessions[handle]
            if session is None or session.sequence == GONE:
                session = self.again(handle)
            found.append(0 if session is None else getattr(session, counter))
        return found

    def __len__(self) -> int:
        return len(self.names)


class Intake:
    """Takes the reports of one organization's sessions."""

    __slots__ = ("_live",)

    def __init__(self, live: Live) -> None:
        self._live = live

    def report(self, updates: Sequence[Update], listener: Listener | None = None) -> Batch:
        """Takes updates, in order; the caller has checked them."""
        live = self._live
        now = live.clock.monotonic()
        sessions = live.sessions
        noted = live.noted
        verdicts: list[int] = []
        verdict = verdicts.append
        for update in updates:
            session = sessions.get(update.session_id)
            if session is None:
                verdict(UNKNOWN)
                continue
            if session.convoy is not None:
                live.release(session)
            sequence = update.sequence
            if sequence <= session.sequence:
                verdict(STALE)
                continue
            state = update.state or RUNNING
            stage = update.stage
            total = update.total_pages
            if (
                session.state == state
                and session.total_pages == total
                and (not stage or stage == session.stage)
                and not update.reason
                and not update.acknowledged_command
                and not update.errors_by_class
                and not update.last_errors
            ):
                session.sequence = sequence
                session.current_page = update.current_page
                session.products_found = update.products_found
                session.errors_count = update.errors_count
                session.reported = now
                session.listener = listener
                if not session.noted:
                    session.noted = True
                    noted.append(session)
                verdict(TAKEN)
                continue
            counters = update.current_page, total, update.products_found, update.errors_count
            verdict(self._take(session, now, listener, sequence, state, counters, update))
        commands = self._commands(update.session_id for update in updates) if live.commanded else []
        self._stir(now, len(updates))
        return Batch(verdicts, commands)

    def report_packed(
        self,
        handles: Handles,
        handle: Sequence[int],
        sequence: Sequence[int],
        current_page: Sequence[int],
        total_pages: Sequence[int],
        products_found: Sequence[int],
        errors_count: Sequence[int],
        state: Sequence[int],
        listener: Listener | None = None,
    ) -> PackedBatch:
        """Takes packed updates: arrays of the same length, which the caller has checked.

        Arrays of counters may be empty instead: nothing changed in any of these then.
        """
        live = self._live
        now = live.clock.monotonic()
        noted = live.noted
        sessions = handles.sessions
        stale = 0
        unknown: list[str] = []
        plain = True
        handles.release(handle)
        current_page = current_page or handles.held(handle, "current_page")
        total_pages = total_pages or handles.held(handle, "total_pages")
        products_found = products_found or handles.held(handle, "products_found")
        errors_count = errors_count or handles.held(handle, "errors_count")
        for place, number, page, total, products, errors, reported in zip(
            handle, sequence, current_page, total_pages, products_found, errors_count, state, strict=True
        ):
            session = sessions[place]
            if (
                session is not None
                and number > session.sequence
                and session.state == (reported or RUNNING)
                and session.total_pages == total
            ):
                session.sequence = number
                session.current_page = page
                session.products_found = products
                session.errors_count = errors
                session.reported = now
                session.listener = listener
                if not session.noted:
                    session.noted = True
                    noted.append(session)
                continue
            plain = False
            if session is None or session.sequence == GONE:
                session = handles.again(place)
                if session is None:
                    unknown.append(handles.names[place])
                    continue
            counters = page, total, products, errors
            if self._take(session, now, listener, number, reported or RUNNING, counters) == STALE:
                stale += 1
        commands = self._commands(handles.names[place] for place in handle) if live.commanded else []
        self._stir(now, len(handle))
        return PackedBatch(len(handle) - stale - len(unknown), stale, unknown, commands, plain)

    def report_convoy(self, handles: Handles, batch: PackedBytes) -> PackedBatch | None:
        """Takes a batch that reports a convoy again; returns None where it must be taken one by one, after its checks.

        What is taken here needs no check: it is as valid as the batch before, by what makes it follow that.
        """
        convoy = handles.convoys.get(batch.handle)
        live = self._live
        now = live.clock.monotonic()
        if convoy is None or not convoy.take(batch, now):
            return None
        commands = convoy.commands() if live.commanded else []
        size = len(convoy.sessions)
        self._stir(now, size)
        return PackedBatch(size, 0, [], commands, True)

    def _stir(self, now: float, reports: int) -> None:
        live = self._live
        if live.noted or live.waiting:
            if live.changes.watched:
                live.changes.stirred.set()
            live.settle_in_passing(now, reports)

    def _commands(self, session_ids: Iterable[str]) -> list[Command]:
        live = self._live
        named = live.commanded.intersection(session_ids)
        commands = [live.sessions[session_id].rarities.command for session_id in sorted(named)]
        return [command for command in commands if command is not None]

    def _take(
        self,
        session: Session,
        now: float,
        listener: Listener | None,
        sequence: int,
        state: int,
        counters: tuple[int, int, int, int],
        update: Update | None = None,
    ) -> int:
        """Takes one report that may change anything; returns its verdict."""
        if sequence <= session.sequence or session.state >= COMPLETED:
            return STALE
        live = self._live
        assert session.convoy is None
        if session.noted and (rated := live.count(session)) > 0:
            # What was reported in the state until now, before that state ends.
            live.figures.rate.add(rated, session.reported)
        described = session.rebuilding or bool(session.owner)
        session.owner = ""
        if session.rebuilding:
            session.rebuilding = False
            live.awaited -= 1
        session.sequence = sequence
        session.reported = now
        session.listener = listener
        page, total, products, errors = counters
        if total != session.total_pages:
            if session.total_pages:
                # What was reckoned for another amount of work is not a forecast for this one.
                session.measured = 0
            session.total_pages = total
        gained = page - session.current_page
        paced = True
        reason = ""
        if update is not None:
            described = session.take_rarities(update) or described
            if session.rarities.command is None:
                live.commanded.discard(session.session_id)
            reason = update.reason
            stage = update.stage
            if stage and stage != session.stage:
                # Another stage has another pace. `interval` stays until that is measured, to tell slow from stalled.
                session.stage = intern(stage)
                session.measured = 0
                paced = False
                described = True
        if state != session.state and not session.rarities.lease_refused:
            # A report without a page ends no stall: leaving upon it would only flap.
            if session.state != STALLED or state != RUNNING or gained > 0:
                described = True
                if session.state != STALLED:
                    paced = False
                    session.paged = now
                why = "a page was done" if session.state == STALLED and gained > 0 else _STATE_REASONS[state]
                live.enter(session, state, reason or why, now)
        elif reason and reason != session.reason and not session.rarities.lease_refused:
            session.reason = reason
            described = True
        session.current_page = page
        session.products_found = products
        session.errors_count = errors
        rated = live.count(session, paced=paced)
        if rated > 0:
            live.figures.rate.add(rated, now)
        live.mark(session, described=described)
        return TAKEN
