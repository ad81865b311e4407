"""Weekly statistics: equal to a plain count, cut at the organization's Mondays, caught up, and never counted twice."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from muster.allocator.v1 import insight_pb2

from allocator.partitions import Partitions
from allocator.weekly import WeeklyStatistics
from allocator.weekly_store import WeeklyStore
from services import partitions as planning
from services.call import Role
from services.partitions import Interval
from services.postgres import Database, queries
from tests.support.acts import Office, act
from tests.support.allocator import Allocator, result, until
from tests.support.services import StartService

_SEOUL = ZoneInfo("Asia/Seoul")
_INSTANT = timedelta(microseconds=1)
_SUM = "results, succeeded, failed, blocked, execution_ms"


@dataclass(frozen=True, slots=True)
class Done:
    """A result: when it came, from whom, its outcome (2 to 4), how long it took."""

    at: datetime
    client: str = "pc-1"
    outcome: int = 2
    milliseconds: int = 1


@dataclass(slots=True)
class Weeks:
    """An allocator whose organization lives in Seoul, and the same statistics as its own, made when a test wants it."""

    allocator: Allocator
    door: asyncpg.Connection[asyncpg.Record]
    store: WeeklyStore
    statistics: WeeklyStatistics
    organization: uuid.UUID

    async def stands(self, name: str, zone: str) -> uuid.UUID:
        """Makes another organization known."""
        found = await self.allocator.service.organization_id(name)
        await self.door.execute("INSERT INTO organizations VALUES ($1, $2)", found, zone)
        return found

    async def partition(self, *days: date) -> None:
        """Sees to it that results of these days and those around them have their partitions."""
        for day in days:
            wanted = planning.planned("allocator", "work_results", Interval.MONTH, day, ahead=1, behind=1)
            await planning.ensure(self.door, "allocator", "work_results", wanted)

    async def record(self, organization: uuid.UUID, done: Sequence[Done]) -> None:
        """Writes results as they stand once they were submitted."""
        await self.door.executemany(
            """INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, client_id,
              client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
              error_message, persona_used, product_count, late)
            VALUES ($1, $2, gen_random_uuid(), '2026-01-01', gen_random_uuid(), $3, '', 0, $4, $4::smallint = 4, '', $5,
              '{}', '', '', false, 0, false)""",
            [(organization, one.at, one.client, one.outcome, one.milliseconds) for one in done],
        )

    async def rows(self, organization: uuid.UUID) -> dict[tuple[date, str], tuple[int, ...]]:
        """Reads what stands."""
        found = await self.door.fetch(
            f"SELECT week, client_id, {_SUM} FROM weekly_statistics WHERE organization_id = $1", organization
        )
        return {(row["week"], row["client_id"]): tuple(row)[2:] for row in found}

    async def moments(self) -> dict[date, datetime]:
        """Reads when each week was computed."""
        found = await self.door.fetch(
            "SELECT week, computed_at FROM weekly_statistics WHERE organization_id = $1 AND client_id = ''",
            self.organization,
        )
        return {row["week"]: row["computed_at"] for row in found}

    async def read(self, **values: Any) -> list[insight_pb2.WeeklyStatistics]:
        """Reads all pages as an operator."""
        rows: list[insight_pb2.WeeklyStatistics] = []
        token = ""
        for _ in range(200):
            page = await self.allocator.insight.ListWeeklyStatistics(
                insight_pb2.ListWeeklyStatisticsRequest(page_token=token, **values), metadata=self.allocator.operator
            )
            rows += page.rows
            if not (token := page.next_page_token):
                return rows
        raise AssertionError("the pages do not end")


@pytest.fixture
async def weeks(start_service: StartService, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Weeks]:
    async def never(_: WeeklyStatistics) -> None:
        await asyncio.Event().wait()

    # Its own first round would come at a moment that no test knows.
    monkeypatch.setattr(WeeklyStatistics, "rounds_for_ever", never)
    service = await start_service("allocator", leases={"sweep_seconds": 0.1})
    for role in (Role.OPERATOR, Role.WORKER, Role.ADMIN):
        await service.key(role, time_zone=_SEOUL.key)
    allocator = await Allocator.of(service)
    await allocator.totals()
    database = await Database.connect(service.chassis.config.postgres, "weekly", search_path="allocator")
    store = WeeklyStore(database, Partitions(database))
    door = allocator.door = await allocator.connect()
    made = Weeks(allocator, door, store, WeeklyStatistics(store), await service.organization_id())
    today = date.today()
    await made.partition(today, *(today - timedelta(days=days) for days in (45, 90, 120)))
    yield made
    await door.close()
    await database.close()


def monday(at: datetime, zone: ZoneInfo) -> date:
    """The Monday of a moment's week somewhere, by other means than the database's."""
    day = at.astimezone(zone).date()
    return day - timedelta(days=day.weekday())


def begins(week: date, zone: ZoneInfo = _SEOUL) -> datetime:
    """When a week begins somewhere."""
    return datetime(week.year, week.month, week.day, tzinfo=zone)


def counted(done: Sequence[Done], zone: ZoneInfo) -> dict[tuple[date, str], tuple[int, ...]]:
    """What results come to, counted one by one."""
    sums: dict[tuple[date, str], list[int]] = {}
    for one in done:
        for client in (one.client, ""):
            row = sums.setdefault((monday(one.at, zone), client), [0] * 5)
            for place, more in enumerate((1, one.outcome == 2, one.outcome == 3, one.outcome == 4, one.milliseconds)):
                row[place] += more
    return {key: tuple(row) for key, row in sums.items()}


def shown(rows: Sequence[insight_pb2.WeeklyStatistics]) -> dict[tuple[date, str], tuple[int, ...]]:
    """What an operator sees."""
    return {
        (date.fromisoformat(row.week), row.client_id): (
            row.results,
            row.succeeded,
            row.failed,
            row.blocked,
            row.execution_ms,
        )
        for row in rows
    }


@pytest.mark.parametrize("seed", range(2))
async def test_weeks_equal_a_plain_count(weeks: Weeks, seed: int) -> None:
    chance = random.Random(seed)
    zones = {weeks.organization: _SEOUL, await weeks.stands("rival", "America/New_York"): ZoneInfo("America/New_York")}
    now = datetime.now(tz=UTC)
    borders = [begins(monday(now, zone) - timedelta(weeks=n), zone) for n in range(11) for zone in zones.values()]
    done = [
        Done(
            chance.choice(borders) + chance.choice((-1, 0, 1)) * _INSTANT
            if chance.random() < 0.3
            else now - timedelta(days=76) * chance.random(),
            f"pc-{chance.randrange(5)}",
            chance.choice((2, 2, 3, 4)),
            chance.choice((0, 17, 2**31 - 1)),
        )
        for _ in range(900)
    ]
    for organization in zones:
        await weeks.record(organization, done)
    assert await weeks.statistics.round() == len(
        await weeks.door.fetch("SELECT FROM weekly_statistics WHERE client_id = ''")
    )
    for organization, zone in zones.items():
        wanted = {key: row for key, row in counted(done, zone).items() if key[0] < monday(now, zone)}
        kept = await weeks.rows(organization)
        assert {key: row for key, row in kept.items() if row[0]} == wanted
        assert {client for (_, client), row in kept.items() if not row[0]} <= {""}
    # As pages of three, in their order; then by their week and their client. Those of others are not seen.
    wanted = {key: row for key, row in counted(done, _SEOUL).items() if key[0] < monday(now, _SEOUL)}
    listed = await weeks.read(page_size=3)
    assert shown(listed) == wanted
    assert [(row.week, row.client_id) for row in listed] == sorted(
        ((f"{week}", client) for week, client in wanted), key=lambda key: (-int(key[0].replace("-", "")), key[1])
    )
    some = max(week for week, _ in wanted) - timedelta(weeks=2)
    for day in (some, some + timedelta(days=6)):
        assert shown(await weeks.read(week=f"{day}")) == {key: row for key, row in wanted.items() if key[0] == some}
    assert shown(await weeks.read(client_id="pc-3", page_size=2)) == {
        key: row for key, row in wanted.items() if key[1] == "pc-3"
    }
    assert not await weeks.read(week=f"{monday(now, _SEOUL)}")


@pytest.mark.parametrize(
    ("zone", "week", "first", "end"),
    [
        # Across a month's turn in UTC, where partitions are cut.
        ("Pacific/Kiritimati", "2026-06-01", "2026-05-31T10:00", "2026-06-07T10:00"),
        ("Asia/Seoul", "2026-06-01", "2026-05-31T15:00", "2026-06-07T15:00"),
        ("UTC", "2026-06-01", "2026-06-01T00:00", "2026-06-08T00:00"),
        ("Pacific/Pago_Pago", "2026-05-25", "2026-05-25T11:00", "2026-06-01T11:00"),
        # 167 and 169 hours, and the half hour of Lord Howe.
        ("America/New_York", "2026-03-02", "2026-03-02T05:00", "2026-03-09T04:00"),
        ("America/New_York", "2025-10-27", "2025-10-27T04:00", "2025-11-03T05:00"),
        ("Europe/Berlin", "2026-03-23", "2026-03-22T23:00", "2026-03-29T22:00"),
        ("Australia/Lord_Howe", "2026-03-30", "2026-03-29T13:00", "2026-04-05T13:30"),
    ],
)
async def test_a_week_is_cut_at_the_organizations_mondays(
    weeks: Weeks, zone: str, week: str, first: str, end: str
) -> None:
    monday_ = date.fromisoformat(week)
    await weeks.partition(monday_)
    abroad = await weeks.stands("abroad", zone)
    begin, over = (datetime.fromisoformat(f"{text}Z") for text in (first, end))
    await weeks.record(
        abroad,
        [
            Done(begin - _INSTANT, milliseconds=1),
            Done(begin, milliseconds=10),
            Done(over - _INSTANT, milliseconds=100),
            Done(over, milliseconds=1000),
        ],
    )
    await weeks.store.compute(abroad, monday_)
    assert await weeks.rows(abroad) == {(monday_, ""): (2, 2, 0, 0, 110), (monday_, "pc-1"): (2, 2, 0, 0, 110)}


async def test_weeks_that_were_missed_are_made_up_for_as_far_as_their_results_are_at_hand(weeks: Weeks) -> None:
    now = datetime.now(tz=UTC)
    this = monday(now, _SEOUL)
    await weeks.record(
        weeks.organization, [Done(begins(this - timedelta(weeks=n)) + timedelta(minutes=1)) for n in range(1, 16)]
    )
    whole = {
        this - timedelta(weeks=n) for n in range(1, 16) if begins(this - timedelta(weeks=n)) >= now - timedelta(days=90)
    }
    assert len(whole) in (11, 12)
    assert await weeks.statistics.round() == len(whole)
    assert {week for week, _ in await weeks.rows(weeks.organization)} == whole
    # Nothing is due until another week is over, or was missed.
    assert await weeks.statistics.round() == 0
    gap = this - timedelta(weeks=7)
    before = await weeks.moments()
    await weeks.door.execute("DELETE FROM weekly_statistics WHERE week = $1", gap)
    assert await weeks.statistics.round() == 1
    after = await weeks.moments()
    assert {week for week in after if after[week] != before[week]} == {gap}
    # A week that the archive has begun to take is left as it was computed.
    old = min(whole) - timedelta(weeks=1)
    await weeks.door.execute("UPDATE weekly_statistics SET week = $1 WHERE week = $2", old, min(whole))
    assert await weeks.statistics.round() == 1
    assert (await weeks.rows(weeks.organization))[old, ""] == (1, 1, 0, 0, 1)


async def test_to_compute_again_counts_nothing_twice(weeks: Weeks) -> None:
    week = monday(datetime.now(tz=UTC), _SEOUL) - timedelta(weeks=1)
    done = [Done(begins(week) + timedelta(hours=n), f"pc-{n % 3}", 2 + n % 3, n) for n in range(30)]
    await weeks.record(weeks.organization, done)
    await asyncio.gather(*(weeks.store.compute(weeks.organization, week) for _ in range(4)))
    once = await weeks.rows(weeks.organization)
    assert once == counted(done, _SEOUL)
    await weeks.store.compute(weeks.organization, week)
    assert await weeks.rows(weeks.organization) == once


async def test_what_was_computed_from_an_older_look_does_not_replace_a_newer_one(weeks: Weeks) -> None:
    week = monday(datetime.now(tz=UTC), _SEOUL) - timedelta(weeks=1)
    await weeks.record(weeks.organization, [Done(begins(week))])
    await weeks.store.compute(weeks.organization, week)
    await weeks.door.execute(
        "UPDATE weekly_statistics SET computed_at = now() + interval '1 minute', execution_ms = 77"
    )
    await weeks.store.compute(weeks.organization, week)
    assert {row[-1] for row in (await weeks.rows(weeks.organization)).values()} == {77}


async def test_the_last_five_weeks_are_computed_again_once_a_day(weeks: Weeks) -> None:
    this = monday(datetime.now(tz=UTC), _SEOUL)
    middles = [begins(this - timedelta(weeks=n)) + timedelta(days=3) for n in range(1, 8)]
    await weeks.record(weeks.organization, [Done(at) for at in middles])
    await weeks.statistics.round()
    await weeks.record(weeks.organization, [Done(at, "pc-2", 4) for at in middles])
    assert await weeks.statistics.round() == 0
    await weeks.door.execute("UPDATE weekly_statistics SET computed_at = computed_at - interval '1 day'")
    assert await weeks.statistics.round() == 5
    rows = await weeks.rows(weeks.organization)
    found = [rows[this - timedelta(weeks=n), ""][0] for n in range(1, 8)]
    assert found == [2, 2, 2, 2, 2, 1, 1]
    assert await weeks.statistics.round() == 0


@pytest.mark.parametrize("taken", ["to the middle of a week", "with their partitions"])
async def test_a_week_whose_results_the_archive_took_early_stays_as_it_was_computed(weeks: Weeks, taken: str) -> None:
    this = monday(datetime.now(tz=UTC), _SEOUL)
    first = begins(this - timedelta(weeks=6))
    await weeks.record(
        weeks.organization,
        [Done(first + timedelta(hours=2 * n), f"pc-{n % 3}", 2 + n % 3, n) for n in range(6 * 7 * 12)],
    )
    assert await weeks.statistics.round() > 5
    kept = await weeks.rows(weeks.organization)
    if taken == "with their partitions":
        for row in await weeks.door.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'work_results'::regclass"
        ):
            await weeks.door.execute(f"DROP TABLE {row['name']}")
    else:
        # By a month that ended there; its partition may stand again by now, and be empty.
        await weeks.door.execute(
            "DELETE FROM work_results WHERE created_at < $1", begins(this - timedelta(weeks=2)) + timedelta(days=4)
        )
    for _ in range(2):
        await weeks.door.execute("UPDATE weekly_statistics SET computed_at = computed_at - interval '1 day'")
        assert await weeks.statistics.round() == 5
        assert await weeks.rows(weeks.organization) == kept
    if taken == "to the middle of a week":
        # A result that is accepted into a week of which nothing was taken still counts.
        await weeks.record(weeks.organization, [Done(begins(this) - _INSTANT, "late")])
        await weeks.door.execute("UPDATE weekly_statistics SET computed_at = computed_at - interval '1 day'")
        await weeks.statistics.round()
        last = this - timedelta(weeks=1)
        assert (await weeks.rows(weeks.organization))[last, ""][0] == kept[last, ""][0] + 1


async def test_an_accepted_result_counts_in_the_week_in_which_it_came(weeks: Weeks) -> None:
    """However long ago: it stands at most four weeks back, so that the weeks that are computed again hold it."""
    allocator = weeks.allocator
    slot = await allocator.slot(daily_quota=1)
    kept = []
    for _ in range(2):
        (unit,) = await allocator.take()
        await allocator.run_out(unit)
        await allocator.swept(unit)
        kept.append(unit)
    (taken,) = await allocator.take()
    assert taken.slot_id == slot.slot_id
    await allocator.submit(*(result(unit) for unit in kept))
    now = datetime.now(tz=UTC)
    came = (now - timedelta(days=9), now - timedelta(days=70))
    for unit, at in zip(kept, came, strict=True):
        await weeks.door.execute(
            "UPDATE quarantined_results SET quarantined_at = $2 WHERE allocation_key = $1",
            uuid.UUID(unit.allocation_key),
            at,
        )
    await weeks.statistics.round()
    office = await Office.of(allocator)
    await office.accept(act(), *(unit.allocation_key for unit in kept))
    await weeks.door.execute("UPDATE weekly_statistics SET computed_at = computed_at - interval '1 day'")
    await weeks.statistics.round()
    wanted = {monday(came[0], _SEOUL), monday(now - timedelta(days=28), _SEOUL)}
    assert {week for (week, client), row in (await weeks.rows(weeks.organization)).items() if client} == wanted


async def test_a_client_leaves_a_week_when_the_organization_moves(weeks: Weeks) -> None:
    week = monday(datetime.now(tz=UTC), _SEOUL) - timedelta(weeks=1)
    await weeks.record(
        weeks.organization, [Done(begins(week), "early"), Done(begins(week) + timedelta(days=3), "pc-1")]
    )
    await weeks.store.compute(weeks.organization, week)
    assert {client for _, client in await weeks.rows(weeks.organization)} == {"", "early", "pc-1"}
    await weeks.door.execute("UPDATE organizations SET time_zone = 'America/New_York'")
    await weeks.store.compute(weeks.organization, week)
    assert await weeks.rows(weeks.organization) == {(week, ""): (1, 1, 0, 0, 1), (week, "pc-1"): (1, 1, 0, 0, 1)}


async def test_nothing_is_read_beyond_the_week(weeks: Weeks) -> None:
    this = monday(datetime.now(tz=UTC), _SEOUL)
    rival = await weeks.stands("rival", "UTC")
    for organization in (weeks.organization, rival):
        await weeks.record(
            organization,
            [Done(begins(this) - timedelta(hours=n * 1.5), f"pc-{n % 3}") for n in range(1400)],
        )
    await weeks.door.execute("ANALYZE work_results")
    week = this - timedelta(weeks=6)
    statement = queries("allocator", "weekly.sql")["compute_week"]
    text = await weeks.door.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", weeks.organization, week)
    scanned, read = 0, set()
    stack = [json.loads(text)[0]["Plan"]]
    while stack:
        node = stack.pop()
        stack += node.get("Plans", ())
        # Of a bitmap's two nodes only the one on the table counts.
        if node.get("Relation Name", "").startswith("work_results") and node["Actual Loops"]:
            scanned += node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            read.add(node["Relation Name"])
    assert scanned == 7 * 16
    ends = (begins(week).astimezone(UTC), (begins(week + timedelta(days=7)) - _INSTANT).astimezone(UTC))
    assert read <= {f"work_results_{Interval.MONTH.label(end.date())}" for end in ends}


async def test_the_service_computes_what_is_due_by_itself(
    weeks: Weeks, start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    week = monday(datetime.now(tz=UTC), _SEOUL) - timedelta(weeks=1)
    await weeks.record(weeks.organization, [Done(begins(week))])
    # A replica that starts finds what was missed while none ran.
    await start_service("allocator", database=weeks.allocator.service.database)

    async def computed() -> bool:
        return (await weeks.rows(weeks.organization)).get((week, "pc-1")) == (1, 1, 0, 0, 1)

    await until(computed)
    (whole, client) = await weeks.read()
    assert (whole.week, whole.client_id, client.client_id) == (f"{week}", "", "pc-1")
    assert abs(whole.computed_at.ToDatetime(tzinfo=UTC) - datetime.now(tz=UTC)) < timedelta(minutes=1)
