"""The archiver's rules that need no database: ranges, retention, schedules, settings, file schemas, fingerprints."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from archiver import columns
from archiver.columns import Column
from archiver.config import ArchiverConfig
from archiver.fingerprints import ColumnFigures, Fingerprint, of_sums
from archiver.policies import DEFAULTS, Policy, past_retention
from archiver.scans import Range
from archiver.schedule import missed
from archiver.tables import _BOUND, _DAY
from services.config import load
from services.errors import StartupError
from services.partitions import Interval

DAY = date(2025, 8, 31)


def test_default_policies_are_those_of_the_documents() -> None:
    found = {policy.table: (policy.interval, policy.hot_retention_days) for policy in DEFAULTS}
    assert found == {
        "work_allocations": (Interval.WEEK, 7),
        "work_results": (Interval.MONTH, 90),
        "product_results": (Interval.MONTH, 90),
        "client_activity_logs": (Interval.WEEK, 90),
        "exit_toggle_logs": (Interval.MONTH, 90),
        "work_slots_history": (Interval.MONTH, 90),
        "daily_work_tracking": (Interval.MONTH, 30),
    }


@pytest.mark.parametrize(
    ("hot_days", "end", "past"),
    [
        (0, date(1970, 1, 1), False),
        (30, DAY - timedelta(days=29), False),
        (30, DAY - timedelta(days=30), True),
        (1, DAY, False),
    ],
)
def test_retention_counts_whole_partitions(hot_days: int, end: date, past: bool) -> None:
    policy = Policy("t", "s", "s", "t", Interval.DAY, hot_retention_days=hot_days)
    assert past_retention(policy, end, DAY) is past


@pytest.mark.parametrize(
    ("begin", "end", "overlaps", "contains"),
    [
        (None, None, True, True),
        (date(2025, 8, 4), date(2025, 8, 11), True, True),
        (date(2025, 8, 5), None, True, False),
        (None, date(2025, 8, 10), True, False),
        (date(2025, 8, 11), None, False, False),
        (None, date(2025, 8, 4), False, False),
    ],
)
def test_ranges(begin: date | None, end: date | None, overlaps: bool, contains: bool) -> None:
    week = (date(2025, 8, 4), date(2025, 8, 11))
    assert Range(begin, end).overlaps(*week) is overlaps
    assert Range(begin, end).contains(*week) is contains


@pytest.mark.parametrize(
    ("began", "now", "expected"),
    [
        ("2025-08-30T03:00:01", "2025-08-30T12:00", False),
        ("2025-08-29T03:00:01", "2025-08-30T12:00", True),
        ("2025-08-29T03:00:01", "2025-08-30T02:59", False),
    ],
)
def test_catch_up_after_downtime(began: str, now: str, expected: bool) -> None:
    zone = ZoneInfo("Asia/Seoul")
    moment = datetime.fromisoformat(began).replace(tzinfo=zone).astimezone(UTC)
    assert missed("0 3 * * *", moment, datetime.fromisoformat(now).replace(tzinfo=zone)) is expected


@pytest.mark.parametrize(
    ("bound", "days"),
    [
        ("FOR VALUES FROM ('2025-08-01') TO ('2025-09-01')", ("2025-08-01", "2025-09-01")),
        ("FOR VALUES FROM ('2025-08-01 00:00:00+00') TO ('2025-09-01 00:00:00+00')", ("2025-08-01", "2025-09-01")),
        ("FOR VALUES FROM ('2025-08-01 00:00:00') TO ('2025-09-01 00:00:00')", ("2025-08-01", "2025-09-01")),
        ("FOR VALUES FROM ('2025-08-01 09:00:00+00') TO ('2025-09-01 00:00:00+00')", None),
        ("FOR VALUES FROM (MINVALUE) TO ('2025-09-01')", None),
        ("FOR VALUES FROM ('2025-08-01', 1) TO ('2025-09-01', 1)", None),
        ("FOR VALUES FROM ('-infinity') TO ('2025-09-01')", None),
        ("FOR VALUES FROM ('0044-03-15 BC') TO ('2025-09-01')", None),
    ],
)
def test_bounds(bound: str, days: tuple[str, str] | None) -> None:
    match = _BOUND.match(bound)
    found = [_DAY.match(text) for text in match.groups()] if match else []
    assert (tuple(one[1] for one in found if one) if found and all(found) else None) == days


def test_columns_of_all_times() -> None:
    newest = (Column("a", "int64"), Column("c", "text"))
    older = [(Column("a", "int32"), Column("b", "decimal(12,3)")), (Column("d", "bytes"),)]
    assert columns.merged(newest, older) == (*newest, Column("b", "decimal(12,3)"), Column("d", "bytes"))
    assert columns.from_json(columns.to_json(older[0])) == older[0]
    assert str(columns.schema_of(older[0]).field("b").type) == "decimal128(12, 3)"


def test_fingerprints_say_where_they_differ() -> None:
    one = of_sums(
        (Column("a", "int64"), Column("b", "text")), 2, ["2", "-1", "7", "1", "2", "0", None, None, None, None]
    )
    assert one.figures["a"] == ColumnFigures(2, 2**64 - 1, 7, "1", "2")
    assert one.figures["b"] == ColumnFigures(0, 0, 0, None, None)
    assert Fingerprint.from_json(one.to_json()) == one
    assert one.difference(one) == ""
    assert "2 rows against 3" in one.difference(Fingerprint(3, one.figures))
    changed = Fingerprint(2, {**one.figures, "a": ColumnFigures(2, 2**64 - 1, 8, "1", "2")})
    assert one.difference(changed) == "column a: tie 7 against 8"
    assert "only one has the column" in one.difference(Fingerprint(2, {"a": one.figures["a"]}))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[archiver]\nunknown = 1", "unknown: unknown key"),
        ("[archiver.schedule]\narchive = 'daily'", "schedule.archive"),
        ("[archiver.schedule]\ntime_zone = 'Mars/Olympus'", "schedule.time_zone"),
        ("[archiver.query]\nmemory_bytes = 1", "query.memory_bytes"),
        ("[[archiver.policies]]\nname = 'A'\nsource = 's'\ntable = 't.t'\ninterval = 'day'", "policies.0.name"),
        ("[[archiver.policies]]\nname = 'a'\nsource = 's'\ntable = 't'\ninterval = 'year'", "policies.0.interval"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "muster.toml"
    file.write_text(text)
    with pytest.raises(StartupError, match=word):
        load(ArchiverConfig, "archiver", file, {})


def test_settings_have_usable_defaults(tmp_path: Path) -> None:
    config = load(ArchiverConfig, "archiver", None, {})
    assert (config.grpc.listen, config.metrics.listen) == ("127.0.0.1:7404", "127.0.0.1:9404")
    file = tmp_path / "muster.toml"
    file.write_text(
        "[archiver.sources.allocator]\ndsn = 'postgresql:///a'\n"
        "[[archiver.policies]]\nname = 'a'\nsource = 'allocator'\ntable = 'allocator.t'\ninterval = 'week'\n"
    )
    config = load(ArchiverConfig, "archiver", file, {})
    assert config.sources["allocator"].resolved_dsn() == "postgresql:///a"
    assert config.policies[0].ahead == 3
