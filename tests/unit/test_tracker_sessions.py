"""The session tracker's memory: reports, silence, ends, roll-ups and the order of changes, on an injected clock."""

from __future__ import annotations

import tracemalloc
from datetime import UTC, datetime
from typing import NoReturn
from uuid import uuid4

import pytest
from muster.session_tracker.v1 import session_pb2

from session_tracker import changes as changes_module
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached, SessionNotFound
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Organizations
from session_tracker.results import Result
from session_tracker.sessions import Lease, Registration, Session, State
from session_tracker.silence import Silence
from tests.support.tracker_memory import ORGANIZATION, Hands, Report, organization
from tests.support.tracker_model import Table


def state(session: Session) -> State:
    return State(session.state)


def test_states_and_verdicts_are_numbered_as_in_the_contract() -> None:
    states = {number: name for name, number in session_pb2.SessionState.items() if number}
    assert states == {member.value: f"SESSION_STATE_{member.name}" for member in State}
    assert (TAKEN, STALE, UNKNOWN) == (
        session_pb2.UPDATE_VERDICT_TAKEN,
        session_pb2.UPDATE_VERDICT_STALE,
        session_pb2.UPDATE_VERDICT_UNKNOWN_SESSION,
    )


def test_stale_repeated_and_out_of_order_reports_change_nothing() -> None:
    tracker = organization(Hands())
    session = tracker.start(Registration("s", total_pages=9))
    verdicts = tracker.report(
        [
            Report(sequence=5, current_page=3, total_pages=9, products_found=30, errors_count=1),
            Report(sequence=5, current_page=4, total_pages=9),
            Report(sequence=2, current_page=1, total_pages=9),
            Report(session_id="other", sequence=1),
        ]
    ).verdicts
    assert verdicts == [TAKEN, STALE, STALE, UNKNOWN]
    assert (session.current_page, session.products_found, session.errors_count) == (3, 30, 1)
    assert (tracker.totals().pages, tracker.totals().products, tracker.totals().errors) == (3, 30, 1)


def test_counters_are_absolute_and_may_fall() -> None:
    tracker = organization(Hands())
    tracker.start(Registration("s"))
    tracker.report([Report(sequence=1, current_page=10, products_found=50)])
    tracker.report([Report(sequence=2, current_page=4, products_found=20)])
    totals = tracker.totals()
    assert (totals.pages, totals.products) == (4, 20)
    assert totals.pages_per_second == 1.0


def test_a_session_started_twice_stands_as_it_is_and_takes_only_newer_progress() -> None:
    tracker = organization(Hands())
    first = tracker.start(Registration("s", stage="search"))
    tracker.report([Report(sequence=7, current_page=7)])
    assert tracker.start(Registration("s", stage="again", progress=Report(sequence=6, current_page=6))) is first
    assert (first.stage, first.current_page) == ("search", 7)
    tracker.start(Registration("s", progress=Report(sequence=8, current_page=8)))
    assert first.current_page == 8
    assert tracker.totals().live == 1


def test_one_report_after_a_restart_restores_a_session_whole() -> None:
    hands = Hands()
    before, after = organization(hands), organization(hands)
    before.start(Registration("s", total_pages=20))
    newest = Report(sequence=9, stage="deep", current_page=9, total_pages=20, products_found=90, errors_count=2)
    before.report([newest])
    assert after.report([newest]).verdicts == [UNKNOWN]
    after.start(Registration("s", total_pages=20, progress=newest))
    assert after.report([newest]).verdicts == [STALE]
    for name in ("state", "stage", "current_page", "total_pages", "products_found", "errors_count", "sequence"):
        assert getattr(after.get("s"), name) == getattr(before.get("s"), name), name
    assert after.totals().pages == 9
    assert after.totals().pages_per_second == 0.0, "pages from before the restart were not done just now"


def test_states_follow_reports() -> None:
    tracker = organization(Hands())
    session = tracker.start(Registration("s"))
    assert state(session) is State.QUEUED
    for sequence, reported, then in (
        (1, 0, State.RUNNING),
        (2, State.PAUSED, State.PAUSED),
        (3, State.RATE_LIMITED, State.RATE_LIMITED),
        (4, State.RUNNING, State.RUNNING),
    ):
        tracker.report([Report(sequence=sequence, state=reported)])
        assert state(session) is then
        assert {member for member, count in tracker.totals().by_state.items() if count} == {then}


async def test_a_session_whose_end_was_never_heard_of_ends_by_its_result_on_record() -> None:
    hands = Hands()
    organizations = Organizations(SessionsConfig(), hands.clock())
    tracker = organizations.of(ORGANIZATION)
    table = Table(hands.clock())
    silence = Silence(organizations, table)
    session, other = tracker.start(Registration("s")), tracker.start(Registration("other"))
    started = datetime(2026, 1, 1, tzinfo=UTC)
    result = Result(ORGANIZATION, "s", State.FAILED, "end", 7, 5, 2, started, "", "", "", "no such page" * 30)
    await table.record([result])
    hands.seconds += 120
    table.fails = True
    await silence.look()
    assert (state(session), state(other)) == (State.LOST, State.LOST)
    table.fails = False
    await silence.look()
    assert (state(session), session.current_page, session.reason) == (State.FAILED, 7, ("no such page" * 30)[:256])
    assert state(other) is State.LOST


async def test_when_a_replica_is_gone_the_results_of_silent_sessions_are_looked_up_once() -> None:
    hands = Hands()
    organizations = Organizations(SessionsConfig(), hands.clock())
    tracker = organizations.of(ORGANIZATION)
    table = Table(hands.clock())
    silence = Silence(organizations, table)
    ended, going_on, silent = (tracker.start(Registration(name)) for name in ("ended", "going on", "silent"))
    started = datetime(2026, 1, 1, tzinfo=UTC)
    hands.seconds += 1
    tracker.doubt()
    hands.seconds += 1
    tracker.report([Report("going on", sequence=1)])
    await table.record([Result(ORGANIZATION, "ended", State.COMPLETED, "end", 7, 5, 2, started, "", "", "", "")])
    await silence.look()
    assert (state(ended), state(going_on), state(silent)) == (State.COMPLETED, State.RUNNING, State.QUEUED)
    await table.record([Result(ORGANIZATION, "silent", State.STOPPED, "end", 1, 0, 0, started, "", "", "", "")])
    await silence.look()
    assert state(silent) is State.QUEUED


async def test_a_silent_session_is_lost_comes_back_by_a_report_and_is_forgotten_in_the_end() -> None:
    hands = Hands()
    organizations = Organizations(SessionsConfig(forget_lost_after_seconds=600), hands.clock())
    tracker = organizations.of(ORGANIZATION)
    silence = Silence(organizations, Table(hands.clock()))
    session = tracker.start(Registration("s"))
    tracker.start(Registration("kept"))
    hands.seconds += 119
    await silence.look()
    assert state(session) is State.QUEUED
    hands.seconds += 1
    await silence.look()
    assert state(session) is State.LOST
    tracker.report([Report(sequence=1, current_page=1), Report("kept", sequence=1)])
    assert state(session) is State.RUNNING
    hands.seconds += 120
    await silence.look()
    hands.seconds += 599
    tracker.report([Report("kept", sequence=2)])
    await silence.look()
    assert tracker.totals().live == 2
    hands.seconds += 1
    await silence.look()
    assert [held.session_id for held in tracker.after("")] == ["kept"]
    assert tracker.totals().pages == 0


def test_limits_and_completed_ids() -> None:
    hands = Hands()
    tracker = organization(hands, max_per_organization=1)
    tracker.start(Registration("a"))
    with pytest.raises(SessionLimitReached):
        tracker.start(Registration("b"))
    tracker.start(Registration("a"))
    tracker.complete("a", 3)
    with pytest.raises(SessionAlreadyCompleted):
        tracker.start(Registration("a"))
    assert tracker.get("a").state == State.COMPLETED, "to be seen for a while"
    hands.seconds += 9
    assert tracker.totals().pages_per_second == pytest.approx(0.3), "finished sessions count for the rate"
    hands.seconds += 51
    tracker.expire()
    with pytest.raises(SessionNotFound):
        tracker.get("a")
    with pytest.raises(SessionAlreadyCompleted):
        tracker.start(Registration("a"))
    hands.seconds += 540
    tracker.start(Registration("a"))


def test_finished_sessions_leave_room_for_others_and_show_how_they_ended() -> None:
    hands = Hands()
    tracker = organization(hands, max_per_organization=1, finished_seconds=5)
    tracker.start(Registration("a", slot_id="slot"))
    tracker.report([Report("a", sequence=1, current_page=2)])
    tracker.complete("a", 3, State.FAILED, products=7, errors=1, reason="the site is gone")
    ended = tracker.get("a")
    assert (state(ended), ended.reason, ended.products_found) == (State.FAILED, "the site is gone", 7)
    assert tracker.report([Report("a", sequence=2, current_page=9)]).verdicts == [STALE], "known, and over"
    assert ended.current_page == 3
    tracker.start(Registration("b"))
    assert tracker.totals().live == 1
    assert tracker.totals().pages == 0
    hands.seconds += 5
    tracker.expire()
    assert set(tracker.sessions) == {"b"}
    assert tracker.report([Report("a", sequence=3)]).verdicts == [UNKNOWN]


class Unscannable(dict[str, Session]):
    """Sessions that may be looked up by id, and not looked through."""

    def _refuse(self) -> NoReturn:
        raise AssertionError("all sessions were looked at")

    def __iter__(self) -> NoReturn:
        self._refuse()

    def keys(self) -> NoReturn:
        self._refuse()

    def values(self) -> NoReturn:
        self._refuse()

    def items(self) -> NoReturn:
        self._refuse()


def test_roll_ups_look_at_no_session() -> None:
    organizations = Organizations(SessionsConfig(), Hands().clock())
    tracker = organizations.of(ORGANIZATION)
    tracker.sessions = tracker.live.sessions = Unscannable()
    for number in range(100):
        tracker.start(Registration(f"s{number}", slot_id=f"slot-{number % 2}"))
        tracker.report([Report(f"s{number}", 1, current_page=number, products_found=2 * number)])
    tracker.complete("s1", 1)
    tracker.drop("s3")
    everything, slot = sum(range(100)) - 1 - 3, sum(range(0, 100, 2))
    assert (tracker.totals().live, tracker.totals().pages, tracker.totals().products) == (
        98,
        everything,
        2 * everything,
    )
    assert (tracker.totals("slot-0").live, tracker.totals("slot-0").pages) == (50, slot)
    assert (organizations.fleet().live, organizations.fleet().pages) == (98, everything)
    assert organizations.count(State.RUNNING) == 98


def test_changes_after_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "_REMEMBERED_ENDS", 3)
    tracker = organization(Hands())
    for name in "abcdef":
        tracker.start(Registration(name))
    known = tracker.changes.offset
    assert tracker.changes.after(known, tracker.sessions.values()) == set()
    tracker.report([Report("a", sequence=1), Report("b", sequence=1)])
    tracker.report([Report("a", sequence=2), Report("a", sequence=3)])
    tracker.drop("c")
    tracker.settle()
    assert tracker.changes.offset == known + 4, "reports of counters that come together are one change"
    assert tracker.changes.after(known, tracker.sessions.values()) == {"a", "b", "c"}
    assert tracker.changes.after(known + 4, tracker.sessions.values()) == set()
    assert tracker.changes.after(known + 5, tracker.sessions.values()) is None, "not of this memory"
    for name in "def":
        tracker.drop(name)
    # Of four ends three are remembered: whoever has not seen the first cannot go on.
    assert tracker.changes.after(known + 4, tracker.sessions.values()) == {"d", "e", "f"}


def test_ids_are_listed_in_order_and_continue_after_any_id() -> None:
    tracker = organization(Hands())
    for name in ("m", "c", "x", "a"):
        tracker.start(Registration(name))
    assert [session.session_id for session in tracker.after("")] == ["a", "c", "m", "x"]
    tracker.drop("c")
    assert [session.session_id for session in tracker.after("b")] == ["m", "x"]
    tracker.start(Registration("c"))
    tracker.start(Registration("n"))
    assert [session.session_id for session in tracker.after("b")] == ["c", "m", "n", "x"]


def test_a_live_session_costs_less_than_a_kilobyte() -> None:
    count = 20_000
    clients, slots = [f"client-{n}" for n in range(100)], [str(uuid4()) for _ in range(2000)]
    tracemalloc.start()
    try:
        tracker = organization(Hands())
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            key = str(uuid4())
            tracker.start(
                Registration(
                    session_id=key,
                    stage="search results",
                    total_pages=5000,
                    slot_id=slots[number % len(slots)],
                    client_id=clients[number % len(clients)],
                    tags=("nightly", f"shop-{number % 7}"),
                    lease=Lease(key, number.to_bytes(16)),
                )
            )
            tracker.report([Report(key, number + 1000, 0, "pages", number + 1000, 5000, number + 2000, number + 300)])
        each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert each < 1024, f"{each:.0f} bytes"
