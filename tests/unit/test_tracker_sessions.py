"""The session tracker's memory: reports, pace, silence, roll-ups and the order of changes, on an injected clock."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from muster.session_tracker.v1 import session_pb2

from session_tracker import changes as changes_module
from session_tracker import eta
from session_tracker.clock import Clock
from session_tracker.commands import Command, CommandKind
from session_tracker.config import SessionsConfig
from session_tracker.errors import SessionAlreadyCompleted, SessionLimitReached, SessionNotFound
from session_tracker.organizations import STALE, TAKEN, UNKNOWN, Organization, Organizations
from session_tracker.rate import Rate
from session_tracker.results import Result
from session_tracker.sessions import Lease, Registration, Session, State
from session_tracker.silence import Silence
from tests.support.tracker_model import Table

ORGANIZATION = UUID(int=1)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass(slots=True)
class Hands:
    """A clock set by hand; it begins far from 0, as a monotonic clock does."""

    seconds: float = 1000.0

    def clock(self) -> Clock:
        return Clock(lambda: self.seconds, lambda: NOON + timedelta(seconds=self.seconds))


@dataclass(frozen=True, slots=True)
class Report:
    session_id: str = "s"
    sequence: int = 1
    state: int = 0
    stage: str = ""
    current_page: int = 0
    total_pages: int = 0
    products_found: int = 0
    errors_count: int = 0
    reason: str = ""
    errors_by_class: tuple[Any, ...] = ()
    last_errors: tuple[Any, ...] = ()
    acknowledged_command: int = 0


def remaining(session: Session, now: float) -> float | None:
    forecast = eta.forecast(session, now)
    return None if forecast is None else forecast.seconds


def organization(hands: Hands, **settings: Any) -> Organization:
    return Organization(ORGANIZATION, SessionsConfig(**settings), hands.clock())


def state(session: Session) -> State:
    return State(session.state)


class Stream:
    """A report stream that notes what it is told."""

    def __init__(self, told: list[Command]) -> None:
        self._told = told

    def tell(self, command: Command) -> None:
        self._told.append(command)


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


async def test_a_session_stalls_after_ten_of_its_own_pages_and_comes_back_by_a_page() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    for page in range(1, 6):
        tracker.report([Report(sequence=page, current_page=page)])
        hands.seconds += 10
    hands.seconds += 85
    tracker.mark_silence(session)
    assert state(session) is State.RUNNING, "30 s are long past, but a page takes it 10 s"
    tracker.report([Report(sequence=6, current_page=5)])
    hands.seconds += 10
    tracker.mark_silence(session)
    assert state(session) is State.STALLED
    tracker.report([Report(sequence=7, current_page=5)])
    assert state(session) is State.STALLED, "a report without a page is no progress"
    tracker.report([Report(sequence=8, current_page=6)])
    assert state(session) is State.RUNNING
    assert tracker.totals().by_state[State.RUNNING] == 1


def test_a_pause_is_not_a_stall_and_does_not_count_as_pace() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s", total_pages=10))
    for page in range(1, 5):
        tracker.report([Report(sequence=page, current_page=page, total_pages=10)])
        hands.seconds += 2
    tracker.report([Report(sequence=5, current_page=4, total_pages=10, state=State.PAUSED)])
    hands.seconds += 100
    tracker.mark_silence(session)
    assert state(session) is State.PAUSED
    assert remaining(session, hands.seconds) is None
    tracker.report([Report(sequence=6, current_page=4, total_pages=10)])
    assert session.interval == pytest.approx(2.0)
    assert remaining(session, hands.seconds) == pytest.approx(12.0)


async def test_a_session_whose_end_was_never_heard_of_ends_by_its_result_on_record() -> None:
    hands = Hands()
    organizations = Organizations(SessionsConfig(), hands.clock())
    tracker = organizations.of(ORGANIZATION)
    table = Table(hands.clock())
    silence = Silence(organizations, table)
    session, other = tracker.start(Registration("s")), tracker.start(Registration("other"))
    started = datetime(2026, 1, 1, tzinfo=UTC)
    result = Result(ORGANIZATION, "s", State.FAILED, "end", 7, 5, 2, started, "", "", "", "no such page")
    await table.record([result])
    hands.seconds += 120
    table.fails = True
    await silence.look()
    assert (state(session), state(other)) == (State.LOST, State.LOST)
    table.fails = False
    await silence.look()
    assert (state(session), session.current_page, session.reason) == (State.FAILED, 7, "no such page")
    assert state(other) is State.LOST


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


def test_the_eta_needs_a_total_and_three_pages_and_begins_anew_with_another_total() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    sequence = 0

    def page(number: int, total: int) -> float | None:
        nonlocal sequence
        sequence += 1
        hands.seconds += 4
        tracker.report([Report(sequence=sequence, current_page=number, total_pages=total)])
        tracker.settle()
        return remaining(session, hands.seconds)

    assert [page(number, 0) for number in range(1, 6)] == [None] * 5, "total unknown"
    assert page(6, 20) == pytest.approx(14 * 4)
    assert page(7, 20) == pytest.approx(13 * 4)
    assert [page(8, 40), page(9, 40)] == [None, None], "another total"
    assert page(10, 40) == pytest.approx(30 * 4)
    hands.seconds += 1000
    assert remaining(session, hands.seconds) == 0.0, "never in the past"
    assert page(41, 40) == 0.0, "more pages than were foreseen"


def test_the_pace_follows_the_last_pages() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    sequence = 0
    for seconds, pages in ((1.0, 20), (3.0, 20)):
        for _ in range(pages):
            sequence += 1
            hands.seconds += seconds
            tracker.report([Report(sequence=sequence, current_page=sequence)])
        tracker.settle()
        assert session.interval == pytest.approx(seconds, rel=0.02)
    hands.seconds += 30
    tracker.report([Report(sequence=sequence + 1, current_page=sequence + 10)])
    tracker.settle()
    assert session.interval == pytest.approx(3.0, rel=0.02), "ten pages reported at once took 3 s each"


def test_the_rate_slides_over_ten_seconds() -> None:
    rate = Rate()
    assert rate.per_second(5000.5) == 0.0
    rate.add(100, 5000.5)
    assert rate.per_second(5000.5) == 10.0
    assert rate.per_second(5009.9) == 10.0
    assert rate.per_second(5010.25) == pytest.approx(7.5), "the second at the far end counts in part"
    assert rate.per_second(5011.0) == 0.0
    rate.add(50, 5020.0)
    assert rate.per_second(5020.0) == 5.0
    assert rate.per_second(9999.0) == 0.0


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


def test_commands_are_numbered_upwards_and_the_newest_stands() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    tracker.command(session, CommandKind.PAUSE, "")
    tracker.command(session, CommandKind.RESUME, "")
    (resume,) = tracker.report([Report(sequence=1)]).commands
    assert resume.kind == CommandKind.RESUME
    assert tracker.report([Report(sequence=2, acknowledged_command=resume.number)]).commands == []
    tracker.command(session, CommandKind.STOP, "")
    assert session.command is not None
    assert session.command.number > resume.number
    after = organization(hands)
    again = Report(sequence=3, acknowledged_command=session.command.number + 10**9)
    restarted = after.start(Registration("s", progress=again))
    after.command(restarted, CommandKind.PAUSE, "")
    assert [command.kind for command in after.report([Report(sequence=4)]).commands] == [CommandKind.PAUSE], (
        "above what the worker carried out before the restart"
    )


def test_leases_are_due_once_a_round_and_a_lost_one_is_told_until_the_end() -> None:
    hands = Hands()
    tracker = organization(hands)
    told: list[Command] = []
    stream = Stream(told)
    session = tracker.start(Registration("s", lease=Lease(str(uuid4()), b"t" * 16)))
    tracker.start(Registration("without"))
    assert tracker.live.moved == []
    tracker.report([Report(sequence=1), Report("without", sequence=1)], stream)
    tracker.report([Report(sequence=2)], stream)
    tracker.settle()
    assert tracker.live.moved == [session]
    tracker.lose_lease(session, "LEASE_LOST: expired")
    assert told == [Command("s", CommandKind.LEASE_LOST, "LEASE_LOST: expired")]
    assert tracker.report([Report(sequence=3), Report(sequence=4)]).commands == told
    assert tracker.report([Report(sequence=4)]).commands == told, "also with a stale report"
    assert (state(session), session.reason) == (State.LOST, "lease lost: LEASE_LOST: expired")
    tracker.report([Report(sequence=5, state=State.PAUSED, current_page=3)])
    assert (state(session), session.current_page) == (State.LOST, 3), "reported on, and lost all the same"
    assert not tracker.command(session, CommandKind.RESUME, ""), "nothing replaces a lost lease"
    assert tracker.live.moved == [session], "nor is it renewed"
    tracker.start(Registration("s", lease=Lease(str(uuid4()), b"u" * 16), progress=Report(sequence=6)))
    assert state(session) is State.RUNNING, "another lease brings it back"
    assert not tracker.report([Report(sequence=7)]).commands
    assert tracker.live.moved == [session, session]


def test_a_stalled_session_does_not_renew_its_lease() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s", lease=Lease(str(uuid4()), b"t" * 16)))
    tracker.report([Report(sequence=1)])
    tracker.settle()
    tracker.live.moved.clear()
    session.renewable = True
    hands.seconds += 31
    tracker.mark_silence(session)
    assert state(session) is State.STALLED
    tracker.report([Report(sequence=2)])
    tracker.settle()
    assert tracker.live.moved == []
    tracker.report([Report(sequence=3, current_page=1)])
    tracker.settle()
    assert tracker.live.moved == [session]


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
