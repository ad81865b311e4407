"""The allocator's pure parts: shares, differences, keys and what they say of days."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, timedelta

import pytest
import uuid_utils.compat as uuids

from allocator.app import CONFIG
from allocator.errors import SlotNotFound
from allocator.leases import work_dates
from allocator.packages import Demand, Package, Task, Terms
from allocator.slots import PersonaNeed, SlotSpec, changed
from allocator.translation import item_error
from services.config import load
from services.errors import Overloaded, StartupError

SPEC = SlotSpec("laptop", date(2024, 1, 1), date(2024, 1, 31), 100)


def test_a_key_names_the_days_around_its_time() -> None:
    moment = datetime(2026, 2, 28, 23, 59, tzinfo=UTC)
    key = uuids.uuid7(nanoseconds=int(moment.timestamp()) * 10**9)
    assert work_dates([key, key]) == [date(2026, 2, 27), date(2026, 2, 28), date(2026, 3, 1)]


def test_the_refusal_of_an_item_says_when_to_come_back() -> None:
    full = item_error(Overloaded("the queue is full", retry_after_seconds=0.25, queue="submit"))
    assert full.retry_after.ToTimedelta() == timedelta(milliseconds=250)
    assert (full.reason, dict(full.metadata)) == ("OVERLOADED", {"queue": "submit"})
    assert not item_error(SlotNotFound(uuid.UUID(int=1))).HasField("retry_after")


@pytest.mark.parametrize("key", [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), uuid.UUID(int=253_402_300_799_999 << 80)])
def test_a_key_that_nobody_made_names_no_day_that_matters(key: uuid.UUID) -> None:
    assert all(date(1970, 1, 1) <= day for day in work_dates([key]))


def test_a_difference_tells_types_apart_and_nothing_from_nothing() -> None:
    spec, difference = changed(SPEC, {"settings": {"a": 1}, "daily_quota": 100})
    assert difference == '{"settings": [{}, {"a": 1}]}'
    assert changed(spec, {"settings": {"a": 1}})[1] is None
    assert changed(spec, {"settings": {"a": True}})[1] is not None
    assert changed(spec, {"settings": {"a": 1.0}})[1] is not None


def test_equal_needs_have_equal_texts() -> None:
    need = PersonaNeed(tags=("a", "b"), region="kr", min_aging_level=2, cool_down_seconds=60)
    assert PersonaNeed.from_json(need.to_json()) == need
    assert PersonaNeed.from_json(None) is None


def test_a_unit_without_a_callers_trace_begins_its_own() -> None:
    key = uuids.uuid7()
    now = datetime.now(UTC)
    task = Task(key, "k", "", "", {}, None, "", "")
    package = Package(key, uuid.uuid4(), task, Terms(now.date(), now, now), Demand(key, b"", "pc", 0, 1, "", "", ""))
    assert package.own_traceparent() == f"00-{key.hex}-{key.hex[16:]}-01"


def test_the_defaults_stand_and_an_unknown_key_is_fatal() -> None:
    config = load(CONFIG, "allocator", None, {})
    assert (config.grpc.listen, config.metrics.listen) == ("127.0.0.1:7401", "127.0.0.1:9401")
    assert (config.leases.duration_seconds, config.exits.limit) == (300, 500)
    with pytest.raises(StartupError, match="duration_second"):
        load(CONFIG, "allocator", None, {"MUSTER_ALLOCATOR__LEASES__DURATION_SECOND": "5"})
    with pytest.raises(StartupError, match="duration_seconds"):
        load(CONFIG, "allocator", None, {"MUSTER_ALLOCATOR__LEASES__DURATION_SECONDS": "0"})
