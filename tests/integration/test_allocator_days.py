"""Days: made at midnight of the organization's time zone, a while before, and when first needed; the month's turn."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from muster.allocator.v1 import exit_pb2, insight_pb2, work_pb2

from allocator import upkeep as upkeep_module
from allocator.allocation_store import AllocationStore
from allocator.leases import work_dates
from allocator.partitions import TABLES, Partitions
from allocator.upkeep import Upkeep
from services import partitions as planning
from services.call import Role
from services.postgres import Database
from tests.support.acts import Office, act
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

# The first and the last midnight of a day on earth, and between them.
ZONES = ("Pacific/Kiritimati", "Asia/Seoul", "UTC", "America/New_York", "Pacific/Pago_Pago")


async def allocator_in(start_service: StartService, zone: str = "UTC") -> Allocator:
    """An allocator whose organization's days begin in a time zone."""
    service = await start_service("allocator", leases={"sweep_seconds": 60})
    for role in (Role.WORKER, Role.OPERATOR, Role.ADMIN):
        await service.key(role, time_zone=zone)
    return await Allocator.of(service)


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    return await allocator_in(start_service)


@pytest.fixture
async def upkeep(allocator: Allocator) -> AsyncIterator[Upkeep]:
    """The same upkeep as the service's, to be run when a test wants it."""
    database = await Database.connect(allocator.service.chassis.config.postgres, "upkeep", search_path="allocator")
    partitions = Partitions(database)
    yield Upkeep(database, AllocationStore(database, partitions), partitions)
    await database.close()


async def set_local_time(allocator: Allocator, hours: float) -> None:
    """Moves the organization to a time zone where so many hours have passed since a midnight of UTC's today.

    From 24 on it is tomorrow there.
    """
    (row,) = await allocator.sql(
        "SELECT extract(epoch FROM (now() AT TIME ZONE 'UTC') - (now() AT TIME ZONE 'UTC')::date)::float8 AS seconds"
    )
    offset = round(hours * 3600 - row["seconds"])
    sign, size = "-" if offset >= 0 else "+", abs(offset)
    # POSIX counts to the west.
    zone = f"<Test>{sign}{size // 3600:02}:{size // 60 % 60:02}:{size % 60:02}"
    await allocator.sql("UPDATE organizations SET time_zone = $1", zone)


async def days_of(allocator: Allocator, slot_id: str) -> list[int]:
    """The days that a slot has rows of, counted from UTC's today."""
    rows = await allocator.sql(
        "SELECT work_date - (now() AT TIME ZONE 'UTC')::date AS day FROM daily_work_tracking "
        "WHERE slot_id = $1 ORDER BY work_date",
        uuid.UUID(slot_id),
    )
    return [row["day"] for row in rows]


async def drop_partitions(allocator: Allocator) -> int:
    """Drops all partitions: what a service finds that was not running for so long that none of its own is left."""
    rows = await allocator.sql(
        "SELECT c.oid::regclass::text AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'allocator' AND c.relispartition AND c.relkind = 'r'"
    )
    for row in rows:
        await allocator.sql(f"DROP TABLE {row['name']}")
    return len(rows)


@pytest.mark.parametrize("zone", ZONES)
async def test_the_turn_of_the_month_does_not_fail_though_nothing_ran_for_a_month(
    start_service: StartService, zone: str
) -> None:
    allocator = await allocator_in(start_service, zone)
    office = await Office.of(allocator)
    assert await drop_partitions(allocator) >= len(TABLES)
    # Each kind of write meets its tables without a partition for today, and makes them.
    slot = await allocator.slot(without_exit=False, daily_quota=10)
    await allocator.update(slot.slot_id, keyword="tablet")
    (exit_,) = await allocator.add_exits(1, cap=10)
    toggle = exit_pb2.ToggleExitRequest(request_id=str(uuid.uuid4()), exit_id=exit_.exit_id)
    await allocator.exits.ToggleExit(toggle, metadata=allocator.operator)
    units = await allocator.take(4)
    assert {unit.work_date for unit in units} == {datetime.now(ZoneInfo(zone)).date().isoformat()}
    await drop_partitions_but_the_days(allocator)
    done = result(units[0], products=[work_pb2.Product(product_id="p1", title="one")])
    (answer,) = await allocator.submit(done)
    assert answer.disposition == work_pb2.RESULT_DISPOSITION_RECORDED
    await allocator.release(lease(units[1]))
    assert await office.revoke(act(), units[2].allocation_key) == [""]
    counters = await allocator.tracking(slot.slot_id)
    assert [counters[name] for name in ("allocated", "succeeded", "released", "expired")] == [4, 1, 1, 1]
    assert len(await office.entries()) == 1
    await allocator.check_invariants()


async def drop_partitions_but_the_days(allocator: Allocator) -> None:
    """Drops the partitions of the logs that a result writes."""
    for table in ("work_allocations", "work_results", "product_results", "client_activity_logs", "audit_log"):
        rows = await allocator.sql(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = $1::text::regclass",
            f"allocator.{table}",
        )
        for row in rows:
            await allocator.sql(f"DROP TABLE {row['name']}")


async def test_missing_partitions_are_counted_and_made(allocator: Allocator, upkeep: Upkeep) -> None:
    partitions = upkeep._partitions
    assert await partitions.missing() == 0
    await allocator.sql("DROP TABLE work_results_" + f"{date.today():%Y_%m}")
    assert await partitions.missing() == 1
    await partitions.ensure()
    assert await partitions.missing() == 0
    rows = await allocator.sql(
        "SELECT count(*) AS loose FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = 'allocator.daily_work_tracking'::regclass AND 'fillfactor=25' = ANY (c.reloptions)"
    )
    assert rows[0]["loose"] == 5


async def test_a_lease_from_before_a_long_downtime_ends_though_its_week_was_archived(
    start_service: StartService,
) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))
    await allocator.slot()
    swept, released = await allocator.take(2)
    day = date.fromisoformat(swept.work_date) - timedelta(days=21)
    await allocator.sql("UPDATE leases SET work_date = $1", day)
    await allocator.run_out(swept)
    week = planning.Partition.of("allocator", "work_allocations", planning.Interval.WEEK, day)
    assert (await allocator.sql("SELECT to_regclass($1) IS NULL AS gone", week.name))[0]["gone"]
    # The replica that runs makes it when it meets it, and one that starts does so at once.
    assert not (await allocator.release(lease(released)))[0].HasField("error")
    await allocator.sql(f"DROP TABLE {week.name}")
    again = await Allocator.of(
        await start_service("allocator", database=allocator.service.database, leases={"sweep_seconds": 0.02})
    )
    await again.swept(swept)
    (row,) = await allocator.sql("SELECT work_date, status FROM work_allocations")
    assert tuple(row) == (day, 5)
    assert not again.service.chassis.failed


async def test_a_table_whose_partitions_cannot_be_made_does_not_keep_the_others(
    allocator: Allocator, upkeep: Upkeep
) -> None:
    database = await Database.connect(
        allocator.service.chassis.config.postgres, "partitions", search_path="allocator", lock_timeout="50"
    )
    partitions = Partitions(database)
    assert await partitions.ensure()
    assert await drop_partitions(allocator) > len(TABLES)
    kept_back = next(iter(TABLES))
    door = await allocator.connect()
    async with door.transaction():
        # As a VACUUM would, or another who changes the table.
        await door.execute(f"LOCK TABLE {kept_back} IN SHARE UPDATE EXCLUSIVE MODE")
        assert not await partitions.ensure()
        assert await partitions.missing() == 4
    assert await partitions.ensure()
    assert await partitions.missing() == 0
    await door.close()
    await database.close()


async def test_partitions_that_cannot_be_made_do_not_keep_the_days(
    upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, rounds = 0, 0

    async def ensure() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 3

    async def make_round() -> None:
        nonlocal rounds
        rounds += 1

    monkeypatch.setattr(upkeep._partitions, "ensure", ensure)
    monkeypatch.setattr(upkeep, "round", make_round)
    monkeypatch.setattr(upkeep_module, "_ROUND_SECONDS", 0.0)
    running = asyncio.create_task(upkeep.rounds_for_ever())

    async def has_gone_on() -> bool:
        return rounds >= 10

    await until(has_gone_on)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    # In each round until all stand, and then once an hour.
    assert asked == 3 + (rounds - 3) // 60


def test_what_is_made_on_any_day_holds_that_day_in_every_time_zone() -> None:
    """Three years, the first and the last moment of each day, in every zone: keys and dates find their partition."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    while moment.year < 2029:
        for at in (moment, moment + timedelta(hours=23, minutes=59, seconds=59)):
            days = {at.astimezone(ZoneInfo(zone)).date() for zone in ZONES}
            key = uuid.UUID(int=int(at.timestamp() * 1000) << 80)
            assert days <= set(work_dates([key]))
            for table, interval in TABLES.items():
                made = planning.planned("allocator", table, interval, at.date(), ahead=3, behind=1)
                assert all(any(part.begin <= day < part.end for part in made) for day in days), (at, table)
                # Weeks without the service: what was made then still holds.
                later = at.date() + timedelta(days=21)
                assert any(part.begin <= later < part.end for part in made), (at, table)
        moment += timedelta(days=1)


@pytest.mark.parametrize("zone", ZONES)
async def test_the_day_is_the_organizations_own(start_service: StartService, zone: str) -> None:
    allocator = await allocator_in(start_service, zone)
    slot = await allocator.slot(daily_quota=2)
    (unit,) = await allocator.take()
    today = datetime.now(ZoneInfo(zone)).date().isoformat()
    assert unit.work_date == today
    assert (await allocator.tracking(slot.slot_id))["allocated"] == 1


async def test_tomorrows_rows_are_made_a_while_before_midnight_and_no_sooner(
    allocator: Allocator, upkeep: Upkeep
) -> None:
    slot = await allocator.slot()
    await allocator.slot(end_date=f"{datetime.now(UTC).date()}")
    await allocator.sql("DELETE FROM daily_work_tracking")
    await allocator.sql("DELETE FROM tracked_days")
    await set_local_time(allocator, 23.75)
    await upkeep.round()
    assert await days_of(allocator, slot.slot_id) == [0]
    await set_local_time(allocator, 23.9)
    for _ in range(2):
        await upkeep.round()
    assert await days_of(allocator, slot.slot_id) == [0, 1]
    # Not for the slot that ends today.
    rows = await allocator.sql("SELECT FROM daily_work_tracking WHERE work_date > (now() AT TIME ZONE 'UTC')::date")
    assert len(rows) == 1
    await set_local_time(allocator, 24.01)
    assert len((await allocator.ask(3)).allocations) == 3
    counted = await allocator.sql(
        "SELECT allocated FROM daily_work_tracking WHERE slot_id = $1 ORDER BY work_date", uuid.UUID(slot.slot_id)
    )
    assert [row["allocated"] for row in counted] == [0, 3]


async def test_a_day_that_nobody_made_is_made_when_it_is_first_needed(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=2)
    await allocator.take(2)
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_QUOTA_EXHAUSTED
    await set_local_time(allocator, 24.1)
    assert len((await allocator.ask(5)).allocations) == 2
    assert await days_of(allocator, slot.slot_id) == [0, 1]
    await allocator.check_invariants()


async def test_todays_reports_are_of_the_day_that_it_is(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=4)
    await set_local_time(allocator, 12)
    await allocator.take(2)
    (row,) = (await dashboard(allocator)).rows
    assert row.tracking.allocated == 2
    await set_local_time(allocator, 36)
    # Nothing was written since, so what was read of the day before is still kept.
    assert row.tracking.work_date not in {later.tracking.work_date for later in (await dashboard(allocator)).rows}
    assert (await dashboard(allocator, work_date=row.tracking.work_date)).rows == [row]


async def test_pages_stay_on_the_day_on_which_they_were_begun(allocator: Allocator) -> None:
    for _ in range(3):
        await allocator.slot(daily_quota=1)
    await set_local_time(allocator, 12)
    units = await allocator.take(3)
    shown = await dashboard(allocator, page_size=2)
    listed = await allocations(allocator, page_size=2)
    await set_local_time(allocator, 36)
    await allocator.take(3)
    shown_next = await dashboard(allocator, page_size=2, page_token=shown.next_page_token)
    rows = [*shown.rows, *shown_next.rows]
    assert {(row.slot_id, row.tracking.work_date) for row in rows} == {(unit.slot_id, unit.work_date) for unit in units}
    listed_next = await allocations(allocator, page_size=2, page_token=listed.next_page_token)
    found = [*listed.allocations, *listed_next.allocations]
    assert {one.allocation_key for one in found} == {unit.allocation_key for unit in units}
    assert not shown_next.next_page_token
    assert not listed_next.next_page_token


async def dashboard(allocator: Allocator, **values: Any) -> insight_pb2.GetDashboardResponse:
    """Reads a page of the dashboard, of today unless a day is given."""
    return await allocator.insight.GetDashboard(insight_pb2.GetDashboardRequest(**values), metadata=allocator.operator)


async def allocations(allocator: Allocator, **values: Any) -> insight_pb2.ListAllocationsResponse:
    """Reads a page of allocations, of today unless a day is given."""
    request = insight_pb2.ListAllocationsRequest(**values)
    return await allocator.insight.ListAllocations(request, metadata=allocator.operator)


async def test_a_lease_that_straddles_midnight_counts_on_its_lease_date(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=4)
    await set_local_time(allocator, 12)
    done, failed, released, lapsed = await allocator.take(4)
    await set_local_time(allocator, 36)
    fresh = await allocator.take(1)
    assert fresh[0].work_date > done.work_date
    assert (await allocator.renew(lease(done)))[0].HasField("expires_at")
    await allocator.submit(result(done), result(failed, 2))
    await allocator.release(lease(released))
    await allocator.run_out(lapsed)
    (answer,) = await allocator.submit(result(lapsed))
    assert answer.disposition == work_pb2.RESULT_DISPOSITION_RECORDED_LATE
    rows = await allocator.sql(
        "SELECT allocated, succeeded, failed, released FROM daily_work_tracking WHERE slot_id = $1 ORDER BY work_date",
        uuid.UUID(slot.slot_id),
    )
    assert [tuple(row) for row in rows] == [(4, 2, 1, 1), (1, 0, 0, 0)]
    dates = await allocator.sql("SELECT DISTINCT work_date::text AS day FROM work_results")
    assert [row["day"] for row in dates] == [done.work_date]
    await allocator.check_invariants()


@pytest.mark.parametrize(
    ("zone", "day", "hours", "begins"),
    [
        ("America/New_York", date(2026, 3, 8), 23, "2026-03-08T05:00:00+00:00"),
        ("America/New_York", date(2026, 11, 1), 25, "2026-11-01T04:00:00+00:00"),
        ("America/New_York", date(2026, 11, 2), 24, "2026-11-02T05:00:00+00:00"),
        ("Asia/Seoul", date(2026, 3, 8), 24, "2026-03-07T15:00:00+00:00"),
        # Clocks go from 23:59:59 to 01:00:00: the day has no midnight.
        ("Africa/Cairo", date(2026, 4, 24), 23, "2026-04-23T22:00:00+00:00"),
    ],
)
async def test_a_paced_day_is_as_long_as_it_is(
    allocator: Allocator, zone: str, day: date, hours: int, begins: str
) -> None:
    slot = await allocator.slot(daily_quota=24)
    await allocator.sql("UPDATE organizations SET time_zone = $1", zone)
    await allocator.sql("UPDATE work_slots SET pacing = 2")
    organization_id = await allocator.service.organization_id()
    if not await covered(allocator, day):
        begin = day.replace(day=1)
        await allocator.sql(
            "CREATE TABLE the_month PARTITION OF daily_work_tracking "
            f"FOR VALUES FROM ('{begin}') TO ('{planning.Interval.MONTH.after(begin)}')"
        )
    await allocator.sql("SELECT track_slots($1, $2, ARRAY[$3::uuid])", organization_id, day, uuid.UUID(slot.slot_id))
    (row,) = await allocator.sql(
        "SELECT paced_from, paced_seconds, open_at FROM daily_work_tracking WHERE work_date = $1", day
    )
    assert row["paced_seconds"] == hours * 3600
    assert datetime.fromtimestamp(row["paced_from"], UTC).isoformat() == begins
    assert row["open_at"] == row["paced_from"]


async def covered(allocator: Allocator, day: date) -> bool:
    """Whether a partition for the days' rows of a month stands."""
    rows = await allocator.sql("SELECT to_regclass($1) IS NOT NULL AS stands", f"daily_work_tracking_{day:%Y_%m}")
    return bool(rows[0]["stands"])
