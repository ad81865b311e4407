"""Pace, forecast and throughput of a session, on an injected clock."""

from __future__ import annotations

import math

import pytest

from session_tracker import eta
from session_tracker.rate import Rate
from session_tracker.series import SPANS, add, read
from session_tracker.sessions import Registration, Session, State
from tests.support.tracker_memory import Hands, Report, organization


def remaining(session: Session, now: float) -> float | None:
    forecast = eta.forecast(session, now)
    return None if forecast is None else forecast.seconds


def test_a_steady_pace_has_a_narrow_interval_and_a_scattered_one_a_wide_one() -> None:
    widths = []
    for pauses in ((4.0, 4.0), (2.0, 6.0)):
        hands = Hands()
        tracker = organization(hands)
        session = tracker.start(Registration("s", total_pages=200))
        tracker.report([Report(sequence=1, total_pages=200)])
        for page in range(1, 101):
            hands.seconds += pauses[page % 2]
            tracker.report([Report(sequence=page + 1, current_page=page, total_pages=200)])
        tracker.settle()
        forecast = eta.forecast(session, hands.seconds)
        assert forecast is not None
        assert forecast.seconds == pytest.approx(400, rel=0.15)
        assert forecast.low <= forecast.seconds <= forecast.high
        assert eta.pages_per_second(session) == pytest.approx(0.25, rel=0.15)
        widths.append(forecast.high - forecast.low)
    assert widths[0] == pytest.approx(0.0)
    # Deviation 2 s of each of 100 pages, and of a mean known from 9: 2 x 1.645 x sqrt(4 x 100 + 4 x 100^2 / 9).
    assert widths[1] == pytest.approx(2 * 1.645 * math.sqrt(400 + 40_000 / 9), rel=0.3)


def test_the_interval_holds_what_a_random_pace_does_in_nine_of_ten_runs() -> None:
    import random

    chance = random.Random(7)  # no secret
    inside = 0
    runs = 400
    for _ in range(runs):
        hands = Hands()
        tracker = organization(hands)
        session = tracker.start(Registration("s", total_pages=60))
        tracker.report([Report(sequence=1, total_pages=60)])
        for page in range(1, 31):
            hands.seconds += chance.gammavariate(4.0, 1.0)
            tracker.report([Report(sequence=page + 1, current_page=page, total_pages=60)])
        tracker.settle()
        forecast = eta.forecast(session, hands.seconds)
        assert forecast is not None
        inside += forecast.low <= sum(chance.gammavariate(4.0, 1.0) for _ in range(30)) <= forecast.high
    assert 0.82 <= inside / runs <= 0.97, inside / runs


def test_another_stage_has_a_pace_of_its_own_and_slow_is_told_from_stalled_by_the_last_one() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s", stage="list", total_pages=100))
    tracker.report([Report(sequence=1, total_pages=100)])
    for page in range(1, 6):
        hands.seconds += 10
        tracker.report([Report(sequence=page + 1, current_page=page, total_pages=100)])
    tracker.settle()
    assert eta.forecast(session, hands.seconds) is not None
    tracker.report([Report(sequence=7, current_page=5, total_pages=100, stage="detail")])
    assert eta.forecast(session, hands.seconds) is None, "unknown in the new stage"
    assert eta.pages_per_second(session) == 0.0
    hands.seconds += 95
    tracker.mark_silence(session)
    assert session.state == State.RUNNING, "ten pages of 10 s of the last stage"
    tracker.report([Report(sequence=8, current_page=6, total_pages=100, stage="detail")])
    for page in range(7, 40):
        hands.seconds += 1
        tracker.report([Report(sequence=page + 2, current_page=page, total_pages=100)])
    tracker.settle()
    forecast = eta.forecast(session, hands.seconds)
    assert forecast is not None
    hands.seconds += 60
    tracker.mark_silence(session)
    assert session.state == State.STALLED
    assert session.reason.startswith("no page for 60 s at ")


def test_the_series_holds_the_last_five_minutes_in_spans_of_ten_seconds() -> None:
    assert read(b"", 1000.0) == [0] * SPANS
    series = add(b"", 3, 1001.0)
    series = add(series, 2, 1009.9)
    series = add(series, 7, 1010.0)
    assert read(series, 1010.0)[-2:] == [5, 7]
    assert read(series, 1035.0)[-5:] == [0, 5, 7, 0, 0]
    assert sum(read(series, 1299.0)) == 12
    assert read(series, 1300.0)[0] == 7, "the first span has left"
    assert read(series, 9999.0) == [0] * SPANS
    series = add(series, 2**32, 9999.0)
    assert read(series, 9999.0)[-1] == 2**32 - 1
    assert read(add(series, 1, 9000.0), 10_000.0)[-2] == 2**32 - 1, "a clock that is behind counts in the newest span"
    for span in range(100):
        series = add(series, span, 20_000.0 + 10 * span)
    assert read(series, 20_990.0) == list(range(70, 100))
    assert len(series) == 5 + SPANS


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


def test_a_session_stalls_after_ten_of_its_own_pages_and_comes_back_by_a_page() -> None:
    hands = Hands()
    tracker = organization(hands)
    session = tracker.start(Registration("s"))
    for page in range(1, 6):
        tracker.report([Report(sequence=page, current_page=page)])
        hands.seconds += 10
    hands.seconds += 85
    tracker.mark_silence(session)
    assert session.state == State.RUNNING, "30 s are long past, but a page takes it 10 s"
    tracker.report([Report(sequence=6, current_page=5)])
    hands.seconds += 10
    tracker.mark_silence(session)
    assert session.state == State.STALLED
    tracker.report([Report(sequence=7, current_page=5)])
    assert session.state == State.STALLED, "a report without a page is no progress"
    tracker.report([Report(sequence=8, current_page=6)])
    assert session.state == State.RUNNING
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
    assert session.state == State.PAUSED
    assert remaining(session, hands.seconds) is None
    tracker.report([Report(sequence=6, current_page=4, total_pages=10)])
    assert session.interval == pytest.approx(2.0)
    assert remaining(session, hands.seconds) == pytest.approx(12.0)
