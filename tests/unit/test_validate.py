"""Field checks: what passes, what does not, and what the caller is told."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from muster.allocator.v1 import work_pb2
from muster.session_tracker.v1 import session_pb2

from services.errors import InvalidField
from services.validate import Checks


def violations(check: Checks) -> list[tuple[str, str]]:
    with pytest.raises(InvalidField) as caught:
        check.done()
    return [(violation.field, violation.rule) for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("method", "arguments", "keywords"),
    [
        ("uuid", ("f", "0198c0de-0000-7000-8000-000000000001"), {}),
        ("uuid", ("f", ""), {"required": False}),
        ("text", ("f", "노트북\tx\n"), {"max_length": 10}),
        ("identifier", ("f", "host-1.example:7_x"), {}),
        ("number", ("f", 3), {"least": 1, "most": 3}),
        ("token", ("f", b"0" * 16), {}),
        ("token", ("f", b""), {"required": False}),
        ("day", ("f", "2024-02-29"), {}),
        ("address", ("f", "::1"), {}),
        ("address", ("f", ""), {}),
        ("json_object", ("f", '{"a": [1, null]}'), {"max_bytes": 100}),
        ("octets", ("f", b"x"), {"most": 1}),
    ],
)
def test_good_values_pass(method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    check = Checks()
    getattr(check, method)(*arguments, **keywords)
    check.done()


@pytest.mark.parametrize(
    ("method", "arguments", "keywords", "said"),
    [
        ("uuid", ("f", ""), {}, "required"),
        ("uuid", ("f", "0198c0de00007000800000000000000100000"), {}, "must be a UUID"),
        ("uuid", ("f", "{198c0de-0000-7000-8000-000000000001}"), {}, "must be a UUID"),
        ("text", ("f", "abc"), {"max_length": 2}, "at most 2 characters, is 3"),
        ("text", ("f", ""), {"max_length": 2, "min_length": 1}, "required"),
        ("text", ("f", "a\x00b"), {"max_length": 9}, "control"),
        ("identifier", ("f", "a b"), {}, "only"),
        ("identifier", ("f", "a\n"), {}, "only"),
        ("number", ("f", 4), {"least": 1, "most": 3}, "from 1 to 3, is 4"),
        ("token", ("f", b"0" * 15), {}, "16 bytes"),
        ("day", ("f", "2023-02-29"), {}, "date"),
        ("day", ("f", "20240229"), {}, "date"),
        ("day", ("f", "0001-01-01"), {}, "date"),
        ("day", ("f", "2026-W01-4"), {}, "date"),
        ("day", ("f", "\u0662026-01-01"), {}, "date"),
        ("address", ("f", "1.2.3"), {}, "IPv4"),
        ("address", ("f", "fe80::1%eth0"), {}, "scope"),
        ("address", ("f", "fe80::1%\x00"), {}, "scope"),
        ("json_object", ("f", "[1]"), {"max_bytes": 100}, "object"),
        ("json_object", ("f", '{"a": NaN}'), {"max_bytes": 100}, "NaN"),
        ("json_object", ("f", "[" * 100_000), {"max_bytes": 10**6}, "JSON"),
        ("json_object", ("f", b"\xff{}"), {"max_bytes": 100}, "UTF-8"),
        ("json_object", ("f", '{"a":1}'), {"max_bytes": 3}, "at most 3 bytes"),
        ("finite", ("f", float("inf")), {}, "finite"),
        ("unique", ("f", ["a", "b", "a"]), {}, "twice"),
        ("count", ("f", []), {"most": 2}, "1 to 2 entries, has 0"),
    ],
)
def test_bad_values_name_field_and_limit(
    method: str, arguments: tuple[Any, ...], keywords: dict[str, Any], said: str
) -> None:
    check = Checks()
    getattr(check, method)(*arguments, **keywords)
    [(field, rule)] = violations(check)
    assert field == "f"
    assert said in rule


def test_all_violations_are_told_at_once() -> None:
    check = Checks()
    check.uuid("a", "x")
    check.number("b", 9, least=0, most=1)
    assert [field for field, _ in violations(check)] == ["a", "b"]


def test_of_very_many_violations_the_first_are_told_and_the_rest_counted() -> None:
    check = Checks()
    for place in range(100_000):
        check.identifier(f"노트북[{place}].endpoint", "a b")
    with pytest.raises(InvalidField) as caught:
        check.done()
    told = caught.value.violations
    assert told[0].field == "노트북[0].endpoint"
    assert caught.value.message.endswith(f"; and {100_000 - len(told)} more")
    assert len(caught.value.message.encode()) < 1500


def test_one_violation_is_told_however_long_it_is() -> None:
    check = Checks()
    check.fail("f", "x" * 2000)
    assert violations(check) == [("f", "x" * 2000)]


def test_durations_and_moments() -> None:
    check = Checks()
    request = work_pb2.AllocateWorkRequest()
    assert check.duration(request, "wait", least=0, most=30) is None
    request.wait.FromMilliseconds(1500)
    assert check.duration(request, "wait", least=0, most=30) == 1.5
    start = session_pb2.StartSessionRequest(started_at=Timestamp(seconds=86_400))
    moment = check.moment(start, "started_at")
    assert moment is not None
    assert moment.date() == date(1970, 1, 2)
    check.done()

    request.wait.FromSeconds(31)
    check.duration(request, "wait", least=0, most=30)
    # A nanosecond field out of range, and a year that Python cannot hold.
    check.moment(session_pb2.StartSessionRequest(started_at=Timestamp(seconds=1, nanos=-1)), "started_at")
    check.moment(session_pb2.StartSessionRequest(started_at=Timestamp(seconds=10**15)), "started_at")
    check.duration(work_pb2.WorkResult(), "execution_time", least=0, most=1, required=True)
    assert [field for field, _ in violations(check)] == ["wait", "started_at", "started_at", "execution_time"]
