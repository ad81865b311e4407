"""The session tracker against a small model that predicts every answer, state, figure and result.

Reports in full and packed, stale, repeated, out of order and for unknown sessions; silence by an injected clock;
commands and lost leases; results on record, the same and another, with a database that fails; restarts that lose the
memory; watchers that come and go.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from muster.session_tracker.v1 import session_pb2 as pb

from services.errors import DatabaseUnavailable
from session_tracker.clock import Clock
from session_tracker.commands import Command, CommandKind
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Organizations
from session_tracker.results import Outcome, Results, StartUnknown
from session_tracker.sessions import Lease, Registration, State
from session_tracker.silence import Silence
from tests.support.tracker_model import Ear, Known, Table, shown

ACME = UUID(int=1)
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
LIMIT = 3
STALLED_SECONDS, LOST_SECONDS, FORGET_SECONDS, FINISHED_SECONDS = 30.0, 120.0, 3600.0, 60.0
COMPLETED_SECONDS = 600.0

NAME_LIST = "abcd"
NAMES = st.sampled_from(NAME_LIST)
COUNTS = st.integers(0, 50)
SEQUENCES = st.integers(1, 15)
REPORTED = st.sampled_from([0, 2, 2, 3, 4])
TEXTS = st.sampled_from(["", "", "", "list", "detail"])
FINAL = st.sampled_from([State.COMPLETED, State.FAILED, State.STOPPED])
CLASSES = st.dictionaries(st.sampled_from(["timeout", "blocked"]), st.integers(1, 9), max_size=2)


def _update(name: str, sequence: int, state: int, stage: str, reason: str, *counts: int, **rare: Any) -> Any:
    page, total, products, errors = counts
    return pb.ProgressUpdate(
        session_id=name, sequence=sequence, state=state, stage=stage, reason=reason, current_page=page,  # type: ignore[arg-type]
        total_pages=total, products_found=products, errors_count=errors, acknowledged_command=rare["acknowledged"],
        errors_by_class=[pb.ErrorCount(error_class=name, count=count) for name, count in rare["classes"].items()],
    )  # fmt: skip


UPDATES = st.builds(
    _update, NAMES, SEQUENCES, REPORTED, TEXTS, TEXTS, COUNTS, st.sampled_from([0, 0, 40, 50]), COUNTS, COUNTS,
    # Below the number of any command, which are by the time of day.
    acknowledged=st.sampled_from([0, 0, 0, 1]), classes=CLASSES | st.just({}),
)  # fmt: skip


class TrackerMachine(RuleBasedStateMachine):
    """Every rule does the same to the tracker and to the model."""

    @initialize(lazy=st.booleans())
    def begin(self, lazy: bool) -> None:
        # Whether reports wait to be counted until something happens that needs it.
        self.lazy = lazy
        self.seconds = 1000.0
        self.clock = Clock(lambda: self.seconds, lambda: EPOCH + timedelta(seconds=self.seconds))
        self.table = Table(self.clock)
        self.recorded: dict[str, tuple[Any, ...]] = {}
        self.loop = asyncio.new_event_loop()
        self.resumed: tuple[str, int] = ("", 0)
        self.held: dict[str, tuple[Any, ...]] = {}
        self.fresh()

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()

    def fresh(self) -> None:
        config = SessionsConfig(
            max_per_organization=LIMIT, stalled_after_seconds=STALLED_SECONDS, lost_after_seconds=LOST_SECONDS,
            forget_lost_after_seconds=FORGET_SECONDS, finished_seconds=FINISHED_SECONDS,
        )  # fmt: skip
        self.organizations = Organizations(config, self.clock)
        self.tracker = self.organizations.of(ACME)
        self.results = Results(self.organizations, self.table, self.clock)
        self.pending = self.tracker.changes.subscribe()
        self.followed: dict[str, tuple[Any, ...]] = {}
        self.handles = self.tracker.handles()
        self.handles.add(NAME_LIST)
        self.model: dict[str, Known] = {}
        self.completed: dict[str, float] = {}
        self.ended: list[Known] = []
        self.committed = 0

    def live(self) -> dict[str, Known]:
        return {name: known for name, known in self.model.items() if known.leaves is None}

    def expire(self) -> None:
        gone = [name for name, known in self.model.items() if known.leaves is not None and known.leaves <= self.seconds]
        for name in gone:
            del self.model[name]
        self.ended = [known for known in self.ended if known.leaves is None or known.leaves > self.seconds]
        self.completed = {name: until for name, until in self.completed.items() if until > self.seconds}

    @rule(
        name=NAMES, progress=st.none() | UPDATES, total=COUNTS, lease=st.sampled_from([b"", b"", b"1" * 16, b"2" * 16])
    )
    def start(self, name: str, progress: Any, total: int, lease: bytes) -> None:
        if progress is not None:
            progress.session_id = name
        given = Lease(str(UUID(int=9)), lease) if lease else None
        registration = Registration(name, total_pages=total, stage="begin", lease=given, progress=progress)
        self.expire()
        known = self.model.get(name)
        if known is not None and known.leaves is None:
            self.tracker.start(registration)
            if lease and lease != known.lease:
                known.lease = lease
                if known.refused:
                    known.refused, known.command = False, None
            if progress is not None:
                known.take(progress, self.seconds, None)
        elif name in self.completed:
            with pytest.raises(SessionAlreadyCompleted):
                self.tracker.start(registration)
        elif len(self.live()) == LIMIT:
            with pytest.raises(SessionLimitReached):
                self.tracker.start(registration)
        else:
            self.tracker.start(registration)
            known = Known(self.clock.wall(), self.seconds, self.seconds, total=total, stage="begin", lease=lease)
            if progress is not None:
                total = progress.total_pages or total
                known.take(progress, self.seconds, None)
                known.total, known.reason = total, progress.reason or "registered again"
            self.model[name] = known

    def verdict(self, update: Any, ear: Ear | None) -> int:
        known = self.model.get(update.session_id)
        if known is None:
            return UNKNOWN
        return TAKEN if known.take(update, self.seconds, ear) else STALE

    def waiting(self, names: set[str]) -> list[Command]:
        commands = [self.model[name].command for name in sorted(names) if name in self.live()]
        return [command for command in commands if command is not None]

    @rule(updates=st.lists(UPDATES, min_size=1, max_size=4), heard=st.booleans(), again=st.booleans())
    def report(self, updates: list[Any], heard: bool, again: bool) -> None:
        ear = Ear() if heard else None
        for _ in range(1 + again):
            batch = self.tracker.report(updates, ear)
            assert batch.verdicts == [self.verdict(update, ear) for update in updates]
            assert batch.commands == self.waiting({update.session_id for update in updates})
        for name, times in Counter(update.session_id for update in updates).items():
            # Pages up and down again within one moment: whether that was a page is not for the model to say.
            if times > 1 and name in self.model:
                self.model[name].paged = None

    @rule(
        handles=st.lists(st.integers(0, len(NAME_LIST) - 1), min_size=1, max_size=4, unique=True),
        sequence=SEQUENCES, counts=st.tuples(COUNTS, COUNTS, COUNTS), total=st.sampled_from([0, 40]), state=REPORTED,
        left_out=st.sets(st.sampled_from(["page", "total", "products", "errors"])),
    )  # fmt: skip
    def report_packed(
        self,
        handles: list[int],
        sequence: int,
        counts: tuple[int, int, int],
        total: int,
        state: int,
        left_out: set[str],
    ) -> None:
        values = dict(zip(("page", "products", "errors"), counts, strict=True)) | {"total": total}
        size = len(handles)
        arrays = {name: [] if name in left_out else [value] * size for name, value in values.items()}
        ear = Ear()
        batch = self.tracker.intake.report_packed(
            self.handles, handles, [sequence] * size, arrays["page"], arrays["total"], arrays["products"],
            arrays["errors"], [state] * size, ear,
        )  # fmt: skip
        names = [NAME_LIST[handle] for handle in handles]
        verdicts = []
        for name in names:
            known = self.model.get(name)
            # What is left out did not change.
            of = {one: getattr(known, one, 0) if one in left_out else value for one, value in values.items()}
            counted = of["page"], of["total"], of["products"], of["errors"]
            update = _update(name, sequence, state, "", "", *counted, acknowledged=0, classes={})
            verdicts.append(self.verdict(update, ear))
        assert (batch.taken, batch.stale) == (verdicts.count(TAKEN), verdicts.count(STALE))
        assert batch.unknown == [name for name, verdict in zip(names, verdicts, strict=True) if verdict == UNKNOWN]
        assert batch.commands == self.waiting(set(names))

    @rule(name=NAMES, kind=st.sampled_from([2, 3, 4, 5]), speed=st.sampled_from([0.0, 30.0]))
    def command(self, name: str, kind: int, speed: float) -> None:
        session, known = self.tracker.sessions.get(name), self.model.get(name)
        assert (session is None) == (known is None)
        if session is None or known is None:
            return
        told = self.tracker.command(session, CommandKind(kind), "because", speed)
        assert told == (known.leaves is None and not known.refused)
        if told:
            waiting = known.command.number if known.command else 0
            number = max(waiting + 1, known.acknowledged + 1, int(self.clock.wall().timestamp() * 1000))
            known.command = Command(name, kind, "because", number, speed)
            known.speed = speed if kind == CommandKind.SPEED_LIMIT else known.speed
            if known.ear is not None:
                assert known.ear.heard[-1] == known.command

    @rule(name=NAMES, update=UPDATES)
    def carry_out(self, name: str, update: Any) -> None:
        known = self.model.get(name)
        if known is not None and known.command is not None:
            update.session_id, update.acknowledged_command = name, known.command.number
            self.report([update], heard=False, again=False)

    @rule(name=NAMES)
    def lose_lease(self, name: str) -> None:
        session, known = self.tracker.sessions.get(name), self.model.get(name)
        if session is not None and known is not None:
            self.tracker.lose_lease(session, "expired")
            if known.leaves is None:
                known.refused, known.state, known.reason = True, State.LOST, "lease lost: expired"
                known.command = Command(name, CommandKind.LEASE_LOST, "expired")

    @rule(
        name=NAMES, state=FINAL, pages=st.integers(0, 3), stage=TEXTS, begun=st.booleans(),
        fails=st.sampled_from([False, False, False, True]), again=st.booleans(),
    )  # fmt: skip
    def complete(self, name: str, state: State, pages: int, stage: str, begun: bool, fails: bool, again: bool) -> None:
        started_at = EPOCH if begun else None
        outcome = Outcome(name, state, stage, pages, 2 * pages, pages, started_at, "", f"{pages} pages")
        self.table.fails = fails
        for _ in range(1 + again):
            self.complete_once(outcome, fails)
        self.table.fails = False

    def complete_once(self, outcome: Outcome, fails: bool) -> None:
        name = outcome.session_id
        known, row = self.model.get(name), self.recorded.get(name)
        begun = outcome.started_at or (known.started_at if known else None)
        call = self.results.complete(ACME, outcome)
        if begun is not None and fails:
            with pytest.raises(DatabaseUnavailable):
                self.loop.run_until_complete(call)
            return
        if begun is None and row is None:
            with pytest.raises(StartUnknown):
                self.loop.run_until_complete(call)
            return
        if row is None:
            stage = outcome.stage or (known.stage if known else "")
            counts = outcome.total_pages, outcome.products_found, outcome.errors_count
            row = self.recorded[name] = (outcome.state, stage, *counts, begun, outcome.message)
            self.committed += 1
        told = outcome.state, outcome.total_pages, outcome.products_found, outcome.errors_count, outcome.message
        agrees = told == (row[0], *row[2:5], row[6]) and outcome.stage in ("", row[1])
        if agrees and outcome.started_at in (None, row[5]):
            answer = self.loop.run_until_complete(call)
            counts = answer.total_pages, answer.products_found, answer.errors_count
            assert (answer.state, answer.stage, *counts, answer.started_at, answer.message) == row
        else:
            with pytest.raises(SessionAlreadyCompleted):
                self.loop.run_until_complete(call)
        if begun is not None:
            # What is on record holds for a session that was started again after its end.
            if known is not None and known.leaves is None:
                self.end(known, row)
            self.completed[name] = self.seconds + COMPLETED_SECONDS

    def end(self, known: Known, row: tuple[Any, ...]) -> None:
        """Shows a session as its result has it; of those that ended, the newest stay for a while."""
        known.state, known.page, known.products, known.errors = row[0], *row[2:5]
        known.reason, known.ear, known.leaves = row[6], None, self.seconds + FINISHED_SECONDS
        self.ended.append(known)
        if len(self.ended) > LIMIT:
            oldest = self.ended.pop(0)
            self.model = {name: one for name, one in self.model.items() if one is not oldest}

    @rule(seconds=st.sampled_from([0.1, 1.0, 29.0, 31.0, 61.0, 121.0, 601.0, 3601.0]), looks=st.integers(0, 2))
    def time_passes(self, seconds: float, looks: int) -> None:
        self.seconds += seconds
        for _ in range(looks):
            self.loop.run_until_complete(Silence(self.organizations, self.table).look())
            self.expire()
            for name, known in self.live().items():
                self.look(name, known)

    def look(self, name: str, known: Known) -> None:
        silent = self.seconds - known.reported
        session = self.tracker.sessions.get(name)
        if silent >= LOST_SECONDS + FORGET_SECONDS and known.state == State.LOST:
            del self.model[name]
            return
        assert session is not None
        paged = session.paged if known.paged is None or self.lazy else known.paged
        without_page = self.seconds - paged
        if silent >= LOST_SECONDS:
            if known.state != State.LOST:
                known.state, known.reason = State.LOST, f"no report for {silent:.0f} s"
                if (row := self.recorded.get(name)) is not None:
                    # It was started again after its end: what is on record holds.
                    self.end(known, row)
                    self.completed[name] = self.seconds + COMPLETED_SECONDS
        elif known.state == State.RUNNING and without_page >= max(STALLED_SECONDS, 10 * session.interval):
            pace = f" at {session.interval:.1f} s a page" if session.interval else ""
            known.state, known.reason = State.STALLED, f"no page for {without_page:.0f} s{pace}"

    @rule()
    def restart(self) -> None:
        self.fresh()

    @rule()
    def watcher_comes_back(self) -> None:
        changes, sessions = self.tracker.changes, self.tracker.sessions
        epoch, offset = self.resumed
        ids = changes.after(offset, sessions.values()) if epoch == changes.epoch else None
        if ids is None:
            self.held.clear()
            ids = set(sessions)
        self.catch_up(self.held, ids)
        self.resumed = changes.epoch, changes.offset

    @rule()
    def follower_catches_up(self) -> None:
        self.tracker.changes.distribute()
        ids = set(self.pending)
        self.pending.clear()
        self.catch_up(self.followed, ids)

    def catch_up(self, held: dict[str, tuple[Any, ...]], ids: set[str]) -> None:
        for session_id in ids:
            held.pop(session_id, None)
            if session_id in self.tracker.sessions:
                held[session_id] = shown(self.tracker.sessions[session_id])
        assert held == {name: known.view() for name, known in self.model.items()}

    @rule()
    def totals_are_looked_at(self) -> None:
        totals, live = self.tracker.totals(), self.live().values()
        assert [session.session_id for session in self.tracker.after("")] == sorted(self.model)
        assert (totals.live, totals.results_committed) == (len(live), self.committed)
        counts = totals.pages, totals.products, totals.errors
        assert counts == tuple(sum(getattr(known, one) for known in live) for one in ("page", "products", "errors"))
        assert {state: count for state, count in totals.by_state.items() if count} == Counter(
            known.state for known in live
        )
        assert totals.pages_per_second >= 0

    @invariant()
    def every_session_is_as_predicted(self) -> None:
        if not self.lazy:
            self.tracker.settle()
        assert {name: shown(session) for name, session in self.tracker.sessions.items()} == {
            name: known.view() for name, known in self.model.items()
        }

    @invariant()
    def results_are_on_record_once(self) -> None:
        assert set(self.table.rows) == set(self.recorded)


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(
    max_examples=int(os.environ.get("MUSTER_PROPERTY_EXAMPLES", "150")), stateful_step_count=40, deadline=None
)
