"""Reports equal what the source documents' own SQL finds in the same rows, and read no more than their range."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from muster.allocator.v1 import insight_pb2, slot_pb2, work_pb2

from allocator.persona_peer import PersonaPeer
from services.call import Role
from services.postgres import queries
from tests.support import documents
from tests.support.allocator import Allocator, lease, result, until
from tests.support.services import StartService

_ZONE = "Asia/Seoul"
_FLAGS = ("cart_click", "block_mercury", "block_image_cdn", "block_img1a_cdn", "block_thumbnail_cdn")


@pytest.fixture
async def allocator(start_service: StartService) -> AsyncIterator[Allocator]:
    """One whose days begin in Seoul, with the back door open there."""
    service = await start_service("allocator", leases={"sweep_seconds": 60})
    for role in (Role.OPERATOR, Role.WORKER):
        await service.key(role, time_zone=_ZONE)
    allocator = await Allocator.of(service)
    await allocator.totals()
    door = allocator.door = await allocator.connect()
    await door.execute(f"SET timezone = '{_ZONE}'")
    yield allocator
    await door.close()


def _door(allocator: Allocator) -> asyncpg.Connection[asyncpg.Record]:
    assert allocator.door is not None
    return allocator.door


async def _documents(allocator: Allocator, *, as_if_midnight: bool = False) -> None:
    """Makes the documents' views, over times as they are or moved on until it is midnight."""
    organization = await allocator.service.organization_id()
    shift = documents.AS_IF_MIDNIGHT if as_if_midnight else "interval '0'"
    await _door(allocator).execute(documents.VIEWS.format(organization=organization, shift=shift))


async def _fill(allocator: Allocator, seed: int) -> None:
    """Writes hundreds of results, some at the very borders of the reports, and the same for another organization."""
    chance = random.Random(seed)
    door = _door(allocator)
    now = await door.fetchval("SELECT now()")
    midnight = await door.fetchval("SELECT CURRENT_DATE::timestamptz")
    instant = timedelta(microseconds=1)
    borders = [
        *(midnight - timedelta(days=7) + step for step in (-instant, timedelta(0), instant)),
        *(midnight + step for step in (-instant, timedelta(0), instant)),
        *(now - timedelta(hours=1) + timedelta(seconds=30) * side for side in (-1, 1)),
    ]
    for name in ("acme", "rival"):
        organization = await allocator.service.organization_id(name)
        for number in range(6):
            await door.execute(
                "INSERT INTO clients (organization_id, client_id, client_name, client_ip) VALUES ($1, $2, $3, '::1')",
                organization,
                f"pc-{number}",
                f"machine {number}",
            )
        results, activity = [], []
        for _ in range(600):
            at = chance.choice(borders) if chance.random() < 0.2 else now - timedelta(days=9) * chance.random() ** 4
            outcome = chance.choice((2, 2, 2, 3, 4))
            client, instance = f"pc-{chance.randrange(6)}", chance.randrange(4)
            settings = {flag: chance.random() < 0.3 for flag in _FLAGS if chance.random() < 0.97}
            if chance.random() < 0.5:
                settings["scroll"] = chance.random() < 0.5
            key, milliseconds = uuid.uuid4(), chance.randrange(100_000)
            block = chance.choice(("captcha", "403", "429")) if outcome == 4 else ""
            results.append(
                (organization, at, key, client, instance, outcome, block, milliseconds, json.dumps(settings))
            )
            if at > now - timedelta(days=6):
                folder = chance.randrange(3)
                activity.append((organization, at, key, client, instance, folder, milliseconds, outcome))
        await door.executemany(
            """INSERT INTO work_results (organization_id, created_at, allocation_key, work_date, slot_id, client_id,
              client_ip, instance_number, outcome, is_blocked, block_type, execution_time_ms, applied_settings, exit_ip,
              error_message, persona_used, product_count, late, target)
            VALUES ($1, $2, $3, CURRENT_DATE, gen_random_uuid(), $4, '::1', $5, $6, $6::smallint = 4, $7, $8, $9,
              '', '', false, 0, false, CASE WHEN $5 = 0 THEN 'shop' ELSE '' END)""",
            results,
        )
        await door.executemany(
            """INSERT INTO client_activity_logs (organization_id, reported_at, allocation_key, client_id, client_ip,
              instance_number, user_folder_number, execution_time_ms, status)
            VALUES ($1, $2, $3, $4, '::1', $5, $6, $7, $8)""",
            activity,
        )


async def _ask(allocator: Allocator, method: str, **values: Any) -> Any:
    request = getattr(insight_pb2, f"{method}Request")(**values)
    return await getattr(allocator.insight, method)(request, metadata=allocator.operator)


@pytest.mark.parametrize("seed", range(3))
async def test_days_and_settings_equal_the_documents_sql(allocator: Allocator, seed: int) -> None:
    await _fill(allocator, seed)
    await _documents(allocator)
    door = _door(allocator)

    theirs = {tuple(row.values()) for row in await door.fetch(documents.CLIENT_PERFORMANCE)}
    clients = (await _ask(allocator, "GetClientPerformance")).clients
    assert clients
    assert {client.client_ip for client in clients} == {"::1"}
    ours = {(one.client_id, one.client_name, one.active_instances, one.tasks, one.succeeded) for one in clients}
    assert ours == {(*row[:4], row[5]) for row in theirs}
    means = {row[0]: float(row[4]) for row in theirs}
    assert {one.client_id: one.mean_execution_ms for one in clients} == pytest.approx(means)
    assert [one.tasks for one in clients] == sorted((one.tasks for one in clients), reverse=True)

    groups = (await _ask(allocator, "GetSettingsEffect", settings=_FLAGS)).groups
    rows = await door.fetch(documents.SETTINGS_EFFECT)
    assert len(rows) > 3
    found = {
        tuple(group.settings[flag].bool_value if flag in group.settings else None for flag in _FLAGS): group
        for group in groups
    }
    assert len(found) == len(groups) == len(rows)
    for row in rows:
        group = found[tuple(row.values())[:5]]
        assert group.results == row["total"]
        assert group.mean_execution_ms == pytest.approx(float(row["avg_time"]))
        assert group.success_rate * 100 == pytest.approx(float(row["success_rate"]))
        assert 0 <= group.rate_low < group.success_rate < group.rate_high <= 1 or group.success_rate in (0, 1)
    rates = [group.success_rate for group in groups]
    assert rates == sorted(rates, reverse=True)
    # All settings tell groups apart unless some are named; a target leaves the others out.
    every = (await _ask(allocator, "GetSettingsEffect")).groups
    assert any("scroll" in group.settings for group in every)
    (shop,) = (await _ask(allocator, "GetSettingsEffect", settings=["none"], target="shop")).groups
    (count,) = await allocator.sql(
        "SELECT count(*) FROM work_results WHERE target = 'shop' AND organization_id = $1 "
        "AND created_at >= CURRENT_DATE - interval '7 days'",
        await allocator.service.organization_id(),
    )
    assert (shop.results, dict(shop.settings)) == (count[0], {})


@pytest.mark.parametrize("seed", range(3))
async def test_the_last_hour_equals_the_documents_sql(allocator: Allocator, seed: int) -> None:
    await _fill(allocator, seed)
    await _documents(allocator, as_if_midnight=True)
    door = _door(allocator)
    rows = await door.fetch(documents.BLOCKS)
    blocks = (await _ask(allocator, "GetBlockReport")).blocks
    assert {(one.block_type, one.count, one.affected_clients) for one in blocks} == {tuple(row) for row in rows}
    assert [one.count for one in blocks] == sorted((one.count for one in blocks), reverse=True)
    seen = 0
    for number in range(7):
        client = f"pc-{number}"
        ours = (await _ask(allocator, "GetClientActivity", client_id=client)).clients
        theirs = await door.fetch(documents.CLIENT_ACTIVITY, client)
        assert [(one.client_id, one.instances_used, one.folders_used) for one in ours] == [
            (row["client_ip"], row["instances_used"], row["folders_used"]) for row in theirs
        ]
        if ours:
            seen += ours[0].reports
            newest = await door.fetchval(
                "SELECT max(reported_at) FROM client_activity_logs WHERE organization_id = $1 AND client_id = $2",
                await allocator.service.organization_id(),
                client,
            )
            assert ours[0].last_activity.ToDatetime(tzinfo=UTC) == newest
    together = (await _ask(allocator, "GetClientActivity", client_ip="0:0::1")).clients
    assert sum(one.reports for one in together) == seen > 0


async def test_the_dashboard_equals_the_documents_sql(allocator: Allocator) -> None:
    await _documents(allocator)
    slots = [await allocator.slot(keyword=f"k{number}", daily_quota=2 + number % 5) for number in range(12)]
    await allocator.slot(keyword="tomorrow", start_date="2099-01-01")
    units = await allocator.take(20)
    await allocator.submit(*(result(unit, 1 + number % 3) for number, unit in enumerate(units[:15])))
    rows: list[insight_pb2.DashboardRow] = []
    token = ""
    while True:
        page = await _ask(allocator, "GetDashboard", page_size=5, page_token=token)
        rows += page.rows
        if not (token := page.next_page_token):
            break
    theirs = await _door(allocator).fetch(documents.TODAYS_WORK)
    assert [row.completion_rate for row in rows] == [row["completion_rate"] for row in theirs]
    names = ("quota", "allocated", "succeeded", "failed", "blocked", "expired", "released")
    assert {(row.slot_id, row.keyword, *(getattr(row.tracking, name) for name in names)) for row in rows} == {
        (str(row["slot_id"]), row["keyword"], *(row[name] for name in names)) for row in theirs
    }
    assert {row.slot_id for row in rows} == {slot.slot_id for slot in slots}
    assert sum(row.tracking.succeeded + row.tracking.failed + row.tracking.blocked for row in rows) == 15


async def test_a_result_shows_at_once_on_the_replica_that_took_it(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=4)
    for count in range(1, 4):
        (unit,) = await allocator.take()
        settings = {"depth": work_pb2.SettingValue(int_value=2)}
        await allocator.submit(result(unit, 3, applied_settings=settings))
        assert (await _ask(allocator, "GetDashboard")).rows[0].completion_rate == count / 4
        assert (await _ask(allocator, "GetClientPerformance")).clients[0].tasks == count
        assert (await _ask(allocator, "GetBlockReport")).blocks[0].count == count
        assert (await _ask(allocator, "GetClientActivity", client_id="pc-1")).clients[0].reports == count
        assert (await allocator.totals()).today.blocked == count


async def test_units_show_at_once_on_the_replica_that_hands_them_out_and_ends_them(start_service: StartService) -> None:
    allocator = await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 0.02}))
    await allocator.slot(daily_quota=10)

    async def counters() -> tuple[int, int, int]:
        tracking = (await _ask(allocator, "GetDashboard")).rows[0].tracking
        return tracking.allocated, tracking.released, tracking.expired

    assert await counters() == (0, 0, 0)
    units = await allocator.take(5)
    assert await counters() == (5, 0, 0)
    await allocator.release(lease(units[0]))
    assert await counters() == (5, 1, 0)
    await allocator.take(1, client="pc-2")
    await allocator.heartbeat("pc-2", goodbye=True)
    assert await counters() == (6, 2, 0)
    await allocator.run_out(units[1])

    async def shows() -> bool:
        return await counters() == (6, 2, 1)

    # It has ended in the database a moment before the replica takes note.
    await until(shows)


async def test_units_that_are_taken_back_show_at_once(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = await Allocator.of(await start_service("allocator"))
    await allocator.slot(persona=slot_pb2.PersonaNeed(region="kr"))
    seen = []

    async def allocated() -> int:
        rows = (await _ask(allocator, "GetDashboard")).rows
        return int(rows[0].tracking.allocated)

    async def none_idle(_: PersonaPeer, organization: uuid.UUID, needs: Sequence[Any], seconds: float) -> list[None]:
        seen.append(await allocated())
        return [None] * len(needs)

    monkeypatch.setattr(PersonaPeer, "check_out", none_idle)
    assert not (await allocator.ask(3)).allocations
    assert set(seen) == {3}
    assert await allocated() == 0


async def test_a_report_is_kept_while_nothing_is_written_here(allocator: Allocator) -> None:
    await _fill(allocator, 1)
    first = await _ask(allocator, "GetSettingsEffect")
    # As another replica would.
    await allocator.sql("DELETE FROM work_results")
    assert await _ask(allocator, "GetSettingsEffect") == first
    assert not (await _ask(allocator, "GetSettingsEffect", target="shop")).groups


async def test_settings_keep_their_types(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=100)
    settings = {
        "flag": work_pb2.SettingValue(bool_value=True),
        "depth": work_pb2.SettingValue(int_value=-(2**63)),
        "ratio": work_pb2.SettingValue(double_value=2.0),
        "huge": work_pb2.SettingValue(double_value=1e300),
        "name": work_pb2.SettingValue(string_value="x"),
    }
    units = await allocator.take(10)
    await allocator.submit(
        *(result(unit, 1 if number else 2, applied_settings=settings) for number, unit in enumerate(units))
    )
    (group,) = (await _ask(allocator, "GetSettingsEffect")).groups
    assert dict(group.settings) == settings
    assert (group.results, group.succeeded, group.success_rate, group.mean_execution_ms) == (10, 9, 0.9, 2000.0)
    # As Wilson's paper and every calculator have it for 9 of 10.
    assert (group.rate_low, group.rate_high) == pytest.approx((0.5958, 0.9821), abs=1e-4)


@pytest.mark.parametrize(
    ("method", "values", "field"),
    [
        ("GetClientPerformance", {"work_date": "20-01-01"}, "work_date"),
        ("GetSettingsEffect", {"settings": ["a"] * 2}, "settings"),
        ("GetSettingsEffect", {"settings": [""]}, r"settings\[0\]"),
        ("GetSettingsEffect", {"settings": [str(n) for n in range(17)]}, "settings"),
        ("GetSettingsEffect", {"target": "t" * 129}, "target"),
        ("GetClientActivity", {}, "client_id"),
        ("GetClientActivity", {"client_id": "a b"}, "client_id"),
        ("GetClientActivity", {"client_ip": "nowhere"}, "client_ip"),
        ("GetDashboard", {"page_size": 1001}, "page_size"),
    ],
)
async def test_bad_questions_are_refused(allocator: Allocator, method: str, values: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
        await _ask(allocator, method, **values)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_reports_read_only_their_range(allocator: Allocator) -> None:
    await _fill(allocator, 2)
    door = _door(allocator)
    organization = await allocator.service.organization_id()
    # Old rows that no report is about: results from the day the month before began, as that partition always stands.
    await door.execute(
        """INSERT INTO work_results SELECT organization_id, date_trunc('month', now() - interval '1 month', 'UTC'),
          gen_random_uuid(), work_date, slot_id, exit_id, persona_id, client_id, client_ip, instance_number, outcome,
          is_blocked, block_type, execution_time_ms, applied_settings, exit_ip, retry_after_ms, error_message,
          persona_used, product_count, late, traceparent, target, exit_signal
        FROM work_results, generate_series(1, 20)"""
    )
    await door.execute(
        """INSERT INTO client_activity_logs SELECT organization_id, now() - interval '5 days', gen_random_uuid(),
          client_id, client_ip, instance_number, user_folder_number, execution_time_ms, status
        FROM client_activity_logs, generate_series(1, 20)"""
    )
    # As the service has it: a partition that has only just begun is small enough to be read whole.
    await door.execute("SET enable_seqscan = off")
    await door.execute("ANALYZE")
    reports = queries("allocator", "reports.sql")
    today = await door.fetchval("SELECT CURRENT_DATE")
    cases: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
        ("client_performance", (today, 1000), "client_activity_logs", "reported_at >= CURRENT_DATE"),
        ("settings_effect", ([], None, 1000), "work_results", "created_at >= CURRENT_DATE - interval '7 days'"),
        ("block_report", (1000,), "work_results", "created_at >= now() - interval '1 hour'"),
        ("client_activity", ("pc-1", None, 1000), "client_activity_logs", "reported_at >= now() - interval '1 hour'"),
    )
    for name, arguments, table, range_ in cases:
        text = await door.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) {reports[name]}", organization, *arguments
        )
        in_range = await door.fetchval(
            f"SELECT count(*) FROM {table} WHERE organization_id = $1 AND {range_}", organization
        )
        scanned = 0
        stack = [json.loads(text)[0]["Plan"]]
        while stack:
            node = stack.pop()
            stack += node.get("Plans", ())
            # Of a bitmap's two nodes only the one on the table counts.
            if node.get("Relation Name", "").startswith(table) and node["Actual Loops"]:
                scanned += node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        assert scanned <= in_range + 10, (name, scanned, in_range)


async def test_two_clients_behind_one_address_are_two(allocator: Allocator) -> None:
    await allocator.slot(daily_quota=10)
    for client in ("pc-1", "pc-2"):
        units = await allocator.take(2, client=client)
        await allocator.submit(*(result(unit) for unit in units), client=client)
    clients = (await _ask(allocator, "GetClientPerformance")).clients
    assert [(one.client_id, one.tasks) for one in clients] == [("pc-1", 2), ("pc-2", 2)]
    day = datetime.now(tz=UTC) + timedelta(days=3)
    assert not (await _ask(allocator, "GetClientPerformance", work_date=f"{day:%Y-%m-%d}")).clients
