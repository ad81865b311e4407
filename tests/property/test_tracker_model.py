"""The session tracker's memory against a small model: reports in any order, silence, restarts and completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from session_tracker.clock import Clock
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Organization
from session_tracker.sessions import Registration, State

NAMES = st.sampled_from("abcd")
COUNTS = st.integers(0, 50)
REPORTED = st.sampled_from([0, State.RUNNING, State.PAUSED, State.RATE_LIMITED])
LIMIT = 3


@dataclass(frozen=True, slots=True)
class Report:
    session_id: str
    sequence: int
    state: int
    stage: str
    current_page: int
    total_pages: int
    products_found: int
    errors_count: int


REPORTS = st.builds(
    Report, NAMES, st.integers(1, 12), REPORTED, st.sampled_from(["", "list"]), COUNTS, COUNTS, COUNTS, COUNTS
)


@dataclass(slots=True)
class Known:
    """What the model knows of a session: the newest report that was taken, and when it was reported."""

    newest: Report | None = None
    reported: float = 0.0


@dataclass(slots=True)
class Watcher:
    """Holds what a watcher holds, by resuming from its offset."""

    epoch: str = ""
    offset: int = 0
    held: dict[str, int] = field(default_factory=dict)


class TrackerMachine(RuleBasedStateMachine):
    """Every rule does the same to the tracker and to the model."""

    @initialize()
    def begin(self) -> None:
        self.seconds = 1000.0
        self.completed: dict[str, float] = {}
        self.watcher = Watcher()
        self.fresh()

    def fresh(self) -> None:
        clock = Clock(lambda: self.seconds, lambda: datetime(2026, 1, 1, tzinfo=UTC))
        self.tracker = Organization(UUID(int=1), SessionsConfig(max_per_organization=LIMIT), clock)
        self.model: dict[str, Known] = {}
        self.completed.clear()

    @rule(name=NAMES, progress=st.none() | REPORTS)
    def start(self, name: str, progress: Report | None) -> None:
        if progress is not None:
            values = [getattr(progress, slot) for slot in Report.__slots__[1:]]
            progress = Report(name, *values)
        known = self.model.get(name)
        try:
            self.tracker.start(Registration(name, progress=progress))
        except SessionAlreadyCompleted:
            assert known is None
            assert self.seconds < self.completed[name] + 600
            return
        except SessionLimitReached:
            assert known is None
            assert len(self.model) == LIMIT
            return
        assert known is not None or name not in self.completed or self.seconds >= self.completed[name] + 600
        newest = known.newest if known is not None else None
        if known is None or (progress is not None and (newest is None or progress.sequence > newest.sequence)):
            self.model[name] = Known(progress, self.seconds)

    @rule(reports=st.lists(REPORTS, min_size=1, max_size=6))
    def report(self, reports: list[Report]) -> None:
        verdicts = []
        for report in reports:
            known = self.model.get(report.session_id)
            if known is None:
                verdicts.append(UNKNOWN)
            elif known.newest is not None and report.sequence <= known.newest.sequence:
                verdicts.append(STALE)
            else:
                verdicts.append(TAKEN)
                known.newest, known.reported = report, self.seconds
        assert self.tracker.report(reports).verdicts == verdicts

    @rule(name=NAMES, pages=COUNTS)
    def complete(self, name: str, pages: int) -> None:
        self.tracker.complete(name, pages)
        self.model.pop(name, None)
        self.completed[name] = self.seconds

    @rule(seconds=st.sampled_from([0.1, 1.0, 31.0, 121.0, 700.0, 3800.0]))
    def time_passes(self, seconds: float) -> None:
        self.seconds += seconds
        for _ in range(2):
            for session in list(self.tracker.sessions.values()):
                self.tracker.mark_silence(session)
        self.model = {
            name: known for name, known in self.model.items() if self.seconds - known.reported < 120.0 + 3600.0
        }

    @rule()
    def restart(self) -> None:
        self.fresh()

    @rule()
    def watcher_catches_up(self) -> None:
        changes, sessions = self.tracker.changes, self.tracker.sessions
        ids = changes.after(self.watcher.offset, sessions.values()) if self.watcher.epoch == changes.epoch else None
        if ids is None:
            self.watcher.held.clear()
            ids = set(sessions)
        for session_id in ids:
            if session_id in sessions:
                self.watcher.held[session_id] = sessions[session_id].changed
            else:
                self.watcher.held.pop(session_id, None)
        self.watcher.epoch, self.watcher.offset = changes.epoch, changes.offset
        assert self.watcher.held == {session_id: session.changed for session_id, session in sessions.items()}

    @invariant()
    def sessions_are_what_their_newest_reports_say(self) -> None:
        assert set(self.tracker.sessions) == set(self.model)
        for name, known in self.model.items():
            session, newest = self.tracker.sessions[name], known.newest
            if newest is None:
                assert (session.sequence, session.current_page) == (0, 0)
                continue
            assert session.sequence == newest.sequence
            assert session.current_page == newest.current_page
            assert session.products_found == newest.products_found
            assert session.errors_count == newest.errors_count
            if session.state not in (State.STALLED, State.LOST):
                assert session.state == (newest.state or State.RUNNING)
            if session.state == State.STALLED:
                assert newest.state in (0, State.RUNNING)
            remaining = session.remaining_seconds(self.seconds)
            assert remaining is None or remaining >= 0

    @invariant()
    def totals_equal_a_scan(self) -> None:
        totals, sessions = self.tracker.totals(), list(self.tracker.after(""))
        assert [session.session_id for session in sessions] == sorted(self.model)
        assert totals.live == len(sessions)
        assert totals.pages == sum(session.current_page for session in sessions)
        assert totals.products == sum(session.products_found for session in sessions)
        assert totals.errors == sum(session.errors_count for session in sessions)
        assert totals.by_state == {
            state: sum(session.state == state for session in sessions) for state in totals.by_state
        }
        assert totals.pages_per_second >= 0


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
