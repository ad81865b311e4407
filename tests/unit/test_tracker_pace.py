"""Pace, forecast and throughput of a session, on an injected clock."""

from __future__ import annotations

import math

import pytest

from session_tracker import eta
from session_tracker.series import SPANS, add, read
from session_tracker.sessions import Registration, State
from tests.unit.test_tracker_sessions import Hands, Report, organization


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
