"""Slots of the allocator: their days, their pauses, their lists, and intake by an external site."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import date, timedelta
from typing import Any

import grpc
import pytest
from muster.allocator.v1 import slot_pb2, work_pb2

from services.postgres import queries
from tests.support.allocator import Allocator, spec, until
from tests.support.services import StartService

_SQL = queries("allocator", "slots.sql")


@pytest.fixture
async def allocator(start_service: StartService) -> Allocator:
    """One that is left in peace by its sweep."""
    return await Allocator.of(await start_service("allocator", leases={"sweep_seconds": 60}))


async def rows_of_days(allocator: Allocator, slot_id: str) -> list[dict[str, Any]]:
    """Returns a slot's rows by day."""
    rows = await allocator.sql(
        """SELECT t.work_date, t.quota, t.active, t.open_at, t.paced_from IS NOT NULL AS paced, c.target, c.priority,
          c.exit_region, c.without_exit
        FROM daily_work_tracking t JOIN slot_classes c USING (class_id) WHERE slot_id = $1 ORDER BY work_date""",
        uuid.UUID(slot_id),
    )
    return [dict(row) for row in rows]


async def today(allocator: Allocator) -> date:
    """Returns the database's day in UTC, the organization's time zone."""
    day: date = (await allocator.sql("SELECT (now() AT TIME ZONE 'UTC')::date AS day"))[0]["day"]
    return day


async def history(allocator: Allocator, slot_id: str) -> list[slot_pb2.SlotChange]:
    """Returns a slot's changes, the oldest first."""
    request = slot_pb2.ListSlotHistoryRequest(slot_id=slot_id)
    found = await allocator.slots.ListSlotHistory(request, metadata=allocator.operator)
    return list(reversed(found.changes))


async def test_pacing_and_the_exits_wish_are_kept_and_are_part_of_the_class(allocator: Allocator) -> None:
    slot = await allocator.slot(without_exit=False, pacing=slot_pb2.PACING_EVEN, exit_region="kr", target="shop")
    assert (slot.spec.pacing, slot.spec.exit_region) == (slot_pb2.PACING_EVEN, "kr")
    (row,) = await rows_of_days(allocator, slot.slot_id)
    assert (row["paced"], row["exit_region"], row["target"]) == (True, "kr", "shop")
    assert row["open_at"] is not None
    plain = await allocator.slot()
    assert plain.spec.pacing == slot_pb2.PACING_ASAP
    (row,) = await rows_of_days(allocator, plain.slot_id)
    assert (row["paced"], row["exit_region"], row["without_exit"]) == (False, "", True)


async def test_a_slot_has_its_row_of_today_from_its_creation_unless_it_gets_no_work_today(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=7)
    (row,) = await rows_of_days(allocator, slot.slot_id)
    assert (row["work_date"], row["quota"], row["active"]) == (await today(allocator), 7, True)
    # Nothing was allocated, so callers see no counters yet.
    assert not slot.HasField("today")
    assert not await rows_of_days(allocator, (await allocator.slot(is_active=False)).slot_id)
    assert not await rows_of_days(allocator, (await allocator.slot(end_date="2020-12-31")).slot_id)


async def test_todays_and_later_rows_follow_every_change(allocator: Allocator) -> None:
    slot = await allocator.slot(daily_quota=5)
    day = await today(allocator)
    tomorrow, after = day + timedelta(days=1), day + timedelta(days=2)
    # Tomorrow is made ahead; of the day after nothing is made yet.
    await allocator.sql("UPDATE tracked_days SET complete = true WHERE work_date = $1", tomorrow)
    await allocator.sql("INSERT INTO tracked_days SELECT organization_id, $1 FROM organizations", after)
    await allocator.sql("SELECT track_slots(organization_id, $1, $2) FROM organizations", tomorrow, [
        uuid.UUID(slot.slot_id)
    ])  # fmt: skip
    await allocator.update(slot.slot_id, daily_quota=9, priority=3, target="shop", pacing=slot_pb2.PACING_EVEN)
    rows = await rows_of_days(allocator, slot.slot_id)
    assert [(row["work_date"], row["quota"], row["priority"], row["target"], row["paced"]) for row in rows] == [
        (day, 9, 3, "shop", True),
        (tomorrow, 9, 3, "shop", True),
    ]
    # A slot made now has tomorrow's row as well, since nobody will look for it again.
    made = await allocator.slot()
    assert [row["work_date"] for row in await rows_of_days(allocator, made.slot_id)] == [day, tomorrow]
    await allocator.update(slot.slot_id, end_date=day.isoformat())
    assert [row["active"] for row in await rows_of_days(allocator, slot.slot_id)] == [True, False]
    await allocator.update(slot.slot_id, start_date=tomorrow.isoformat(), end_date=tomorrow.isoformat())
    assert [row["active"] for row in await rows_of_days(allocator, slot.slot_id)] == [False, True]


async def test_days_made_twice_at_once_have_one_row(allocator: Allocator) -> None:
    ids = [uuid.UUID((await allocator.slot(daily_quota=7)).slot_id) for _ in range(3)]
    await allocator.sql("DELETE FROM daily_work_tracking")
    arguments = (await allocator.service.organization_id(), await today(allocator), ids)
    first, second = await allocator.connect(), await allocator.connect()
    try:
        transaction = first.transaction()
        await transaction.start()
        await first.execute("SELECT track_slots($1, $2, $3)", *arguments)
        waiting = asyncio.create_task(second.execute("SELECT track_slots($1, $2, $3)", *arguments))
        await until(allocator.waits_for_a_lock)
        await first.execute("UPDATE work_slots SET daily_quota = 9 WHERE slot_id = $1", ids[0])
        await transaction.commit()
        await waiting
    finally:
        await first.close()
        await second.close()
    rows = await allocator.sql("SELECT slot_id, quota FROM daily_work_tracking ORDER BY slot_id")
    assert [(row["slot_id"], row["quota"]) for row in rows] == [(ids[0], 9), (ids[1], 7), (ids[2], 7)]


@pytest.mark.parametrize("change", ["create", "resume"])
async def test_no_slot_slips_between_the_making_of_a_day_and_its_own_commit(allocator: Allocator, change: str) -> None:
    standing = await allocator.slot(is_active=False)
    tomorrow = await today(allocator) + timedelta(days=1)
    maker = await allocator.connect()
    transaction = maker.transaction()
    await transaction.start()
    await maker.execute("SELECT FROM tracked_days WHERE work_date = $1 FOR UPDATE", tomorrow)
    # The maker looks at the slots, and does not see the one in hand.
    await maker.execute("UPDATE tracked_days SET complete = true WHERE work_date = $1", tomorrow)
    if change == "create":
        waiting = asyncio.create_task(allocator.slot())
    else:
        request = slot_pb2.ResumeSlotRequest(slot_id=standing.slot_id)
        call = allocator.slots.ResumeSlot(request, metadata=allocator.operator)
        waiting = asyncio.create_task(_slot_of(call))

    async def held_up() -> bool:
        blocked = await allocator.sql(
            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%allocator.%_days%'"
        )
        return bool(blocked)

    await until(held_up)
    assert not waiting.done()
    await transaction.commit()
    await maker.close()
    slot = await waiting
    assert tomorrow in [row["work_date"] for row in await rows_of_days(allocator, slot.slot_id)]


async def _slot_of(call: Any) -> slot_pb2.Slot:
    slot: slot_pb2.Slot = (await call).slot
    return slot


async def test_a_pause_and_a_resume_leave_history_and_repeating_them_does_not(allocator: Allocator) -> None:
    slot = await allocator.slot()
    taken = await allocator.take(1)
    pause = slot_pb2.PauseSlotRequest(slot_id=slot.slot_id, reason="holiday")
    resume = slot_pb2.ResumeSlotRequest(slot_id=slot.slot_id, reason="back")
    paused = (await allocator.slots.PauseSlot(pause, metadata=allocator.operator)).slot
    assert not paused.spec.is_active
    assert (await allocator.slots.PauseSlot(pause, metadata=allocator.operator)).slot == paused
    assert (await rows_of_days(allocator, slot.slot_id))[0]["open_at"] is None
    assert (await allocator.ask()).no_work.blocker == work_pb2.BLOCKER_KIND_SLOT_INACTIVE
    # The live lease goes on.
    (renewed,) = await allocator.renew(
        *(work_pb2.Lease(allocation_key=one.allocation_key, lease_token=one.lease_token) for one in taken)
    )
    assert renewed.HasField("expires_at")
    resumed = (await allocator.slots.ResumeSlot(resume, metadata=allocator.operator)).slot
    assert resumed.spec.is_active
    assert resumed.etag != slot.etag
    await allocator.take(1)
    first, second = await history(allocator, slot.slot_id)
    assert json.loads(first.difference_json) == {"is_active": [True, False]}
    assert json.loads(second.difference_json) == {"is_active": [False, True]}
    assert (first.reason, second.reason) == ("holiday", "back")
    assert uuid.UUID(first.actor) == uuid.UUID(second.actor)
    assert first.changed_at.ToDatetime() < second.changed_at.ToDatetime()
    missing = slot_pb2.PauseSlotRequest(slot_id=str(uuid.uuid4()))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocator.slots.PauseSlot(missing, metadata=allocator.operator)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"exit_provider": "nobody"}, "spec.exit_provider"),
        ({"without_exit": True, "exit_region": "kr"}, "spec.exit_region"),
        ({"exit_region": "k" * 65}, "spec.exit_region"),
        ({"pacing": 7}, "spec.pacing"),
    ],
)
async def test_what_no_slot_can_have_is_refused_by_field_and_changes_nothing(
    allocator: Allocator, values: dict[str, Any], field: str
) -> None:
    slot = await allocator.slot(without_exit=values.get("without_exit", False))
    changes = {name: value for name, value in values.items() if name != "without_exit"}
    for attempt in (allocator.slot(**{"without_exit": False, **values}), allocator.update(slot.slot_id, **changes)):
        with pytest.raises(grpc.aio.AioRpcError, match=field) as refused:
            await attempt
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (count,) = await allocator.sql("SELECT count(*), max(version) AS version FROM work_slots")
    assert (count["count"], count["version"]) == (1, 1)
    assert not await history(allocator, slot.slot_id)


async def test_lists_are_filtered_by_all_that_is_named_and_page_on(allocator: Allocator) -> None:
    for number in range(6):
        await allocator.slot(
            keyword=f"k{number}", code=f"c{number % 2}", target="t" * (number % 3), external_id=f"e{number}"
        )

    async def keywords(**values: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = slot_pb2.ListSlotsRequest(page_size=2, page_token=token, **values)
            page = await allocator.slots.ListSlots(request, metadata=allocator.operator)
            found += [slot.spec.keyword for slot in page.slots]
            token = page.next_page_token
            if not token:
                return found

    assert await keywords(code="c1") == ["k1", "k3", "k5"]
    assert await keywords(code="c1", target="t") == ["k1"]
    assert await keywords(external_id="e4") == ["k4"]
    assert await keywords(external_id="e4", code="c1") == []
    assert await keywords(external_id="nobody") == []
    assert await keywords(code="c0", keyword_prefix="k4", is_active=True) == ["k4"]


async def test_a_page_of_slots_ends_before_it_is_more_than_a_message_holds(allocator: Allocator) -> None:
    settings = {f"s{n}": work_pb2.SettingValue(string_value="x" * 1000) for n in range(15)}
    slot = await allocator.slot(settings=settings)
    await allocator.sql(
        """INSERT INTO work_slots (slot_id, organization_id, keyword, code, target, start_date, end_date, daily_quota,
          settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), organization_id, keyword, code, target, start_date, end_date, daily_quota, settings,
          is_active, priority, weight, without_exit, spec_sha256, class_id FROM work_slots, generate_series(1, 500)"""
    )
    sizes, found, token = [], set(), ""
    while True:
        request = slot_pb2.ListSlotsRequest(page_size=1000, page_token=token)
        page = await allocator.slots.ListSlots(request, metadata=allocator.operator)
        sizes.append(page.ByteSize())
        found |= {slot.slot_id for slot in page.slots}
        token = page.next_page_token
        if not token:
            break
    assert len(found) == 501
    assert slot.slot_id in found
    assert len(sizes) > 1
    # What a gRPC client of any language takes by default.
    assert max(sizes) < 4 * 2**20


async def test_a_setting_of_another_type_is_another_slot(allocator: Allocator) -> None:
    one = {"n": work_pb2.SettingValue(int_value=1)}
    slot = await allocator.slot(external_id="site-1", settings=one)
    assert (await allocator.slot(external_id="site-1", settings=one)).slot_id == slot.slot_id
    for other in (work_pb2.SettingValue(bool_value=True), work_pb2.SettingValue(double_value=1.0)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await allocator.slot(external_id="site-1", settings={"n": other})
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_lists_by_code_and_external_id_read_only_their_rows(allocator: Allocator) -> None:
    organization_id = await allocator.service.organization_id()
    await allocator.slot()
    await allocator.sql(
        """INSERT INTO work_slots (slot_id, organization_id, external_id, keyword, code, target, start_date, end_date,
          daily_quota, settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), $1, 'e' || n, 'k', 'c' || n / 2, '', '2020-01-01', '2099-12-31', 1, '{}', true, 0, 1,
          true, decode(repeat('00', 32), 'hex'), 1 FROM generate_series(1, 50000) n""",
        organization_id,
    )
    await allocator.sql("ANALYZE work_slots")
    cases = (
        ("page_of_slots_by_code", "work_slots_code", ["c7"]),
        ("page_of_slots_by_external_id", "work_slots_external_id", ["e7", ""]),
    )
    connection = await allocator.connect()
    try:
        # The plan that any values get, as a connection takes it after some calls.
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        for name, index, key in cases:
            statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {_SQL[name]}"
            arguments = (organization_id, None, 100, "", None, "", *key)
            plan = json.loads(await connection.fetchval(statement, *arguments))[0]["Plan"]
            text = json.dumps(plan)
            assert index in text, text
            assert "Seq Scan" not in text, text
            assert _scanned(plan) <= 4
    finally:
        await connection.close()


async def test_many_slots_are_read_by_look_ups_also_before_their_tables_were_analyzed(allocator: Allocator) -> None:
    organization_id = await allocator.service.organization_id()
    await allocator.slot()
    rows = await allocator.sql(
        """INSERT INTO work_slots (slot_id, organization_id, external_id, keyword, code, target, start_date, end_date,
          daily_quota, settings, is_active, priority, weight, without_exit, spec_sha256, class_id)
        SELECT gen_random_uuid(), $1, 'e' || n, 'k', '', '', '2020-01-01', '2099-12-31', 1, '{}', true, 0, 1, true,
          decode(repeat('00', 32), 'hex'), 1 FROM generate_series(1, 3000) n RETURNING slot_id""",
        organization_id,
    )
    ids = [row["slot_id"] for row in rows]
    await allocator.sql("SELECT track_slots($1, $2, $3)", organization_id, await today(allocator), ids)
    connection = await allocator.connect()
    try:
        for name, keys in (("slots_by_id", ids[:100]), ("slots_by_external_id", [f"e{n}" for n in range(1, 101)])):
            statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {_SQL[name]}"
            plan = json.loads(await connection.fetchval(statement, organization_id, keys))[0]["Plan"]
            assert _scanned(plan) <= 100, json.dumps(plan)
    finally:
        await connection.close()


def _scanned(plan: dict[str, Any]) -> int:
    own = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
    return int(max([own, *(_scanned(child) for child in plan.get("Plans", ()))]))


async def test_an_external_sites_intake_makes_one_slot_however_often_and_at_once_it_comes(allocator: Allocator) -> None:
    async def intake(request_id: str, **values: Any) -> str:
        request = slot_pb2.CreateSlotRequest(request_id=request_id, spec=spec(without_exit=True, **values))
        return (await allocator.slots.CreateSlot(request, metadata=allocator.operator)).slot.slot_id

    # One call each, as from many processes of the site.
    made = await asyncio.gather(*(intake(str(uuid.uuid4()), external_id="site-1") for _ in range(24)))
    assert len(set(made)) == 1
    # One call repeated before its answer came.
    request_id = str(uuid.uuid4())
    made = await asyncio.gather(*(intake(request_id) for _ in range(12)))
    assert len(set(made)) == 1
    # Different contents under one id: one stands, and every other is told which.
    outcomes = await asyncio.gather(
        *(intake(str(uuid.uuid4()), external_id="site-2", daily_quota=quota) for quota in range(1, 9)),
        return_exceptions=True,
    )
    (stands,) = [one for one in outcomes if isinstance(one, str)]
    refused = [one for one in outcomes if isinstance(one, grpc.aio.AioRpcError)]
    assert len(refused) == 7
    assert {one.code() for one in refused} == {grpc.StatusCode.ALREADY_EXISTS}
    assert await intake(str(uuid.uuid4()), external_id="site-2", daily_quota=await _quota(allocator, stands)) == stands
    (row,) = await allocator.sql("SELECT count(*) FROM work_slots")
    assert row["count"] == 3
    (row,) = await allocator.sql("SELECT count(*) FROM daily_work_tracking")
    assert row["count"] == 3


async def _quota(allocator: Allocator, slot_id: str) -> int:
    found = await allocator.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot_id), metadata=allocator.operator)
    return found.slot.spec.daily_quota


async def test_every_change_leaves_who_when_and_the_difference_and_pages(allocator: Allocator) -> None:
    slot = await allocator.slot(without_exit=False)
    await allocator.update(slot.slot_id, "first", exit_region="kr")
    await allocator.update(slot.slot_id, "second", pacing=slot_pb2.PACING_EVEN, weight=4)
    await allocator.update(slot.slot_id, "nothing", weight=4)
    changes = await history(allocator, slot.slot_id)
    assert [json.loads(change.difference_json) for change in changes] == [
        {"exit_region": ["", "kr"]},
        {"pacing": ["asap", "even"], "weight": [1, 4]},
    ]
    assert [change.reason for change in changes] == ["first", "second"]
    request = slot_pb2.ListSlotHistoryRequest(slot_id=slot.slot_id, page_size=1)
    page = await allocator.slots.ListSlotHistory(request, metadata=allocator.operator)
    request.page_token = page.next_page_token
    rest = await allocator.slots.ListSlotHistory(request, metadata=allocator.operator)
    assert [page.changes[0].reason, rest.changes[0].reason] == ["second", "first"]
