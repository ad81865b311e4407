"""When a target is left alone: the rule itself."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.clients import ClientIdentity
from allocator.exit_health import Signal
from allocator.leases import LeaseName, Status
from allocator.results import Submission
from allocator.targets import BackOff, News, target_name

BACK_OFF = BackOff(base_seconds=60, limit_seconds=1800, window_seconds=600, least_results=10, block_rate=0.10)


@given(results=st.integers(0, 2000), blocked=st.integers(0, 2000))
def test_more_than_a_tenth_of_at_least_ten(results: int, blocked: int) -> None:
    assert BACK_OFF.is_due(blocked, results) == (results >= 10 and 10 * blocked > results)


@given(percent=st.integers(0, 99), hundreds=st.integers(1, 10))
def test_a_rate_that_is_just_reached_is_not_passed(percent: int, hundreds: int) -> None:
    back_off = BackOff(60, 1800, 600, 10, percent / 100)
    assert not back_off.is_due(percent * hundreds, 100 * hundreds)
    assert back_off.is_due(percent * hundreds + 1, 100 * hundreds)


def test_the_reason_says_the_figures() -> None:
    assert BACK_OFF.reason(3, 20) == "3 of the last 20 results within 10 minutes were blocked"


def test_a_slot_without_a_target_is_its_own() -> None:
    slot_id = uuid.uuid4()
    assert target_name("shop.example", slot_id) == "shop.example"
    assert target_name("", slot_id) == f"slot:{slot_id}"


@pytest.mark.parametrize(
    ("news", "matters"),
    [
        (News(None, results=5), False),
        (News(None, results=5, blocked=1), True),
        (News(None, results=1, retry_after_ms=1), True),
        (News(None, results=1, crawl_delay_ms=0), True),
        (News(None, results=1, probe_key=uuid.UUID(int=1)), True),
    ],
)
def test_good_runs_are_no_news(news: News, matters: bool) -> None:
    assert news.matter() is matters


@pytest.mark.parametrize(
    ("status", "signal", "retry_after_ms", "well"),
    [
        (Status.SUCCEEDED, None, None, True),
        (Status.SUCCEEDED, Signal.TRANSPORT, 0, True),
        (Status.SUCCEEDED, Signal.RATE_LIMITED, None, False),
        (Status.SUCCEEDED, None, 1, False),
        (Status.FAILED, None, None, None),
        (Status.FAILED, Signal.TRANSPORT, None, None),
        (Status.FAILED, Signal.RATE_LIMITED, None, False),
        (Status.FAILED, Signal.BLOCKED, None, False),
        (Status.FAILED, None, 60_000, False),
        (Status.BLOCKED, Signal.BLOCKED, None, False),
        (Status.BLOCKED, Signal.TRANSPORT, None, False),
    ],
)
def test_only_success_is_good_and_only_a_refusal_is_bad(
    status: Status, signal: Signal | None, retry_after_ms: int | None, well: bool | None
) -> None:
    submission = Submission(
        name=LeaseName(uuid.uuid4(), uuid.uuid4()),
        client=ClientIdentity("pc-1", "", 0, 0, ""),
        status=status,
        block_type="",
        execution_time_ms=1,
        applied_settings={},
        exit_ip="",
        products=(),
        retry_after_ms=retry_after_ms,
        error_message="",
        persona_used=False,
        exit_signal=signal,
    )
    assert submission.went_well is well
